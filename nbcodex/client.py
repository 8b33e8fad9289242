"""The one client of a process: its services, journals, limiters, and the handles of its requests.

Its methods may be called from any thread, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from nbcodex.errors import NbcodexError
from nbcodex.events import BackingOff, Ending, Event, Listener
from nbcodex.models import NOTE_POSSIBLY_PAID_TWICE, Request, Resumption, UsageTotals
from nbcodex.requests.conversation import Conversations
from nbcodex.requests.handle import Handle
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.settings import DEFAULT_MODEL, JOURNAL_FILENAME, Secret, Settings, data_folder

if TYPE_CHECKING:
    import httpx2

    from nbcodex.journal.journal import Journal
    from nbcodex.journal.reads import Entry
    from nbcodex.openai_api.endpoints import Endpoint
    from nbcodex.ratelimit.limiter import Limiter
    from nbcodex.ratelimit.sharing import LimitState
    from nbcodex.requests.budget import RequestEstimate
    from nbcodex.requests.runner import Services

# The 90 days are `journal.database.RETENTION_S`.
_FIRST_USE_NOTICE = (
    "from now on prompts and answers are kept in {folder} for 90 days, readable by you alone "
    "(%codex forget erases, %config Codex.journal = False keeps none)"
)

# A front end that restarts a kernel kills it after this time; the journal must be closed by then.
SHUTDOWN_TIMEOUT_S = 5.0
# This much of it is for parking the running requests: the loop may be busy with loading the SDK.
PARK_TIMEOUT_S = 2.0


class SessionTotals:
    """A listener that sums up what this process has used, by model."""

    def __init__(self) -> None:
        self.by_model: defaultdict[str, UsageTotals] = defaultdict(UsageTotals)
        self._refusals: Counter[str] = Counter()  # of running requests, by id

    def __call__(self, event: Event) -> None:
        """Count an event, on the loop's thread."""
        if isinstance(event, BackingOff) and event.limit is not None:
            self._refusals[event.request_id] += 1
        elif isinstance(event, Ending):
            refusals = self._refusals.pop(event.request_id, 0)
            # A reused answer, or a request that was never sent, has used nothing.
            if event.reply.attempts:
                model = event.reply.model or "unknown"
                self.by_model[model] += UsageTotals.of(event.reply, refusals=refusals)

    @property
    def total(self) -> UsageTotals:
        """The totals of all models together."""
        return sum(self.by_model.values(), UsageTotals())


class Client:
    """All requests of a process: one set of services and listeners."""

    def __init__(
        self, *, clock: Clock | None = None, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self.clock = clock or BootClock()
        self.totals = SessionTotals()  # what this process has used
        self.listeners: list[Listener] = [self.totals]
        self._transport = transport  # replaces the network, in the simulator and in tests
        self._services: Services | None = None
        # By data folder and Redis URL; None: the one of `Settings.private_limits`.
        self._limiters: dict[tuple[Path, Secret | None] | None, Limiter] = {}
        self._notices = ""  # sentences to be shown to the user once
        self._unannounced: set[Path] = set()  # folders of new journals that hold no request yet
        self._journals: dict[Path | None, Journal] = {}  # by folder; None: in memory
        self._journals_lock, self._services_lock = threading.Lock(), threading.Lock()
        # Weak: a handle that no thread follows lives as long as its request.
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        self.conversations = Conversations()

    def services(self) -> Services:
        """Return the services; the first call creates them."""
        # Several cells may call it first at the same time, in subshells and threads.
        with self._services_lock:
            if self._services is None:
                from nbcodex.openai_api.api_client import ApiClient
                from nbcodex.requests.runner import Services

                atexit.register(self.close)
                self._services = Services(
                    api_client=ApiClient(clock=self.clock, transport=self._transport),
                    clock=self.clock,
                    limiter=self.limiter,
                    journal=self.journal,
                    spending_journal=self.spending_journal,
                )
            return self._services

    def endpoint(self, request: Request, settings: Settings) -> Endpoint:
        """Return where a request goes, once an async factory has made the custom client."""
        return event_loop.run(self.services().api_client.await_endpoint(request, settings))

    def limiter(self, settings: Settings) -> Limiter:
        """Return the limiter for these settings; called on the loop's thread."""
        from nbcodex.ratelimit.limiter import Limiter
        from nbcodex.ratelimit.worker import SharedLimiter, open_store

        if settings.private_limits:
            return self._limiters.setdefault(None, Limiter())
        # Shared by all processes with this folder or Redis, also where prompts are not kept: it
        # holds numbers only, under names that are hashes.
        key = folder, url = data_folder(settings), settings.redis_url
        if key not in self._limiters:
            open_shared = partial(open_store, folder, redis_url=url, notify=self._add_notice)
            limiter = SharedLimiter(open_shared, clock=self.clock, on_problem=self._add_notice)
            self._limiters[key] = limiter
        return self._limiters[key]

    def _add_notice(self, notice: str) -> None:
        self._notices = f"{self._notices} {notice}".strip()

    def take_notices(self, settings: Settings) -> str:
        """Return the sentences to be shown once, below a request that was made with `settings`."""
        folder = data_folder(settings)
        # The demo says itself where its requests are kept.
        if settings.journal and not settings.private_limits and folder in self._unannounced:
            self._unannounced.discard(folder)
            self._add_notice(_FIRST_USE_NOTICE.format(folder=folder))
        notices, self._notices = self._notices, ""
        return notices

    def journal(self, settings: Settings) -> Journal:
        """Return the journal for these settings, on disk or in memory; each is opened once."""
        folder = data_folder(settings) if settings.journal else None
        if folder and folder not in self._journals and not (folder / JOURNAL_FILENAME).exists():
            self._unannounced.add(folder)
        return self._open_journal(folder)

    def journal_on_disk(self, settings: Settings) -> Journal | None:
        """Return the journal on disk, if there is one, even with the setting `journal` off."""
        folder = data_folder(settings)
        is_used = folder in self._journals or (folder / JOURNAL_FILENAME).exists()
        return self._open_journal(folder) if is_used else None

    def spending_journal(self, settings: Settings, *, create: bool = False) -> Journal:
        """Return the journal that counts what is spent: if possible the one on disk.

        With `create`, it is on disk even if the file has to be created for the counters alone.
        """
        # Numbers reveal nothing, and switching off the journal must not lift a cap of a day. The
        # demo (`private_limits`) costs nothing, so its spending is counted apart.
        if settings.journal or settings.private_limits:
            return self.journal(settings)
        from nbcodex.requests.budget import parse_cap

        folder = data_folder(settings)
        create = create or any(parse_cap(cap).period != "session" for cap in settings.budgets)
        is_on_disk = create or (folder / JOURNAL_FILENAME).exists()
        return self._open_journal(folder if is_on_disk else None)

    def _open_journal(self, folder: Path | None) -> Journal:
        from nbcodex.journal.journal import Journal

        with self._journals_lock:
            if folder not in self._journals:
                self._journals[folder] = Journal(folder, clock=self.clock)
            return self._journals[folder]

    # Budgets and estimates. Imports are local: the client exists from the first cell on, which has
    # to be fast.

    async def budget_usage(self, settings: Settings) -> list[str]:
        """Return, as text, how much of each of the user's caps is used."""
        budget = self.services().budget
        await budget.refresh(self.spending_journal(settings))
        return budget.usage_lines(settings.budgets)

    async def budget_remaining(
        self, settings: Settings, base_url: str, *, tokens: int, cost: float | None
    ) -> list[str]:
        """Return, as text, whether each of the user's caps still allows `tokens` and `cost`."""
        budget, caps = self.services().budget, settings.budgets
        await budget.refresh(self.spending_journal(settings))
        return budget.remaining_lines(caps, base_url=base_url, tokens=tokens, cost=cost)

    async def estimate(
        self, request: Request, settings: Settings
    ) -> tuple[str | None, RequestEstimate, list[str]]:
        """Return the model of a request, what it may cost, and whether each cap allows it."""
        from nbcodex.openai_api import pricing

        services = self.services()
        base_url = (await services.api_client.await_endpoint(request, settings)).base_url
        model = await services.api_client.resolve_model(request, settings)
        await asyncio.to_thread(pricing.load_prices)
        estimate = services.budget.estimate(request, model=model, base_url=base_url)
        tokens = estimate.input_tokens + estimate.output_tokens
        budgets = self.budget_remaining(settings, base_url, tokens=tokens, cost=estimate.cost)
        return model, estimate, await budgets

    def resume(
        self,
        entry: Entry,
        settings: Settings,
        *,
        not_before: float | None = None,
        any_server: bool = False,
        listener: Listener | None = None,
    ) -> Handle:
        """Return a handle that resumes a parked, abandoned, interrupted or failed request.

        Nothing is started yet. It is not sent before `not_before`, in seconds since the epoch.
        With `any_server` it may go to another server than the entry was written for.
        """
        # A request that began with less patience than the settings have now gets theirs.
        request = replace(entry.request, patience=max(entry.request.patience, settings.patience))
        if any_server:
            request = request.with_server(None)
        position = entry.stream_position
        # Where a stream is read from its beginning (no `sequence`), its text arrives again.
        text = "" if position is None or position.sequence is None else entry.reply.text
        notes = (NOTE_POSSIBLY_PAID_TWICE,) if entry.possibly_paid else ()
        resumption = Resumption(not_before, position=position, text=text, notes=notes)
        return self.create_handle(request, settings, resumption=resumption, listener=listener)

    def create_handle(
        self,
        request: Request,
        settings: Settings,
        *,
        resumption: Resumption | None = None,
        listener: Listener | None = None,
    ) -> Handle:
        """Return a handle of a request; nothing is started yet."""
        handle = Handle(
            request,
            settings,
            services=self.services,
            listeners=[*self.listeners, listener] if listener else self.listeners,
            resumption=resumption,
        )
        self._handles[request.id] = handle
        return handle

    def active_handles(self) -> list[Handle]:
        """Return the requests of this process that have not ended, oldest first."""
        # References first: iterating over the handles fails while a thread starts a request.
        handles = [reference() for reference in self._handles.valuerefs()]
        return [handle for handle in handles if handle is not None and not handle.done]

    def close(self) -> None:
        """Park what is running, and close the journals and limiters, as the process ends."""
        handles = self.active_handles()
        # Parked rather than abandoned: `%codex resume` then knows when each can be sent.
        for handle in handles:
            handle.park_at_exit()
        concurrent.futures.wait([handle.ending for handle in handles], timeout=PARK_TIMEOUT_S)
        for journal in self._journals.values():
            journal.shut_down(max_interruption_age=SHUTDOWN_TIMEOUT_S)
        for limiter in self._limiters.values():
            limiter.close()

    async def limits(self, settings: Settings) -> dict[str, LimitState]:
        """Return the limits of the models used here and the default one, by ``MODEL at SERVER``."""
        limiter, api_client = self.limiter(settings), self.services().api_client
        default_ids: list[str] = []  # a hash, salted alike in all processes that share limits
        with contextlib.suppress(NbcodexError):
            endpoint = api_client.endpoint(Request(prompt="?"), settings)
            model = settings.model or DEFAULT_MODEL
            default_ids = [api_client.limits_id(endpoint, model, salt=await limiter.salt())]
            limiter.labels.setdefault(default_ids[0], f"{model} at {endpoint.base_url}")
        return await limiter.limit_states(self.clock.now(), *default_ids)


_current: Client | None = None


def get_client() -> Client:
    """Return this process's client."""
    global _current
    if _current is None:
        _current = Client()
    return _current


def _reset_after_fork() -> None:
    # A forked child must not use the connections and files of its parent.
    global _current
    _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
