"""A split in words and as a picture: what it is expected to take, and beside it what it took.

Fixed values in, lines out; used for the plan that runs and for those that `halka plan` thinks up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peer.planning.pipeline import in_flight
from peer.planning.plan import Forecast, PeerForecast, PlanWindow, Split
from peer.planning.profile import ModelShape, engine_name
from peer.words import ring
from peer.words.basis import TimedRing
from peer.words.screen import Screen, count, moment, size

SAME = 1.01  # times of which one is so many times the other are told as the same
UNIFIED = ("metal",)  # kinds of GPUs whose memory is the machine's


@dataclass(frozen=True, slots=True)
class Seen:
    """A split and what is known of it. labels: by peer id. gpus: (device, kind) by peer id.

    usage: what a peer's stage really uses, in words, by peer id.
    """

    shape: ModelShape
    split: Split
    forecast: Forecast | None = None
    timed: TimedRing = field(default_factory=TimedRing)
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    usage: Mapping[str, str] = field(default_factory=dict)

    @property
    def ring(self) -> tuple[str, ...]:
        """Peers in ring order, each once."""
        return tuple(dict.fromkeys(window.peer_id for window in self.split.windows))

    @property
    def rounds(self) -> int:
        """Windows of each peer."""
        return len(self.split.windows) // max(1, len(self.ring))

    def name(self, peer_id: str) -> str:
        """For people."""
        return self.labels.get(peer_id, peer_id[:8])

    def names(self, peer_id: str) -> str:
        """Of all who compute this peer's windows together with it."""
        others = dict.fromkeys(other for w in self.windows(peer_id) for other in w.island)
        return " + ".join(map(self.name, (peer_id, *others)))

    def windows(self, peer_id: str) -> list[PlanWindow]:
        """In rounds' order."""
        return [window for window in self.split.windows if window.peer_id == peer_id]

    def forecast_of(self, peer_id: str) -> PeerForecast | None:
        """This peer's, where there is one."""
        peers = self.forecast.peers if self.forecast else ()
        return next((peer for peer in peers if peer.peer_id == peer_id), None)

    def on_gpu(self, window: PlanWindow) -> int:
        """How many of the window's layers, its last ones."""
        layers = window.last - window.first
        if window.peer_id not in self.gpus:
            return 0
        return layers if window.gpu_layers < 0 else min(layers, window.gpu_layers)

    def total_bytes(self, peer_id: str) -> int:
        """Of the machine and of its GPU together."""
        peer = self.forecast_of(peer_id)
        own = peer is not None and self.gpus.get(peer_id, ("", ""))[1] not in UNIFIED
        return self.memory_bytes(peer_id) + (peer.gpu_bytes if peer and own else 0)

    def memory_bytes(self, peer_id: str) -> int:
        """Of the machine, predicted; where nobody did, the weights alone."""
        if peer := self.forecast_of(peer_id):
            return peer.memory_bytes
        mine = self.windows(peer_id)
        predicted = sum(w.memory_bytes for w in mine)
        return predicted or sum(self.shape.window_bytes(w.first, w.last) for w in mine)


# The whole -------------------------------------------------------------------------------------


def facts(seen: Seen, screen: Screen) -> str:
    """How large it is, in a line."""
    split = seen.split
    return screen.pick(" · ", ", ").join(
        [
            count(seen.shape.layers, "layer"), count(_peers(seen), "peer"),
            count(seen.rounds, "round"), f"{split.context} tokens of context",
            count(split.slots, "slot"), *_settings(split),
        ]
    )  # fmt: skip


def _peers(seen: Seen) -> int:
    """All that take part."""
    return len(seen.ring) + sum(len(window.island) for window in seen.split.windows)


def _settings(split: Split) -> list[str]:
    """Those of the coordinator that are not as usual."""
    said = [f"KV cache {split.kv_type}"] if split.kv_type != "f16" else []
    said += [f"flash attention {split.flash}"] if split.flash != "auto" else []
    return said + ([f"speculation {split.speculation}"] if split.speculation != "auto" else [])


def times(seen: Seen, screen: Screen) -> list[str]:
    """TPOT and TTFT, predicted and measured; and what many answers at once would get."""
    forecast, timed = seen.forecast, seen.timed
    if forecast is None:
        if timed.tpot_s:
            return [f"  TPOT  measured {moment(timed.tpot_s)} a token"]
        return []
    tpot = f"predicted {moment(forecast.tpot_s)}"
    tpot += f", measured {moment(timed.tpot_s)} a token" if timed.tpot_s else " a token"
    if forecast.hops_s:
        tpot += f"; {moment(forecast.hops_s)} of it on the network"
    ttft = f"predicted {moment(forecast.ttft_s)}"
    if took := _ttft_s(seen, forecast):
        ttft += f", by what the stages took {moment(took)}"
    rate = 1 / forecast.stage_s if forecast.stage_s else 0.0
    many = f"{rate:.0f}" if rate >= 9.5 else f"{rate:.1f}" if rate >= 0.095 else f"{rate:.2g}"
    return [
        *screen.wrap(tpot, "  TPOT  "),
        *screen.wrap(f"{ttft} for a prompt of {_prompt(seen, forecast)}", "  TTFT  "),
        *screen.wrap(f"many answers at once share up to {many} tokens a second", "  "),
        *_guesses(seen, forecast, screen),
    ]


def _prompt(seen: Seen, forecast: Forecast) -> str:
    """512 tokens, in chunks of 64."""
    chunk = forecast.chunk_tokens
    text = f"{forecast.prompt_tokens} tokens"
    return f"{text}, in chunks of {chunk}" if 0 < chunk < forecast.prompt_tokens else text


def _guesses(seen: Seen, forecast: Forecast, screen: Screen) -> list[str]:
    """Whose speed nobody measured."""
    names = [seen.name(peer.peer_id) for peer in forecast.peers if not peer.measured]
    if not names:
        return []
    whose = "everybody" if len(names) == len(forecast.peers) > 1 else ", ".join(names)
    return screen.wrap(f"of {whose}, only what is usual for such a machine is known", "  ")


def _ttft_s(seen: Seen, forecast: Forecast) -> float:
    """The same prompt by what each stage took for a row, with links and disks as predicted; 0
    where a stage has not said."""
    took = [seen.timed.peers[p].prefill_s if p in seen.timed.peers else 0.0 for p in seen.ring]
    if not took or not all(took):
        return 0.0
    chunk = forecast.chunk_tokens or seen.split.batch_tokens
    rows = min(chunk, forecast.prompt_tokens)
    chunks = forecast.prompt_tokens / rows
    depth = in_flight(len(seen.ring), seen.rounds)
    predicted = _chunks_s([peer.prefill_s for peer in forecast.peers], chunks, depth)
    beside = forecast.ttft_s - predicted
    return _chunks_s([each * rows for each in took], chunks, depth) + max(0.0, beside)


def _chunks_s(each_s: Sequence[float], chunks: float, depth: int) -> float:
    """What so many chunks keep the stages computing: the first one all of them, the others at the
    pace of the slowest; one after another where only one is in flight."""
    around = sum(each_s)
    return around + (chunks - 1) * (max(each_s) if depth > 1 else around)


def in_a_line(seen: Seen, screen: Screen) -> str:
    """Who, how many layers, how fast."""
    who = ", ".join(f"{seen.name(p)} {_layers(seen, p)}" for p in seen.ring)
    text = f"{who}; {count(seen.rounds, 'round')}" if seen.rounds > 1 else who
    if seen.forecast is None:
        return f"{text}; what it takes cannot be predicted from these profiles"
    text += f"; TPOT {moment(seen.forecast.tpot_s)}, TTFT {moment(seen.forecast.ttft_s)}"
    if seen.timed.tpot_s:
        text += f" (measured TPOT {moment(seen.timed.tpot_s)})"
    return text


def _layers(seen: Seen, peer_id: str) -> int:
    return sum(window.last - window.first for window in seen.windows(peer_id))


# Peer by peer ----------------------------------------------------------------------------------


def picture(seen: Seen, screen: Screen) -> list[str]:
    """The ring, its layers, and what the bars are made of."""
    rows = [
        ring.Row(
            name=seen.names(peer_id),
            windows=tuple((w.first, w.last) for w in seen.windows(peer_id)),
            phase=_role(seen, peer_id),
            right=size(seen.total_bytes(peer_id)),
            gpu=tuple((w.last - n, w.last) for w in seen.windows(peer_id) if (n := seen.on_gpu(w))),
            streamed=tuple(s for w in seen.windows(peer_id) if (s := _streamed(seen, w))),
        )
        for peer_id in seen.ring
    ]
    return [*ring.draw(screen, seen.shape.layers, rows), *ring.legend(screen, rows)]


def _role(seen: Seen, peer_id: str) -> str:
    head = peer_id == seen.split.windows[0].peer_id
    tail = peer_id == seen.split.windows[-1].peer_id
    return "head and tail" if head and tail else "head" if head else "tail" if tail else ""


def _streamed(seen: Seen, window: PlanWindow) -> tuple[int, int] | None:
    """As many of a window's first layers as weigh what it reads again for each token."""
    left, layer = window.streamed_bytes, window.first
    end = window.last - seen.on_gpu(window)
    while left > 0 and layer < end:
        left -= seen.shape.layer_bytes[layer]
        layer += 1
    return (window.first, layer) if layer > window.first else None


def peers(seen: Seen, screen: Screen) -> list[str]:
    """Each peer's part in words, and why the others have none."""
    out: list[str] = []
    for peer_id in seen.ring:
        name, uses = seen.names(peer_id), _memory(seen, peer_id)
        if peer := seen.forecast_of(peer_id):
            out += screen.wrap(f"{name}: {_work(seen, peer)}", "  ", "    ")
            out += screen.wrap(uses, "    ")
        else:
            out += screen.wrap(f"{name}: {uses}", "  ", "    ")
    if seen.split.left_out:
        out += ["", "Without layers"]
        for left in seen.split.left_out:
            out += screen.wrap(f"{seen.name(left.peer_id)}: {left.why}", "  ", "    ")
    return out


def _work(seen: Seen, peer: PeerForecast) -> str:
    """What a peer computes and reads for a token."""
    layers, on_gpu = _layers(seen, peer.peer_id), sum(map(seen.on_gpu, seen.windows(peer.peer_id)))
    text = count(layers, "layer")
    if seen.windows(peer.peer_id)[0].island:
        text += ", each computed by all of them together,"
    if not on_gpu:
        text += " on the CPU"
    else:
        device, _ = seen.gpus[peer.peer_id]
        text += f" on {device}" if on_gpu == layers else f", {on_gpu} of them on {device}"
    text += f", {moment(peer.decode_s)} a token"
    took = seen.timed.peers.get(peer.peer_id)
    if took and took.decode_s:
        text += f" predicted, {moment(took.decode_s)} measured"
    elif not peer.measured:
        text += " (usual for its kind, not measured)"
    if peer.streamed_bytes:
        text += f"; reads {size(peer.streamed_bytes)} from disk for each token"
        text += f" in {seen.rounds} rounds" if seen.rounds > 1 else ""
        text += (
            f", and waits {moment(peer.disk_s)} for it" if peer.disk_s else ", while others work"
        )
    return text


def _memory(seen: Seen, peer_id: str) -> str:
    """Which engines, how much memory, and what is really used."""
    engines = dict.fromkeys(window.backend for window in seen.windows(peer_id))
    text = f"{'+'.join(map(engine_name, engines))}, planned {size(seen.memory_bytes(peer_id))}"
    peer = seen.forecast_of(peer_id)
    if peer and peer.gpu_bytes:
        _, kind = seen.gpus.get(peer_id, ("", ""))
        text += f", {size(peer.gpu_bytes)} "
        text += "of it for the GPU" if kind in UNIFIED else "on the GPU besides"
    return text + seen.usage.get(peer_id, "")


# What would be different -----------------------------------------------------------------------


def moves(shape: ModelShape, split: Split, held: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """(parts, bytes) that peers would have to fetch, by what they hold."""
    sizes = {"head": shape.head_bytes, "embed": shape.embed_bytes, "output": shape.output_bytes}
    sizes |= {f"layer-{i:03d}": weight for i, weight in enumerate(shape.layer_bytes)}
    wanted: set[tuple[str, str]] = set()
    for window in split.windows:
        parts = shape.window_parts(window.first, window.last)
        wanted |= {(p, part) for p in (window.peer_id, *window.island) for part in parts}
    lacking = [part for peer_id, part in wanted if part not in held.get(peer_id, ())]
    return len(lacking), sum(sizes[part] for part in lacking)


def difference(
    now: Seen, then: Seen, held: Mapping[str, Sequence[str]], screen: Screen
) -> list[str]:
    """What changes from one plan to the other, in words."""
    said = []
    if (before := now.forecast) and (after := then.forecast):
        said.append(_instead("TPOT", before.tpot_s, after.tpot_s))
        said.append(_instead("TTFT", before.ttft_s, after.ttft_s))
    if _layout(now) == _layout(then):
        said.append("the same peers run the same layers")
    if now.split.kv_type != then.split.kv_type:
        said.append(f"a KV cache of {then.split.kv_type} instead of {now.split.kv_type}")
    if now.split.context != then.split.context:
        said.append(f"{then.split.context} tokens of context instead of {now.split.context}")
    if held:
        parts, weight = moves(then.shape, then.split, held)
        said.append(f"{count(parts, 'part')}, {size(weight)} would move" if parts else "")
    return screen.wrap("; ".join(filter(None, said)) or "nothing", "Difference  ")


def _layout(seen: Seen) -> list[tuple[str, int, int, int]]:
    return [(w.peer_id, w.first, w.last, seen.on_gpu(w)) for w in seen.split.windows]


def _instead(what: str, before_s: float, after_s: float) -> str:
    """TPOT 41 ms instead of 88 ms (2.1 times as fast)."""
    slow, fast = max(before_s, after_s), max(1e-12, min(before_s, after_s))
    if slow / fast < SAME:
        return f"{what} {moment(after_s)} as before"
    text = f"{what} {moment(after_s)} instead of {moment(before_s)}"
    if slow / fast < 1.25:  # of what it was before
        percent = abs(after_s / before_s - 1) * 100
        return f"{text} ({percent:.0f} % {'less' if after_s < before_s else 'more'})"
    return f"{text} ({slow / fast:.1f} times as {'fast' if after_s < before_s else 'slow'})"
