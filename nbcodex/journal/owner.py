"""Who owns an entry: one journal in one process, and whether that process is still alive.

Identifies a process across reboots, containers and reused pids, and writes its heartbeats.
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

# Six heartbeats: a kernel that is swapped out may miss some of them without being taken for dead.
HEARTBEAT_TIMEOUT_S = 60.0

ACTIVE_STATUSES = frozenset({"pending", "running", "waiting"})


class Connection(sqlite3.Connection):
    """A connection to a journal, with the owner of what is written and the clock that dates it."""

    owner: Owner
    clock: Clock
    # What `is_gone` returned in this transaction, by the id of the owner: it reads /proc, and many
    # rows have one owner.
    owner_is_gone: dict[int, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One journal in one process, distinguished from all others."""

    id: int  # random, and new for each journal that is opened
    machine: str  # its host name
    boot: str  # the boot id; empty where the platform has none, like the next one
    # Two containers of one machine share the boot id, and each has its own pid 1.
    pid_namespace: str
    pid: int
    start_ticks: int  # when the process started, in ticks since boot, because pids are reused

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return a new owner in this process."""
        pid_namespace = ""
        with contextlib.suppress(OSError):
            pid_namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
        _, start_ticks = read_process(os.getpid()) or ("", 0)
        return cls(
            id=secrets.randbits(62),
            machine=socket.gethostname(),
            boot=boot_id(),
            pid_namespace=pid_namespace,
            pid=os.getpid(),
            start_ticks=start_ticks,
        )


def write_heartbeat(connection: Connection) -> None:
    """Record that the owner is alive."""
    from nbcodex.journal.codec import sqlite_text  # here, because `%load_ext` has to be fast

    owner, wall, now = connection.owner, connection.clock.wall(), connection.clock.now()
    host = sqlite_text(owner.machine)
    connection.execute(
        """INSERT INTO owners (id, host, boot, space, pid, start, beat_at, beat_now)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET beat_at = excluded.beat_at, beat_now = excluded.beat_now""",
        (owner.id, host, owner.boot, owner.pid_namespace, owner.pid, owner.start_ticks, wall, now),
    )


def is_abandoned(connection: Connection, row: sqlite3.Row) -> bool:
    """Return whether an entry, a row of the view `book`, is unfinished and its owner is gone."""
    if row["status"] not in ACTIVE_STATUSES or row["owner"] == connection.owner.id:
        return False
    if row["owner"] not in connection.owner_is_gone:
        connection.owner_is_gone[row["owner"]] = is_gone(connection, row)
    return connection.owner_is_gone[row["owner"]]


def is_gone(connection: Connection, row: sqlite3.Row) -> bool:
    """Return whether the owner in a row with the columns of `owners` is gone."""
    if row["host"] is None:  # the owner deleted its row of `owners` when it was closed
        return True
    owner = Owner(
        id=row["owner"],
        machine=row["host"],
        boot=row["boot"],
        pid_namespace=row["space"],
        pid=row["pid"],
        start_ticks=row["start"],
    )
    observer, clock = connection.owner, connection.clock
    # A kernel that was killed is recognised at once, not after a minute without a heartbeat.
    if is_provably_dead(owner, observer=observer):
        return True
    # Within one boot the boot clock decides, because nothing can set it. Between machines there
    # is only the wall clock: a heartbeat from the future counts as a sign of life.
    if owner.boot and owner.boot == observer.boot:
        silence: float = clock.now() - row["beat_now"]
    else:
        silence = clock.wall() - row["beat_at"]
    return silence > HEARTBEAT_TIMEOUT_S


def read_process(pid: int) -> tuple[str, int] | None:
    """Return a process's state letter ("?": unknown) and its start; None if it does not exist."""
    # Not psutil: its `create_time` adds the boot time of the wall clock, and so changes when that
    # clock is set (https://github.com/giampaolo/psutil/issues/2526). A live kernel would be taken
    # for dead, and its request sent twice. Where there is no /proc, heartbeats decide.
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "?", 0
    # See proc(5). The name of the program, in parentheses, may hold spaces and parentheses itself.
    # After it come the fields from the third, the state, on; `starttime` is the 22nd.
    fields = line[line.rfind(b")") + 2 :].split()
    return fields[0].decode("ascii", "replace"), int(fields[19])


def is_provably_dead(owner: Owner, *, observer: Owner) -> bool:
    """Return whether `owner` was a process of the observer's machine that has ended."""
    # Across machines, boots and pid namespaces, or where the platform does not name these, a pid
    # proves nothing: only the heartbeat counts.
    scopes = {(each.machine, each.boot, each.pid_namespace) for each in (owner, observer)}
    known = owner.boot, owner.pid_namespace, owner.start_ticks, observer.start_ticks
    if len(scopes) > 1 or not all(known):
        return False
    if (process := read_process(owner.pid)) is None:
        return True
    state, start = process
    # A process that cannot be read may be alive. "Z" and "X" are dead; another start means that
    # the pid was given to another process.
    return state != "?" and (state in "ZX" or start != owner.start_ticks)
