"""Who owns an entry: one journal in one process, and whether that process is still alive.

Owns the identity of a process across reboots, containers and reused pids, and its heartbeats. Must
not know what an entry holds.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from nbcodex.runtime.clock import Clock, boot_id

HEARTBEAT_INTERVAL_S = 10.0

# Six heartbeats: a kernel in heavy swapping is not taken for dead after one or two of them.
HEARTBEAT_TIMEOUT_S = 60.0

ACTIVE_STATUSES = frozenset({"pending", "running", "waiting"})


class Connection(sqlite3.Connection):
    """A connection to a journal, with the owner of what is written and the clock that dates it."""

    owner: Owner
    clock: Clock


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


def write_heartbeat(connection: Connection) -> None:
    """Record that the owner is alive."""
    from nbcodex.journal.codec import storable  # here, because `%load_ext` has to be fast

    owner, wall, now = connection.owner, connection.clock.wall(), connection.clock.now()
    host = storable(owner.host)
    connection.execute(
        """INSERT INTO owners (id, host, boot, space, pid, start, beat_at, beat_now)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET beat_at = excluded.beat_at, beat_now = excluded.beat_now""",
        (owner.id, host, owner.boot, owner.space, owner.pid, owner.start, wall, now),
    )


def is_abandoned(
    connection: Connection, row: sqlite3.Row, gone: dict[int, bool] | None = None
) -> bool:
    """Return whether an entry is unfinished and its owner is gone."""
    if row["status"] not in ACTIVE_STATUSES or row["owner"] == connection.owner.id:
        return False
    # Kept by owner: `is_gone` reads /proc, and a list has many rows of one owner.
    gone = {} if gone is None else gone
    if row["owner"] not in gone:
        gone[row["owner"]] = is_gone(connection, row)
    return gone[row["owner"]]


def is_gone(connection: Connection, row: sqlite3.Row) -> bool:
    """Return whether the owner in a row is gone."""
    if row["host"] is None:  # it deleted its row when it was closed
        return True
    names = ("host", "boot", "space", "pid", "start")
    owner = Owner(id=row["owner"], **{name: row[name] for name in names})
    here, clock = connection.owner, connection.clock
    # Proof first: a kernel that was killed is recognised at once, not after a minute of silence.
    return is_provably_dead(owner, here=here) or is_silent(
        owner, wall=row["beat_at"], now=row["beat_now"], here=here, clock=clock
    )


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


def is_provably_dead(owner: Owner, *, here: Owner) -> bool:
    """Return whether `owner` was a process of this machine that has ended."""
    # Across hosts, boots and pid namespaces only the heartbeat counts.
    if (owner.host, owner.boot, owner.space) != (here.host, here.boot, here.space):
        return False
    if not (owner.boot and owner.space and owner.start and here.start):
        return False  # the platform does not say where pids are unique
    if (process := read_process(owner.pid)) is None:
        return True
    state, start = process
    # A process that cannot be read may be alive. "Z" and "X" are dead; another start means that
    # the pid was given to another process.
    return state != "?" and (state in "ZX" or start != owner.start)


def is_silent(owner: Owner, *, wall: float, now: float, here: Owner, clock: Clock) -> bool:
    """Return whether the last heartbeat of `owner` is older than HEARTBEAT_TIMEOUT_S.

    It was written at `wall` of the wall clock, and at `now` of the boot clock of the owner's host.
    """
    # Within one boot the boot clock decides, because nothing can set it. Between hosts there is
    # only the wall clock: a heartbeat from the future counts as a sign of life.
    if owner.boot and owner.boot == here.boot:
        return clock.now() - now > HEARTBEAT_TIMEOUT_S
    return clock.wall() - wall > HEARTBEAT_TIMEOUT_S
