"""Sends one request, and reads what comes back to its end or to an error.

Owns what the attempts of a request have in common. Whether there is another one is the engine's
affair.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from nbcodex import events
from nbcodex.errors import GoneError, LimitError, NbcodexError
from nbcodex.journal.entry import JournalEntry
from nbcodex.models import Rates, StreamPosition
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import (
    CompletedAnswer,
    Notice,
    ReasoningDelta,
    Reset,
    ResponseStarted,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit.limiter import CooldownTooLongError, Limiter, Reservation, Waiter
from nbcodex.ratelimit.rate_limiter import Cooldown, Wait
from nbcodex.requests import parking
from nbcodex.requests.cost_estimate import rate_limit_cost
from nbcodex.requests.partial import ASKED_ANEW
from nbcodex.requests.story import Story
from nbcodex.settings import Settings


class Sender:
    """One request's way to the server.

    Parameters
    ----------
    api_client : ApiClient
        The way.
    settings : Settings
        How the server is reached.
    story, entry
        Of the request: what is told of it, and kept of it.
    limiter, waiter : Limiter, Waiter
        Whose permit each attempt needs, and how the request waits for one.
    under_way : callable
        Told the base URL when an attempt is.
    permit : callable
        Raises where the request may not be sent, before the ledger is asked.

    Attributes
    ----------
    heard_at : float
        When the attempt under way was heard of last.
    opened : bool
        Whether the server has let it in.
    sent : bool
        Whether an attempt is under way that the server may know of.
    reservation : Reservation or None
        Of the attempt under way; None where it draws on no limit.
    """

    def __init__(
        self,
        api_client: ApiClient,
        settings: Settings,
        story: Story,
        entry: JournalEntry,
        limiter: Limiter,
        waiter: Waiter,
        under_way: Callable[[str], None],
        permit: Callable[[], Awaitable[None]],
    ) -> None:
        self._api_client, self._settings = api_client, settings
        self._under_way, self._permit = under_way, permit
        self._story, self._entry = story, entry
        self._limiter, self._waiter = limiter, waiter
        self.reservation: Reservation | None = None
        self._request, self._partial = story.request, story.partial
        self.heard_at = story.clock.now()
        self.opened = self.sent = self._broken = False

    async def attempt(self) -> CompletedAnswer:
        """Send the request once, or go on with its durable answer, and read to the end."""
        try:
            return await self._attempt()
        except NbcodexError as error:
            if error.simulated:
                self._story.hear_server(simulated=True)
            raise

    async def _attempt(self) -> CompletedAnswer:
        self.heard_at = self._story.clock.now()
        if not (self._request.model or self._settings.model):
            await self._entry.wait_inserted()  # for to name one, the server may have to be asked
        self._story.model = model = await self._api_client.resolve_model(
            self._request, self._settings
        )
        endpoint = self._api_client.endpoint(self._request, self._settings)
        # That of a client made by a factory is known only now.
        self._story.base_url = endpoint.base_url
        if mark := self._partial.mark:
            with contextlib.suppress(GoneError):
                return await self._pick_up(mark)
            self._partial.note(ASKED_ANEW)
        salt = await self._limiter.salt()
        return await self._ask(model, self._api_client.bucket_id(endpoint, model, salt=salt))

    async def _pick_up(self, mark: StreamPosition) -> CompletedAnswer:
        """Go on where the stream broke; that draws on no limit, so nothing is reserved."""
        self.reservation = None
        await self._begin(rates=None)
        text = self._partial.resume(mark)
        return await self._read(
            self._api_client.resume_stream(self._request, self._settings, mark=mark, text=text)
        )

    async def _ask(self, model: str, bucket: str) -> CompletedAnswer:
        if self._broken:
            self._broken = False
            self._story.lose(self._partial.so_far(self._story.asking))
        self._partial.ask_anew()
        await self._permit()
        reservation = await self._reserve(bucket, label=f"{model} at {self._story.base_url}")
        try:
            base_url = self._story.base_url
            rates, unpriced = (
                pricing.token_rates(model, base_url),
                pricing.is_price_unknown(model, base_url),
            )
            await self._begin(rates=rates, unpriced=unpriced)
            reservation.mark_sent()
            stream = self._api_client.stream(self._story.asking, self._settings, model=model)
            completed = await self._read(stream)
        except LimitError as error:
            self._end_in_vain(error)
            raise  # the runner refuses the reservation: that closes the model before others go
        except NbcodexError as error:
            self._end_in_vain(error)
            reservation.release()
            raise
        except asyncio.CancelledError:
            reservation.settle(self._partial.usage(self._request, "interrupted", None))
            raise
        except BaseException:
            reservation.release()
            raise
        reservation.settle(self._partial.usage(self._request, "done", completed))
        return completed

    async def _reserve(self, bucket: str, *, label: str) -> Reservation:
        self.reservation = None
        cost = rate_limit_cost(self._story.asking)
        try:
            self.reservation = await self._limiter.acquire(
                bucket, cost, self._waiter, label=label, on_wait=self._on_wait
            )
        except CooldownTooLongError as error:
            cause = parking.closed(error.cooldown.limit)
            raise self._story.parked(cause, error.cooldown.until) from None
        return self.reservation

    async def _on_wait(self, wait: Wait | Cooldown) -> None:
        """Tell of a wait; a cooldown is noted in the journal, too."""
        story = self._story
        if isinstance(wait, Wait):
            story.tell(
                events.CoolingDown,
                limit=None,
                resume_at=wait.due_at,
                waited=story.waited,
                queued=True,
            )
            return
        await self._entry.wait_inserted()
        story.tell(events.CoolingDown, limit=wait.limit, resume_at=wait.until, waited=story.waited)
        await self._entry.wait(wait.until, wait.limit)

    def _end_in_vain(self, error: NbcodexError) -> None:
        self._broken = self.opened
        self._story.refused += error.refused and not self.opened

    async def _begin(self, *, rates: Rates | None, unpriced: bool = False) -> None:
        """Have the journal know, and tell, that an attempt is under way."""
        story = self._story
        story.attempts += 1
        self.heard_at, self.opened = story.clock.now(), False
        await self._entry.start_attempt(story.attempts)
        story.tell(
            events.Sent,
            attempt=story.attempts,
            model=story.model,
            input_tokens=pricing.estimate_request_tokens(self._story.asking),
            rates=rates,
            unpriced=unpriced,
            simulated=story.simulated,
        )
        self.sent = True
        self._under_way(story.base_url)

    async def _read(self, pieces: AsyncGenerator[StreamEvent]) -> CompletedAnswer:
        story = self._story
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                self.heard_at = story.clock.now()
                match piece:
                    case ResponseStarted():
                        self.opened = True
                        story.hear_server(simulated=piece.simulated)
                        if self.reservation:
                            self.reservation.observe(piece.snapshot)
                    case StreamPosition():
                        self._partial.reach(piece)
                        await self._entry.set_response_id(piece)
                    case Reset():
                        self._partial.replace()
                    case TextDelta(text):
                        if self._partial.add(text):
                            story.tell(events.Restarted)
                        story.grow(text)
                        self._entry.update_soon()
                    case ReasoningDelta(text):
                        story.grow(text, reasoning=True)
                    case Notice(text):
                        self._partial.note(text)
                    case CompletedAnswer():
                        return piece
        raise AssertionError("the wire ends a stream with Completed or an error")
