"""The one client of a process: what its requests share, and their handles.

Its methods may be called from any thread, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from nbcodex.errors import NbcodexError
from nbcodex.events import Listener
from nbcodex.models import NOTE_POSSIBLY_PAID_TWICE, Request, Resumption
from nbcodex.requests.conversation import Conversations
from nbcodex.requests.handle import Handle
from nbcodex.requests.process_resources import ProcessResources
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import Clock
from nbcodex.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    import httpx2

    from nbcodex.journal.reads import Entry
    from nbcodex.openai_api.endpoints import Endpoint
    from nbcodex.ratelimit.sharing import LimitState
    from nbcodex.requests.budget import RequestEstimate

# For parking the running requests, within `process_resources.SHUTDOWN_TIMEOUT_S`: the loop may
# be busy with loading the SDK.
PARK_TIMEOUT_S = 2.0


class Client(ProcessResources):
    """All requests of a process: one set of services and listeners."""

    def __init__(
        self, *, clock: Clock | None = None, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(clock=clock, transport=transport)
        self.listeners: list[Listener] = [self.totals]
        # Weak: a handle that no thread follows lives as long as its request.
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        self.conversations = Conversations()

    def endpoint(self, request: Request, settings: Settings) -> Endpoint:
        """Return where a request goes, once an async factory has made the custom client."""
        return event_loop.run(self.services().api_client.await_endpoint(request, settings))

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
        super().close()

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
