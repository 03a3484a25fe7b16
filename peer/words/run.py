"""`halka run`: settings read and checked, then the agent itself, in the foreground."""

from __future__ import annotations

from argparse import Namespace

from peer import config


def command(args: Namespace) -> int:
    """Runs until it is told to end; its exit code. Raises: ConfigError, HalkaError."""
    flags = {key: value for key, value in vars(args).items() if key != "word"}
    settings, warnings = config.load(flags=flags)
    from peer.daemon import main

    return main(settings, warnings)
