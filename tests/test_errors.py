"""Errors travel: between processes whole, and to a reader in a few lines."""

from __future__ import annotations

import inspect
import pickle

import pytest

from nbcodex import errors
from nbcodex.errors import LimitError, NbcodexError, ParkedError, Stopped
from nbcodex.models import Limit, Reply

LIMIT = Limit(resource="tokens", window=60.0, limit=30_000)
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, NbcodexError | Stopped)
]


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_error_keeps_its_message_and_details(kind: type[BaseException]) -> None:
    details = {"limit": LIMIT} if kind is LimitError else {}
    error = kind("what happened", advice="what to do", **details)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_pickled_parked_error_keeps_its_limit() -> None:
    cause = LimitError("limit reached", limit=LIMIT, wait=432.0)
    error = ParkedError("parked", cause=cause, resume_at=1e9)
    error.reply = Reply(id="1", status="parked")
    again = pickle.loads(pickle.dumps(error))
    assert again.limit == LIMIT
    assert again.reply == error.reply


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_error_has_at_most_six_lines(kind: type[BaseException]) -> None:
    details = {"limit": LIMIT} if kind is LimitError else {}
    error = kind("word " * 900, advice="step " * 900, **details)
    lines = error._render_traceback_()  # type: ignore[attr-defined]
    assert len(lines) <= 6
    assert any(line.startswith("→") for line in lines)
