"""Where the journal is, and who can read it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import psutil
import pytest

from nbcodex.journal.journal import Journal
from nbcodex.runtime.sqlite_files import UnsafePathError, is_on_network, prepare_file
from nbcodex.settings import JOURNAL_FILENAME, Settings, data_folder

from .conftest import added

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing there")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_is_named_by_the_settings(tmp_path: Path) -> None:
    """NBCODEX_HOME, else the platform's data folder."""
    assert data_folder(Settings.read(environ={"NBCODEX_HOME": str(tmp_path)})) == tmp_path
    assert data_folder(Settings()) == Path(platformdirs.user_data_dir("nbcodex", False))


def test_nothing_is_created_before_the_first_use(folder: Path) -> None:
    Journal(folder).close()
    assert not folder.exists()


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_are_readable_by_their_user_only(
    open_journal: Callable[..., Journal], folder: Path, umask: int
) -> None:
    """0700 for the folder and 0600 for every file, with any umask."""
    before = os.umask(umask)
    try:
        added(open_journal())
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        JOURNAL_FILENAME: 0o600,
        f"{JOURNAL_FILENAME}-wal": 0o600,
        f"{JOURNAL_FILENAME}-shm": 0o600,
    }


@posix
def test_readable_folder_and_file_become_private(folder: Path) -> None:
    """Other users lose access to a folder and a file of the user that they could read."""
    folder.mkdir(mode=0o755)
    (folder / JOURNAL_FILENAME).touch(mode=0o644)
    prepare_file(folder, JOURNAL_FILENAME)
    assert (mode(folder), mode(folder / JOURNAL_FILENAME)) == (0o700, 0o600)


@posix
@pytest.mark.parametrize("open_to", [0o770, 0o707, 0o1777])
def test_folder_that_others_can_write_is_refused(
    open_journal: Callable[..., Journal], folder: Path, open_to: int
) -> None:
    """Requests continue in memory, and `problem` says what to do."""
    folder.mkdir()
    folder.chmod(open_to)
    journal = open_journal()
    asked = added(journal, status="parked")
    assert "chmod 700" in (journal.problem or "")
    assert journal.find_entry(asked.id).status == "parked"
    assert list(folder.iterdir()) == []


@posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_folder_or_file_of_another_user_is_refused(
    open_journal: Callable[..., Journal], folder: Path, what: str
) -> None:
    folder.mkdir(mode=0o700)
    (folder / JOURNAL_FILENAME).touch(mode=0o600)
    os.chown(folder if what == "folder" else folder / JOURNAL_FILENAME, 65534, 65534)
    journal = open_journal()
    added(journal)
    assert f"The {what}" in (journal.problem or "")
    assert "belongs to another user" in (journal.problem or "")
    assert (folder / JOURNAL_FILENAME).stat().st_size == 0


@posix
@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_journal_must_be_a_plain_file(folder: Path, tmp_path: Path, what: str) -> None:
    """A link is not followed."""
    folder.mkdir(mode=0o700)
    match what:
        case "link":
            (folder / JOURNAL_FILENAME).symlink_to(tmp_path / "elsewhere")
        case "folder":
            (folder / JOURNAL_FILENAME).mkdir()
        case _:
            os.mkfifo(folder / JOURNAL_FILENAME)
    with pytest.raises(UnsafePathError, match="not a plain file"):
        prepare_file(folder, JOURNAL_FILENAME)
    assert not (tmp_path / "elsewhere").exists()


def test_file_in_place_of_the_folder_is_reported(
    open_journal: Callable[..., Journal], folder: Path
) -> None:
    folder.write_text("not a folder")
    journal = open_journal()
    added(journal)
    assert "cannot be used" in (journal.problem or "")


MOUNTS = [
    ("overlay", "/", "overlay"),
    ("/dev/sdb", "/home/local", "ext4"),
    ("server:/home", "/home", "nfs4"),
    ("me@there:", "/mnt/my disk", "fuse.sshfs"),
    ("tmpfs", "/home/local/deep/er", "tmpfs"),
    ("C:", "/mnt/c", "9p"),
]


@pytest.mark.parametrize(
    ("place", "network"),
    [
        ("/root/x", False),
        ("/home/me", True),
        ("/home/local/me", False),
        ("/home/localhost", True),
        ("/home/local/deep/er", False),
        ("/mnt/my disk/x", True),
        ("/mnt/c/Users", True),
        ("\\\\server\\share", True),
    ],
)
def test_the_deepest_mount_point_decides_whether_a_folder_is_on_a_network(
    monkeypatch: pytest.MonkeyPatch, place: str, network: bool
) -> None:
    mounts = [SimpleNamespace(device=d, mountpoint=m, fstype=t, opts="rw") for d, m, t in MOUNTS]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    assert is_on_network(Path(place)) is network


def test_a_drive_that_windows_calls_remote_is_on_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = SimpleNamespace(device="Z:", mountpoint="/", fstype="NTFS", opts="rw,remote")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [drive])
    assert is_on_network(Path("/home/me"))


def test_a_platform_without_a_list_of_mounts_has_no_network_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: Any) -> None:
        raise FileNotFoundError("/proc")

    monkeypatch.setattr(psutil, "disk_partitions", fail)
    assert not is_on_network(Path("/home/me"))


@pytest.mark.parametrize(("network", "mode_"), [(True, "delete"), (False, "wal")])
def test_network_folder_gets_a_rollback_journal(
    open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, network: bool, mode_: str
) -> None:
    """A write-ahead log would lose data there."""
    monkeypatch.setattr("nbcodex.journal.schema.sqlite_files.is_on_network", lambda _: network)
    journal = open_journal()
    asked = added(journal, status="done", text="kept")
    found = journal._worker.call(
        lambda c: c.execute("PRAGMA journal_mode").fetchone()[0], default=""
    )
    assert found == mode_
    journal.close()
    assert open_journal().find_entry(asked.id).reply.text == "kept"
