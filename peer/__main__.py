"""`python -m peer` is `halka`."""

from peer.cli import entry

entry()
