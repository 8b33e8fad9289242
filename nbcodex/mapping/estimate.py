"""What a map will use and cost, before anything is sent. Every figure is an estimate.

Owns the arithmetic, and the question to the user before an expensive map. Must not send anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, NbcodexError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.rows import InputData, Row, RowRequests
from nbcodex.models import Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR
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

    rows: int  # number of rows
    # answered, equal, refused: rows that cost nothing: answered before; equal to an earlier row,
    # whose answer they get; of which no request can be made.
    answered: int = 0
    equal: int = 0
    refused: int = 0
    # input_tokens, output_tokens: tokens of the others. The output is `max_output` for each,
    # otherwise 500.
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None  # US dollars; None if no price is known
    model: str | None = None  # the model, if it is known without asking the server
    bounded: bool = False  # whether `max_output` bounds the output
    halved: bool = False  # whether the cost is that of the Batch API
    budgets: tuple[str, ...] = ()  # what is left of the user's budgets, in words

    def __str__(self) -> str:
        at_most = "at most " if self.bounded else ""
        assumed = "" if self.bounded else f" ({DEFAULT_OUTPUT_TOKENS} a row assumed)"
        parts = [
            f"{self.rows:,} rows",
            f"{self.answered:,} answered before" if self.answered else "",
            f"{self.equal:,} equal to others" if self.equal else "",
            f"{self.refused:,} make no request" if self.refused else "",
            f"~{self.input_tokens:,} in",
            f"{at_most}~{self.output_tokens:,} out{assumed}",
            "price unknown" if self.cost is None else f"{at_most}~${self.cost:,.2f}",
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
    """Return what the rows will use; with `from_sample`, extrapolated from some of them.

    An iterator is read to its end.
    """
    rows: Iterable[Row] = data.rows()
    distinct, scale = 0, 1.0
    # A sample calls the user's function some hundred times, not for each of a million rows.
    if from_sample:
        sample, distinct = _sample(data, requests)
        rows, scale = sample, distinct / max(len(sample), 1)
    count, model, base_url = _count(rows, requests, client, settings)
    total = count.rows if data.total is None else data.total
    cost = _cost(count, model, base_url)
    is_batch = requests.origin.engine == "batch"
    result = replace(
        count,
        rows=total,
        answered=round(count.answered * scale),
        equal=round(count.equal * scale) + (total - distinct if from_sample else 0),
        refused=round(count.refused * scale),
        input_tokens=round(count.input_tokens * scale),
        output_tokens=round(count.output_tokens * scale),
        cost=None if cost is None else cost * scale * (BATCH_PRICE_FACTOR if is_batch else 1.0),
        model=model,
        halved=is_batch,
    )
    used = result.input_tokens + result.output_tokens
    # Parts of the budget that other kernels use are in the journal, which the loop reads.
    outlook = client.budget_outlook(settings, base_url, tokens=used, cost=result.cost)
    return replace(result, budgets=tuple(event_loop.shared().submit(outlook).result()))


def _count(
    rows: Iterable[Row], requests: RowRequests, client: Client, settings: Settings
) -> tuple[Estimate, str | None, str]:
    """Count rows and tokens one by one; return them with the model and the server's address."""
    count = {"rows": 0, "answered": 0, "equal": 0, "refused": 0, "input": 0, "output": 0}
    first: Request | None = None
    base_url, seen, unread = "", set[int](), iter(rows)
    while chunk := list(itertools.islice(unread, LOOKUP_CHUNK_ROWS)):
        made = [request for row in chunk if (request := _request_or_none(requests, row))]
        count["rows"] += len(chunk)
        count["refused"] += len(chunk) - len(made)
        if made and first is None:
            first = made[0]
            base_url = client.services().api_client.endpoint(first, settings).base_url
        # A row without `reuse` has no key: it is sent even if it was answered before.
        keys = [equality_key(r, base_url=base_url) if r.reuse else b"" for r in made]
        answered = client.journal(settings).maps.answered_keys(filter(None, keys))
        for request, key in zip(made, keys, strict=True):
            if key in answered:
                count["answered"] += 1
            elif key and not _add_new(hash(key), seen):
                count["equal"] += 1
            else:
                count["input"] += pricing.estimate_request_tokens(request)
                count["output"] += request.max_output or DEFAULT_OUTPUT_TOKENS
    model = (first and first.model) or settings.model
    if model is None and pricing.provider_of(base_url) == "openai":
        model = DEFAULT_MODEL
    counted = Estimate(
        rows=count["rows"],
        answered=count["answered"],
        equal=count["equal"],
        refused=count["refused"],
        input_tokens=count["input"],
        output_tokens=count["output"],
        bounded=bool(first and first.max_output),
    )
    return counted, model, base_url


def _request_or_none(requests: RowRequests, row: Row) -> Request | None:
    try:
        return requests.request(row)
    except NbcodexError:
        return None


def _sample(data: InputData, requests: RowRequests) -> tuple[list[Row], int]:
    """Return some of the distinct rows, evenly spaced, and the number of distinct rows.

    One pass without knowing the number of rows: whenever the sample is twice as large as needed,
    every other row is dropped and the step doubles.
    """
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


def _cost(count: Estimate, model: str | None, base_url: str) -> float | None:
    """Return the cost of the rows that are sent, from that of the mean row.

    The mean, not the sum: prices rise above a length of prompt that only single rows can reach.
    """
    sent = count.rows - count.answered - count.equal - count.refused
    # Without any request there is no server whose prices could be unknown.
    if sent <= 0:
        return 0.0 if pricing.provider_of(base_url) or not base_url else None
    mean = Usage(input_tokens=count.input_tokens // sent, output_tokens=count.output_tokens // sent)
    cost_per_row = pricing.cost(mean, model, base_url)
    return None if cost_per_row is None else cost_per_row * sent


def has_known_prices(requests: RowRequests, client: Client, settings: Settings) -> bool:
    """Return whether prices are known for the server; calls no function of the user's."""
    sample = Request(prompt="?", api_base=requests.options.api_base)
    endpoint = client.services().api_client.endpoint(sample, settings)
    return pricing.provider_of(endpoint.base_url) is not None


def confirm_cost(
    expected: Estimate, *, threshold: float, confirm: Callable[[str], bool | None]
) -> None:
    """Ask the user about a map that may cost more than `threshold` dollars; raise if declined."""
    if expected.cost is None or expected.cost <= threshold:
        return
    # None: there is no terminal or notebook front end, as in a scheduled run.
    confirmed = confirm(f"{expected}. That is more than ${threshold:,.2f}. Go on?")
    if confirmed is None:
        raise ConfigurationError(
            f"This map may cost about ${expected.cost:,.2f}, which is more than Codex.ask_above "
            f"(${threshold:,.2f}), and there is no way to ask here. Nothing was sent.",
            advice="Pass confirm=True, set %config Codex.ask_above, or try limit=10.",
        )
    if not confirmed:
        raise NbcodexError("Not started; nothing was sent.", advice="Try some rows with limit=10.")
