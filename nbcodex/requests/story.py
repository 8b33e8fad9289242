"""What has come of one request so far, and how its listener is told.

Owns the figures and the text that every event and reply is made of. Decides nothing, and must not
know attempts from waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from nbcodex.errors import ParkedError, TransientError
from nbcodex.events import BackingOff, CoolingDown, Delta, Event, Sent
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import CarriedReasoning, Reply, Request, Status, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.ratelimit.limiter import Patience
from nbcodex.requests import parking
from nbcodex.requests.partial import Partial
from nbcodex.runtime.clock import Clock

E = TypeVar("E", bound=Event)

log = logging.getLogger(__name__)

NOTHING = Usage(input_tokens=0, output_tokens=0)
"""What a request has used that was refused whenever it was sent."""


class Story:
    """One request's story.

    Parameters
    ----------
    request : Request
        Whose it is.
    listener : callable
        Hears the events.
    clock : Clock
        Dates them.
    simulators : set of str or None
        Base URLs at which a simulator answers, as far as anybody has heard from one.

    Attributes
    ----------
    partial : Partial
        What there is of the answer.
    attempts : int
        HTTP tries.
    patience : Patience
        How long its user waits, and how much of that is used up.
    refused : int
        Tries that cost nothing: the server refused them before any answer, or never had them.
    broken : Usage
        What tries have used that broke off, as far as text has come of it; an estimate.
    base_url, model : str, str or None
        The server and the model, as far as they are known.
    asking : Request
        The request as it is put now.
    answer : Completed or None
        The finished answer.
    wait : Wait or None
        What it waits for now.
    """

    def __init__(
        self,
        request: Request,
        listener: Callable[[Event], None],
        *,
        clock: Clock,
        simulators: set[str] | None = None,
    ) -> None:
        self.request, self.clock = request, clock
        self.partial = Partial()
        self.attempts, self.refused = 0, 0
        self.patience = Patience(request.patience)
        self.broken = NOTHING
        self.base_url = ""
        self.model: str | None = request.model
        self.asking = request
        self.answer: CompletedAnswer | None = None
        self.wait: parking.Wait | None = None
        self._begun = False
        self._simulators = set() if simulators is None else simulators
        self._listener = listener
        self._born_at = clock.now()

    @property
    def waited(self) -> float:
        """The seconds of patience that are used up."""
        return self.patience.waited

    @property
    def simulated(self) -> bool:
        """Whether a simulator answers at the server's address, so that nothing of it counts."""
        return self.base_url in self._simulators

    def hear_server(self, *, simulated: bool) -> None:
        """The server has said whether it is a simulator."""
        (self._simulators.add if simulated else self._simulators.discard)(self.base_url)

    def lose(self, usage: Usage) -> None:
        """Count what an attempt has used that broke off: it is paid, and no server tells of it."""
        if usage != Usage():
            self.broken = self.broken.plus(usage)

    @property
    def spent(self) -> SpendAmount:
        """What attempts have come to that broke off."""
        if self.broken == NOTHING:
            return SpendAmount()
        cost = pricing.cost(self.broken, self.model, self.base_url)
        return SpendAmount(tokens=self.broken.total_tokens or 0, dollars=cost or 0.0)

    def event(self, kind: Callable[..., E], **details: Any) -> E:
        """Return an event of this request that happens now."""
        return kind(request_id=self.request.id, at=self.clock.now(), **details)

    def say(self, event: Event) -> None:
        """Tell the listener; whatever it raises is its own affair."""
        match event:
            case BackingOff(error=error, resume_at=until, limit=limit):
                at_the_door = limit is not None and self.attempts == 1 and not self._begun
                self.wait = parking.Wait(error, until, unpaid=at_the_door)
            case CoolingDown(limit=limit, resume_at=float(until), queued=False):
                self.wait = parking.Wait(parking.closed(limit), until, unpaid=not self.attempts)
            case Sent() | CoolingDown():
                self.wait = None
            case Delta():
                self._begun = True
        try:
            self._listener(event)
        except Exception:
            log.exception("a listener failed on %s", type(event).__name__)

    def grow(self, text: str, *, reasoning: bool = False) -> None:
        """Tell the listener of more of the answer, or of the thinking before it."""
        self.tell(Delta, text=text, reasoning=reasoning, simulated=self.simulated)

    def tell(self, kind: Callable[..., Event], **details: Any) -> None:
        """Tell the listener what happens now."""
        self.say(self.event(kind, **details))

    def reply(self, status: Status, completed: CompletedAnswer | None = None) -> Reply:
        """Return what there is of an answer."""
        usage = self._usage(self.partial.usage(self.request, status, completed))
        model = (completed and completed.model) or self.model
        return Reply(
            id=self.request.id,
            text=completed.text if completed else self.partial.text,
            status=status,
            model=model,
            usage=usage,
            cost=pricing.cost(usage, model, self.base_url),
            attempts=self.attempts,
            waited=self.waited,
            seconds=max(0.0, self.clock.now() - self._born_at - self.waited),
            cut=completed.cut if completed else None,
            images=completed.images if completed else (),
            simulated=self.simulated,
            notes=self.partial.notes,
            carried=self._carried(completed),
        )

    def _usage(self, last: Usage) -> Usage:
        """Return what all tries have used, of which the `last` one may be known."""
        if last == Usage() and 0 < self.attempts == self.refused:
            return NOTHING
        if self.broken == NOTHING:
            return last
        return replace(
            last,
            input_tokens=(last.input_tokens or 0) + (self.broken.input_tokens or 0),
            output_tokens=(last.output_tokens or 0) + (self.broken.output_tokens or 0),
            estimated=True,
        )

    def _carried(self, completed: CompletedAnswer | None) -> CarriedReasoning | None:
        if completed is None or not completed.reasoning or not self.model:
            return None
        return CarriedReasoning(items=completed.reasoning, model=self.model, base_url=self.base_url)

    def parked(self, cause: TransientError, resume_at: float) -> ParkedError:
        """Return the error that ends a request which cannot go before `resume_at`."""
        return parking.for_want_of_patience(
            self.request, cause, resume_at=resume_at, waited=self.waited, clock=self.clock
        )
