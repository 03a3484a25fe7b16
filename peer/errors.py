"""Every exception of halka.

HalkaError
├── ConfigError        settings that cannot be used; raised by config, shown by cli (exit 2)
├── PeerError          something at a distance failed; retried or re-planned by whoever awaited it
│   ├── PeerLost       the peer is gone or silent
│   ├── ProtocolError  the peer sent what the protocol does not allow (bytes, sizes, versions)
│   └── StalePlan      the message belongs to a plan or term that is over
├── ModelError         a model, manifest or part that cannot be used; shown by cli and api
│   ├── GGUFError      a file that is not the GGUF it claims to be; names the byte offset
│   └── PartError      a part that is missing, damaged or of the wrong hash
├── NoPlan             nothing can serve the model now; says what is missing (HTTP 503)
├── BackendError       an engine's process failed; raised by survey, logged, tried again
├── AnswerFailed       an answer that began cannot go on; says why (error event in the stream)
├── RequestError       the client's request is wrong (HTTP 400 unless the status says otherwise)
└── CommandError       what was typed cannot be done; shown by cli with its exit code
"""

from __future__ import annotations


class HalkaError(Exception):
    """Root of every error that halka raises on purpose. The text is for a tired person at night."""


class ConfigError(HalkaError):
    """A setting that cannot be used. Raised by `config`, handled by `cli.main` (exit 2)."""


class PeerError(HalkaError):
    """Something at a distance failed. Handled by retrying or re-planning."""


class PeerLost(PeerError):
    """The peer is gone or silent."""


class ProtocolError(PeerError):
    """Bytes that the protocol does not allow. The message is dropped, the sender is named."""


class StalePlan(PeerError):
    """The message belongs to a plan or term that is over. Dropped."""


class ModelError(HalkaError):
    """A model, manifest or part that cannot be used."""


class GGUFError(ModelError):
    """A file that is not the GGUF it claims to be. Raised by `models.gguf` before any use."""

    def __init__(self, why: str, offset: int | None = None) -> None:
        self.offset = offset
        super().__init__(why if offset is None else f"{why} (at byte {offset})")


class PartError(ModelError):
    """A part that is missing, damaged or of the wrong hash."""


class NoPlan(HalkaError):
    """Nothing can serve the model now; says what is missing. HTTP 503."""


class BackendError(HalkaError):
    """The process of an engine failed. Raised by `planning.survey`, logged and tried again."""


class AnswerFailed(HalkaError):
    """An answer that began cannot go on; says why. The stream ends with an error event."""


class RequestError(HalkaError):
    """The client's request is wrong. Raised in `api`, answered in the dialect's own shape."""

    def __init__(
        self,
        why: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        self.status, self.kind, self.param, self.code = status, kind, param, code
        super().__init__(why)


class CommandError(HalkaError):
    """What the user typed cannot be done. Raised by `words`, shown by `cli.main`.

    mend: the one command or setting that mends it. exit_code: 1 failure · 2 usage or settings ·
    3 agent not running · 4 degraded.
    """

    def __init__(self, why: str, mend: str = "", exit_code: int = 1) -> None:
        self.mend, self.exit_code = mend, exit_code
        super().__init__(why)
