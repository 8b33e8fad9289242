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

MOUNTS = Path("/proc/self/mounts")

_NETWORK = re.compile(
    r"(nfs\d*|cifs|smb\w*|9p|afs|ceph|lustre|gpfs|beegfs|orangefs|ocfs2|gfs2?|virtiofs|vboxsf"
    r"|prl_fs|vmhgfs|ncpfs|coda|fuse\.(?!fuse-overlayfs).*)"
)
_ESCAPE = re.compile(r"\\([0-7]{3})")


class UnsafePathError(Exception):
    """A folder or a file is not the user's own; says why, in a sentence."""


def prepare(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`; both exist, and are the user's alone.

    Raises
    ------
    UnsafePathError
        If somebody else owns the folder or the file, or can write to the folder.
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
    """Give `path` its mode, and refuse what is not the user's own."""
    found = path.stat() if kind == "folder" else path.lstat()
    if not (stat.S_ISDIR if kind == "folder" else stat.S_ISREG)(found.st_mode):
        raise UnsafePathError(f"{path} is not a plain {kind}.")
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid():
        raise UnsafePathError(f"The {kind} {path} belongs to another user.")
    if kind == "folder" and found.st_mode & 0o022:
        raise UnsafePathError(f"Others can write to the {kind} {path}: chmod 700 would mend that.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(mode)


def on_network(folder: Path, *, mounts: Path = MOUNTS) -> bool:
    """Return whether `folder` lies on a file system whose shared memory cannot be relied on.

    There SQLite's write-ahead log does not work (https://sqlite.org/wal.html, "all processes using
    a database must be on the same host computer"). False where the platform does not tell.
    """
    if os.fspath(folder).startswith("\\\\"):
        return True
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    place, kind = Path(os.path.realpath(folder)), ""
    deepest = 0
    for fields in (line.split(" ") for line in lines):
        if len(fields) < 3:
            continue
        point = Path(_ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), fields[1]))
        if len(point.parts) >= deepest and place.is_relative_to(point):
            deepest, kind = len(point.parts), fields[2]
    return _NETWORK.fullmatch(kind) is not None
