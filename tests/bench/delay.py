"""A slow cable for processes on one machine: bytes pass on after a while, by a relay in user space.

python -m tests.bench.delay SECONDS HOST:PORT…: listens on a port of its own for each of these,
prints the ports on one line, and passes what comes on to the address behind it, and back, each way
after so many seconds. It ends when its stdin does. `relayed` runs it.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from peer import children

READ_BYTES = 1 << 18
Due = tuple[float, bytes]  # when, and what; b"": the end


def passes(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Pass all that comes on, later, until it ends."""
    on_the_way: queue.SimpleQueue[Due] = queue.SimpleQueue()

    def sends() -> None:
        while True:
            due_s, data = on_the_way.get()
            time.sleep(max(0.0, due_s - time.monotonic()))
            try:
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
            except OSError:
                return  # whoever listened is gone

    threading.Thread(target=sends, daemon=True).start()
    data = b"."
    while data:
        try:
            data = source.recv(READ_BYTES)
        except OSError:
            data = b""
        on_the_way.put((time.monotonic() + delay_s, data))


def serves(listener: socket.socket, address: tuple[str, int], delay_s: float) -> None:
    """Connect everybody who comes."""
    while True:
        ours, _ = listener.accept()
        try:
            theirs = socket.create_connection(address)
        except OSError:  # nobody listens there (any more)
            ours.close()
            continue
        for one, other in ((ours, theirs), (theirs, ours)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=passes, args=(one, other, delay_s), daemon=True).start()


def main(words: Sequence[str]) -> int:
    """Relay until stdin ends."""
    delay_s, ports = float(words[0]), list[int]()
    for word in words[1:]:
        host, _, port = word.rpartition(":")
        listener = socket.create_server(("127.0.0.1", 0))
        ports.append(listener.getsockname()[1])
        address = host, int(port)
        threading.Thread(target=serves, args=(listener, address, delay_s), daemon=True).start()
    sys.stdout.write(" ".join(map(str, ports)) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    return 0


@contextlib.contextmanager
def relayed(delay_s: float, ports: Sequence[int]) -> Iterator[list[int]]:
    """Ports that lead to these on 127.0.0.1, later; gone afterwards."""
    words = [str(delay_s), *(f"127.0.0.1:{port}" for port in ports)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.delay", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=children.environment(),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        try:
            yield [int(port) for port in process.stdout.readline().split()]
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
