"""Estimates of what a map will use and cost, and the questions to the user before it starts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nbcodex.client import Client
from nbcodex.errors import ConfigurationError, NbcodexError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.requests.budget import DEFAULT_OUTPUT_TOKENS
from nbcodex.runtime import event_loop
from nbcodex.settings import DEFAULT_MODEL

# Rows from which the cost of all rows is estimated; a dry run looks at each row.
SAMPLE_ROWS = 200
# Rows whose answers are looked up in one transaction of the journal, which takes milliseconds: for
# so long its other transactions wait.
LOOKUP_CHUNK_ROWS = 400
# Fingerprints that are kept to find equal rows, some 100 bytes each. Later rows count as new.
MAX_FINGERPRINTS = 1_000_000

Confirm = Callable[[str], bool | None]  # asks the user; returns None where that is not possible


@dataclass(slots=True, kw_only=True)
class Estimate:
    """What a map will probably use."""

    rows: int = 0
    answered: int = 0  # rows with an answer in the journal
    equal: int = 0  # rows that are equal to an earlier one, and get its answer
    invalid: int = 0  # rows of which no request can be made
    # Tokens of the other rows; of output, each has `max_output`, or else DEFAULT_OUTPUT_TOKENS.
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None  # US dollars; None if no price is known
    paid_tools: tuple[str, ...] = ()  # `cost` has one call of each in each row
    model: str | None = None  # the model, if it is known without asking the server
    is_output_bounded: bool = False  # whether `max_output` bounds the output
    is_batch_price: bool = False  # whether the cost is that of the Batch API, half the usual one
    budgets: tuple[str, ...] = ()  # whether the user's budgets allow it, in words

    def __str__(self) -> str:
        at_most = "at most " if self.is_output_bounded else ""
        bound = "at least " if self.paid_tools else at_most
        assumed = "" if self.is_output_bounded else f" ({DEFAULT_OUTPUT_TOKENS} a row assumed)"
        figures = [
            f"{self.rows:,} rows",
            f"{self.answered:,} answered before" if self.answered else "",
            f"{self.equal:,} equal to others" if self.equal else "",
            f"{self.invalid:,} make no request" if self.invalid else "",
            f"~{self.input_tokens:,} in",
            f"{at_most}~{self.output_tokens:,} out{assumed}",
            "price unknown" if self.cost is None else f"{bound}~${self.cost:,.2f}",
            "half the usual price" if self.is_batch_price and self.cost else "",
            self.model or "",
            *self.budgets,
        ]
        return " · ".join(filter(None, figures))

    def __repr__(self) -> str:
        return f"<Estimate {self}>"


def estimate(
    data: InputData, row_requests: RowRequests, client: Client, *, from_sample: bool = False
) -> Estimate:
    """Return what all rows will use; with `from_sample`, extrapolated from some of them."""
    rows: Iterable[Row] = data.rows()
    repeated_rows, scale = 0, 1.0
    # A sample calls the user's function some hundred times, not for each of a million rows.
    if from_sample:
        rows, distinct_rows = _sample(data, row_requests)
        repeated_rows = (data.total or 0) - distinct_rows
        scale = distinct_rows / max(len(rows), 1)
    counted, base_url = _count(rows, row_requests, client)
    sent_rows = counted.rows - counted.answered - counted.equal - counted.invalid
    # A provider is a server with known prices. Without any request there is no server.
    cost = 0.0 if pricing.known_provider(base_url) or not base_url else None
    if sent_rows > 0:
        # From the mean row, not from the sums: some models cost more above a length of prompt.
        mean_usage = Usage(
            input_tokens=counted.input_tokens // sent_rows,
            output_tokens=counted.output_tokens // sent_rows,
            service_tier=pricing.BATCH_TIER if counted.is_batch_price else None,
            hosted_tool_calls=counted.paid_tools,
        )
        row_cost = pricing.cost(mean_usage, counted.model, base_url)
        cost = None if row_cost is None else row_cost * sent_rows * scale
    for name in ("answered", "equal", "invalid", "input_tokens", "output_tokens"):
        setattr(counted, name, round(getattr(counted, name) * scale))
    counted.rows = counted.rows if data.total is None else data.total
    counted.equal += repeated_rows
    counted.cost, tokens = cost, counted.input_tokens + counted.output_tokens
    # On the event loop, because what other kernels use of the budget is read from the journal.
    remaining = client.budget_remaining(row_requests.settings, base_url, tokens=tokens, cost=cost)
    counted.budgets = tuple(event_loop.run(remaining))
    return counted


def _count(rows: Iterable[Row], row_requests: RowRequests, client: Client) -> tuple[Estimate, str]:
    """Return what all of `rows` will use, without the cost, and the server's base URL."""
    settings = row_requests.settings
    counted = Estimate(is_batch_price=row_requests.origin.engine == "batch")
    first: Request | None = None
    base_url, fingerprints, unread = "", set[int](), iter(rows)
    while chunk := list(itertools.islice(unread, LOOKUP_CHUNK_ROWS)):
        made = []
        for row in chunk:
            with contextlib.suppress(NbcodexError):
                made.append(row_requests.request(row))
        counted.rows += len(chunk)
        counted.invalid += len(chunk) - len(made)
        if made and first is None:
            first = made[0]
            base_url = client.endpoint(first, settings).base_url
        # A row without `reuse` has no key: it is sent even if it was answered before.
        keys = [equality_key(r, base_url=base_url) if r.reuse else b"" for r in made]
        answered_keys = client.journal(settings).maps.answered_keys(set(filter(None, keys)))
        for request, key in zip(made, keys, strict=True):
            if key in answered_keys:
                counted.answered += 1
            elif key and not _add_if_new(hash(key), fingerprints):
                counted.equal += 1
            else:
                counted.input_tokens += pricing.estimate_request_tokens(request)
                counted.output_tokens += request.max_output or DEFAULT_OUTPUT_TOKENS
    counted.model = (first and first.model) or settings.model
    if counted.model is None and pricing.known_provider(base_url) == "openai":
        counted.model = DEFAULT_MODEL
    if first:
        counted.paid_tools = pricing.paid_tools(first, counted.model)
        counted.is_output_bounded = first.max_output is not None
    return counted, base_url


def _sample(data: InputData, row_requests: RowRequests) -> tuple[list[Row], int]:
    """Return some of the distinct rows, evenly spaced, and the number of distinct rows."""
    # In one pass, though the number of distinct rows is not known: whenever the sample is twice as
    # large as needed, every other row is dropped and the step doubles.
    fingerprints: set[int] = set()
    sample: list[Row] = []
    distinct, step = 0, 1
    for row in data.rows():
        fingerprint = row_requests.fingerprint(row)
        # Rows that cannot be compared (None) count as distinct.
        if fingerprint is not None and not _add_if_new(fingerprint, fingerprints):
            continue
        if distinct % step == 0:
            sample.append(row)
        if len(sample) > 2 * SAMPLE_ROWS:
            sample, step = sample[::2], step * 2
        distinct += 1
    return sample, distinct


def _add_if_new(fingerprint: int, known: set[int]) -> bool:
    if fingerprint in known:
        return False
    if len(known) < MAX_FINGERPRINTS:
        known.add(fingerprint)
    return True


def confirm_start(
    data: InputData, row_requests: RowRequests, client: Client, confirm: Confirm
) -> None:
    """Ask the user about equal prompts and about a high cost; raise if the map is declined."""
    settings = row_requests.settings
    if row_requests.template and not row_requests.template.column_names and data.total != 1:
        rows = "every row" if data.total is None else f"all {data.total:,} rows"
        _ask(
            f"The template has no field, so {rows} would get the same prompt.",
            confirm,
            advice="Write a column's name in braces, such as {text}, or pass confirm=True.",
        )
    # An iterator has no `total`, and reading it would use it up.
    if not data.total:
        return
    # Where no price is known, the user's function is not called for an estimate.
    any_request = Request(prompt="?", api_base=row_requests.options.api_base)
    if pricing.known_provider(client.endpoint(any_request, settings).base_url) is None:
        return
    expected = estimate(data, row_requests, client, from_sample=True)
    if expected.cost is not None and expected.cost > settings.ask_above:
        _ask(
            f"{expected}. That is more than Codex.ask_above (${settings.ask_above:,.2f}).",
            confirm,
            advice="Try limit=10, raise Codex.ask_above, or pass confirm=True.",
        )


def _ask(problem: str, confirm: Confirm, *, advice: str) -> None:
    """Raise an error if the user cannot be asked about a problem, or declines."""
    confirmed = confirm(f"{problem} Continue?")
    if confirmed is None:  # there is no terminal or front end, as in a scheduled run
        raise ConfigurationError(
            f"{problem} There is no way to ask here, so nothing was sent.", advice=advice
        )
    if not confirmed:
        raise NbcodexError("Not started; nothing was sent.", advice=advice)
