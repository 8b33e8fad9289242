"""What every SQLite file of nbcodex needs: private folders, retries while locked, safe forks."""

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

FORK_TIMEOUT_S = 2.0  # a fork waits no longer for a thread to leave SQLite

# Names of network file systems: ``nfs4``, ``cifs``, ``fuse.sshfs``; not ``fuse.fuse-overlayfs``.
_NETWORK_FILE_SYSTEMS = re.compile(
    r"(nfs\d*|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs|orangefs|ocfs2|gfs2?|virtiofs|vboxsf"
    r"|prl_fs|vmhgfs|ncpfs|coda|afpfs|webdav|fuse\.(?!fuse-overlayfs).*)"
)
BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class UnsafePathError(Exception):
    """Other users have access to a folder or a file; the message says how, in a sentence."""


def prepare_file(folder: Path, name: str) -> Path:
    """Create the file `name` in `folder`, if it is missing, for the user alone; return its path.

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
    # A folder may be a symbolic link, which `stat` follows; a file may not.
    file_stat = path.stat() if kind == "folder" else path.lstat()
    if not (stat.S_ISDIR if kind == "folder" else stat.S_ISREG)(file_stat.st_mode):
        raise UnsafePathError(f"{path} is not a plain {kind}.")
    check_owner(path, file_stat, kind=kind)
    if hasattr(os, "geteuid") and stat.S_IMODE(file_stat.st_mode) & 0o077:
        path.chmod(mode)


def check_owner(path: Path, file_stat: os.stat_result, *, kind: str) -> None:
    """Raise UnsafePathError if others own `path`, or can write to it if it is a folder."""
    if not hasattr(os, "geteuid"):
        return
    if file_stat.st_uid != os.geteuid():
        raise UnsafePathError(f"The {kind} {path} belongs to another user.")
    if kind == "folder" and file_stat.st_mode & 0o022:
        raise UnsafePathError(f"Others can write to the {kind} {path}: run chmod 700 on it.")


def is_on_network(folder: Path) -> bool:
    """Return whether `folder` is on a file system whose locks and shared memory are unreliable."""
    # SQLite's write-ahead log needs all processes on one machine (https://sqlite.org/wal.html).
    if os.fspath(folder).startswith("\\\\"):
        return True
    import psutil  # here, because `%load_ext` has to be fast

    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):  # the platform does not list its mounts
        return False
    target = Path(os.path.realpath(folder))
    # The deepest mount point counts; of two mounts at one path, the later one hides the earlier.
    candidates = [mount for mount in mounts if target.is_relative_to(mount.mountpoint)]
    mount = max(reversed(candidates), key=lambda m: len(Path(m.mountpoint).parts), default=None)
    if mount is None:
        return False
    is_network = bool(_NETWORK_FILE_SYSTEMS.fullmatch(mount.fstype))
    return is_network or "remote" in mount.opts.split(",")  # as psutil marks drives of Windows


def retry_while_locked(operation: Callable[[], ResultT], *, timeout: float) -> ResultT:
    """Return what `operation` returns; call it again while another process locks the file."""
    # For statements during which SQLite does not call its own busy handler: while the journal mode
    # of a new file changes, and where a read becomes a write.
    deadline = time.monotonic() + timeout
    while True:
        try:
            return operation()
        except sqlite3.OperationalError as error:
            if primary_code(error) not in BUSY_CODES or time.monotonic() >= deadline:
                raise
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311 - spreads the retries


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code (the low byte of an extended one)."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


# SQLite has mutexes that all databases of a process share: a child that is forked while a thread
# holds one could never use SQLite again. So every thread that uses SQLite pauses for the fork.


class ForkAware(Protocol):
    """An object whose thread uses SQLite."""

    @property
    def fork_lock(self) -> threading.Lock | threading.RLock:
        """Held while the thread is in SQLite."""

    def after_fork_in_child(self) -> None:
        """Stop using the parent's connections, without closing them."""


_registered: weakref.WeakSet[ForkAware] = weakref.WeakSet()  # does not keep them alive
_held_locks: list[threading.Lock | threading.RLock] = []  # acquired by `_before_fork`


def register_for_forks(sqlite_user: ForkAware) -> None:
    """Let the object's thread pause at each fork of the process, for as long as it lives."""
    _registered.add(sqlite_user)


def leak_connection(connection: sqlite3.Connection) -> None:
    """In a forked child: keep the parent's connection open and unused, to the end of the child."""
    # Closing it, or letting it be collected, would end the parent's locks: POSIX drops a process's
    # locks on a file with any descriptor (2.6 of https://sqlite.org/howtocorrupt.html).
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _before_fork() -> None:
    locks = [each.fork_lock for each in list(_registered)]
    _held_locks.extend(lock for lock in locks if lock.acquire(timeout=FORK_TIMEOUT_S))


def _after_fork_in_parent() -> None:
    while _held_locks:
        _held_locks.pop().release()


def _after_fork_in_child() -> None:
    # The locks stay locked in the child: each object makes a new one, or is not used any more.
    _held_locks.clear()
    for each in list(_registered):
        each.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
