"""Makes an answer fit the shape that was asked for, by asking once more where it does not.

Owns the round of repair: visible, and paid from the patience. Must not know how a request is sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from nbcodex.errors import NbcodexError
from nbcodex.models import Reply, Request
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.requests import fitting, structured_output
from nbcodex.requests.story import Story

Asking = Callable[[], Awaitable[CompletedAnswer]]


def reused(request: Request, reply: Reply | None) -> Reply | None:
    """Return an answer of the journal with its object; None where it has another shape now."""
    if reply is None or request.schema is None:
        return reply
    try:
        return replace(reply, parsed=structured_output.read(request.schema, reply.text))
    except structured_output.MisfitError:
        return None


async def fitted(story: Story, answer: CompletedAnswer, ask: Asking) -> object:
    """Return the object that was asked for, if one was; ask once more where it does not fit.

    Parameters
    ----------
    story : Story
        Of the request; holds the answer that counts in the end.
    answer : Completed
        What the server said first.
    ask : callable
        Asks what `story.asking` says, until there is an answer.

    Raises
    ------
    NbcodexError
        If there is no such object in the end.
    """
    story.answer = answer
    fitting.check_given(answer)
    if answer.refused:
        story.partial.note(fitting.REFUSED)
    schema = story.request.schema
    if schema is None:
        return None
    try:
        return structured_output.read(schema, answer.text)
    except structured_output.MisfitError as misfit:
        fitting.check_mendable(story.request, answer, misfit, waited=story.waited)
        story.answer = await _asked_again(story, answer, misfit, ask)
    fitting.check_given(story.answer)
    try:
        return structured_output.read(schema, story.answer.text)
    except structured_output.MisfitError as misfit:
        raise fitting.unfit(schema, misfit, asked="twice") from None


async def _asked_again(
    story: Story, answer: CompletedAnswer, misfit: structured_output.MisfitError, ask: Asking
) -> CompletedAnswer:
    """Return another answer; asking for it counts as waiting."""
    began, waited = story.clock.now(), story.waited
    story.asking = structured_output.again(story.request, answer.text, misfit)
    story.partial.note(fitting.ASKED_AGAIN)
    story.partial.ask_anew()
    try:
        second = await ask()
    except NbcodexError as error:
        raise fitting.unfit(story.request.schema, misfit, asked="once", then=error) from error
    finally:
        story.patience.waited = waited + story.clock.now() - began
    return replace(second, usage=answer.usage.plus(second.usage))
