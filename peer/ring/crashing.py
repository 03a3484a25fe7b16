"""What a stage prepares, so that its crash is quick, and told in a few lines."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource


def prepare() -> None:
    """Before the engine is loaded. Where something cannot be set, the crash only tells less."""
    faulthandler.enable(all_threads=False)
    # No core file: it would hold prompts, and dumping gigabytes of weights keeps a process that has
    # crashed alive for seconds, in which nobody knows that it has.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # llama.cpp's own backtrace starts a debugger, which does the same.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
