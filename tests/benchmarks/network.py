"""Hosts without machines: network namespaces on one bridge, made and taken away again.

The namespace of the test has the first address of the bridge, so servers in it are reached there.
Where namespaces are not allowed, hosts are processes on the loopback, and `hosts` says so.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One host: what to put before a command so that it runs there."""

    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """Hosts, and the address at which they reach the servers of the test."""

    address: str
    hosts: tuple[Host, ...]
    real: bool


def ip(*words: str) -> None:
    """Run ``ip``; raise a CalledProcessError or an OSError if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def free_block() -> int:
    """Return a third of an address that no interface has: 10.213.N.0/24."""
    shown = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    return next(n for n in itertools.count(os.getpid() % 200) if f"10.213.{n % 256}." not in shown)


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Make `count` hosts on one bridge; take everything away afterwards."""
    with ExitStack() as undo:
        try:
            made = _build(count, undo)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no network namespaces here ({error}): processes instead", file=sys.stderr)
            undo.close()
            made = Network("127.0.0.1", (Host(),) * count, real=False)
        yield made


def _build(count: int, undo: ExitStack) -> Network:
    block, bridge = free_block() % 256, f"nbx{os.getpid() % 100_000}"
    ip("link", "add", bridge, "type", "bridge")
    undo.callback(_try, "link", "del", bridge)
    ip("addr", "add", f"10.213.{block}.1/24", "dev", bridge)
    ip("link", "set", bridge, "up")
    hosts = []
    for index in range(count):
        name, near, far = f"{bridge}-{index}", f"{bridge}a{index}", f"{bridge}b{index}"
        ip("netns", "add", name)
        undo.callback(_try, "netns", "del", name)
        ip("link", "add", near, "type", "veth", "peer", "name", far)
        undo.callback(_try, "link", "del", near)
        ip("link", "set", near, "master", bridge, "up")
        ip("link", "set", far, "netns", name)
        inside = ("netns", "exec", name, "ip")
        ip(*inside, "addr", "add", f"10.213.{block}.{index + 2}/24", "dev", far)
        ip(*inside, "link", "set", far, "up")
        ip(*inside, "link", "set", "lo", "up")
        hosts.append(Host(("ip", "netns", "exec", name)))
    return Network(f"10.213.{block}.1", tuple(hosts), real=True)


def _try(*words: str) -> None:
    subprocess.run(["ip", *words], check=False, capture_output=True)
