"""Maps through the Batch API: handed in once, found again, fetched and erased."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from nbcodex import events
from nbcodex.errors import BatchUnsupportedError, BudgetError, ModelError
from nbcodex.journal.journal import Journal
from nbcodex.mapping import upload
from nbcodex.mapping.pending_rows import PendingRow
from nbcodex.mapping.upload import BatchUploader
from nbcodex.models import Origin, Request
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.requests.services import Services
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Knobs, Simulator
from nbcodex.simulator.transport import SimulatorTransport
from tests.simulated import KEY
from tests.virtual import LoopClock, let_time_wait, run_virtual

SETTINGS = Settings(api_key=Secret(KEY), base_url="http://127.0.0.1/v1", model="gpt-5.6-sol")
HOUR = 3_600.0


class Gate(httpx2.AsyncBaseTransport):
    """Lets calls through to a simulator, unless a test has something else for them.

    `before` and `after` see each call; what they raise or return is what comes of it.
    """

    def __init__(self, core: Simulator) -> None:
        self._inner = SimulatorTransport(core)
        self.calls: list[str] = []
        self.before: Callable[[str], httpx2.Response | None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        call = f"{request.method} {request.url.path}"
        self.calls.append(call)
        if (instead := self.before(call)) is not None:
            return instead
        response = await self._inner.handle_async_request(request)
        self.after(call)
        return response

    def count(self, start: str) -> int:
        return sum(call.startswith(start) for call in self.calls)


class Place:
    """A server and a journal, which outlive the processes that use them; made on the loop."""

    def __init__(self, **knobs: Any) -> None:
        self.clock = LoopClock()
        knobs = {"batch_seconds": HOUR, **knobs}
        self.core = Simulator(Knobs(**knobs), clock=self.clock)
        self.gate = Gate(self.core)
        self.journal = Journal()
        let_time_wait(self.journal)
        self.events: list[events.Event] = []
        self._heard = asyncio.Event()

    def uploader(
        self, settings: Settings = SETTINGS, *, cancels_jobs: bool = False
    ) -> BatchUploader:
        engine = Services(
            api_client=ApiClient(clock=self.clock, transport=self.gate),
            journal=lambda _: self.journal,
            limiter=lambda _: None,  # type: ignore[arg-type,return-value]  # a batch draws on no limit
            clock=self.clock,
        )
        return BatchUploader(engine, settings, self._hear, cancels_jobs=cancels_jobs)

    def _hear(self, event: events.Event) -> None:
        self.events.append(event)
        self._heard.set()

    async def ended(self, uploader: BatchUploader, requests: list[Request], **known: Any) -> None:
        """Hand rows over, and wait for all to end."""
        uploader.add([PendingRow(request, known.get(request.id)) for request in requests])
        uploader.flush()
        give_up = self.clock.now() + 3 * 86_400.0
        while len(self.endings) < len(requests):
            self._heard.clear()
            assert await self.clock.wait(give_up, unless=self._heard), "it did not come about"

    async def until(self, holds: Callable[[], bool], *, within: float = 86_401.0) -> None:
        give_up = self.clock.now() + within
        while not holds():
            assert self.clock.now() < give_up, "it did not come about"
            await asyncio.sleep(30.0)

    @property
    def endings(self) -> dict[str, events.Ending]:
        return {e.request_id: e for e in self.events if isinstance(e, events.Ending)}

    def again(self) -> None:
        """Hear of what comes from now on alone."""
        self.events.clear()

    @property
    def asked(self) -> list[str]:
        """What the provider answered in batches."""
        return [seen.prompt for seen in self.core.log if seen.method == "BATCH"]

    @property
    def files(self) -> int:
        return len(self.core.library._files)

    def entries(self, batch: str = "m1") -> dict[str, Any]:
        return {entry.id: entry for entry in self.journal.maps.entries(batch)}


def requests(count: int, *, batch: str = "m1", prompt: str = "[[echo: {}]]", **o: Any) -> Any:
    return [
        Request(
            prompt=prompt.format(n),
            id=f"{batch}-{n}",
            origin=Origin(map_id=batch, row_index=n, row_count=count, engine="batch"),
            **{"reuse": True, **o},
        )
        for n in range(count)
    ]


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time."""

    def run() -> None:
        run_virtual(test())

    run.__doc__, run.__name__ = test.__doc__, test.__name__
    return run


@virtually
async def test_all_rows_are_answered_by_one_batch_whose_files_are_erased() -> None:
    """Text, usage and status are in the journal, too; of looks there are few."""
    place = Place()
    await place.ended(place.uploader(), requests(5))
    assert [place.endings[f"m1-{n}"].reply.text for n in range(5)] == list("01234")
    assert {entry.reply.status for entry in place.entries().values()} == {"done"}
    assert place.entries()["m1-3"].reply.usage.total_tokens
    assert place.endings["m1-3"].reply.simulated
    assert place.gate.count("POST /v1/batches") == 1
    assert place.files == 0
    looks = place.gate.count("GET /v1/batches/")
    assert 60 <= looks <= 90  # an hour, seldom more often than once a minute


@virtually
async def test_a_row_is_in_the_journal_before_anything_is_handed_in() -> None:
    """So is the part that it goes with."""
    place = Place()
    seen: list[set[Any]] = []
    place.gate.before = lambda call: (
        seen.append({entry.batch_job for entry in place.entries().values()})
        if call == "POST /v1/files"
        else None
    )
    await place.ended(place.uploader(), requests(3))
    assert len(seen) == 1
    assert len(seen[0]) == 1
    assert None not in seen[0]


@virtually
async def test_what_is_answered_is_not_handed_in() -> None:
    """An equal row of another map costs nothing."""
    place = Place()
    await place.ended(place.uploader(), requests(2))
    place.again()
    await place.ended(place.uploader(), requests(3, batch="m2"))
    assert [place.endings[f"m2-{n}"].reply.reused for n in range(3)] == [True, True, False]
    assert sorted(place.asked) == ["[[echo: 0]]", "[[echo: 1]]", "[[echo: 2]]"]


@virtually
async def test_after_stop_the_provider_goes_on_and_resume_fetches() -> None:
    """The rows are parked at once, and handed in once."""
    place = Place()
    stopped, rows = place.uploader(), requests(3)
    stopped.add([PendingRow(request) for request in rows])
    stopped.flush()
    await place.until(lambda: stopped.stage == "in progress 1 of 3")
    await stopped.park()
    assert {type(ending) for ending in place.endings.values()} == {events.Parked}
    assert {entry.status for entry in place.entries().values()} == {"parked"}
    place.again()
    await place.ended(place.uploader(), rows, **place.entries())
    assert {ending.reply.status for ending in place.endings.values()} == {"done"}
    assert len(place.asked) == 3
    assert place.files == 0


@virtually
async def test_running_the_map_again_waits_for_what_is_with_the_provider() -> None:
    """It is another map then, with equal rows: they are not handed in twice."""
    place = Place()
    stopped = place.uploader()
    stopped.add([PendingRow(request) for request in requests(3)])
    stopped.flush()
    await place.until(lambda: place.gate.count("POST /v1/batches") == 1)
    await asyncio.sleep(100)
    await stopped.park()
    place.again()
    again = place.uploader()
    again.add([PendingRow(request) for request in requests(4, batch="m2")])
    again.flush()
    await place.until(lambda: sum(id_.startswith("m2-") for id_ in place.endings) == 4)
    assert {place.endings[f"m2-{n}"].reply.text for n in range(4)} == set("0123")
    assert len(place.asked) == 4
    assert {entry.status for entry in place.entries("m1").values()} == {"done"}
    assert place.files == 0


@virtually
async def test_a_batch_that_nobody_noted_is_found_by_its_tag() -> None:
    """Between the provider's yes and our commit, the process dies: nothing is paid twice."""
    place = Place()
    died, rows = place.uploader(), requests(2)

    def die(call: str) -> None:
        if call == "POST /v1/batches":
            raise asyncio.CancelledError

    place.gate.after = die
    died.add([PendingRow(request) for request in rows])
    died.flush()
    await place.until(lambda: place.gate.count("POST /v1/batches") == 1)
    await asyncio.sleep(1)
    await died.park()
    place.again()
    await place.ended(place.uploader(), rows, **place.entries())
    assert {ending.reply.text for ending in place.endings.values()} == set("01")
    assert place.gate.count("POST /v1/batches") == 1
    assert place.files == 0


@virtually
async def test_a_part_that_never_arrived_is_handed_in() -> None:
    """Written down, but the process died before the provider heard of it."""
    place = Place()
    died, rows = place.uploader(), requests(2)
    place.gate.before = lambda call: httpx2.Response(503) if call.startswith("POST") else None
    died.add([PendingRow(request) for request in rows])
    died.flush()
    await place.until(lambda: place.gate.count("POST /v1/files") >= 2)
    await died.park()
    place.again()
    place.gate.before = lambda _: None
    await place.ended(place.uploader(), rows, **place.entries())
    assert {ending.reply.text for ending in place.endings.values()} == set("01")
    assert len(place.asked) == 2


@virtually
async def test_a_lost_answer_to_handing_in_is_no_reason_to_do_it_twice() -> None:
    """The provider made the batch, and its answer was lost on the way."""
    place = Place()

    def lose(call: str) -> None:
        if call == "POST /v1/batches" and place.gate.count(call) == 1:
            raise httpx2.ReadError("lost")

    place.gate.after = lose
    await place.ended(place.uploader(), requests(2))
    assert place.gate.count("POST /v1/batches") == 1
    assert place.gate.count("POST /v1/files") == 1
    assert len(place.asked) == 2


@virtually
async def test_faults_of_looks_and_results_are_survived() -> None:
    """A third of all calls fail, whatever they are."""
    place, chance = Place(), random.Random(7)
    place.gate.before = lambda _: httpx2.Response(503) if chance.random() < 0.3 else None
    await place.ended(place.uploader(), requests(3))
    assert {ending.reply.text for ending in place.endings.values()} == set("012")
    assert len(place.asked) == 3
    assert place.files == 0


@virtually
async def test_failures_of_rows_are_listed_and_the_rest_is_answered() -> None:
    """A row that the server rejects ends as it would when asked at once."""
    place = Place()
    rows = [*requests(1), *requests(2, model="no-such-model")[1:]]
    await place.ended(place.uploader(), rows)
    assert place.endings["m1-0"].reply.text == "0"
    ending = place.endings["m1-1"]
    assert isinstance(ending, events.Failed)
    assert isinstance(ending.error, ModelError)
    assert place.entries()["m1-1"].status == "failed"


@pytest.mark.slow
@virtually
async def test_what_a_batch_did_not_come_to_is_parked_and_handed_in_again() -> None:
    """An expired batch costs only what it answered."""
    place = Place(batch_seconds=2 * 86_400.0)
    rows = requests(4)
    await place.ended(place.uploader(), rows)
    kinds = [type(place.endings[f"m1-{n}"]) for n in range(4)]
    assert kinds == [events.Finished] * 2 + [events.Parked] * 2
    assert place.files == 0
    place.core.change_knobs(batch_seconds=HOUR)
    place.again()
    await place.ended(place.uploader(), rows[2:], **place.entries())
    assert {ending.reply.text for ending in place.endings.values()} == {"2", "3"}
    assert len(place.asked) == 4


@virtually
async def test_cancel_fetches_what_is_done_and_hands_in_nothing() -> None:
    """The provider is told, and its files are erased."""
    place = Place()
    stopped, rows = place.uploader(), requests(4)
    stopped.add([PendingRow(request) for request in rows])
    stopped.flush()
    await place.until(lambda: stopped.stage == "in progress 2 of 4")
    await stopped.park()
    place.again()
    await place.ended(place.uploader(cancels_jobs=True), rows, **place.entries())
    kinds = [type(place.endings[f"m1-{n}"]) for n in range(4)]
    assert kinds == [events.Finished] * 2 + [events.Parked] * 2
    assert place.gate.count("POST /v1/batches") == 2  # the batch, and its cancelling
    assert place.files == 0


@virtually
async def test_a_full_queue_is_waited_for_with_smaller_parts() -> None:
    """Rows stay in order, none is an error, and what fits goes."""
    place = Place(batch_queue=4, batch_seconds=600.0)
    await place.ended(place.uploader(), requests(20))
    assert {ending.reply.status for ending in place.endings.values()} == {"done"}
    assert len(place.asked) == 20
    assert place.asked[:4] == [f"[[echo: {n}]]" for n in range(4)] or len(place.asked[:2]) == 2
    assert place.files == 0


@virtually
async def test_a_part_holds_so_many_rows_and_bytes_at_the_most() -> None:
    """What does not fit goes with the next one."""
    place = Place()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upload, "MAX_BATCH_REQUESTS", 3)
        await place.ended(place.uploader(), requests(7))
        patched.setattr("nbcodex.mapping.batch_files.MAX_BATCH_BYTES", 700)
        patched.setattr(upload, "MAX_BATCH_REQUESTS", 50)
        place.again()
        made = place.gate.count("POST /v1/files")
        assert made == 3
        await place.ended(place.uploader(), requests(4, batch="m2", prompt="x" * 100 + "{}"))
        assert place.gate.count("POST /v1/files") - made >= 2
    assert len(place.asked) == 11


@virtually
async def test_a_server_without_batches_says_so() -> None:
    """The error names the engine that works there."""
    place = Place()
    place.gate.before = lambda _: httpx2.Response(404, json={"error": {"message": "Not Found"}})
    await place.ended(place.uploader(), requests(2))
    ending = place.endings["m1-0"]
    assert isinstance(ending, events.Failed)
    assert isinstance(ending.error, BatchUnsupportedError)
    assert "engine='live'" in str(ending.error)


@virtually
async def test_a_budget_holds_rows_back() -> None:
    """What would pass it is parked, before it is handed in; what goes is counted as used."""
    place = Place()
    settings = replace(SETTINGS, budgets=("250",))
    await place.ended(place.uploader(settings), requests(5, max_output=60))
    parked = [e for e in place.endings.values() if isinstance(e, events.Parked)]
    assert 0 < len(parked) < 5
    assert isinstance(parked[0].error, BudgetError)
    assert len(place.asked) == 5 - len(parked)


async def set_aside(place: Place) -> int:
    """Return how many tokens are set aside for all kernels."""
    return (await place.journal.read_spending("2030-01-01")).reserved.tokens


@virtually
async def test_nothing_stays_set_aside_for_rows_that_no_provider_took() -> None:
    """Else a day's budget would refuse what comes, though nothing is under way."""
    place = Place(batch_queue=2)
    await place.journal.set_budget("90k/day")
    stopped = place.uploader()
    stopped.add([PendingRow(request) for request in requests(12)])
    stopped.flush()
    await place.until(lambda: stopped.stage == "the provider's queue is full")
    assert await set_aside(place) > 0
    await stopped.park()
    assert await set_aside(place) == 0


@virtually
async def test_what_the_provider_goes_on_with_stays_set_aside() -> None:
    """Until it is fetched."""
    place = Place()
    await place.journal.set_budget("90k/day")
    stopped, rows = place.uploader(), requests(3)
    stopped.add([PendingRow(request) for request in rows])
    stopped.flush()
    await place.until(lambda: stopped.stage.startswith("in progress"))
    before = await set_aside(place)
    await stopped.park()
    assert await set_aside(place) == before > 0
    place.again()
    await place.ended(place.uploader(), rows, **place.entries())
    assert await set_aside(place) == 0


@virtually
async def test_another_server_is_not_asked_for_what_it_does_not_have() -> None:
    """The rows stay where they are, and the error says where that is."""
    place = Place()
    stopped, rows = place.uploader(), requests(2)
    stopped.add([PendingRow(request) for request in rows])
    stopped.flush()
    await place.until(lambda: place.gate.count("GET /v1/batches/") > 0)
    await stopped.park()
    place.again()
    elsewhere = replace(SETTINGS, base_url="http://127.0.0.2/v1")
    await place.ended(place.uploader(elsewhere), rows, **place.entries())
    assert "127.0.0.1" in str(place.endings["m1-0"].error)  # type: ignore[union-attr]
    assert {entry.status for entry in place.entries().values()} == {"parked"}
    place.again()
    await place.ended(place.uploader(), rows, **place.entries())
    assert len(place.asked) == 2


@virtually
async def test_files_that_a_dead_process_left_are_erased_by_the_next_map() -> None:
    """It died between the last commit and the erasing."""
    place = Place()
    place.gate.before = lambda call: httpx2.Response(500) if call.startswith("DELETE") else None
    await place.ended(place.uploader(), requests(1))
    assert place.files == 2
    place.gate.before = lambda _: None
    place.again()
    await place.ended(place.uploader(), requests(2))
    await place.until(lambda: place.files == 0)


@virtually
async def test_a_file_of_which_no_batch_was_made_is_erased() -> None:
    """The process died between the two; its rows are handed in as another one."""
    place = Place()
    died, rows = place.uploader(), requests(2)
    place.gate.before = lambda call: httpx2.Response(503) if call == "POST /v1/batches" else None
    died.add([PendingRow(request) for request in rows])
    died.flush()
    await place.until(lambda: place.gate.count("POST /v1/batches") >= 2)
    await died.park()
    assert place.files == 1
    place.again()
    place.gate.before = lambda _: None
    await place.ended(place.uploader(), rows, **place.entries())
    assert len(place.asked) == 2
    assert place.files == 0


@virtually
async def test_files_are_kept_where_the_user_wants_it() -> None:
    """Questions and answers stay with the provider."""
    place = Place()
    await place.ended(place.uploader(replace(SETTINGS, keep_files=True)), requests(1))
    assert place.files == 2
