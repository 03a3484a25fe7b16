"""A split's reasons in words: why it is as it is, who is left out, what is missing. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from peer.planning import coarse, costs, halda
from peer.planning.costs import Able, Problem, Size
from peer.planning.halda import Ring, Wanted
from peer.planning.plan import PlanWindow, Split
from peer.planning.profile import ModelShape, Profile, engine_name
from peer.planning.wishes import Wishes

_FORCED_MAX = 6  # peers of a ring for which it is reckoned out what one more would do


def told_apart(profiles: Sequence[Profile]) -> list[Profile]:
    """Two machines of one name get the beginnings of their peer ids after it, as on the screen."""
    names = [profile.name for profile in profiles]
    return [
        replace(p, name=f"{p.name[:9]} {p.peer_id[:4]}") if names.count(p.name) > 1 else p
        for p in profiles
    ]


def chosen(of: Problem, ring: Ring, context_wanted: int) -> str:
    """The split in words."""
    shape, size, forecast = of.shape, of.size, ring.forecast
    if len(ring.order) == 1:
        text = f"{of.peers[ring.order[0]].profile.name} runs all {shape.layers} layers"
    else:
        text = f"{len(ring.order)} peers share {shape.layers} layers"
        if ring.rounds > 1:
            text += f" in {ring.rounds} rounds"
    text += f", a token in {seconds(forecast.tpot_s)} by the speeds that are known"
    if not all(peer.measured for peer in forecast.peers):
        text = text.replace("by the speeds that are known", "as far as is known without measuring")
    if streamed := sum(part.streamed_bytes for part in ring.parts):
        text += f"; {mib(streamed)} do not stay in memory and are read from disk for each token"
    if size.context < context_wanted:
        text += f"; the context is {size.context} tokens, not {context_wanted}, for want of memory"
    elif size.kv_cells < min(8 * size.context, 32768):
        text += f"; {size.kv_cells} tokens of KV cache for all answers, for want of memory"
    return text


def engines(of: Problem, ring: Ring) -> str:
    """Whose engine computes with rounded weights, in words that follow others, or ""."""
    said = ""
    for able in (of.peers[at] for at in ring.order):
        fit = of.shape.fit(able.backend, able.profile.weights)
        if fit and fit.how == "approximate":
            name = engine_name(fit.backend)
            said += f"; {name} on {able.profile.name} is approximate: {fit.why}"
    return said[:600]


def left_out(
    profile: Profile, ring_of: Sequence[Profile], of: Problem, ring: Ring, wishes: Wishes
) -> str:
    """Why a peer that could take part has no window. ring_of: those that have one."""
    shape, name = of.shape, profile.name
    if shape.whole_why:
        return f"{shape.model} must stay whole: {shape.whole_why}"
    smaller = costs.problem(sorted([*ring_of, profile], key=lambda p: p.peer_id), shape, of.size)
    able = next(a for a in smaller.peers if a.peer_id == profile.peer_id)
    least, has = least_bytes(smaller, able), max(able.ram_bytes, able.gpu_bytes)
    if least > has:
        return f"{name} has {mib(has)} free and the smallest window needs {mib(least)}"
    latency = wishes.objective == "latency"
    if latency and len(ring_of) < _FORCED_MAX and not coarse.needed(smaller):
        forced = halda.solve(smaller, Wanted(everyone=True))
        if forced is not None and forced.broken:
            links = _pairs(broken_links(smaller, forced))
            return f"{links} cannot reach each other, and no ring with {name} goes without that"
        if forced is not None:
            return (
                f"with {name} a token would take {seconds(forced.forecast.tpot_s)} instead of "
                f"{seconds(ring.forecast.tpot_s)}"
            )
    return f"{shape.model} cannot be cut so that {name} gets a window and a token is not slower"


def broken_links(of: Problem, ring: Ring) -> tuple[tuple[str, str], ...]:
    """Names of neighbours in a ring that do not reach each other."""
    pairs = {
        (min(a, b), max(a, b))
        for a, b in zip(ring.order, (*ring.order[1:], ring.order[0]), strict=True)
        if of.hop_s[a, b] >= costs.UNREACHED_S
    }
    names = [able.profile.name for able in of.peers]
    return tuple((names[a], names[b]) for a, b in sorted(pairs))


def broken(links: Sequence[tuple[str, str]], shape: ModelShape) -> str:
    """Why there is no plan where every ring would need one of these links."""
    return (
        f"{_pairs(links)} cannot reach each other, and {shape.model} fits into no ring without "
        "that: look at the cable, the Wi-Fi or the firewall between them, or start another peer"
    )


def _pairs(links: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{a} and {b}" for a, b in links[:3])


def stayed(shape: ModelShape, windows: Sequence[PlanWindow], before: Split) -> str:
    """How much is to be loaded anew after a loss."""
    had = {(w.peer_id, at) for w in before.windows for at in range(w.first, w.last)}
    new = [at for w in windows for at in range(w.first, w.last) if (w.peer_id, at) not in had]
    if not new:
        return "every layer stays where it was"
    size = mib(sum(shape.layer_bytes[at] for at in new))
    return f"{count(len(new), 'layer')} ({size}) are loaded anew, all others stay where they were"


def least_bytes(of: Problem, able: Able) -> int:
    """What a window of one layer needs at least on this peer."""
    each = zip(able.held.layer_bytes, able.held.layer_kv_bytes, strict=True)
    return (
        able.scratch_bytes
        + of.compute_bytes
        + min(weights + of.size.kv_cells * kv for weights, kv in each)
    )


def missing(able: Sequence[Profile], shape: ModelShape, size: Size, wishes: Wishes) -> str:
    """What is missing for the smallest size, and the smallest thing that would help."""
    of = costs.problem(able, shape, size)
    if not of.peers:
        return f"no peer that is left can run {shape.model}: start another one"
    largest = max(of.peers, key=lambda a: (a.memory_bytes, a.peer_id))
    name, has = largest.profile.name, largest.memory_bytes
    compute, whole = of.compute_bytes, _whole_bytes(of, largest)
    if wishes.rounds and shape.layers % wishes.rounds:
        return f"{wishes.rounds} rounds do not divide the {shape.layers} layers of {shape.model}"
    if wishes.pinned or wishes.rounds:
        return (
            f"{shape.model} fits into no ring with the windows or rounds that are asked for: leave "
            "one of them out"
        )
    if shape.whole_why:
        return (
            f"{shape.model} must stay whole ({shape.whole_why}) and needs {mib(whole)}; {name}, "
            f"which has most, has {mib(has)}: {mib(max(1, whole - has))} are missing there. Free "
            f"memory on {name} or pull a smaller model"
        )
    free = sum(max(0, a.memory_bytes - compute) for a in of.peers)
    wanted = min(_whole_bytes(of, a) for a in of.peers) - compute
    if wanted > free:
        disk = "" if any(a.disk_bytes_per_s for a in of.peers) else _DISKS
        return (
            f"{shape.model} needs {mib(wanted)} for its weights and {size.context} tokens of "
            f"context; {count(len(of.peers), 'peer')} here can give {mib(free)}: "
            f"{mib(wanted - free)} are missing{disk}. Free that much on {name}, start another "
            "peer, or pull a smaller model"
        )
    return (
        f"{shape.model} fits into the peers' memory together, but not at the layers where "
        f"{shape.architecture} may be cut. Free {mib(max(1, whole - has))} on {name}, which could "
        "then run it alone, or start another peer"
    )


def _whole_bytes(of: Problem, able: Able) -> int:
    """What all layers need in one stage of this peer."""
    held = able.held
    kv = of.size.kv_cells * sum(held.layer_kv_bytes)
    ends = of.compute_bytes + of.logits_bytes + able.scratch_bytes
    return held.window_bytes(0, held.layers) + kv + ends


_DISKS = ", and no peer's disk is known to be fast enough to read them again for each token"


def seconds(value: float) -> str:
    """3.2 ms, 41 ms, 2.4 s."""
    if value < 0.01:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def count(number: int, noun: str) -> str:
    """1 peer, 2 peers."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def mib(size: int) -> str:
    """Rounded up, so that what is missing is never called 0."""
    return f"{-(-size // (1 << 20)):,} MiB"
