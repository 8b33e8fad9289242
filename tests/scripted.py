"""An API client without a network: each attempt does what the next part of a script says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from nbcodex.events import EndAction, Ending, Event
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.models import Reply, Request, Usage
from nbcodex.openai_api.answers import CompletedAnswer, ResponseStarted, StreamEvent, TextDelta
from nbcodex.openai_api.endpoints import Endpoint, resolve
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.requests.runner import RequestRunner, Services
from nbcodex.settings import Secret, Settings
from tests.virtual import LoopClock

# What one attempt does: events that arrive, seconds that pass, an error that ends it.
Attempt = Iterable[StreamEvent | Exception | float]

SETTINGS = Settings(api_key=Secret("sk-test"))
USAGE = Usage(input_tokens=10, output_tokens=5)
STARTED = ResponseStarted(
    api="responses", model="m-1", snapshot=None, simulated=False, request_id=None
)


def answer(text: str) -> Attempt:
    """Return an attempt that brings `text` as its answer."""
    done = CompletedAnswer(text=text, usage=USAGE, model="m-1", cut=None, response_id=None)
    return [STARTED, TextDelta(text), done]


@dataclass
class ScriptedApiClient:
    """Stands in for `ApiClient`; `seen` holds each request as it was sent."""

    attempts: list[Attempt]
    seen: list[tuple[float, Request]] = field(default_factory=list)

    def endpoint(self, request: Request, settings: Settings) -> Endpoint:
        return resolve(settings, request)

    async def await_endpoint(self, request: Request, settings: Settings) -> Endpoint:
        return self.endpoint(request, settings)

    def limits_id(self, endpoint: Endpoint, model: str, *, salt: bytes) -> str:
        return model

    async def resolve_model(self, request: Request, settings: Settings) -> str:
        return request.model or "m"

    async def stream(
        self, request: Request, settings: Settings, *, model: str
    ) -> AsyncIterator[StreamEvent]:
        self.seen.append((asyncio.get_running_loop().time(), request))
        for step in self.attempts.pop(0):
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


@dataclass
class InstantJournal:
    """Stands in for `Journal`, whose thread virtual time cannot wait for."""

    written: list[tuple[str, Any]] = field(default_factory=list)
    claimable: bool = True
    answers: dict[bytes, Reply] = field(default_factory=dict)
    budget: str = ""

    async def insert(self, request: Request, **where: Any) -> None:
        self.written.append(("insert", request))
        if attempt := where.get("attempt"):
            self.written.append(("start_attempt", attempt))

    async def find_answer(self, key: bytes, *, reply_id: str) -> Reply | None:
        found = self.answers.get(key)
        return found and replace(found, id=reply_id)

    async def claim(self, id_: str, *, server: str | None = None) -> bool:
        self.written.append(("claim", id_))
        return self.claimable

    async def read_spending(self, today: str) -> Spending:
        return Spending(budget=self.budget)

    async def reserve_budget(
        self, id_: str, amount: SpendAmount, *, today: str, allowed: Callable[[Spending], bool]
    ) -> Spending:
        return Spending(budget=self.budget)

    async def start_attempt(self, id_: str, attempt: int, *, continues: bool = False) -> None:
        self.written.append(("start_attempt", attempt))

    async def record_wait(self, id_: str, resume_at: float, *, notes: tuple[str, ...] = ()) -> None:
        self.written.append(("record_wait", resume_at))

    async def set_response_id(self, id_: str, response_id: str) -> None:
        self.written.append(("set_response_id", response_id))

    async def update_text(self, id_: str, text: str, *, sequence: int | None = None) -> None:
        self.written.append(("update_text", text))

    async def finish(self, reply: Reply, **why: Any) -> None:
        self.written.append(("finish", reply))


class ScriptedServices:
    """Services with a scripted API client, in virtual time; must be created on the loop."""

    def __init__(self, *attempts: Attempt) -> None:
        self.api_client = ScriptedApiClient(list(attempts))
        self.journal = InstantJournal()
        self.limiter = Limiter()
        self.services = Services(
            api_client=self.api_client,  # type: ignore[arg-type]
            journal=lambda _: self.journal,  # type: ignore[arg-type,return-value]
            spending_journal=lambda _: self.journal,  # type: ignore[arg-type,return-value]
            limiter=lambda _: self.limiter,
            clock=LoopClock(),
        )
        self.events: dict[str, list[Event]] = {}

    def start(
        self, request: Request, *, on_committed: Callable[[], object] = lambda: None
    ) -> RequestRunner:
        """Start a request; its events are gathered under its id."""
        received = self.events.setdefault(request.id, [])
        runner = RequestRunner(
            self.services, request, SETTINGS, received.append, on_committed=on_committed
        )
        return runner.start()

    async def run(self, request: Request, *actions: tuple[float, EndAction]) -> list[Event]:
        """Run a request to its ending, with actions at given seconds; return its events."""
        run = self.start(request)
        loop = asyncio.get_running_loop()
        for after, what in actions:
            loop.call_later(after, run.end, what)
        await asyncio.wait([run.task])
        return self.events[request.id]


def ending(events: list[Event]) -> Any:
    """Return the one ending, which is the last event."""
    assert [isinstance(e, Ending) for e in events].index(True) == len(events) - 1
    return events[-1]
