"""One run of a short-lived process of ours: a JSON order in, a JSON answer out, never left behind.

It leads a process group of its own, so that what it started ends with it, whether it answered,
crashed, took too long or nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from peer import children
from peer.errors import BackendError


async def ask(module: str, order: bytes, within_s: float, lines_max: int = 1) -> bytes:
    """What the process answers. lines_max: of its last words that are told where it fails.

    Raises: BackendError, which ends the sentence "the engine …".
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *children.command(module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=children.environment(),
        )
    except OSError as error:
        raise BackendError(f"cannot be started: {error.strerror}") from None
    try:
        answer, said = await asyncio.wait_for(process.communicate(order), within_s)
    except TimeoutError:
        raise BackendError(f"did not answer within {within_s:.0f} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()
    if not process.returncode:
        return answer
    lines = said.decode("utf-8", "replace").strip().splitlines()[-lines_max:]
    code = process.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    words = " | ".join(line.strip()[:200] for line in lines)
    raise BackendError(f"{how}: {words}" if words else how)
