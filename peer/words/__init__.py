"""The words that a user types: one small module for each family of commands.

They are clients of the agent on this machine and decide nothing: they ask over HTTP, draw, and say
in one line each what is wrong and what mends it. `peer.cli` imports a module only when its word
was typed, so that `halka status` starts quickly.
"""
