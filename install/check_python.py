"""Says in one sentence why this Python cannot carry halka; says nothing where it can.

Run by install.sh with each candidate, so it must be readable by every Python 3.6 and later.
Argument: system or user.
"""

import sys


def why_not(mode: str) -> str:
    """The sentence, without its full stop."""
    version = ".".join(map(str, sys.version_info[:2]))
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"{sys.executable} is {version}"
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return f"{sys.executable} ({version}) comes without venv"
    if mode == "system" and sys.base_prefix.startswith(("/home/", "/root/", "/Users/")):
        return f"{sys.base_prefix} ({version}) lies in a home folder, which a service cannot read"
    return ""


if __name__ == "__main__":
    sys.stdout.write(why_not(sys.argv[1]))
