"""From token ids to text that is safe to show, as it comes. Pure.

A token may end in the middle of a character and a stop string may begin in one token and end three
later: what is not certain yet is held back. Whatever the split of the tokens, the text is the same.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from peer.errors import AnswerFailed


class Deltas:
    """The text of one answer. `stopped`: a stop string was met; `tokens`: ids taken until then.

    pieces: the bytes of every token id. stops: the answer ends before the first of them that is
    complete (of two that are complete at once, the longer one); empty ones mean nothing.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Iterable[str] = ()) -> None:
        self._pieces = pieces
        self._stops = tuple(sorted({stop for stop in stops if stop}, key=len, reverse=True))
        # Invalid bytes become U+FFFD, but only once no byte to come could make them valid.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False
        self.tokens = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Take tokens; the text that is certain now and was not before.

        Raises: AnswerFailed for an id that the model does not have.
        """
        shown: list[str] = []
        for token in ids:
            if self.stopped:
                break
            if not 0 <= token < len(self._pieces):
                raise AnswerFailed(
                    f"the ring sent token {token}, but the model has only {len(self._pieces)}"
                )
            self.tokens += 1
            if piece := self._pieces[token]:
                shown.append(self._show(self._decoder.decode(piece)))
        return "".join(shown)

    def flush(self) -> str:
        """The answer is over: the rest of its text, nothing where it was stopped."""
        if self.stopped:
            return ""
        shown = self._show(self._decoder.decode(b"", final=True))
        if self.stopped:  # by a stop string that contains U+FFFD
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _show(self, text: str) -> str:
        """Add text to what is held; what of it is certain, cut before a stop string."""
        held = self._held + text
        if not self._stops or not text:
            self._held = held if self._stops else ""
            return "" if self._stops else held
        cut = self._stop_in(held)
        if cut is not None:
            self.stopped, self._held = True, ""
            return held[:cut]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _stop_in(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        ends = ((text.find(stop) + len(stop), stop) for stop in self._stops if stop in text)
        first = min(ends, key=lambda end: (end[0], -len(end[1])), default=None)
        return None if first is None else first[0] - len(first[1])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
