"""What a model weighs on an engine that repacks it, everywhere that memory is counted."""

from __future__ import annotations

import math
import random

import pytest
from msgspec.structs import replace

from backends.mlx import window as mlx_window
from peer.errors import NoPlan
from peer.planning import costs, counts, drafts
from peer.planning.correction import corrected
from peer.planning.costs import Problem, Size
from peer.planning.drafts import with_draft
from peer.planning.plan import Plan, PlanId, PlanWindow, Split, check
from peer.planning.profile import EngineProfile, Fit, ModelOffer, ModelShape, Profile
from peer.planning.split import solve
from peer.planning.tables import Tables
from peer.planning.wishes import Wishes
from peer.protocol import Timed
from tests.macs import (
    EXACT,
    GIB,
    LLAMA,
    MIB,
    MLX,
    NO,
    PLAIN,
    A,
    linux,
    mac,
    model,
    repacked,
    speed,
)

# What it weighs ----------------------------------------------------------------------------------


def problem(peer: Profile, of: ModelShape, size: Size | None = None) -> Problem:
    return costs.problem([peer], of, size or Size(512, 1024, 64))


def test_weights_weigh_what_they_do_in_memory() -> None:
    of = model(repacked(factor=1.5))
    there = problem(mac(), of)
    (able,) = there.peers
    ends = there.compute_bytes + there.logits_bytes + able.scratch_bytes
    kv = 1024 * 1024
    for windows, embed, output in (([(3, 7)], 0, 0), ([(0, 4)], 90, 0), ([(8, 12)], 0, 120)):
        found = costs.part(there, able, windows, 0)
        assert found
        wanted = (
            4 * (150 * MIB + kv) + (embed + output) * MIB + there.compute_bytes + able.scratch_bytes
        )
        wanted += there.logits_bytes if output else 0
        assert found.memory_bytes == found.gpu_bytes == wanted
        assert found.gpu_layers == 4, "all of a window is where its weights are"
    whole = costs.part(there, able, [(0, 12)], 5)
    assert whole
    assert whole.memory_bytes == 12 * (150 * MIB + kv) + 210 * MIB + ends
    split = solve([mac()], of)
    assert split.windows[0].memory_bytes == 12 * 150 * MIB + 210 * MIB + 12 * 1024 * split.kv_cells
    assert split.windows[0].gpu_layers == -1
    plain = problem(linux(), of)
    mapped = costs.part(plain, plain.peers[0], [(0, 4)], 0)
    assert mapped
    assert mapped.memory_bytes == 4 * (100 * MIB + kv) + plain.compute_bytes


def test_an_engine_that_repacks_is_given_room_to_compute_in() -> None:
    of = model(EXACT, layer_kv_bytes=(100, 4000, *(100,) * 10))
    (able,) = problem(mac(), of, Size(512, 2000, 64)).peers
    assert able.scratch_bytes == mlx_window.SCORES_BYTES + 3 * 4000 * 2000
    (able,) = problem(linux(), of).peers
    assert able.scratch_bytes == 0


def test_a_tied_embedding_is_in_memory_once() -> None:
    of = model(replace(repacked(factor=1.5), output_bytes=0), tied=True, output_bytes=0)
    there = problem(mac(), of)
    (able,) = there.peers
    alone = costs.part(there, able, [(0, 12)], 12)
    head, tail = costs.part(there, able, [(0, 6)], 6), costs.part(there, able, [(6, 12)], 6)
    assert alone
    assert head
    assert tail
    assert head.memory_bytes + tail.memory_bytes - alone.memory_bytes == (
        90 * MIB + there.compute_bytes + able.scratch_bytes
    )


def test_nothing_is_streamed_by_an_engine_that_has_copies() -> None:
    of = model(repacked(factor=1.5))
    small = mac(memory=GIB, disk_read_bytes_per_s=3e9)
    on_linux = EngineProfile("mlx", "CPU", "cpu")
    for engines in (MLX, (on_linux,)):
        with pytest.raises(NoPlan, match="are missing"):
            solve([replace(small, engines=engines)], of)
    with_llama = solve([small], of)
    assert with_llama.windows[0].backend == "llama_cpp"
    assert with_llama.windows[0].streamed_bytes > 0
    assert costs.forecast([small], of, with_llama), "by the engine of its windows"


def test_llama_cpp_is_taken_where_mlx_would_leave_too_little_memory() -> None:
    of = model(repacked(factor=1.5), context=8192, layer_kv_bytes=(8192,) * 12)
    for memory, backend in ((30 * GIB, "mlx"), (3 * GIB, "mlx"), (2 * GIB, "llama_cpp")):
        split = solve([mac(memory=memory * 9 // 8)], of)
        assert (split.windows[0].backend, split.context) == (backend, 8192), memory
        assert split.windows[0].streamed_bytes == 0


def test_kv_cells_of_mlx_are_float16_whatever_the_plan_has() -> None:
    of = model(EXACT, kv_types=("f16", "q8_0"), layer_kv_bytes=(64 * 7,) * 12)
    wishes = Wishes(kv_type="q8_0", context=1024)
    split = solve([mac()], of, wishes)
    assert split.kv_type == "q8_0"
    weights = of.window_bytes(0, 12)
    assert split.windows[0].memory_bytes == weights + 12 * split.kv_cells * 64 * 7
    split = solve([mac(engines=LLAMA)], of, wishes)
    assert split.windows[0].memory_bytes == weights + 12 * split.kv_cells * 34 * 7


def test_a_window_is_all_on_the_gpu_or_all_on_the_processor() -> None:
    of = model(EXACT)
    (slow,) = costs.problem([mac(speeds=(speed("mlx", "metal", 1, of),))], of, Size(1, 1, 8)).peers
    assert slow.whole
    there = problem(mac(), of)
    (table,) = Tables(there, 1).choices
    a, b = 2, 9
    assert table.gpu_layers.shape[0] == 1
    assert table.gpu_layers[0, a, b] == b - a
    on_linux = mac(engines=(EngineProfile("mlx", "CPU", "cpu"),), unified_memory=False)
    (able,) = problem(on_linux, of).peers
    assert able.gpu is None
    assert solve([on_linux], of).windows[0].gpu_layers == 0


@pytest.mark.parametrize("seed", range(40))
def test_tables_and_parts_agree_about_every_window_of_every_engine(seed: int) -> None:
    draw = random.Random(seed)
    tied = draw.random() < 0.5
    fit = repacked(factor=draw.uniform(1, 2.4))
    of = model(fit, tied=tied, layer_kv_bytes=tuple(64 * draw.randint(0, 9) for _ in range(12)))
    size = Size(512, draw.choice([512, 9000]), 64, draw.choice(["f16", "q8_0"]))
    rounds = draw.choice([1, 2, 3])
    peer = mac(
        memory=int(draw.uniform(0.2, 3) * GIB), disk_read_bytes_per_s=draw.choice([0.0, 1e9]),
        engines=draw.choice([MLX, LLAMA, MLX[1:], PLAIN]),
        unified_memory=draw.random() < 0.7,
    )  # fmt: skip
    there = problem(peer, of, size)
    (able,) = there.peers
    (table,) = Tables(there, rounds).choices
    for choice in range(len(table.fits)):
        for a in range(12 // rounds):
            for b in range(a + 1, 12 // rounds + 1):
                layers = int(table.gpu_layers[choice, a, b])
                found = costs.part(there, able, costs.windows(12, rounds, (a, b)), layers)
                assert (found is not None) == bool(table.fits[choice, a, b]), (choice, a, b)
                if found:
                    assert math.isclose(found.busy_s, float(table.busy_s[choice, a, b]))
                    assert math.isclose(
                        found.read_s, float(table.read_s[choice, a, b]), abs_tol=1e-12
                    )


def test_the_counting_programme_puts_no_layer_of_mlx_on_the_processor() -> None:
    of = model(repacked())
    there = costs.problem([mac(memory=1400 * MIB), linux(memory=GIB)], of, Size(512, 512, 64))
    assert set(counts.order(there, 1, frozenset())) == {0, 1}


def test_many_layers_are_shared_in_proportion_with_each_engines_bytes() -> None:
    layers = 2500
    fit = Fit("mlx", layer_bytes=(2 * MIB,) * layers)
    of = model(fit, layers=layers, layer_bytes=(MIB,) * layers, layer_kv_bytes=(0,) * layers)
    memory = 2400 * MIB  # half of the layers are too many for the one with copies
    split = solve([mac(memory=memory, engines=MLX), linux(memory=memory)], of)
    assert check(Plan(PlanId(1, 1), A, of, split)) == ""
    for window in split.windows:
        each = 2 if window.backend == "mlx" else 1
        assert window.memory_bytes < memory
        assert window.memory_bytes >= each * MIB * (window.last - window.first)


# A plan that is there ----------------------------------------------------------------------------


def planned(of: ModelShape, backend: str) -> Plan:
    window = PlanWindow(A, 0, 12, backend)
    return Plan(PlanId(1, 1), A, of, Split((window,), 512, 512, 1, 512))


def test_a_plan_is_reckoned_with_the_engines_that_it_has() -> None:
    of = model(EXACT)
    speeds = (speed("mlx", "metal", 1e-3, of), speed("llama_cpp", "metal", 5e-3, of))
    peer = mac(speeds=speeds)
    tpot = {
        backend: found.tpot_s
        for backend in ("mlx", "llama_cpp")
        if (found := costs.forecast([peer], of, planned(of, backend).split))
    }
    assert tpot["llama_cpp"] > 4 * tpot["mlx"]
    without = replace(peer, engines=LLAMA)
    assert costs.forecast([without], of, planned(of, "mlx").split) is None


def test_what_steps_took_corrects_the_engine_that_took_them() -> None:
    of = model(EXACT)
    speeds = (speed("mlx", "metal", 1e-3, of), speed("llama_cpp", "metal", 5e-3, of))
    told = corrected(mac(speeds=speeds), planned(of, "llama_cpp"), Timed(decode_s=0.2))
    assert told
    (kept,) = [s for s in told.speeds if s.backend == "mlx"]
    (changed,) = [s for s in told.speeds if s.backend == "llama_cpp"]
    assert kept.correction == 1.0
    assert changed.correction > 2


def test_a_draft_model_weighs_what_it_does_on_the_engine_that_will_run_it() -> None:
    of = model(EXACT)
    small = model(repacked(factor=2.0), digest="d" * 64, model="small")
    other = replace(small, fits=(NO,))
    split = planned(of, "mlx").split
    on_mlx, on_llama = (drafts._bytes(d, split, mac()) for d in (small, other))
    assert on_mlx - on_llama == (12 * 100 + 60 + 80) * MIB
    parts = small.window_parts(0, 12)
    offers = {A: [ModelOffer(d, 1.0, parts) for d in (of, small)]}
    wishing = mac(draft_wanted="small", memory=5 * GIB)
    assert with_draft(split, of, [wishing], offers, False).draft == small.digest
