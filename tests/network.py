"""Two machines on one: this one, and a network namespace with a /dev/shm of its own, joined by a pair of veth."""

import os
import socket
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

OWN_SHM = ["unshare", "--mount", "--ipc", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on now."""
    with socket.create_server((host, 0)) as free:
        port: int = free.getsockname()[1]
        return port


@dataclass
class Network:
    """Where this side and the other are; what runs a command over there; what parts the two, with nothing said."""

    here: str
    there: str
    prefix: list[str]
    parts: list[str] | None


@contextmanager
def two_machines() -> Iterator[Network]:
    """Loopback, with a warning, where no namespace can be made: in a container without CAP_SYS_ADMIN, for example."""
    name, number = f"qvq{os.getpid()}", os.getpid() * 4 % (1 << 16)
    here, there = (f"10.198.{number >> 8}.{(number & 255) + side}" for side in (1, 2))
    prefix = ["ip", "netns", "exec", name, *OWN_SHM]
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name],
        ["ip", "address", "add", f"{here}/30", "dev", name],
        ["ip", "link", "set", name, "up"],
        ["ip", "-n", name, "address", "add", f"{there}/30", "dev", "eth0"],
        ["ip", "-n", name, "link", "set", "eth0", "up"],
        ["ip", "-n", name, "link", "set", "lo", "up"],
        [*prefix, "true"],
    ]
    found = Network(here, there, prefix, ["ip", "link", "set", name, "down"])
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"no network namespace can be made here ({error}): both nodes are on loopback", stacklevel=2)
        found = Network("127.0.0.1", "127.0.0.1", [], None)
    try:
        yield found
    finally:
        for command in (["ip", "link", "delete", name], ["ip", "netns", "delete", name]):
            if found.prefix:
                subprocess.run(command, check=False, capture_output=True)
