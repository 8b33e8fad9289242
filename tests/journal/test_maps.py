"""Maps in the journal: their rows are listed as one entry and resumed together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbcodex.errors import EntryError
from nbcodex.journal.codec import equality_key
from nbcodex.journal.journal import Journal
from nbcodex.models import Origin, Reply, Request
from nbcodex.settings import JOURNAL_FILENAME

from .conftest import added, run

Open = Callable[..., Journal]


def row(number: int, map_id: str = "m1234", notebook: str = "one.ipynb") -> Request:
    origin = Origin(notebook=notebook, map_id=map_id, row_index=number, row_count=3)
    return Request(prompt=f"row {number}", id=f"{map_id}-{number}", origin=origin)


def key(request: Request) -> bytes:
    return equality_key(request, base_url="https://a")


def add(journal: Journal, request: Request, status: str | None = None) -> None:
    run(journal.insert(request, key=key(request)))
    if status:
        run(journal.finish(Reply(id=request.id, status=status)))  # type: ignore[arg-type]


def test_list_shows_a_map_as_one_entry(journal: Journal) -> None:
    """Many rows do not displace all other entries from the list."""
    other = added(journal)
    for number in range(3):
        add(journal, row(number))
    assert [entry.id for entry in journal.recent_entries(10)] == ["m1234-0", other.id]


def test_rows_that_never_started_are_parked(journal: Journal, open_journal: Open) -> None:
    """The next kernel finds them in order, and can claim them."""
    add(journal, row(0), "done")
    journal.maps.insert_parked([(row(n), key(row(n))) for n in (2, 1)])
    journal.close()
    again = open_journal()
    assert [(e.id, e.status) for e in again.maps.entries("m1234")] == [
        ("m1234-0", "done"),
        ("m1234-1", "parked"),
        ("m1234-2", "parked"),
    ]
    assert run(again.claim("m1234-1"))


def test_rows_of_a_map_are_counted_by_status(journal: Journal, open_journal: Open) -> None:
    """Those of a kernel that has gone are abandoned, so the map is unfinished."""
    add(journal, row(0), "done")
    add(journal, row(1), "failed")
    add(journal, row(2))
    journal.close()
    maps = open_journal().maps
    assert maps.count_rows("m1234") == {"done": 1, "failed": 1, "abandoned": 1}
    assert maps.unfinished() == ["m1234"]


def test_resumable_entries_exclude_rows_of_maps(journal: Journal) -> None:
    """Maps with unfinished rows are listed separately, by notebook."""
    add(journal, row(0, "m1"), "parked")
    add(journal, row(0, "m2", "two.ipynb"), "parked")
    add(journal, row(0, "m3"), "done")
    assert journal.resumable_entries(notebook=None) == []
    assert journal.maps.unfinished() == ["m1", "m2"]
    assert journal.maps.unfinished(notebook="two.ipynb") == ["m2"]


def test_map_is_found_by_a_unique_prefix(journal: Journal) -> None:
    """An exact id wins over longer ones; an ambiguous prefix is an error that lists the maps."""
    for map_id in ("m12", "m13", "m123"):
        add(journal, row(0, map_id))
    assert journal.maps.find_id("m12") == "m12"
    assert journal.maps.find_id("x") is None
    assert journal.maps.find_id("") is None
    with pytest.raises(EntryError, match="m12, m123, m13"):
        journal.maps.find_id("m1")


def test_answered_rows_are_found_by_key(journal: Journal) -> None:
    """More keys than one statement can hold are looked up, too."""
    add(journal, row(0), "done")
    add(journal, row(1), "failed")
    asked = [key(row(number)) for number in range(1_000)]
    assert journal.maps.answered_keys(asked) == {asked[0]}


def test_row_key_distinguishes_equal_prompts() -> None:
    """Two rows with equal prompts are different requests if their keys differ."""
    one, two = (Request(prompt="a joke", row=name) for name in ("1", "2"))
    assert key(one) != key(two)
    assert key(one) == key(Request(prompt="a joke", row="1"))


def test_rows_survive_the_loss_of_the_file(journal: Journal, folder: Path) -> None:
    """Rows that are kept in memory, because the file is gone, still belong to their map."""
    add(journal, row(0))
    (folder / JOURNAL_FILENAME).unlink()
    add(journal, row(1))
    assert [entry.id for entry in journal.maps.entries("m1234")] == ["m1234-0", "m1234-1"]


def test_deleting_a_map_deletes_its_rows_only(journal: Journal) -> None:
    """One row is deleted by its own id, or all of them by the map's."""
    other = added(journal)
    for number in range(3):
        add(journal, row(number))
    assert run(journal.delete("m1234-1")) == 1
    assert run(journal.delete("m12")) == 2
    assert [entry.id for entry in journal.recent_entries()] == [other.id]


def test_job_is_awaited_until_its_kernel_parks_closes_or_ends(
    open_journal: Open,
) -> None:
    """Also if the entries of its rows were deleted meanwhile."""
    waiting, other = open_journal(), open_journal()
    for number, tag in enumerate(["parked", "closed", "left"]):
        add(waiting, row(number))
        request = waiting.find_entry(f"m1234-{number}").request
        run(waiting.batch_jobs.insert_job(tag, [request], base_url="https://a/v1"))
        run(waiting.batch_jobs.set_remote_ids(tag, file_id=f"file of {tag}"))
    run(other.delete())

    def awaited() -> dict[str, bool]:
        return {job.tag: job.is_awaited for job in run(other.batch_jobs.unerased_jobs())}

    assert awaited() == {"parked": True, "closed": True, "left": True}
    run(waiting.batch_jobs.park_rows(in_jobs=["parked"]))
    run(waiting.batch_jobs.close_job("closed", erased=False))
    assert awaited() == {"parked": False, "closed": False, "left": True}
    waiting.close()
    assert awaited() == {"parked": False, "closed": False, "left": False}
