"""Where the files of nbcodex lie, and who else can get at them.

Owns the folder (0700), the files' mode (0600) and the question whether they lie on a network. Must
not know what is in a file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

_NETWORK = re.compile(
    r"(nfs\d*|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs|orangefs|ocfs2|gfs2?|virtiofs|vboxsf"
    r"|prl_fs|vmhgfs|ncpfs|coda|afpfs|webdav|fuse\.(?!fuse-overlayfs).*)"
)


class UnsafePathError(Exception):
    """A folder or a file is not the user's own; says why, in a sentence."""


def prepare(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`; both exist, and are the user's alone.

    Raises
    ------
    UnsafePathError
        If another user owns the folder or the file, or can write to the folder.
    OSError
        If it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _claim(folder, kind="folder", mode=0o700)
    path = folder / name
    # The file is opened only where it does not exist yet: closing a second descriptor of a
    # database drops the locks that this process holds on it (SQLite's "How To Corrupt", 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    _claim(path, kind="file", mode=0o600)
    return path


def _claim(path: Path, *, kind: str, mode: int) -> None:
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
    """Return whether `folder` is on a file system whose locks and shared memory are not reliable.

    False where the platform does not list its mounts.
    """
    # SQLite's write-ahead log needs all processes on one host (https://sqlite.org/wal.html).
    if os.fspath(folder).startswith("\\\\"):
        return True
    import psutil  # takes milliseconds, so not before a file is opened

    try:
        mounts = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):
        return False
    place = Path(os.path.realpath(folder))
    # The deepest mount point counts; of two at one place, the later one covers the earlier.
    around = [mount for mount in mounts if place.is_relative_to(mount.mountpoint)]
    mount = max(reversed(around), key=lambda m: len(Path(m.mountpoint).parts), default=None)
    if mount is None:
        return False
    return bool(_NETWORK.fullmatch(mount.fstype)) or "remote" in mount.opts.split(",")
