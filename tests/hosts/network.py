"""Hosts on one machine: network namespaces with addresses, names and disks of their own.

What crosses a network crosses one here: every host is a namespace on a bridge, with processes,
/tmp/ray, /dev/shm and a home of its own. The machine itself is where people submit from. It must be
Linux, with root and iproute2.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NETNS = Path("/etc/netns")  # what lies there under a namespace's name is laid over /etc in it
# Its own names, memory and temporary folder, and then the command.
ENTER = """
hostname "$1"
mount --bind "$2/ray" /tmp/ray
mount -t tmpfs -o size=1g tmpfs /dev/shm
shift 2
exec "$@"
"""


def explain_absence() -> str | None:
    """Why there can be no hosts here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    return None if shutil.which("ip") else "network namespaces need iproute2"


def run_ip(*words: str) -> str:
    """`ip` with these words, and what it says."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A namespace: its name on the network, its address and its folder here."""

    name: str
    namespace: str
    address: str
    folder: Path

    @property
    def enter(self) -> list[str]:
        """What stands before a command to run it there."""
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["sh", "-e", "-c", ENTER, "sh", self.name, str(self.folder)]
        return ["ip", "netns", "exec", self.namespace, *own, *script]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def list_processes(self) -> list[int]:
        return [int(pid) for pid in run_ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """As if the power went."""
        while processes := self.list_processes():
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cut_off(self) -> None:
        """As if the cable was pulled: processes go on, packets go nowhere."""
        run_ip("-n", self.namespace, "link", "set", "eth0", "down")


@dataclass
class Network:
    """A bridge with the hosts on it."""

    folder: Path
    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    subnet: str = field(default_factory=lambda: f"10.213.{random.randrange(1, 255)}")
    hosts: dict[str, Host] = field(default_factory=dict)
    num_made: int = 0  # hosts; the address of one that has gone is not given again

    @property
    def bridge(self) -> str:
        return f"cifake-{self.tag}"

    def add_host(self, name: str) -> Host:
        """Another host; it knows those before it by name."""
        self.num_made += 1
        number, namespace = self.num_made, f"{self.bridge}-{self.num_made}"
        host = Host(name, namespace, f"{self.subnet}.{number}", self.folder / namespace)
        for folder in (host.home, host.folder / "ray", Path("/tmp/ray"), NETNS / host.namespace):
            folder.mkdir(parents=True, exist_ok=True)
        self.hosts[name] = host
        lines = ["127.0.0.1 localhost", *(f"{h.address} {h.name}" for h in self.hosts.values())]
        (NETNS / host.namespace / "hosts").write_text("\n".join(lines) + "\n")
        outer = f"veth-{self.tag}-{number}"
        run_ip("netns", "add", host.namespace)
        run_ip(
            "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", host.namespace
        )
        run_ip("link", "set", outer, "master", self.bridge, "up")
        run_ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            run_ip("-n", host.namespace, "link", "set", link, "up")
        return host

    def remove_host(self, host: Host) -> None:
        """End what runs there and take it off the network."""
        host.kill()
        run_ip("netns", "delete", host.namespace)
        shutil.rmtree(NETNS / host.namespace)
        del self.hosts[host.name]


@contextmanager
def make_network(folder: Path) -> Iterator[Network]:
    """A network without hosts; whatever is on it at the end goes with it."""
    network = Network(folder)
    run_ip("link", "add", network.bridge, "type", "bridge")
    try:
        run_ip("address", "add", f"{network.subnet}.254/24", "dev", network.bridge)
        run_ip("link", "set", network.bridge, "up")
        yield network
    finally:
        for host in list(network.hosts.values()):
            network.remove_host(host)
        run_ip("link", "delete", network.bridge)
        with suppress(OSError):
            NETNS.rmdir()
