"""What every SQLite file of nbcodex needs: a private folder, patience with locks, care at forks.

Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

ResultT = TypeVar("ResultT")

# How long a fork waits for a user of SQLite. It takes that long only if a file is locked.
FORK_TIMEOUT_S = 2.0

_NETWORK = re.compile(
    r"(nfs\d*|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs|orangefs|ocfs2|gfs2?|virtiofs|vboxsf"
    r"|prl_fs|vmhgfs|ncpfs|coda|afpfs|webdav|fuse\.(?!fuse-overlayfs).*)"
)
BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class UnsafePathError(Exception):
    """A folder or a file is not the user's own; says why, in a sentence."""


def prepare(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`; both exist, and only the user has access.

    Raises UnsafePathError if another user owns the folder or the file, or can write to the folder,
    and OSError if it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _restrict(folder, kind="folder", mode=0o700)
    path = folder / name
    # The file is opened only where it does not exist yet: closing a second descriptor of a
    # database drops the locks that this process holds on it (SQLite's "How To Corrupt", 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    _restrict(path, kind="file", mode=0o600)
    return path


def _restrict(path: Path, *, kind: str, mode: int) -> None:
    """Set the mode of `path`; raise UnsafePathError if others own it or can write to it."""
    found = path.stat() if kind == "folder" else path.lstat()
    if not (stat.S_ISDIR if kind == "folder" else stat.S_ISREG)(found.st_mode):
        raise UnsafePathError(f"{path} is not a plain {kind}.")
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid():
        raise UnsafePathError(f"The {kind} {path} belongs to another user.")
    if kind == "folder" and found.st_mode & 0o022:
        raise UnsafePathError(f"Others can write to the {kind} {path}: run chmod 700 on it.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(mode)


def on_network(folder: Path) -> bool:
    """Return whether `folder` is on a file system whose locks and shared memory are unreliable."""
    # SQLite's write-ahead log needs all processes on one host (https://sqlite.org/wal.html).
    if os.fspath(folder).startswith("\\\\"):
        return True
    import psutil  # takes milliseconds, so not before a file is opened

    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):  # the platform does not list its mounts
        return False
    target = Path(os.path.realpath(folder))
    # The deepest mount point counts; of two at one place, the later one covers the earlier.
    candidates = [mount for mount in mounts if target.is_relative_to(mount.mountpoint)]
    mount = max(reversed(candidates), key=lambda m: len(Path(m.mountpoint).parts), default=None)
    if mount is None:
        return False
    return bool(_NETWORK.fullmatch(mount.fstype)) or "remote" in mount.opts.split(",")


def wait_for_lock(step: Callable[[], ResultT], *, patience: float) -> ResultT:
    """Return what `step` returns; call it again while another process keeps the file locked."""
    # For statements during which SQLite does not call its own busy handler: while the journal mode
    # of a new file changes, and where a read becomes a write.
    deadline = time.monotonic() + patience
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            if primary_code(error) not in BUSY_CODES or time.monotonic() >= deadline:
                raise
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - jitter, not cryptography


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code (the low byte of an extended one)."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


# SQLite has mutexes that all databases of a process share: a child that is forked while a thread
# holds one could never use SQLite again. So every user of SQLite pauses for the fork.


class ForkAware(Protocol):
    """A user of SQLite on a thread of its own."""

    @property
    def fork_lock(self) -> threading.Lock | threading.RLock:
        """Held while SQLite is in use."""

    def after_fork_in_child(self) -> None:
        """Leave all connections to the parent."""


# Weak references: being registered keeps nothing alive.
_registered: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_locked: list[threading.Lock | threading.RLock] = []


def register_for_forks(user: ForkAware) -> None:
    """Keep `user` out of SQLite during each fork of the process, for as long as it lives."""
    _registered.add(user)


def leak_connection(connection: sqlite3.Connection) -> None:
    """In a forked child: keep the parent's connection open and unused, to the end of the child."""
    # Closing it, or letting it be collected, would end the parent's locks: POSIX drops a process's
    # locks on a file with any descriptor (2.6 of https://sqlite.org/howtocorrupt.html).
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _before_fork() -> None:
    locks = [user.fork_lock for user in list(_registered)]
    _locked.extend(lock for lock in locks if lock.acquire(timeout=FORK_TIMEOUT_S))


def _after_fork_in_parent() -> None:
    while _locked:
        _locked.pop().release()


def _after_fork_in_child() -> None:
    # The locks stay locked here: each user makes a new one, or is not used any more.
    _locked.clear()
    for user in list(_registered):
        user.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
