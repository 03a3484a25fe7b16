"""How many answers one step can let in: what it carries for them has to fit into a frame."""

from __future__ import annotations

import numpy as np

from backends.base import Batch
from peer.protocol import Sampling
from peer.ring.frames import FrameHeader, Open, decode, encode_frame, pack_index
from peer.ring.scheduler import Returned, Run, Scheduler, Submitted
from tests.plans import plan, shape
from tests.unit.test_pipelining import runs

CONTEXT = 262_144


def test_long_answers_whose_penalties_look_back_on_all_of_them_fit_into_frames() -> None:
    machine = Scheduler(8, CONTEXT, 8 * CONTEXT, 512, 60.0, depth=1)
    penalties = Sampling(frequency_penalty=1.0, repeat_last_n=-1)
    flying: list[Run] = []
    for i in range(8):
        ids = np.full(CONTEXT - 100, i, np.int32)
        asked = Submitted(("e", f"r{i}"), ids, penalties, 50, frozenset())
        flying += runs(machine.step(asked, 0))
    of = plan(
        4, 12, model=shape(layers=12, hidden=1), slots=8, context=CONTEXT, kv_cells=8 * CONTEXT,
        batch_tokens=512,
    )  # fmt: skip
    opened = 0
    while opened < 8:
        run = flying.pop(0)
        header = FrameHeader(of.id, run.step, 1, len(run.ids), 1, run.ops, drafts=run.drafts)
        index = pack_index(Batch(run.slots, run.positions, run.outputs))
        parts = encode_frame(header, index, np.zeros((len(run.ids), 1), np.float32))
        decode([memoryview(part) for part in parts], of)
        opened += sum(isinstance(op, Open) for op in run.ops)
        flying += runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
