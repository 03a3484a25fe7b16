"""A thousand requests in ten minutes, of random lengths, many of them left by their clients.

python -m tests.bench.thousand [--requests N] [--seconds N] [--seed N] [--fake]: two real agents on
loopback run SmolLM2 (or the fake engine) together, and clients ask both of them. Some of them wait
to the end, some break the connection at once, before the first token or in the middle of the
answer; some go on with an earlier conversation, some begin with the same long text. In the end:
every answer that was waited for is whole (with the fake engine: and right), no request waited long
for its first token, memory is flat, and the head says that nothing runs. Exit code 1: not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from backends.fake_model import BOS
from peer.words.bench_figures import middle, prose, share
from tests import fake_models
from tests.bench.pause import say
from tests.bench.streaming import commit, processor
from tests.e2e.agents import STAGE, TEXT, Agent, House, until
from tests.e2e.soak import rise
from tests.smollm2 import smollm2

AT_ONCE = 24  # requests: three for each slot
PROMPT_WORDS = (2, 24, 220)  # at least, usually, at most
TOKENS = (1, 24, 160)
LEFT_TOKENS = 3000  # asked for by those who leave
COMMON_WORDS = 90  # of the text that some begin with
ENDS = {"waits": 0.68, "in the middle": 0.16, "before the first": 0.1, "at once": 0.06}
BEGINS = {"anew": 0.55, "with the common text": 0.2, "with an earlier conversation": 0.25}
WARM_SHARE = 0.25  # of the time, before memory counts: every cell of the KV cache was used once
GROWTH_BYTES = 24 << 20  # of a process, from the first third to the last
LOOK_S = 0.5
FREE_S = 8.0  # for what was left to have ended
EARLIER = 8  # conversations that can go on
EARLIER_WORDS = 250  # of one: they do not grow for ever
MIB = 1 << 20


@dataclass
class Request:
    """One request and what came of it. Seconds since it was sent; text: as far as it was read."""

    prompt: str
    tokens: int
    end: str
    begin: str
    text: str = ""
    finish: str = ""
    count: int = 0
    first_s: float = 0.0
    took_s: float = 0.0
    why: str = ""  # it failed


@dataclass
class Result:
    """A run. wrong: in words. memory: by process, bytes as they were looked at."""

    requests: list[Request] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)
    took_s: float = 0.0

    @property
    def longest_s(self) -> float:
        """That a client waited for a first token."""
        return max((r.first_s for r in self.requests), default=0.0)

    def grown(self) -> list[str]:
        """What is not flat."""
        found = []
        for name, seen in self.memory.items():
            if (more := rise(_warm(seen))) > GROWTH_BYTES:
                found.append(f"{name} has {more / MIB:.0f} MiB more than at first")
        return found

    def told(self) -> list[str]:
        """For a reader."""
        first = [r.first_s for r in self.requests if r.first_s]
        ends = Counter(r.end for r in self.requests)
        memory = (
            f"{name} {middle(seen) / MIB:.0f} MiB {rise(_warm(seen)) / MIB:+.1f}"
            for name, seen in self.memory.items()
        )
        return [
            f"  {len(self.requests)} requests in {self.took_s:.0f} s: "
            + ", ".join(f"{count} {end}" for end, count in ends.items()),
            f"  first token after {middle(first):.2f} s (p50), {share(first, 0.99):.2f} s (p99), "
            f"{self.longest_s:.2f} s (longest); {sum(r.count for r in self.requests)} tokens read",
            f"  memory, and its rise from the first to the last third: {'; '.join(memory)}",
            *(f"  WRONG: {why}" for why in [*self.wrong, *self.grown()][:20]),
        ]


def _warm(seen: Sequence[int]) -> Sequence[int]:
    return seen[int(len(seen) * WARM_SHARE) :]


class Thousand:
    """One run against the agents of a house."""

    def __init__(self, house: House, seed: int, fake: Path | None) -> None:
        self._house, self._fake = house, fake
        self._random = random.Random(seed)
        self._seeds = iter(range(seed, seed + (1 << 30)))
        self._common = prose(next(self._seeds), COMMON_WORDS)
        self._earlier: list[str] = []
        self.result = Result()

    def _length(self, bounds: tuple[int, int, int]) -> int:
        least, usual, most = bounds
        return min(most, max(least, int(self._random.lognormvariate(0, 0.9) * usual)))

    def _request(self) -> Request:
        text = prose(next(self._seeds), self._length(PROMPT_WORDS))
        (begin,) = self._random.choices([*BEGINS], [*BEGINS.values()])
        if begin == "with the common text":
            text = f"{self._common} {text}"
        elif begin == "with an earlier conversation" and self._earlier:
            text = f"{self._random.choice(self._earlier)} {text}"
        (end,) = self._random.choices([*ENDS], [*ENDS.values()])
        # Who leaves asked for much: left alone, it would keep its slot for long.
        tokens = self._length(TOKENS) if end == "waits" else LEFT_TOKENS
        return Request(text, tokens, end, begin)

    async def run(self, requests: int, seconds: float) -> Result:
        """So many requests in so much time, then look at what is left."""
        result, began_s = self.result, time.monotonic()
        looking = asyncio.create_task(self._look())
        places = asyncio.Semaphore(AT_ONCE)
        limits = aiohttp.ClientTimeout(total=None, sock_read=180)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with (
            aiohttp.ClientSession(timeout=limits, connector=connector) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(requests):
                due_s = began_s + seconds * number / requests
                # Not evenly: some come together, and then none for a while.
                due_s += self._random.expovariate(requests / seconds)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await places.acquire()
                request = self._request()
                result.requests.append(request)
                agent = self._house.agents[number % len(self._house.agents)]
                group.create_task(self._one(client, agent, request, places))
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        result.took_s = time.monotonic() - began_s
        await asyncio.to_thread(self._check)
        return result

    async def _one(
        self,
        client: aiohttp.ClientSession,
        agent: Agent,
        request: Request,
        places: asyncio.Semaphore,
    ) -> None:
        """Send it, and read as far as its client does."""
        began_s = time.monotonic()
        body = {
            "prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        patience_s = {"at once": 0.0, "before the first": self._random.uniform(0.01, 0.4)}
        leave_after = self._length(TOKENS)
        url = "http://{}:{}/v1/completions".format(*agent.address)
        try:
            async with asyncio.timeout(patience_s.get(request.end)):
                async with client.post(url, json=body) as response:
                    if response.status != 200:
                        request.why = (await response.text())[:300]
                        return
                    pieces = 0
                    async for event in _events(response):
                        pieces += self._take(request, event, began_s)
                        if request.end == "in the middle" and pieces >= leave_after:
                            return
        except TimeoutError:
            if request.end not in patience_s:
                request.why = "nothing came for minutes"
        except (aiohttp.ClientError, OSError) as error:
            request.why = f"{type(error).__name__}: {error}"
        finally:
            request.took_s = time.monotonic() - began_s
            places.release()
            if request.finish:
                turns = f"{request.prompt} {request.text}".split(" ")[:EARLIER_WORDS]
                self._earlier = [*self._earlier, " ".join(turns)][-EARLIER:]

    def _take(self, request: Request, event: dict[str, Any], began_s: float) -> int:
        """An event of the stream; 1 where it has text."""
        if error := event.get("error"):
            request.why = str(error.get("message"))
        if usage := event.get("usage"):
            request.count = usage["completion_tokens"]
        pieces = 0
        for choice in event.get("choices", ()):
            request.finish = choice["finish_reason"] or request.finish
            if text := choice["text"]:
                request.first_s = request.first_s or time.monotonic() - began_s
                request.text += text
                pieces = 1
        return pieces

    async def _look(self) -> None:
        """Look at the memory of every process."""
        seen = await asyncio.to_thread(self._processes)
        while True:
            for name, process in seen.items():
                with suppress(psutil.Error):  # it ended: that is found in another way
                    rss = process.memory_info().rss
                    self.result.memory.setdefault(name, []).append(rss)
            await asyncio.sleep(LOOK_S)

    def _processes(self) -> dict[str, psutil.Process]:
        found = {}
        for agent in self._house.agents:
            found[f"agent {agent.number}"] = psutil.Process(agent.pid)
            for kind in (STAGE, TEXT):
                for process in agent.processes(kind):
                    found[f"{kind.rpartition('.')[2]} {agent.number}"] = process
        return found

    def _check(self) -> None:
        """What is wrong now that all have ended."""
        wrong, agents = self.result.wrong, self._house.agents
        try:
            until(lambda: all(a.running() == 0 for a in agents), FREE_S, "no answer runs")
            until(lambda: not any(map(active, agents)), FREE_S, "the head says so")
        except AssertionError as error:
            wrong.append(f"{error}: {[(a.running(), active(a)) for a in agents]}")
        for request in self.result.requests:
            if why := self._wrong(request):
                wrong.append(f"{request.begin}, {request.end}: {why}")

    def _wrong(self, request: Request) -> str:
        if request.why:
            return request.why
        if request.end == "waits":
            if request.finish not in ("length", "stop"):
                return "an answer that was waited for did not end"
            if request.finish == "length" and request.count != request.tokens:
                return f"{request.count} tokens instead of {request.tokens}"
        if self._fake is not None:
            # As `answers.told`: of this prompt, by the model file alone.
            ids = [BOS, *request.prompt.encode()]
            read = len(request.text.encode()) + 8  # at least as many tokens, each a byte
            tokens = request.tokens if request.finish else min(request.tokens, read)
            answer = fake_models.truth(self._fake, ids, tokens)
            whole = bytes(answer).decode("utf-8", "replace")
            if request.finish and request.text != whole:
                return "another answer than the model's"
            if not whole.startswith(request.text):
                return "another beginning than the model's"
        return ""


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The stream's events."""
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield json.loads(data)


def active(agent: Agent) -> int:
    """Answers that run or wait in the ring, by its head's last word that reached this agent."""
    code, plan = agent.request("GET", "/halka/plan")
    return int(plan["timed"].get("active", 0)) if code == 200 and plan else 0


def house_of(folder: Path, fake: bool, context: int = 4096) -> tuple[House, Path]:
    """Two agents, not started, and the model that the first one is given."""
    if fake:
        model = fake_models.write(
            folder / "thousand.gguf", 4, context=context, end_every=0, delay_s=0.002
        )
        return House(folder, 2), model
    return House(folder, 2, HALKA_BACKEND="llama_cpp", HALKA_CONTEXT=str(context)), smollm2()


def main(words: Sequence[str]) -> int:
    """0: as it should be."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--requests", type=int, default=1000)
    reader.add_argument("--seconds", type=float, default=600.0)
    reader.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    reader.add_argument("--fake", action="store_true")
    given = reader.parse_args(words)
    engine = "the fake engine" if given.fake else smollm2().name
    say(f"{processor()}, commit {commit()}, two agents, {engine}, seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        house, model = house_of(Path(folder), given.fake)
        try:
            done = house.agents[0].word("pull", str(model))
            assert done.returncode == 0, done.stderr
            house.start()
            house.serving(within_s=90)
            run = Thousand(house, given.seed, model if given.fake else None)
            result = asyncio.run(run.run(given.requests, given.seconds))
        finally:
            house.close()
    say("\n".join(result.told()))
    return 1 if result.wrong or result.grown() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
