"""What the API needs of the rest of the peer; the daemon provides it, tests provide a fake one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from peer.protocol import Sampling


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that clients may name. why: what it waits for, while it is not ready."""

    id: str
    created_s: int  # when it was pulled, seconds since 1970
    context: int  # tokens of one request at most
    ready: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of an answer, as they come. finish: "" goes on · "stop" an end token · "length"."""

    ids: tuple[int, ...]
    finish: Literal["", "stop", "length"] = ""


class Words(Protocol):
    """A model's words, as `models.text.Text` has them."""

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of every token id."""
        ...

    @property
    def ends(self) -> AbstractSet[int]:
        """Ids that end an answer."""
        ...

    async def ids_of_chat(
        self, messages: Sequence[dict[str, Any]], *, context_tokens: int
    ) -> list[int]:
        """Token ids of a chat. Raises RequestError."""
        ...

    async def ids_of_prompt(self, text: str, *, context_tokens: int) -> list[int]:
        """Token ids of a text. Raises RequestError."""
        ...


class Service(Protocol):
    """Models, their words, and answers."""

    def models(self) -> Sequence[ServedModel]:
        """Models of this cluster, the one that is served by default first."""
        ...

    async def text(self, model_id: str) -> Words:
        """The words of one of `models`. Raises NoPlan, ModelError."""
        ...

    def context(self, model_id: str) -> int:
        """Tokens of one request at most, prompt and answer together, on the plan that serves."""
        ...

    def answer(
        self,
        request_id: str,
        model_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        tokens_max: int,
        ends: tuple[int, ...],
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a prompt, as it is made. Its last piece has a `finish`.

        Closing (aclose) or cancelling the iterator ends the answer in every stage.
        Raises, as it runs: NoPlan or RequestError before the first piece, AnswerFailed later.
        """
        ...

    def status(self) -> Mapping[str, Any]:
        """What `halka status --json` prints. Plain values."""
        ...

    def plan(self) -> Mapping[str, Any] | None:
        """What `halka plan --json` prints; None while there is no plan."""
        ...

    def profiles(self) -> Mapping[str, Any]:
        """All that a plan is made of; what `halka plan --save` writes. Plain values."""
        ...

    def leaving(self) -> str:
        """Why this peer takes no new answers, as it is going away; "" while it takes them."""
        ...

    def leave(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Go away once others have taken over: how far that is, as `words.state.Going` says.

        Closing the iterator takes nothing back. Raises NoPlan while the peer still starts.
        """
        ...

    def stay(self) -> None:
        """Take `leave` back."""
        ...
