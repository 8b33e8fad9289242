"""What the records promise by themselves."""

from __future__ import annotations

from nbcodex.models import new_id


def test_ids_do_not_repeat() -> None:
    """No two of 200,000 requests, as a large map makes them, have the same id."""
    assert len({new_id() for _ in range(200_000)}) == 200_000
