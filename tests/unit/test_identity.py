"""Who a peer is, across restarts, copies, damage and hostile permissions."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import zmq

from peer.cluster import identity as module
from peer.cluster.identity import Identity, peer_id_of
from peer.errors import ConfigError
from peer.protocol import Sighted


def opened(home: Path) -> Identity:
    """An identity as the next start finds it; the lock is let go at once."""
    made = Identity(home)
    made.close()
    return made


def a_peer() -> Sighted:
    key = zmq.curve_keypair()[0].decode()
    return Sighted(peer_id_of(key), key, ("tcp://10.0.0.5:42553",))


def test_the_same_folder_gives_the_same_peer_with_a_higher_incarnation(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert (first.peer_id, first.public, first.secret) == (
        second.peer_id,
        second.public,
        second.secret,
    )
    assert second.incarnation > first.incarnation
    assert re.fullmatch("[a-z2-7]{16}", first.peer_id)
    assert peer_id_of(first.public) == first.peer_id


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    made = opened(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "identity.json").stat().st_mode & 0o777 == 0o600
    assert made.secret not in repr(made)
    (home / "identity.json").chmod(0o644)
    opened(home)
    assert (home / "identity.json").stat().st_mode & 0o777 == 0o600


def test_terms_and_peers_survive_a_restart_and_terms_never_go_back(tmp_path: Path) -> None:
    first = opened(tmp_path)
    met = (a_peer(), a_peer())
    first.store_term(7)
    first.store_term(5)
    first.remember(met)
    second = opened(tmp_path)
    assert second.term == 7
    assert second.remembered() == met


def test_a_copied_folder_makes_a_new_identity_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path / "a")
    first.store_term(9)
    first.remember([a_peer()])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = opened(tmp_path / "b")
    assert copy.peer_id != first.peer_id
    assert "copied or moved" in caplog.text
    assert first.peer_id in caplog.text
    assert copy.term == 0  # what the other one claimed is not its own
    assert copy.remembered() == ()
    assert opened(tmp_path / "a").peer_id == first.peer_id


def test_a_folder_on_another_machine_makes_a_new_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = opened(tmp_path).peer_id
    monkeypatch.setattr(module, "machine_id", lambda: "another machine")
    assert opened(tmp_path).peer_id != here


@pytest.mark.parametrize("name", ["identity.json", "state.json", "peers.json"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 4096, id="zeros"),
        pytest.param(b'{"public": 3', id="half"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b" " * (2 << 20), id="huge"),
        pytest.param(b'{"term": -1, "incarnation": "x"}', id="wrong"),
        pytest.param(b'{"public": "a", "secret": "b", "bound_to": "c"}', id="no keys"),
    ],
)
def test_a_damaged_file_is_made_anew_with_a_warning(
    tmp_path: Path, name: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path)
    first.store_term(3)
    first.remember([a_peer()])
    (tmp_path / name).write_bytes(content)
    caplog.clear()
    again = opened(tmp_path)
    again.remembered()
    again.store_term(4)
    assert [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "damaged" in caplog.text
    assert (again.peer_id == first.peer_id) == (name != "identity.json")
    assert again.incarnation > first.incarnation
    assert opened(tmp_path).term == 4


def test_keys_that_do_not_fit_each_other_are_made_anew(tmp_path: Path) -> None:
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    text = (tmp_path / "a" / "identity.json").read_text()
    (tmp_path / "a" / "identity.json").write_text(text.replace(a.public, b.public))
    assert opened(tmp_path / "a").peer_id not in (a.peer_id, b.peer_id)


def test_a_second_agent_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = Identity(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}.*already uses.*HALKA_HOME"):
        Identity(tmp_path)
    first.close()
    opened(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_a_folder_of_another_user_is_refused_with_what_mends_it(tmp_path: Path) -> None:
    opened(tmp_path)
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(ConfigError, match=r"belongs to user 12345.*sudo chown -R 0 "):
        opened(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_with_what_mends_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="chown"):
        Identity(tmp_path / "file" / "home")


def test_a_failed_write_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = opened(tmp_path)
    made.store_term(3)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            made.store_term(4)
        with pytest.raises(ConfigError, match="free disk space"):
            opened(tmp_path)
    assert made.term == 3
    assert opened(tmp_path).term == 3
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 41, "\x00" * 40, "ü" * 40, '"' * 40, "#" * 40, "~" * 40]
)
def test_what_is_no_key_has_no_peer_id(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        peer_id_of(key)
