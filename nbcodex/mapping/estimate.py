"""What a map will use and cost, before anything is sent. Every figure is an estimate.

Owns the arithmetic, and the questions to the user before a map starts. Must not send anything.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, NbcodexError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.requests.budget import DEFAULT_OUTPUT_TOKENS
from nbcodex.runtime import event_loop
from nbcodex.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    from nbcodex.client import Client

# Rows from which the cost of all is estimated, unless the user asks for a dry run.
SAMPLE_ROWS = 200
# Rows that are looked up in the journal in one query.
LOOKUP_CHUNK_ROWS = 2_000
# Fingerprints that are kept to find equal rows, some 100 bytes each. Rows beyond count as new.
MAX_FINGERPRINTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a map will probably use."""

    rows: int
    answered: int = 0  # rows with an answer in the journal
    equal: int = 0  # rows that are equal to an earlier one, and get its answer
    refused: int = 0  # rows of which no request can be made
    # Tokens of the other rows. The output of each is `max_output`, otherwise 500.
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None  # US dollars; None if no price is known
    paid_tools: tuple[str, ...] = ()  # `cost` has one call of each in each row
    model: str | None = None  # the model, if it is known without asking the server
    bounded: bool = False  # whether `max_output` bounds the output
    halved: bool = False  # whether the cost is that of the Batch API
    budgets: tuple[str, ...] = ()  # what is left of the user's budgets, in words

    def __str__(self) -> str:
        at_most = "at most " if self.bounded else ""
        bound = "at least " if self.paid_tools else at_most
        assumed = "" if self.bounded else f" ({DEFAULT_OUTPUT_TOKENS} a row assumed)"
        parts = [
            f"{self.rows:,} rows",
            f"{self.answered:,} answered before" if self.answered else "",
            f"{self.equal:,} equal to others" if self.equal else "",
            f"{self.refused:,} make no request" if self.refused else "",
            f"~{self.input_tokens:,} in",
            f"{at_most}~{self.output_tokens:,} out{assumed}",
            "price unknown" if self.cost is None else f"{bound}~${self.cost:,.2f}",
            "half the usual price" if self.halved and self.cost else "",
            self.model or "",
            *self.budgets,
        ]
        return " · ".join(filter(None, parts))

    def __repr__(self) -> str:
        return f"<Estimate {self}>"


def estimate(
    data: InputData,
    requests: RowRequests,
    client: Client,
    settings: Settings,
    *,
    from_sample: bool = False,
) -> Estimate:
    """Return what all rows will use; with `from_sample`, extrapolated from some of them."""
    rows: Iterable[Row] = data.rows()
    repeated, scale = 0, 1.0
    # A sample calls the user's function some hundred times, not for each of a million rows.
    if from_sample:
        rows, distinct = _sample(data, requests)
        repeated, scale = (data.total or 0) - distinct, distinct / max(len(rows), 1)
    counted, base_url = _count(rows, requests, client, settings)
    sent = counted.rows - counted.answered - counted.equal - counted.refused
    # Without any request there is no server whose prices could be unknown.
    cost = 0.0 if pricing.provider_of(base_url) or not base_url else None
    if sent > 0:
        # From the mean row, since prices rise above a length of prompt that few rows reach.
        mean = Usage(
            input_tokens=counted.input_tokens // sent,
            output_tokens=counted.output_tokens // sent,
            service_tier=pricing.BATCH_TIER if counted.halved else None,
            hosted_tool_calls=counted.paid_tools,
        )
        each = pricing.cost(mean, counted.model, base_url)
        cost = None if each is None else each * sent * scale
    result = replace(
        counted,
        rows=counted.rows if data.total is None else data.total,
        answered=round(counted.answered * scale),
        equal=round(counted.equal * scale) + repeated,
        refused=round(counted.refused * scale),
        input_tokens=round(counted.input_tokens * scale),
        output_tokens=round(counted.output_tokens * scale),
        cost=cost,
    )
    used = result.input_tokens + result.output_tokens
    # Parts of the budget that other kernels use are in the journal, which the loop reads.
    outlook = client.budget_outlook(settings, base_url, tokens=used, cost=result.cost)
    return replace(result, budgets=tuple(event_loop.run(outlook)))


def _count(
    rows: Iterable[Row], requests: RowRequests, client: Client, settings: Settings
) -> tuple[Estimate, str]:
    """Return what all of `rows` use, without the cost, and the server's address."""
    total = answered = equal = refused = input_tokens = output_tokens = 0
    first: Request | None = None
    base_url, seen, unread = "", set[int](), iter(rows)
    while chunk := list(itertools.islice(unread, LOOKUP_CHUNK_ROWS)):
        made = []
        for row in chunk:
            with contextlib.suppress(NbcodexError):
                made.append(requests.request(row))
        total, refused = total + len(chunk), refused + len(chunk) - len(made)
        if made and first is None:
            first = made[0]
            base_url = client.services().api_client.endpoint(first, settings).base_url
        # A row without `reuse` has no key: it is sent even if it was answered before.
        keys = [equality_key(r, base_url=base_url) if r.reuse else b"" for r in made]
        known = client.journal(settings).maps.answered_keys(filter(None, keys))
        for request, key in zip(made, keys, strict=True):
            if key in known:
                answered += 1
            elif key and not _add_new(hash(key), seen):
                equal += 1
            else:
                input_tokens += pricing.estimate_request_tokens(request)
                output_tokens += request.max_output or DEFAULT_OUTPUT_TOKENS
    model = (first and first.model) or settings.model
    if model is None and pricing.provider_of(base_url) == "openai":
        model = DEFAULT_MODEL
    counted = Estimate(
        rows=total,
        answered=answered,
        equal=equal,
        refused=refused,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        model=model,
        bounded=bool(first and first.max_output),
        halved=requests.origin.engine == "batch",
        paid_tools=pricing.paid_tools(first, model) if first else (),
    )
    return counted, base_url


def _sample(data: InputData, requests: RowRequests) -> tuple[list[Row], int]:
    """Return some of the distinct rows, evenly spaced, and the number of distinct rows."""
    # One pass without knowing the number of rows: whenever the sample is twice as large as needed,
    # every other row is dropped and the step doubles.
    seen: set[int] = set()
    sample: list[Row] = []
    distinct, step = 0, 1
    for row in data.rows():
        fingerprint = requests.fingerprint(row)
        if fingerprint is not None and not _add_new(fingerprint, seen):
            continue
        if distinct % step == 0:
            sample.append(row)
        if len(sample) > 2 * SAMPLE_ROWS:
            sample, step = sample[::2], step * 2
        distinct += 1
    return sample, distinct


def _add_new(fingerprint: int, seen: set[int]) -> bool:
    """Add a fingerprint; return whether it was new."""
    if fingerprint in seen:
        return False
    if len(seen) < MAX_FINGERPRINTS:
        seen.add(fingerprint)
    return True


def confirm_start(
    data: InputData,
    requests: RowRequests,
    client: Client,
    settings: Settings,
    confirm: Callable[[str], bool | None],
) -> None:
    """Ask the user about equal prompts and about a high cost; raise if the map is declined."""
    if requests.template and not requests.template.names and data.total != 1:
        rows = "every row" if data.total is None else f"all {data.total:,} rows"
        _ask(
            f"The template has no field, so {rows} would get the same prompt.",
            confirm,
            advice="Write a column's name in braces, such as {text}, or pass confirm=True.",
        )
    # The number of an iterator's rows is unknown, and reading it would use it up.
    if not data.total:
        return
    # Without known prices the user's function is not called for an estimate.
    sample = Request(prompt="?", api_base=requests.options.api_base)
    endpoint = client.services().api_client.endpoint(sample, settings)
    if pricing.provider_of(endpoint.base_url) is None:
        return
    expected = estimate(data, requests, client, settings, from_sample=True)
    if expected.cost is not None and expected.cost > settings.ask_above:
        _ask(
            f"{expected}. That is more than Codex.ask_above (${settings.ask_above:,.2f}).",
            confirm,
            advice="Try limit=10, set %config Codex.ask_above, or pass confirm=True.",
        )


def _ask(problem: str, confirm: Callable[[str], bool | None], *, advice: str) -> None:
    """Raise an error if the user cannot be asked about a problem, or declines."""
    confirmed = confirm(f"{problem} Continue?")
    if confirmed is None:  # there is no terminal or front end, as in a scheduled run
        raise ConfigurationError(
            f"{problem} There is no way to ask here, so nothing was sent.", advice=advice
        )
    if not confirmed:
        raise NbcodexError("Not started; nothing was sent.", advice=advice)
