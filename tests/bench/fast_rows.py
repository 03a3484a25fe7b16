"""The rows of `tests.bench.fast`: what is run against what, one function each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from backends.llama_cpp.library import library
from peer.bench.orders import Ask
from peer.protocol import Sampling
from peer.words.bench_figures import Heard, peak, share
from tests.bench import one_stream as stream
from tests.bench.fast_ring import GREEDY, Model, Pinned, Row, alone, in_turns, noise, ringed
from tests.bench.uneven import Peer, house
from tests.bench.uneven_ring import rings
from tests.netns.world import why_not
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

LONG, MANY, TOKENS = 1500, 8, 64
GROUP = 4  # of 8 answers, with two stages in work at once
DELAY_S = 0.002
CHUNKS = (64, 96, 128, 192, 256)
CHUNKS_ALONE = (64, 128, 256, 512)
PAGE = (
    "The harbour at Wexley was built in 1784 by a company of herring merchants. Its outer wall is "
    "made of grey granite blocks, each wieghing about three tonnes, which were brought by barge "
    "from a quarry eleven miles to the north. The lighthouse at the end of the wall was added "
    "forty years later, after a storm wrecked nine boats in a single night. Today the harbour "
    "shelters some thirty fishing boats, a small ferry that runs twice a day to Saint Orrin's "
    "island, and a growing number of sailing yachts in summer. The old salt house on the quay is "
    "now a musuem, where visitors can see nets, barrels and the logbooks of the first harbour "
    "masters."
)
EDIT = (
    "<|im_start|>user\nCorrect the spelling of this text and give it back unchanged otherwise."
    f"\n\n{PAGE}<|im_end|>\n<|im_start|>assistant\n"
)
EDITED = 140  # tokens, then it is at its end


def ids_of(text: str) -> tuple[int, ...]:
    """Token ids of a text by SmolLM2's own tokenizer."""
    library()  # libllama's many words go to its journal
    with PlainLlama(smollm2(), cells=64, batch=64) as model:
        return tuple(model.tokenise(text))


async def one_stream(model: Model, turns: int) -> Row:
    """SmolLM2."""
    row = Row("one-stream", "one stream, decode: ring ÷ whole model", 0.95, "tokens/s")
    return await asyncio.to_thread(_stream, model, row, turns, (17, 20), 128)


async def one_stream_large(model: Model, turns: int) -> Row:
    """A random model of the shapes of Llama-3.2-1B, in Q4_0."""
    what = "one stream, decode, 1.2 B parameters in Q4_0: ring ÷ whole model"
    row = Row("one-stream-1b", what, 0.98, "tokens/s")
    return await asyncio.to_thread(_stream, model, row, min(turns, 5), (10,), 32)


def _stream(model: Model, row: Row, turns: int, cuts: Sequence[int], tokens: int) -> Row:
    """As `tests.bench.one_stream` measures it, at the better of the cuts."""
    words = [sys.executable, "-m", "tests.bench.one_stream", "--whole", str(model.path)]
    best: tuple[float, list[float], list[float], int] | None = None
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as whole:
        assert whole.stdout is not None
        prompt = [int(token) for token in whole.stdout.readline().split()]
        for cut in cuts:
            stages = stream.Stages(model.plan(cut), model.folder, model.cores)
            try:
                ring, other = stream.measure(stages, whole, prompt, turns, tokens)
            finally:
                stages.close()
            ratio = median(other) / median(ring)
            row.notes.append(f"cut before layer {cut}: {ratio:.3f}")
            if best is None or ratio > best[0]:
                best = ratio, ring, other, cut
    assert best is not None
    row.one, row.other = [1 / s for s in best[1]], [1 / s for s in best[2]]
    return row


async def prefill(model: Model, turns: int) -> Row:
    """Each side with the chunk, the ring with the cut, that is best for it. One slot: what an
    earlier prompt left in another one would be looked at, too, before it is masked."""
    row = Row("prefill", f"prefill of {LONG} tokens: 2 peers ÷ 1 core", 1.8, "tokens/s")
    with alone(model) as whole:

        async def other(turn: int, chunk: int = 512) -> float:
            took = await whole.ask(Ask((noise(1000 + turn, LONG),), 1, chunk))
            return LONG / took.read_s[0]

        rates = {chunk: await other(chunk, chunk) for chunk in CHUNKS_ALONE}
        chunk = max(rates, key=lambda chunk: rates[chunk])
        row.notes.append(f"one process, by chunk: {_told(rates)}")
        tried: dict[tuple[int, int], float] = {}
        for cut in (15, 16):
            for size in CHUNKS:
                async with ringed(model, model.plan(cut, chunk_tokens=size, slots=1)) as ring:
                    tried[cut, size] = await _read(ring, 2000 + size)
        cut, size = max(tried, key=lambda key: tried[key])
        row.notes.append(f"ring, by cut and chunk: {_told(tried)}")
        async with ringed(model, model.plan(cut, chunk_tokens=size, slots=1)) as ring:
            return await in_turns(
                row, turns, lambda turn: _read(ring, 3000 + turn), lambda turn: other(turn, chunk)
            )


async def _read(ring: Pinned, seed: int) -> float:
    """Tokens a second of a long prompt."""
    heard, _ = await ring.hear(noise(seed, LONG), 1)
    return LONG / heard.ttft_s


def _told(rates: dict[int, float] | dict[tuple[int, int], float]) -> str:
    return ", ".join(f"{key}: {rate:.0f}" for key, rate in rates.items())


async def eight_streams(model: Model, turns: int) -> Row:
    """The ring with the cut that is best for it."""
    what = f"{MANY} streams at once, decode: 2 peers ÷ 1 core, as many rows a step"
    row = Row("eight-streams", what, 1.8, "tokens/s")
    prompts = [noise(4000 + i, 24) for i in range(MANY)]
    in_one: list[float] = []
    with alone(model) as whole:

        async def other(_turn: int, group: int = GROUP) -> float:
            took = await whole.ask(Ask(tuple(prompts), TOKENS, 512, group))
            return MANY / median(took.steps_s)

        async def one(_turn: int) -> float:
            return peak(await ring.together(prompts, TOKENS))[1]

        tried: dict[int, float] = {}
        for cut in (16, 18, 20, 22):
            async with ringed(model, model.plan(cut)) as ring:
                tried[cut] = await one(0)
        row.notes.append(f"ring, by cut: {_told(tried)}")
        cut = max(tried, key=lambda cut: tried[cut])
        async with ringed(model, model.plan(cut)) as ring:
            await in_turns(row, turns, one, other)
            in_one += [await other(0, MANY) for _ in range(2)]
    row.notes.append(
        f"÷ one process with all {MANY} rows in a step ({median(in_one):.1f} tokens/s): "
        f"{median(row.one) / median(in_one):.3f}"
    )
    return row


async def second_turn(model: Model, turns: int) -> Row:
    """What is new in a conversation is all that is read."""
    what = f"second turn of a chat of {LONG} tokens: TTFT ÷ first turn's"
    row = Row("second-turn", what, 0.1, "s", most=True)
    async with ringed(model, model.plan(16, chunk_tokens=128)) as ring:
        for turn in range(turns):
            prompt = noise(5000 + turn, LONG)
            first, answer = await ring.hear(prompt, 16)
            second, _ = await ring.hear((*prompt, *answer, *noise(6000 + turn, 24)), 16)
            row.one.append(second.ttft_s)
            row.other.append(first.ttft_s)
    return row


async def lookup(model: Model, turns: int) -> Row:
    """A text that is in the prompt already, over slow cables."""
    what = f"prompt lookup, text editing, {DELAY_S * 1e3:.0f} ms a hop: TPOT without ÷ with"
    row = Row("lookup", what, 1.5, "s")
    prompt = ids_of(EDIT)
    async with (
        ringed(model, model.plan(17), DELAY_S) as plain,
        ringed(model, model.plan(17, speculation="auto"), DELAY_S) as guessing,
    ):
        answers: dict[Pinned, list[int]] = {}

        async def tpot(ring: Pinned) -> float:
            heard, answers[ring] = await ring.hear(prompt, EDITED)
            return heard.tpot_s

        await in_turns(row, turns, lambda _: tpot(plain), lambda _: tpot(guessing))
        same = sum(a == b for a, b in zip(answers[plain], answers[guessing], strict=True))
        row.notes += [_drafted(guessing), f"{same} of {len(answers[plain])} tokens alike"]
    return row


def _drafted(ring: Pinned) -> str:
    timed = ring.news[ring.plan.head].timed
    if timed is None:
        return "the head has not told what it drafted"
    return f"{timed.accepted} of {timed.drafted} drafted tokens were right"


async def failing_drafts(model: Model, turns: int) -> Row:
    """A few words that come again and again, drawn at random: what followed them before says
    nothing of what follows now, and looks as if it did."""
    what = "text where drafts fail: TPOT with ÷ without speculation"
    row = Row("failing-drafts", what, 1.03, "s", most=True)
    some = noise(7000, 8)
    prompt = tuple(some[i % len(some)] for i in noise(7001, 200))
    bias = tuple((token, 100.0) for token in some)
    async with (
        ringed(model, model.plan(17)) as plain,
        ringed(model, model.plan(17, speculation="auto")) as guessing,
    ):

        async def tpot(ring: Pinned, turn: int) -> float:
            sampling = Sampling(20.0, len(some), 1.0, 0.0, logit_bias=bias, seed=turn)
            return (await ring.hear(prompt, 160, sampling))[0].tpot_s

        await in_turns(
            row, turns, lambda turn: tpot(guessing, turn), lambda turn: tpot(plain, turn)
        )
        row.notes.append(_drafted(guessing))
    return row


async def gap(model: Model, turns: int) -> Row:
    """Gaps between the tokens of an answer, from the moment that another prompt comes until its own
    first token does."""
    what = f"p99 gap of an answer while a prompt of {LONG} tokens arrives ÷ its normal TPOT"
    row = Row("gap", what, 6.0, "s", most=True)
    longest: list[float] = []
    async with ringed(model, model.plan(16, chunk_tokens=128)) as ring:
        for turn in range(turns):
            running = asyncio.create_task(ring.hear(noise(8000 + turn, 24), 500))
            await asyncio.sleep(1.0)
            arrived, _ = await ring.hear(noise(9000 + turn, LONG), 1)
            answer, _ = await running
            before = [b - a for a, b in pairwise(answer.at_s) if b < arrived.asked_s]
            meanwhile = _gaps(answer, arrived)
            row.other.append(median(before))
            row.one.append(share(meanwhile, 0.99))
            longest.append(max(meanwhile))
            row.notes.append(
                f"{len(meanwhile)} gaps, median {median(meanwhile) * 1e3:.1f} ms; the prompt took "
                f"{arrived.ttft_s:.2f} s"
            )
    row.notes.append(f"the longest gap: {max(longest) * 1e3:.0f} ms")
    return row


def _gaps(answer: Heard, arrived: Heard) -> list[float]:
    """Gaps that ended while the other prompt was read."""
    return [
        b - a for a, b in pairwise(answer.at_s)
        if b > arrived.asked_s and a < arrived.at_s[0]
    ]  # fmt: skip


async def gigabit(model: Model, turns: int) -> Row:
    """Peers in network namespaces, with a token bucket on both ends of their cables."""
    row = Row("gigabit", "1 Gbit/s link: decode ÷ loopback", 0.95, "tokens/s")
    if why := why_not():
        raise SystemExit(f"gigabit: {why}")
    prompt = noise(10000, 24)
    plan = model.plan(17)
    peers = [Peer(name, core, link_mbit=1000) for name, core in zip("ab", model.cores, strict=True)]
    names = dict(zip(plan.ring, "ab", strict=True))
    with tempfile.TemporaryDirectory() as folder, house(Path(folder), peers) as made:
        with made.asking():
            opened = rings(made, model.folder)
            cabled = await opened.__aenter__()
            far = await cabled.start(plan, names)
        try:
            async with ringed(model, plan) as near:

                async def one(_turn: int) -> float:
                    return 1 / (await cabled.once(far, prompt, 128)).tpot_s

                async def other(_turn: int) -> float:
                    return 1 / (await near.hear(prompt, 128, GREEDY))[0].tpot_s

                await one(0)
                return await in_turns(row, turns, one, other)
        finally:
            await opened.__aexit__(None, None, None)
