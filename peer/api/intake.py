"""From an HTTP request to something to answer: its JSON, the model that it means, ids that fit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from peer.api.limits import Limits
from peer.api.service import ServedModel
from peer.errors import NoPlan, RequestError

ALIASES = frozenset({"", "default", "halka", "dummy", "tgi"})
"""Names for whatever is served; the last two are what some clients send when they know none."""

_SMALL_BYTES = 256 << 10  # longer JSON is parsed off the loop


async def read_json(request: web.Request, limits: Limits) -> dict[str, Any]:
    """The body, a JSON object. Raises RequestError.

    Its type must be application/json: a page of another site cannot send that without asking first.
    """
    if request.content_type != "application/json":
        raise RequestError(
            f"the body is {request.content_type}; send it with `Content-Type: application/json`",
            status=415,
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(limits.body_s):
            data = await request.read()
    except TimeoutError:
        raise RequestError("the body did not arrive in time", status=408, code="timeout") from None
    except web.HTTPRequestEntityTooLarge:
        raise RequestError(
            f"the body is longer than {limits.body_bytes} bytes", status=413, code="body_too_large"
        ) from None
    except (web.RequestPayloadError, ValueError) as error:
        raise _not_json(str(error)) from None
    try:
        if len(data) > _SMALL_BYTES:
            body = await asyncio.to_thread(msgspec.json.decode, data)
        else:
            body = msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise _not_json("its text is not UTF-8") from None
    except RecursionError:
        raise _not_json("it is nested too deep") from None
    except msgspec.MsgspecError as error:
        raise _not_json(str(error)) from None
    if not isinstance(body, dict):
        raise _not_json("it must be an object")
    return body


def _not_json(why: str) -> RequestError:
    return RequestError(f"the body is not the JSON that is wanted: {why}", code="invalid_json")


def pick(models: Sequence[ServedModel], name: str) -> ServedModel:
    """The model that a client means. Raises RequestError (404) with the list, NoPlan."""
    if name in ALIASES:
        model = next((m for m in models if m.ready), models[0] if models else None)
        if model is None:
            raise NoPlan("no peer here has a model yet. Get one: halka pull smollm2")
    else:
        model = named(models, name)
    if not model.ready:
        raise NoPlan(model.why or f"{model.id} is not ready yet")
    return model


def named(models: Sequence[ServedModel], name: str) -> ServedModel:
    """The model of this id (or id:latest). Raises RequestError (404) with the list."""
    for model in models:
        if name in (model.id, f"{model.id}:latest"):
            return model
    served = ", ".join(m.id for m in models) or "none. Get one: halka pull smollm2"
    raise RequestError(
        f"there is no model `{name[:200]}` here. Models: {served}",
        status=404,
        param="model",
        code="model_not_found",
    )


def check_ids(ids: Sequence[int], vocabulary: int, context: int, param: str) -> None:
    """Raises RequestError where a prompt is empty, foreign to the model or too long for it."""
    if not ids:
        raise RequestError("the prompt is empty", param=param, code="invalid_value")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise RequestError(
            f"token ids of this model are 0 to {vocabulary - 1}", param=param, code="invalid_value"
        )
    if len(ids) >= context:
        raise RequestError(
            f"the context is {context} tokens, answer included, and the prompt has {len(ids)}. "
            "Shorten it",
            param=param,
            code="context_length_exceeded",
        )
