"""A machine's cable to the switch: pulled, dead, deaf on one side, slow."""

from __future__ import annotations

import json
import subprocess


def ip(*words: str) -> str:
    """What `ip` with these words prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


class Cable:
    """From a device in a namespace to a port of the bridge, which is in one of its own."""

    def __init__(self, namespace: str, bridge: str, port: str) -> None:
        self.namespace, self.bridge, self.port = namespace, bridge, port

    def plug(self) -> None:
        """Put the cable back."""
        ip("-n", self.bridge, "link", "set", self.port, "up")

    def unplug(self) -> None:
        """Pull the cable at the switch: this machine's own interface still has its address."""
        ip("-n", self.bridge, "link", "set", self.port, "down")

    def mute(self) -> None:
        """The switch passes nothing any more, though the cable is in and the lamp is on."""
        self._at_the_switch("state", "disabled")

    def unmute(self) -> None:
        """The switch passes everything again."""
        self._at_the_switch("state", "forwarding")

    def no_multicast(self) -> None:
        """The switch passes no multicast on to this machine: it hears no mDNS."""
        self._at_the_switch("mcast_flood", "off")

    def _at_the_switch(self, setting: str, value: str) -> None:
        words = ["bridge", "link", "set", "dev", self.port, setting, value]
        ip("netns", "exec", self.bridge, *words)

    def lose(self, way: str) -> None:
        """Lose all that this machine sends ("sent"), or all that it is sent ("received"): a token
        bucket that is smaller than any packet. The other way is as it was."""
        bucket = ["tbf", "rate", "8bit", "burst", "1", "limit", "1"]
        words = ["tc", "qdisc", "replace", "dev", self._out_of(way)[1], "root", *bucket]
        ip("netns", "exec", self._out_of(way)[0], *words)

    def lose_nothing(self) -> None:
        """Undo `lose`, and `shape`."""
        for way in ("sent", "received"):
            namespace, device = self._out_of(way)
            words = ["tc", "qdisc", "del", "dev", device, "root"]
            # Fails where there is none.
            subprocess.run(
                ["ip", "netns", "exec", namespace, *words], capture_output=True, check=False
            )

    def _out_of(self, way: str) -> tuple[str, str]:
        """Namespace and device that what goes this way leaves by."""
        ways = {
            "sent": (self.namespace, "eth0"),
            "received": (self.bridge, self.port),
        }
        return ways[way]

    def shape(self, rate: str) -> None:
        """What this machine sends is slowed to a rate, as in 100mbit, by a token bucket."""
        bucket = ["tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
        words = ["tc", "qdisc", "replace", "dev", "eth0", "root", *bucket]
        ip("netns", "exec", self.namespace, *words)

    def received_bytes(self) -> int:
        """What came in over the cable so far, with all headers."""
        (link,) = json.loads(ip("-n", self.namespace, "-s", "-j", "link", "show", "eth0"))
        return int(link["stats64"]["rx"]["bytes"])
