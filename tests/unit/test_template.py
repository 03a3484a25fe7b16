"""models.template: what transformers writes, and nothing that a template should not do."""

from __future__ import annotations

import time
from typing import Any

import pytest

from peer.errors import RequestError
from peer.models import template
from peer.models.template import ChatTemplate, choose

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>"},
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, messages: list[dict[str, Any]] = CHAT, **tokens: str) -> str:
    return ChatTemplate("tokenizer.chat_template", source, **tokens).render(messages)


def test_the_template_of_smollm2_is_written_out_exactly() -> None:
    assert render(SMOLLM2) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(SMOLLM2, CHAT[1:]).startswith("<|im_start|>system\nYou are a helpful AI")


def test_blocks_leave_no_newlines_and_no_indentation_behind() -> None:
    source = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.role }};\n  {% endif %}\n{% endfor %}\n"
    )
    assert render(source) == "system;\nuser;\n"


def test_bos_eos_loop_controls_generation_and_dates_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert render(source, bos="<s>", eos="</s>") == "<s>Be brief.</s>4"


def test_tojson_is_plain_json() -> None:
    assert render("{{ messages[1] | tojson }}") == '{"role": "user", "content": "Hi <b>"}'
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": "é"\n}'


def test_what_the_template_raises_reaches_the_client_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.code == "template_refused"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__.datetime }}",
    "{{ (messages | attr('append'))({}) }}{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'root'}) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) | attr('x') .y }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_but_its_messages(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.code == "template_failed"
    assert "tokenizer.chat_template" in str(caught.value)


BROKEN = [
    "{% if %}",
    "{{ messages | nofilter }}",
    "{{ nothing.inside }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].role }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 2**30 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 2 ** 999999999 }}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "{{ '\\ud800' }}",
    "{{ 'a' + 1 }}",
    "{{ strftime_now(1) }}",
    "{" * 2000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "x" * (template.SOURCE_CHARS_MAX + 1),
]


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_or_greedy_template_is_named_in_a_client_error(source: str) -> None:
    before = time.monotonic()
    with pytest.raises(RequestError, match="pull another build") as caught:
        render(source)
    assert caught.value.code == "template_failed"
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - before < 2


def test_output_is_cut_off_as_soon_as_it_is_too_long() -> None:
    source = (
        "{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    )
    with pytest.raises(RequestError, match="more than 5000 characters"):
        ChatTemplate("t", source).render(CHAT, 5000)


def test_the_plain_template_is_chosen_before_named_ones_and_the_generic_only_without_any() -> None:
    key = "tokenizer.chat_template"
    spellings = {1: "<s>", 2: "</s>"}.__getitem__
    metadata = {
        f"{key}.tool_use": "T", f"{key}.default": "D", key: "{{ bos_token }}P{{ eos_token }}",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert choose(metadata, spellings).render(CHAT) == "<s>P</s>"
    del metadata[key]
    assert choose(metadata, spellings).render(CHAT) == "D"
    del metadata[f"{key}.default"]
    assert choose(metadata, spellings).name == f"{key}.tool_use"
    generic = choose({}, spellings)
    assert generic.render(CHAT[1:]) == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
