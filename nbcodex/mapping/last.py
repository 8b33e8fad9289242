"""What `nbcodex.map.last` is: the replies of a map, finished or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from nbcodex.mapping.map_run import MapRun
from nbcodex.models import Reply


class Last(Sequence[Reply]):
    """The map that was asked last: its replies in order, false where there is no answer.

    Of an iterator, nothing is kept: it is empty.

    Attributes
    ----------
    id : str
        The map's id, for `%codex resume`.
    """

    def __init__(self, run: MapRun) -> None:
        self._course = run
        self.id = run.id

    @property
    def result(self) -> Any:
        """The replies as the kind of data that was given."""
        return self._course.result

    @property
    def failed(self) -> dict[str, str]:
        """Why there is no answer, by row: its row key, or else its index, key or position.

        Of rows that are called the same, all but the first are told apart by their position.
        """
        told: dict[str, str] = {}
        for index, (label, why) in sorted(self._course.failures.items()):
            told[f"{label} (row {index})" if label in told else label] = why
        return told

    def __len__(self) -> int:
        return self._course.shape.total or 0

    @overload
    def __getitem__(self, index: int) -> Reply: ...
    @overload
    def __getitem__(self, index: slice) -> list[Reply]: ...
    def __getitem__(self, index: int | slice) -> Reply | list[Reply]:
        return self._course.replies_in_order()[index]

    def __iter__(self) -> Iterator[Reply]:
        return iter(self._course.replies_in_order())

    def __repr__(self) -> str:
        done = sum(bool(reply) for reply in self)
        return f"<map {self.id}: {done:,} of {len(self):,} answered, {len(self.failed):,} failed>"
