"""The command `halka`: what the user typed, to the module that does it; errors to one line each.

Starts in < 150 ms: nothing heavy is imported at the top, and a word's module only when it was
typed. Exit codes: 0 ok · 1 failure · 2 usage or settings · 3 agent not running · 4 degraded ·
130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from peer import VERSION
from peer.errors import CommandError, ConfigError, HalkaError

INTERRUPTED = 130

EPILOG = """first time:  halka run            (in one terminal, on each machine)
             halka pull smollm2   (on one of them)
             halka chat "Why is the sky blue?"
exit codes:  0 ok, 1 failure, 2 usage or settings, 3 agent not running, 4 degraded"""


PLAN_EPILOG = """examples:  halka plan --with desk:memory=+8GiB
           halka plan --without attic --link mini=1gbit
           halka plan --profiles home.toml --model 70B:q4_k_m
A file of profiles has [[peer]] tables: name, memory="12GiB", cores, cpu_bandwidth="40GB/s",
cpu_flops="500G", gpu="cuda", gpu_memory="8GiB", gpu_bandwidth="200GB/s", gpu_flops="8T",
unified=true, disk="2GB/s", link="1gbit", rtt="0.4ms"; and [[link]]: from, to, bandwidth, rtt."""


def entry() -> None:
    """The installed command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Do what was typed. Returns the exit code; every error is one line, and one that mends it."""
    args = parser().parse_args(argv)  # exits 2 with its own line where it does not understand
    try:
        command = importlib.import_module(f"peer.words.{args.word}").command
        return int(command(args))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `halka status | head`: the reader had enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence
        return _explain(_cause(error), args.word)


def _cause(error: Exception) -> Exception:
    """What went wrong in the agent's TaskGroup, where it was one thing."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _explain(error: Exception, word: str) -> int:
    """One line that says why, one that mends it where that is known. Returns the exit code."""
    match error:
        case CommandError():
            return _fail(str(error), error.mend, error.exit_code)
        case ConfigError():
            return _fail(str(error), "", 2)
        case HalkaError():
            return _fail(str(error), "", 1)
        case OSError():
            return _fail(_sentence(error), "", 1)
    if word == "run" or os.environ.get("HALKA_LOG") == "debug":
        traceback.print_exception(error)  # of a service, the log is all that is left
    return _fail(
        f"a mistake of halka's own: {type(error).__name__}: {error}",
        "HALKA_LOG=debug before the same command shows where; please report that",
        1,
    )


def _fail(why: str, mend: str, code: int) -> int:
    from peer.words.screen import Screen, note

    screen = Screen.of(sys.stderr)
    note(f"halka: {screen.clean(why)}")
    if mend:
        note(f"  mend it: {screen.clean(mend)}")
    return code


def _sentence(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def parser() -> argparse.ArgumentParser:
    """Every word and its flags."""
    top = argparse.ArgumentParser(
        prog="halka",
        description="Runs one language model together on all the machines of a home.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"halka {VERSION}")
    words = top.add_subparsers(dest="word", metavar="COMMAND", required=True)
    _run(_word(words, "run", "run this machine's agent, in the foreground"))
    _status(_word(words, "status", "am I running, who is here, what runs where, what is wrong"))
    _chat(_word(words, "chat", "ask the cluster; without a question, a conversation"))
    _as_json(_word(words, "models", "which models are here"))
    pull = _word(words, "pull", "get a model: a GGUF file, or smollm2")
    pull.add_argument("model", help="path of a GGUF file, or smollm2 (a small one, to try halka)")
    _plan(_word(words, "plan", "who runs which layers, and why; what if"))
    _bench(_word(words, "bench", "how fast the ring is, and the whole model in one process"))
    _as_json(_word(words, "verify", "prove this machine's engines: are their numbers right"))
    _as_json(_word(words, "doctor", "look for what keeps halka from working well here"))
    _word(words, "leave", "stop this machine's agent once others have taken over; Ctrl-C: stay")
    return top


def _word(words: Any, name: str, text: str) -> argparse.ArgumentParser:
    """One command with the two flags that all have: which agent is meant."""
    word: argparse.ArgumentParser = words.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    word.add_argument("--home", metavar="DIR", help="everything that halka stores (HALKA_HOME)")
    word.add_argument("--http", metavar="HOST:PORT", help="where the agent answers (HALKA_HTTP)")
    return word


def _run(word: argparse.ArgumentParser) -> None:
    add = word.add_argument
    add("--port", metavar="N", help="control port; 0 or nothing: chosen and announced")
    add("--cluster", metavar="NAME", help="only peers of the same name meet (home)")
    add("--backend", metavar="NAME", help="auto, llama_cpp, mlx or fake")
    add("--spread", metavar="HOW", help="auto, or all: every peer gets at least one layer")
    add("--threads", metavar="N", help="of the engine; 0: one a physical core")
    add("--context", metavar="TOKENS", help="of one request at most; 0: what fits")
    add("--memory", metavar="SIZE", help="that the engine may use, such as 8GiB; 0: what is free")
    add("--model", metavar="ID", help="the model to serve (the one pulled last)")
    add("--peers", metavar="HOST:PORT,…", help="peers that multicast cannot find")
    add(
        "--interfaces", metavar="NAME,…", help="addresses or interfaces to use (the home network's)"
    )
    add("--mdns", metavar="BOOL", help="true, or false: neither announce nor look by multicast")
    add("--log", metavar="LEVEL", help="debug, info, warning or error")


def _status(word: argparse.ArgumentParser) -> None:
    _as_json(word)
    word.add_argument("--watch", action="store_true", help="draw again every second, until Ctrl-C")


def _chat(word: argparse.ArgumentParser) -> None:
    add = word.add_argument
    add("question", nargs="?", help="one question; without it, a conversation")
    add("--model", metavar="ID", help="the model to ask (the one that is served)")
    add("--temperature", metavar="T", type=float, help="0 is always the likeliest token")
    add("--max-tokens", metavar="N", type=int, help="of the answer at most")
    add("--seed", metavar="N", type=int, help="the same seed draws tokens alike")
    add("--stats", action="store_true", help="print TTFT and TPOT after the answer")


def _plan(word: argparse.ArgumentParser) -> None:
    _as_json(word)
    word.formatter_class = argparse.RawDescriptionHelpFormatter
    word.epilog = PLAN_EPILOG
    if_ = word.add_argument_group("what if (nothing is changed; all but the numbers repeatable)")
    add = if_.add_argument
    add(
        "--with",
        dest="with_",
        metavar="NAME[:CHANGE]",
        action="append",
        help="memory=+8GiB, gpu_memory=8GiB, disk=2GB/s, speed=x2; without CHANGE, one of FILE",
    )
    add("--without", metavar="NAME", action="append", help="a peer were not there")
    add("--only", metavar="NAME,…", action="append", help="only these took part")
    add(
        "--link",
        metavar="NAME=RATE",
        action="append",
        help="a peer's own cable: 1gbit, 5ms (the round trip), or 100mbit,5ms",
    )
    add("--window", metavar="NAME=0-11", action="append", help="a peer ran just these layers")
    add("--rounds", metavar="N", type=int, help="so many rounds")
    add("--objective", choices=("latency", "throughput"), help="of one answer, or of many at once")
    add("--context", metavar="TOKENS", type=int, help="so long a context")
    add("--kv", choices=("f16", "q8_0"), help="a KV cache of this type")
    add("--model", metavar="MODEL", help="its id, a GGUF file, or SIZE:QUANT such as 70B:q4_k_m")
    add("--profiles", metavar="FILE", help="plan off line, with peers from TOML or saved JSON")
    add("--save", metavar="FILE", help="write all that is planned with, as JSON for --profiles")


def _bench(word: argparse.ArgumentParser) -> None:
    _as_json(word)
    word.add_argument("--quick", action="store_true", help="less than a minute; rough numbers")


def _as_json(word: argparse.ArgumentParser) -> None:
    word.add_argument("--json", action="store_true", help="for programs")
