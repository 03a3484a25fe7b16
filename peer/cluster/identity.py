"""Who this peer is: its CURVE key pair, its peer id, and the little that it must remember.

One folder holds it (HALKA_HOME): `identity.json` (the key pair, mode 0600, bound to this machine
and to this folder), `state.json` (the term and the incarnation) and `peers.json` (peers met
before). A folder that was copied, to another machine or to another place, gets a new identity: two
peers must never share one. Every write goes to a temporary file, then to disk, then into place.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from peer.errors import ConfigError
from peer.planning.profile import PEERS_MAX, is_key
from peer.protocol import Sighted, Term

log = logging.getLogger("halka.cluster")

FILE_BYTES_MAX = 1 << 20  # of our own small files; a larger one is damaged
T = TypeVar("T")


class _Keys(msgspec.Struct, frozen=True):
    public: str
    secret: str
    bound_to: str  # see `machine_mark`


class _State(msgspec.Struct, frozen=True):
    term: Term
    incarnation: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


def peer_id_of(key: str) -> str:
    """The peer id that belongs to a CURVE public key (Z85): 80 bits of its hash, in base32.

    Raises: ValueError when it is not a key.
    """
    if not is_key(key):  # z85.decode fails in ways of its own, such as struct.error
        raise ValueError(f"{key[:64]!r} is not a CURVE key: 40 characters of Z85")
    digest = hashlib.blake2b(z85.decode(key), digest_size=10, person=b"halka-peer").digest()
    return base64.b32encode(digest).decode().lower()


def machine_id() -> str:
    """What tells this machine from others, "" where the system does not say."""
    if sys.platform == "darwin":
        return _apple_uuid()
    for file in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            if text := file.read_text(encoding="ascii", errors="replace").strip():
                return text
    return socket.gethostname()


def _apple_uuid() -> str:
    command = ["/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=5, check=True)
        for line in done.stdout.decode(errors="replace").splitlines():
            if "IOPlatformUUID" in line:
                return line.split('"')[-2]
    return socket.gethostname()


def machine_mark(home: Path) -> str:
    """A hash of this machine and of the folder's place on it; the machine's id stays private."""
    text = f"halka\0{machine_id()}\0{home.resolve()}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Identity:
    """This peer's keys and memory. Holds the folder's lock until `close()`.

    public, secret: CURVE keys, Z85. incarnation: higher at every start, so that others tell a
    restart from a reconnect. term: the highest stored one.
    """

    def __init__(self, home: Path) -> None:
        """Open or make the identity in `home`. Raises ConfigError, with what mends it."""
        self.home = home
        self._lock = -1
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self._take_lock()
            keys = self._keys()
            state = self._read("state.json", _State) or _State(0, 0)
            self.public, self.secret = keys.public, keys.secret
            self.peer_id = peer_id_of(keys.public)
            self.term = state.term
            # Also the clock, so that a lost state file does not take the incarnation back.
            self.incarnation = max(state.incarnation + 1, time.time_ns() // 1_000_000)
            self._write("state.json", _State(self.term, self.incarnation))
        except OSError as error:
            self.close()
            raise self._unusable(error) from None
        except ConfigError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def store_term(self, term: int, *, lower: bool = False) -> None:
        """Keep the term across restarts; on disk when this returns. Raises OSError.

        lower: also where a higher one is kept.
        """
        if term > self.term or (lower and term < self.term):
            self._write("state.json", _State(term, self.incarnation))
            self.term = term

    def remembered(self) -> tuple[Sighted, ...]:
        """Peers met before. Hints only."""
        peers = self._read("peers.json", tuple[Sighted, ...]) or ()
        return peers[:PEERS_MAX]

    def remember(self, peers: Iterable[Sighted]) -> None:
        """Keep these for the next start. Raises OSError."""
        self._write("peers.json", tuple(peers)[:PEERS_MAX])

    def close(self) -> None:
        """Let another agent use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_owner(self) -> None:
        owner = self.home.stat().st_uid
        if owner != os.geteuid():
            raise ConfigError(
                f"{self.home} belongs to user {owner}, and halka runs as user {os.geteuid()}. "
                f"Run it as that user, or: sudo chown -R {os.geteuid()} '{self.home}'"
            )

    def _take_lock(self) -> None:
        file = self.home / "lock"
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"another halka agent (process {holder}) already uses {self.home}. "
                "Stop it first, or give this one its own folder with HALKA_HOME"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _keys(self) -> _Keys:
        mark = machine_mark(self.home)
        keys = self._read("identity.json", _Keys)
        if keys is not None:
            try:
                pair = zmq.curve_public(keys.secret.encode()).decode() == keys.public
            except (ValueError, zmq.ZMQError):
                pair = False
            if not pair:
                log.warning("identity=damaged because=the_keys_do_not_fit_each_other")
            elif keys.bound_to == mark:
                (self.home / "identity.json").chmod(0o600)  # also where a copy loosened it
                return keys
            else:
                log.warning(
                    "identity=new because=the folder %s was copied or moved here; the peer "
                    "%s stays what it was in the other place",
                    self.home,
                    peer_id_of(keys.public),
                )
        public, secret = zmq.curve_keypair()
        keys = _Keys(public.decode(), secret.decode(), mark)
        self._write("identity.json", keys)
        # What the other machine met and claimed is not ours.
        for name in ("state.json", "peers.json"):
            (self.home / name).unlink(missing_ok=True)
        log.info("identity=made peer=%s home=%s", peer_id_of(keys.public), self.home)
        return keys

    def _read(self, name: str, shape: type[T]) -> T | None:
        """The file's content, or None where there is none or it is damaged (said in the log)."""
        file = self.home / name
        try:
            with file.open("rb") as stream:
                data = stream.read(FILE_BYTES_MAX + 1)
            if len(data) > FILE_BYTES_MAX:
                raise ValueError("too long")
            return msgspec.json.decode(data, type=shape)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            log.warning("file=%s is damaged (%s) and is made anew", file, error)
            return None

    def _write(self, name: str, value: Any) -> None:
        file = self.home / name
        temporary = file.with_suffix(".tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
            with os.fdopen(handle, "wb") as stream:
                stream.write(msgspec.json.encode(value))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(self.home, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{error.filename or self.home}: {error.strerror}. halka keeps its identity there; "
            f"make the folder writable with: sudo chown -R {os.geteuid()} '{self.home}' && "
            f"chmod -R u+rwX '{self.home}' (or free disk space, if it is full)"
        )
