"""What a row of a batch comes to, by what the provider says of it. Pure, but for the time.

Owns the price of such answers. Must not know files, batches or the journal.
"""

from __future__ import annotations

from dataclasses import replace

from nbcodex import events
from nbcodex.errors import AnswerError, NbcodexError, ParkedError, TransientError
from nbcodex.models import NO_USAGE, Reply, Request
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR
from nbcodex.requests import fitting, structured_output
from nbcodex.requests.story import Story
from nbcodex.runtime.clock import Clock


def ending_of(
    request: Request,
    told: CompletedAnswer | NbcodexError,
    *,
    model: str | None,
    base_url: str,
    clock: Clock,
) -> events.Ending:
    """Return what a row comes to; what another try may mend is parked."""
    if isinstance(told, TransientError):
        return parked(request, told.message, clock=clock)
    if isinstance(told, NbcodexError):
        return failed(request, told, clock=clock)
    story = Story(request, lambda _: None, clock=clock)
    story.base_url, story.attempts = base_url, 1
    story.hear_server(simulated=told.simulated)
    story.model, story.answer = model or request.model, told
    try:
        parsed = _parsed(request, told)
    except AnswerError as error:
        story.partial.note(fitting.UNFIT)
        reply = _at_half_price(story.reply("failed", told))
        return story.event(events.Failed, error=error, reply=reply)
    if told.refused:
        story.partial.note(fitting.REFUSED)
    reply = _at_half_price(story.reply("done", told))
    return story.event(events.Finished, reply=replace(reply, parsed=parsed))


def failed(request: Request, error: NbcodexError, *, clock: Clock) -> events.Failed:
    """Return the end of a row that can never be answered; it has cost nothing."""
    reply = Reply(id=request.id, status="failed", attempts=1, usage=NO_USAGE, cost=0.0)
    return events.Failed(request_id=request.id, at=clock.now(), error=error, reply=reply)


def parked(request: Request, why: str, *, clock: Clock, attempts: int = 0) -> events.Parked:
    """Return the end, for now, of a row that is kept for later; it has cost nothing."""
    advice = f"`%codex resume {request.origin.map_id or request.id}` goes on with it."
    error = ParkedError(why, advice=advice)
    reply = Reply(id=request.id, status="parked", attempts=attempts)
    return events.Parked(request_id=request.id, at=clock.now(), error=error, reply=reply)


def _parsed(request: Request, told: CompletedAnswer) -> object:
    """Return the object that was asked for, if one was; a batch asks nobody twice."""
    fitting.check_given(told)
    if request.schema is None:
        return None
    try:
        return structured_output.read(request.schema, told.text)
    except structured_output.MisfitError as misfit:
        raise fitting.unfit(request.schema, misfit, asked="once") from None


def _at_half_price(reply: Reply) -> Reply:
    return reply if reply.cost is None else replace(reply, cost=reply.cost * BATCH_PRICE_FACTOR)
