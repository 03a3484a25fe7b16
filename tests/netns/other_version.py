"""`halka` as a later release will be, as far as peers see: it speaks another protocol version."""

from __future__ import annotations

import sys

import peer.protocol

peer.protocol.PROTOCOL = 99  # before anything else of the agent is imported and takes its value

from peer.cli import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
