"""Who owns an entry, and whether that process is still alive.

Owns the identity of a process across reboots, containers and reused pids. Knows nothing of tables.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbcodex.runtime.clock import Clock, boot_id

HEARTBEAT_INTERVAL_S = 10.0

# Six heartbeats: a kernel in heavy swapping is not taken for dead after one or two of them.
HEARTBEAT_TIMEOUT_S = 60.0

# Returns the state letter and the start of the process with a pid; None if there is none.
ProcessReader = Callable[[int], tuple[str, int] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One journal in one process, distinguished from all others."""

    id: int  # random, and new for each journal that is opened
    # host, boot, space: host name, boot id and pid namespace; empty where the platform has none.
    host: str
    boot: str
    space: str
    # pid, start: the process, and its start in ticks since boot, because pids are reused.
    pid: int
    start: int

    @classmethod
    def here(cls) -> Owner:
        """Return a new owner in this process."""
        space = ""
        with contextlib.suppress(OSError):
            # Two containers of one machine share the boot id, and each has its own pid 1.
            space = str(Path("/proc/self/ns/pid").stat().st_ino)
        process = read_process(os.getpid())
        return cls(
            id=secrets.randbits(62),
            host=socket.gethostname(),
            boot=boot_id(),
            space=space,
            pid=os.getpid(),
            start=process[1] if process else 0,
        )

    @property
    def machine(self) -> tuple[str, str, str] | None:
        """The scope in which its pid is unique; None where that is not known."""
        known = self.boot and self.space and self.start
        return (self.host, self.boot, self.space) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A sign of life: in seconds since the epoch, and on the boot clock of the owner's host."""

    at: float
    boot_time: float


def read_process(pid: int) -> tuple[str, int] | None:
    """Return the state letter and the start (ticks since boot) of a process, from proc(5).

    None if there is no such process; a state of "?" where that cannot be known.
    """
    # Not psutil: its `create_time` adds the boot time of the wall clock, and so changes when that
    # clock is set (https://github.com/giampaolo/psutil/issues/2526). A live kernel would be taken
    # for dead, and its request sent twice. Where there is no /proc, heartbeats decide.
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "?", 0
    # The name of the program, in parentheses, may hold spaces and parentheses itself.
    fields = line[line.rfind(b")") + 2 :].split()
    return fields[0].decode("ascii", "replace"), int(fields[19])


def is_provably_dead(owner: Owner, *, here: Owner, read: ProcessReader = read_process) -> bool:
    """Return whether `owner` was a process of this machine that has ended.

    Never true across hosts, boots or pid namespaces: there only the heartbeat counts.
    """
    if owner.machine is None or owner.machine != here.machine:
        return False
    match read(owner.pid):
        case None:
            return True
        case "?", _:
            return False
        case state, start:
            return state in "ZX" or start != owner.start
    return False


def is_silent(owner: Owner, last: Heartbeat, *, here: Owner, clock: Clock) -> bool:
    """Return whether the last heartbeat of `owner` is older than HEARTBEAT_TIMEOUT_S."""
    # Within one boot the boot clock decides, because nothing can set it. Between hosts there is
    # only the wall clock: a heartbeat from the future counts as a sign of life.
    if owner.boot and owner.boot == here.boot:
        return clock.now() - last.boot_time > HEARTBEAT_TIMEOUT_S
    return clock.wall() - last.at > HEARTBEAT_TIMEOUT_S
