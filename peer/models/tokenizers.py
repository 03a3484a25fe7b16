"""Whether two models speak the same token ids, from their metadata alone. Pure.

A model can guess another one's tokens only where an id means the same text to both. As in
llama.cpp (common/speculative.cpp: common_speculative_are_compatible), vocabularies may differ by
some padding at their end, and in the spelling of their first few control words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

PADDING_MAX = 128  # ids that one vocabulary may have more than the other
CONTROL_IDS = 5  # the first ids: <unk>, <s>, </s>, … are spelled differently by some converters
_DIGITS = 16  # of a hash, in a mark: far more than vocabularies there are


def difference(target: Mapping[str, Any], draft: Mapping[str, Any]) -> str:
    """In what the draft model's tokenizer is not the target's, in words, or "". Both: metadata."""
    ours, theirs = (_kind(metadata) for metadata in (target, draft))
    if ours != theirs:
        return f"its tokenizer is of the kind {theirs or 'unknown'}, not {ours or 'unknown'}"
    tokens, guessed = _tokens(target), _tokens(draft)
    if not tokens or not guessed:
        return "its vocabulary is not told in its header"
    if abs(len(tokens) - len(guessed)) > PADDING_MAX:
        return f"its vocabulary has {len(guessed)} tokens, not {len(tokens)}"
    for token, (a, b) in enumerate(zip(tokens, guessed, strict=False)):
        if token >= CONTROL_IDS and a != b:
            return f"token {token} is {_shown(b)} to it, not {_shown(a)}"
    for name in ("bos", "eos"):
        added = [metadata.get(f"tokenizer.ggml.add_{name}_token") for metadata in (target, draft)]
        ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for metadata in (target, draft)]
        if None not in added and (added[0] != added[1] or (added[0] and ids[0] != ids[1])):
            return f"it {'begins' if name == 'bos' else 'ends'} texts with another token"
    return ""


def mark(metadata: Mapping[str, Any]) -> str:
    """What tells tokenizers apart for those who have not both headers; "" where there is none.

    kind:tokens:hash:hash. The hashes cover the vocabulary up to the last two multiples of
    PADDING_MAX within it, so that two of which one is padded have a place in common.
    """
    tokens = _tokens(metadata)
    if not tokens:
        return ""
    last = len(tokens) // PADDING_MAX * PADDING_MAX
    hashes = [_hash(tokens[CONTROL_IDS:end]) for end in (last, last - PADDING_MAX) if end > 0]
    return ":".join([_kind(metadata)[:32], str(len(tokens)), *hashes])


def same(target: str, draft: str) -> bool:
    """Whether two marks may be of one tokenizer. Where one is unknown they may."""
    if not target or not draft:
        return True
    (ours, tokens, *hashes), (theirs, guessed, *others) = target.split(":"), draft.split(":")
    if ours != theirs or not (tokens.isdecimal() and guessed.isdecimal()):
        return False
    if abs(int(tokens) - int(guessed)) > PADDING_MAX:
        return False
    at, other = (_ends(int(count)) for count in (tokens, guessed))
    known, found = dict(zip(at, hashes, strict=False)), dict(zip(other, others, strict=False))
    return all(known[end] == found[end] for end in known.keys() & found.keys())


def _ends(tokens: int) -> tuple[int, int]:
    last = tokens // PADDING_MAX * PADDING_MAX
    return last, last - PADDING_MAX


def _kind(metadata: Mapping[str, Any]) -> str:
    """`tokenizer.ggml.model`: llama, gpt2, … without what would make a mark unreadable."""
    return str(metadata.get("tokenizer.ggml.model", "")).replace(":", "")


def _tokens(metadata: Mapping[str, Any]) -> Sequence[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) else []


def _hash(tokens: Sequence[str]) -> str:
    text = "\0".join(map(str, tokens)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:_DIGITS]


def _shown(token: object) -> str:
    return repr(token)[:24]
