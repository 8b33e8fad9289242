"""`PendingReply`: inspecting it never waits, reading its text does."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from nbcodex.events import CoolingDown, Finished
from nbcodex.models import Reply, Request, Resumption
from nbcodex.requests.handle import Handle, PendingReply
from nbcodex.settings import Settings


def no_services() -> Any:
    raise AssertionError("nothing is sent here")


class WouldWaitError(AssertionError):
    """The reply was waited for."""


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """Return the handle of a request that never ends by itself."""
    handle = Handle(Request(prompt="x", id="3f2a"), Settings(), services=no_services)
    wait = handle.wait

    def wait_or_fail() -> Any:
        if not handle.done:
            raise WouldWaitError
        return wait()

    monkeypatch.setattr(handle, "wait", wait_or_fail)
    return handle


def finish(handle: Handle) -> None:
    reply = Reply(id="3f2a", text="an answer", model="m")
    handle._on_event(Finished(request_id="3f2a", at=1.0, reply=reply))


@pytest.mark.parametrize("look", [repr, str, dir, bool, hash, PendingReply._repr_markdown_])
def test_inspection_does_not_wait(handle: Handle, look: Any) -> None:
    look(PendingReply(handle))


def test_members_are_properties_which_completers_do_not_evaluate() -> None:
    for name in ("text", "usage", "parsed", "status"):
        assert isinstance(inspect.getattr_static(PendingReply, name), property)


def test_pickle_of_running_reply_holds_what_is_known(handle: Handle) -> None:
    found = pickle.loads(pickle.dumps([PendingReply(handle)]))[0]
    assert (found.id, found.status, bool(found)) == ("3f2a", "running", False)


def test_pickle_of_finished_reply_holds_the_answer(handle: Handle) -> None:
    pending = PendingReply(handle)
    finish(handle)
    assert pickle.loads(pickle.dumps(pending)) == Reply(id="3f2a", text="an answer", model="m")


def test_copies_fill_with_the_original(handle: Handle) -> None:
    pending = PendingReply(handle)
    copies = [copy.copy(pending), *copy.deepcopy([pending])]
    finish(handle)
    assert [each.text for each in copies] == ["an answer"] * 2


@pytest.mark.parametrize("read", [lambda r: r.text, lambda r: f"{r}", lambda r: r.usage])
def test_reading_waits(handle: Handle, read: Any) -> None:
    pending = PendingReply(handle)
    with pytest.raises(WouldWaitError):
        read(pending)
    finish(handle)
    assert read(pending) is not None
    assert str(pending) == f"{pending}" == "an answer"


def test_wait_in_the_queue_does_not_show_that_a_request_is_committed(handle: Handle) -> None:
    wait = CoolingDown(
        request_id="3f2a", at=0.0, limit=None, resume_at=None, waited=0.0, queued=True
    )
    handle._on_event(wait)
    assert not handle._committed.is_set()
    finish(handle)
    handle.wait_until_committed()


def test_resumed_request_is_in_the_journal_from_the_start() -> None:
    handle = Handle(Request(prompt="x"), Settings(), services=no_services, resumption=Resumption())
    handle.wait_until_committed()
