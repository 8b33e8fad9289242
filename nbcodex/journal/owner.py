"""Who runs an entry, and whether that process still lives.

Owns the identity of a process across reboots, containers and reused pids. Must not know the tables.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbcodex.runtime.clock import Clock

BEAT = 10.0
"""Seconds between two heartbeats."""

SILENCE = 60.0
"""Seconds without a heartbeat after which an owner counts as gone."""

Look = Callable[[int], tuple[str, int] | None]
"""Returns the state letter and the start (in ticks since boot) of a process; None: no such pid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One journal in one process, told apart from all others.

    Parameters
    ----------
    id : int
        Random, and new for each journal that is opened.
    host, boot, space : str
        Host name, boot id and pid namespace; empty where the platform does not tell.
    pid, start : int
        The process, and when it started (ticks since boot): pids are used again.
    """

    id: int
    host: str
    boot: str
    space: str
    pid: int
    start: int

    @classmethod
    def here(cls) -> Owner:
        """Return a new owner in this process."""
        space = ""
        with contextlib.suppress(OSError):
            space = str(Path("/proc/self/ns/pid").stat().st_ino)
        seen = look(os.getpid())
        return cls(
            id=secrets.randbits(62),
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            space=space,
            pid=os.getpid(),
            start=seen[1] if seen else 0,
        )

    @property
    def machine(self) -> tuple[str, str, str] | None:
        """What pids are relative to; None where that is not known."""
        known = self.boot and self.space and self.start
        return (self.host, self.boot, self.space) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A heartbeat: `at` in seconds since the epoch, `now` on the boot clock of the owner's host."""

    at: float
    now: float


def look(pid: int) -> tuple[str, int] | None:
    """Return the state letter and the start of a process of this machine; None if there is none.

    The fields are those of ``/proc/PID/stat`` in proc(5): 3, the state, and 22, the start.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "?", 0
    fields = line[line.rfind(b")") + 2 :].split()
    return fields[0].decode("ascii", "replace"), int(fields[19])


def provably_dead(owner: Owner, *, here: Owner, look: Look = look) -> bool:
    """Return whether `owner` lived on this machine and is no more.

    Never True across hosts, boots or pid namespaces: there only the heartbeat counts.
    """
    if owner.machine is None or owner.machine != here.machine:
        return False
    match look(owner.pid):
        case None:
            return True
        case "?", _:
            return False
        case state, start:
            return state in "ZX" or start != owner.start
    return False


def silent(owner: Owner, beat: Beat, *, here: Owner, clock: Clock) -> bool:
    """Return whether `owner` gave no heartbeat for longer than `SILENCE`.

    Within one boot the boot clock decides, which nobody can set. Between hosts there is only the
    wall clock: a beat from the future counts as a sign of life.
    """
    if owner.boot and owner.boot == here.boot:
        return clock.now() - beat.now > SILENCE
    return clock.wall() - beat.at > SILENCE


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
