"""The whole model in one process beside the ring: whether this machine can, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from peer.bench.orders import Ask, Open, engine_of, whole
from peer.bench.reference import Reference
from peer.errors import BackendError, ModelError
from peer.models.manifest import load
from peer.planning.groups import control_group_bytes
from peer.planning.plan import Plan
from peer.planning.profile import Profile
from peer.planning.survey import available_bytes, cores
from peer.protocol import Sampling
from peer.words.bench_figures import middle, over
from peer.words.bench_results import Alone
from peer.words.screen import size
from peer.words.state import Status

AROUND_BYTES = 256 << 20  # buffers, and Python's own
CELLS_LEAST = 2048


class Alongside:
    """The process, or why there is none (`said`)."""

    def __init__(self, plan: Plan, status: Status, profile: Profile | None, rows: int) -> None:
        """rows: answers at once that will be asked for at most."""
        self._plan = plan
        self._folder = Path(status.me.home) / "models" / plan.shape.digest
        self._slots = min(rows, plan.split.slots)
        self._cells = plan.split.kv_cells
        self.threads = (profile.threads if profile else 0) or cores()
        self._profile, self._peer_id = profile, status.me.peer_id
        self._weights = profile.weights if profile else "auto"
        self._backend = engine_of(plan, self._peer_id, profile)
        self._held = plan.shape.in_memory(self._backend, self._weights)
        why, mend = _lacks(self._folder, plan, status) or self._too_large(status)
        self.said = Alone(not why, self.threads, 0, why, mend, self._backend)
        self._reference: Reference | None = None

    def _too_large(self, status: Status) -> tuple[str, str]:
        shape = self._held
        needed = shape.window_bytes(0, shape.layers) + AROUND_BYTES
        each = max(1, sum(shape.layer_kv_bytes))
        free = available_bytes(0, int(psutil.virtual_memory().available), control_group_bytes())
        # Fewer cells than the ring has do for it; they cost what is left over.
        self._cells = max(min(self._cells, CELLS_LEAST), min(self._cells, (free - needed) // each))
        needed += self._cells * each
        if needed <= free:
            return "", ""
        return (
            f"it would need {size(needed)} of memory, and {size(free)} is free on this machine",
            "ask on the machine with the most memory: halka bench",
        )

    def open(self) -> None:
        """Start it and load the model; `said` says why not, where that fails."""
        if not self.said.measured:
            return
        reference = self._reference = Reference()
        order = Open(
            whole(
                self._plan, self._peer_id,
                slots=self._slots, kv_cells=self._cells, gpu_layers=self._gpu_layers(),
                backend=self._backend,
            ),
            str(self._folder), self.threads, self._weights,
        )  # fmt: skip
        try:
            used = reference.open(order)
        except BackendError as error:
            self.said = Alone(False, self.threads, 0, str(error), "halka status says what is wrong")
            return
        memory_bytes = used.weights_bytes + used.kv_bytes + used.compute_bytes
        self.said = msgspec.structs.replace(self.said, memory_bytes=memory_bytes)

    def _gpu_layers(self) -> int:
        """All of them on a GPU with room for them, as the planner would have it; else none."""
        shape, profile = self._held, self._profile
        needed = shape.window_bytes(0, shape.layers) + self._cells * sum(shape.layer_kv_bytes)
        mine = [e for e in profile.engines if e.backend == self._backend] if profile else []
        cards = [e for e in mine if e.kind != "cpu"]
        return -1 if any(card.memory_free_bytes > needed + AROUND_BYTES for card in cards) else 0

    def decode(self, text: str, tokens: int, sampling: Sampling, limit_s: float) -> float:
        """Tokens a second of one answer; 0.0 where there is no such process (any more)."""
        return self.many([text], tokens, sampling, limit_s)

    def many(self, texts: Sequence[str], tokens: int, sampling: Sampling, limit_s: float) -> float:
        """Tokens a second of all of these answers together, once all are read."""
        chunk = self._plan.split.batch_tokens
        ask = Ask(tuple(texts), tokens, chunk, 0, sampling, limit_s)
        took = self._ask(ask)
        return len(texts) * over(1.0, middle(took[1])) if took else 0.0

    def prefill(self, text: str) -> float:
        """Tokens a second of this prompt, to its answer's first token."""
        took = self._ask(Ask((text,), 1, self._plan.split.batch_tokens))
        return over(took[2], took[0]) if took else 0.0

    def _ask(self, ask: Ask) -> tuple[float, tuple[float, ...], int] | None:
        """Seconds to the first token, seconds of steps, ids of the first prompt."""
        if not self.said.measured or self._reference is None:
            return None
        try:
            took = self._reference.ask(ask)
        except BackendError as error:
            self.said = Alone(False, self.threads, 0, str(error), "halka status says what is wrong")
            return None
        return took.read_s[0], took.steps_s, took.prompt_tokens[0]

    def close(self, hurry: bool = False) -> None:
        """End it. hurry: at once."""
        if self._reference is not None:
            error = KeyboardInterrupt() if hurry else None
            self._reference.__exit__(type(error) if error else None, error, None)
            self._reference = None


def _lacks(folder: Path, plan: Plan, status: Status) -> tuple[str, str] | None:
    """Why the model is not here whole, and what mends it; None where it is."""
    shape = plan.shape
    wanted = shape.window_parts(0, shape.layers)
    name = "smollm2" if shape.model.startswith("smollm2-135m") else "/path/to/the/same.gguf"
    pull = f"halka pull {name}, on this machine"
    try:
        if not folder.is_dir():
            return f"this machine has none of the model's {len(wanted)} parts", pull
        manifest = load(folder)
        missing = [p.name for p in manifest.parts if not (folder / p.file).is_file()]
        if missing:
            some = f"{len(missing)} of {len(manifest.parts)}"
            return f"this machine lacks {some} of the model's parts", pull
        with (folder / manifest.parts[0].file).open("r+b"):  # headers are rewritten for a window
            return None
    except PermissionError:
        owner = folder.owner() if folder.exists() else "halka"
        return (
            f"{folder} belongs to {owner}",
            f"sudo -u {owner} halka bench --home {status.me.home}",
        )
    except (ModelError, OSError) as error:
        return f"the model here cannot be read: {error}", pull
