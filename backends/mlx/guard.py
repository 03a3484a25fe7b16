"""Ends a child process, and everything that it started, once its parent is gone.

Started with the parent's pipe as stdin, in the child's process group. The child itself could not
do it: while MLX waits for the other ranks of an island it holds the interpreter's lock (measured:
no other Python thread runs during `mx.distributed.init`), and a process that is stopped does
nothing at all. It is run as a file, without the project's packages, so that it starts in
milliseconds and stays small.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Wait until stdin ends: the parent has let go of it, or is dead."""
    while os.read(0, 64):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
