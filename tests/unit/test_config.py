"""Settings: file, then environment, then flags; checked once, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peer.config import SPARE_AUTO, Config, load
from peer.errors import ConfigError


def home(tmp_path: Path, text: str = "") -> dict[str, str]:
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    return {"HALKA_HOME": str(tmp_path)}


def test_an_empty_file_is_a_good_file(tmp_path: Path) -> None:
    assert load(home(tmp_path), {}) == (Config(home=tmp_path), [])


def test_flags_beat_the_environment_and_the_environment_beats_the_file(tmp_path: Path) -> None:
    environment = home(tmp_path, 'threads = 1\ncontext = 100\nmemory = "2GiB"\nmdns = false')
    config, _ = load(environment | {"HALKA_THREADS": "2", "HALKA_CONTEXT": "200"}, {"threads": 3})
    assert (config.threads, config.context, config.memory) == (3, 200, 2 << 30)
    assert config.mdns is False


def test_lists_and_addresses_are_read_from_either_form(tmp_path: Path) -> None:
    environment = home(tmp_path, 'peers = ["10.0.0.5:42553"]')
    config, _ = load(environment | {"HALKA_INTERFACES": "eth0, 10.0.0.2"}, {"http": "[::1]:80"})
    assert config.peers == ("10.0.0.5:42553",)
    assert config.interfaces == ("eth0", "10.0.0.2")
    assert (config.http_host, config.http_port) == ("::1", 80)


def test_a_setting_that_does_not_exist_is_a_warning_with_the_one_that_was_meant(
    tmp_path: Path,
) -> None:
    config, (warning,) = load(home(tmp_path) | {"HALKA_BACKEN": "fake"}, {})
    assert config.backend == "auto"
    assert "`backend`" in warning


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": 70000}, "is not a port"),
        ({"threads": -1}, "whole number"),
        ({"threads": True}, "whole number"),
        ({"context": "many"}, "whole number"),
        ({"memory": "8GB"}, "8GiB"),
        ({"memory": "nanGiB"}, "8GiB"),
        ({"http": "127.0.0.1"}, "host:port"),
        ({"peers": "10.0.0.5"}, "host:port"),
        ({"peers": 5}, "list of strings"),
        ({"mdns": "perhaps"}, "true or false"),
        ({"backend": "tpu"}, "one of auto"),
        ({"cluster": ""}, "needs a name"),
        ({"cluster": "a\nb"}, "short text"),
        ({"model": "x" * 65}, "short text"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load(home(tmp_path), settings)
    assert f"--{next(iter(settings))}" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(home(tmp_path, "threads ="), {})


@pytest.mark.parametrize(
    ("told", "means"),
    [("auto", SPARE_AUTO), ("off", 0), ("OFF", 0), ("20GiB", 20 << 30), (0, 0), ("12345", 12345)],
)
def test_spare_is_auto_off_or_a_size(tmp_path: Path, told: str | int, means: int) -> None:
    assert load(home(tmp_path), {})[0].spare == SPARE_AUTO
    assert load(home(tmp_path), {"spare": told})[0].spare == means


@pytest.mark.parametrize("told", ["-1", -1, "some", "20 GB", True])
def test_spare_that_is_neither_is_refused_with_what_would_be_right(
    tmp_path: Path, told: Any
) -> None:
    with pytest.raises(ConfigError, match="`spare` is auto, off or a size such as 8GiB"):
        load(home(tmp_path), {"spare": told})
