"""A growing text that can be kept in an immutable state. Knows nothing of what it says."""

from __future__ import annotations


class Text:
    """Text that grows by chunks; each `Text` is immutable.

    Those that grew out of one another share one list, of which each sees its own beginning: a
    delta costs the same however long the answer is.
    """

    __slots__ = ("_chunks", "_count", "size")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, chunks: list[str] | None = None, count: int = 0, size: int = 0) -> None:
        self._chunks = [] if chunks is None else chunks
        self._count = count
        self.size = size

    def __add__(self, more: str) -> Text:
        # Where another text has already grown from this one, the end of the list is not ours.
        branches = len(self._chunks) != self._count
        chunks = self._chunks[: self._count] if branches else self._chunks
        chunks.append(more)
        return Text(chunks, self._count + 1, self.size + len(more.encode(errors="replace")))

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        return self.since(0)

    def __repr__(self) -> str:
        return f"Text({self._count} chunks, {self.size} bytes)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and str(self) == str(other)

    def grew_from(self, other: Text) -> bool:
        """Return whether `other` is surely the beginning of this text."""
        return self._chunks is other._chunks and self._count >= other._count

    def since(self, count: int) -> str:
        """Return what came after the first `count` chunks."""
        return "".join(self._chunks[count : self._count])
