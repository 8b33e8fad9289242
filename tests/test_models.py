"""The records, and the names under which a journal keeps them."""

from __future__ import annotations

import json

from nbcodex.journal.codec import decode
from nbcodex.models import Origin, TurnPosition, new_id


def test_ids_do_not_repeat() -> None:
    """No two of 200,000 requests, as a large map makes them, have the same id."""
    assert len({new_id() for _ in range(200_000)}) == 200_000


def test_records_of_an_earlier_release_are_read_under_their_new_names() -> None:
    """A file written before the records were renamed still tells the map, the row and the turn."""
    place = {"__record__": "Place", "chapter": 2, "number": 7, "begins": False}
    origin = {"__record__": "Origin", "batch": "m1", "item": 3, "of": 9, "place": place}
    text = json.dumps({"__record__": "Request", "prompt": "x", "origin": origin})
    position = TurnPosition(chapter=2, number=7)
    assert decode(text).origin == Origin(map_id="m1", row_index=3, row_count=9, position=position)
