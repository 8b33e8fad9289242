"""When an answer is none, or not the one that was asked for, and whether to ask once more. Pure."""

from __future__ import annotations

from typing import Literal

from nbcodex.errors import AnswerError, NbcodexError, shorten
from nbcodex.models import CONTENT_FILTER, Request, Schema
from nbcodex.openai_api.answers import CompletedAnswer
from nbcodex.requests.structured_output import MisfitError

ASKED_AGAIN = "asked again, for the answer did not fit"
REFUSED = "the model refuses"
UNFIT = "not what was asked for"
"""What the figures of such an answer say."""


def check_given(answer: CompletedAnswer) -> None:
    """Raise an AnswerError if the provider has withheld all of an answer."""
    if answer.cut == CONTENT_FILTER and not answer.text.strip():
        raise AnswerError(
            "The provider's content filter withheld the answer.", advice="Put the question anew."
        )


def check_mendable(
    request: Request, answer: CompletedAnswer, misfit: MisfitError, *, waited: float
) -> None:
    """Raise an AnswerError if asking once more cannot help, or is not to be paid for."""
    schema = request.schema
    if answer.refused:
        raise AnswerError(
            f"The model refuses: {shorten(answer.text, 200)}", advice="Put the question anew."
        )
    if answer.cut:
        advice = "Raise --max-output." if answer.cut.startswith("max") else "Put it anew."
        raise AnswerError(
            f"The answer was cut ({shorten(answer.cut, 40)}): {misfit}", advice=advice
        )
    if schema is None or not schema.definition or waited >= request.patience:
        raise unfit(schema, misfit, asked="once")


def unfit(
    schema: Schema | None,
    misfit: MisfitError,
    *,
    asked: Literal["once", "twice"],
    then: NbcodexError | None = None,
) -> AnswerError:
    """Return the error of an answer that does not fit; `then`: why it was not asked again."""
    wanted = f"the schema {schema.name}" if schema and schema.definition else "JSON"
    often = ", asked twice" if asked == "twice" else ""
    why = f" It could not be asked again: {shorten(then.message, 120)}" if then else ""
    return AnswerError(
        f"The answer does not fit {wanted}{often}. {misfit}{why}",
        advice="Its text is kept: it is shown, in the Reply of -o, and in this error's `reply`.",
    )
