"""models.text and models.vocabulary: a real text process, honest, hostile, hanging and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import gguf
import pytest

from peer.errors import ModelError, NoPlan, RequestError
from peer.models import text
from peer.models.text import Text
from tests.conftest import Until

BOS, EOS = 256, 257
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def head(folder: Path, template: str | None = PLAIN) -> Path:
    """The head.gguf of a fake model with this chat template."""
    writer = gguf.GGUFWriter(folder / "head.gguf", "fake")
    writer.add_uint32("tokenizer.ggml.bos_token_id", BOS)
    writer.add_uint32("tokenizer.ggml.eos_token_id", EOS)
    if template is not None:
        writer.add_string("tokenizer.chat_template", template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "head.gguf"


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def pid_of(words: Text) -> int:
    assert words._process is not None
    return words._process.pid


async def test_chats_and_prompts_become_ids_with_one_bos_and_pieces_give_the_bytes(
    tmp_path: Path,
) -> None:
    words = await Text.open("fake", head(tmp_path))
    ids = await words.ids_of_chat(chat("é"), context_tokens=64)
    assert ids == [BOS, *"[user]é".encode()]
    assert b"".join(words.pieces[i] for i in ids) == "[user]é".encode()
    assert await words.ids_of_prompt("hé", context_tokens=64) == [BOS, *"hé".encode()]
    assert await words.ids_of_prompt("", context_tokens=64) == [BOS]
    assert words.ends == {EOS}
    await words.close()


async def test_a_model_without_a_template_is_asked_in_the_generic_one(tmp_path: Path) -> None:
    words = await Text.open("fake", head(tmp_path, None))
    ids = await words.ids_of_chat(chat("hi"), context_tokens=64)
    assert b"".join(words.pieces[i] for i in ids).endswith(b"assistant\n")
    await words.close()


async def test_many_ask_at_once_and_each_gets_its_own_ids(tmp_path: Path) -> None:
    words = await Text.open("fake", head(tmp_path))
    asked = [words.ids_of_prompt(f"text {i}", context_tokens=64) for i in range(50)]
    answers = await asyncio.gather(*asked)
    assert answers == [[BOS, *f"text {i}".encode()] for i in range(50)]
    await words.close()


HANGS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HANGS_ON = "{% if 'hang' in messages[0].content %}" + HANGS + "{% endif %}ok"


async def test_a_template_that_hangs_costs_two_seconds_and_only_that_request(
    tmp_path: Path,
) -> None:
    words = await Text.open("fake", head(tmp_path, HANGS_ON))
    pid, before = pid_of(words), time.monotonic()
    with pytest.raises(RequestError, match=r"`tokenizer.chat_template`.*within 2 s") as caught:
        await words.ids_of_chat(chat("hang"), context_tokens=64)
    assert time.monotonic() - before < 4
    assert (caught.value.status, caught.value.code) == (400, "template_failed")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert await words.ids_of_chat(chat("go on"), context_tokens=64) == [BOS, *b"ok"]
    await words.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
async def test_a_template_that_wants_a_gibibyte_gets_an_error_and_no_memory(tmp_path: Path) -> None:
    words = await Text.open("fake", head(tmp_path, "{{ 'a'.ljust(3000000000) }}"))
    pid = pid_of(words)
    with pytest.raises(RequestError, match="MemoryError"):
        await words.ids_of_chat(chat("x"), context_tokens=64)
    assert peak_bytes(pid) < 512 << 20
    await words.close()


async def test_a_killed_text_process_is_started_again_unnoticed(tmp_path: Path) -> None:
    words = await Text.open("fake", head(tmp_path))
    os.kill(pid_of(words), signal.SIGKILL)
    assert await words.ids_of_prompt("a", context_tokens=64) == [BOS, 97]
    await words.close()


async def test_a_client_who_leaves_in_the_middle_does_not_mix_up_the_next(tmp_path: Path) -> None:
    words = await Text.open("fake", head(tmp_path, HANGS_ON))
    leaving = asyncio.create_task(words.ids_of_chat(chat("hang"), context_tokens=64))
    done, _ = await asyncio.wait({leaving}, timeout=0.1)
    assert not done
    leaving.cancel()
    assert await words.ids_of_chat(chat("go on"), context_tokens=64) == [BOS, *b"ok"]
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await words.close()


async def test_closing_ends_who_still_asks_and_starts_nothing_again(
    tmp_path: Path, until: Until
) -> None:
    words = await Text.open("fake", head(tmp_path, HANGS_ON))
    asking = asyncio.gather(
        *(words.ids_of_chat(chat(say), context_tokens=64) for say in ("hang", "on", "and on")),
        return_exceptions=True,
    )
    await until(lambda: words._turn.locked(), 5, "the first asks")
    await words.close()
    assert [type(error) for error in await asking] == [NoPlan] * 3
    with pytest.raises(NoPlan, match="ask again"):
        await words.ids_of_prompt("x", context_tokens=64)


async def test_a_text_that_cannot_fit_is_refused_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = await Text.open("fake", head(tmp_path, "{{ messages[0].content * 9 }}"))

    async def never(question: object) -> None:
        raise AssertionError("it was sent")

    with monkeypatch.context() as patched:
        patched.setattr(words, "_answer_to", never)
        for ask in (
            words.ids_of_prompt("x" * 10000, context_tokens=100),
            words.ids_of_chat(chat("x" * 10000), context_tokens=100),
        ):
            with pytest.raises(RequestError, match=r"10000.* 100 ") as caught:
                await ask
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    with pytest.raises(RequestError) as caught:  # short messages, long text
        await words.ids_of_chat(chat("x" * 1000), context_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    await words.close()


@pytest.mark.parametrize(
    ("engine", "because"), [("no_such", "no engine `no_such`"), ("llama_cpp", "head.gguf")]
)
async def test_words_that_cannot_be_read_are_a_model_error_that_says_why(
    tmp_path: Path, engine: str, because: str
) -> None:
    path = head(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match=because):
        await Text.open(engine, path)
    with pytest.raises(ModelError, match="absent"):
        await Text.open("fake", tmp_path / "absent")


CHATTER = """
import os, backends
from backends import fake
class Loud(fake.FakeVocabulary):
    def encode(self, text, *, special):
        os.write(1, b"hello from C " * 1000)
        assert not os.read(0, 1)
        if "crash" in text:
            os.abort()
        return [99999] if "lie" in text else super().encode(text, special=special)
fake.FakeVocabulary = Loud
from peer.models import vocabulary
raise SystemExit(vocabulary.main())
"""


async def test_a_tokenizer_that_prints_lies_or_crashes_harms_only_its_request(
    tmp_path: Path,
) -> None:
    words = await Text.open("fake", head(tmp_path), command=(sys.executable, "-c", CHATTER))
    assert await words.ids_of_prompt("a", context_tokens=64) == [BOS, 97]
    with pytest.raises(RequestError, match="tokenizer did not work"):
        await words.ids_of_prompt("crash", context_tokens=64)
    with pytest.raises(ModelError, match="ids that the model does not have"):
        await words.ids_of_prompt("lie", context_tokens=64)
    assert await words.ids_of_prompt("b", context_tokens=64) == [BOS, 98]
    await words.close()


@pytest.mark.parametrize(
    "says", [b"\xff\xff\xff\xff", b"\x05\x00\x00\x00hello", b"\x00\x00\x00\x00", b""]
)
async def test_nonsense_from_a_text_process_is_a_model_error(tmp_path: Path, says: bytes) -> None:
    command = (sys.executable, "-c", f"import os; os.write(1, {says!r})")
    with pytest.raises(ModelError, match="cannot be read"):
        await Text.open("fake", head(tmp_path), command=command)


async def test_the_text_process_ends_when_its_agent_does(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *text.COMMAND, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), 20) == 0
