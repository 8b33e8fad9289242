"""What a map will use and cost, before anything is sent. Every figure is an estimate.

Owns the arithmetic, and whom to ask before a dear map. Must not send anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, NbcodexError
from nbcodex.journal.codec import equality_key
from nbcodex.mapping.inputs import InputData, Row
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.batches import BATCH_PRICE_FACTOR
from nbcodex.requests.cost_estimate import DEFAULT_OUTPUT_TOKENS
from nbcodex.runtime import event_loop
from nbcodex.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    from nbcodex.client import Client

SAMPLE = 200
"""Rows of which the cost of all is estimated, where nobody asked for more."""
TOGETHER = 2_000
"""Rows that are looked at in one go."""
MOST = 1_000_000
"""Rows that are remembered to find equal ones by, some 100 bytes each; what is equal to others
behind these is counted as if it were not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a map will use, about.

    Parameters
    ----------
    rows : int
        Its rows.
    answered : int
        Those of them that were answered before and cost nothing.
    equal : int
        Those that ask the same as one before them, and get its answer.
    refused : int
        Those that make no request.
    input_tokens, output_tokens : int
        Tokens of the others. The output is `max_output` for each, else 500.
    cost : float or None
        US dollars; None where no price is known.
    model : str or None
        The model that is asked, if it is known without asking the server.
    bounded : bool
        Whether `max_output` bounds the output.
    halved : bool
        Whether the cost is that of the Batch API.
    budgets : tuple of str
        What is left of the user's own caps for it, in words.
    """

    rows: int
    answered: int = 0
    equal: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    model: str | None = None
    bounded: bool = False
    halved: bool = False
    budgets: tuple[str, ...] = ()

    def __str__(self) -> str:
        most = "at most " if self.bounded else ""
        assumed = "" if self.bounded else f" ({DEFAULT_OUTPUT_TOKENS} a row assumed)"
        told = [
            f"{self.rows:,} rows",
            f"{self.answered:,} answered before" if self.answered else "",
            f"{self.equal:,} equal to others" if self.equal else "",
            f"{self.refused:,} make no request" if self.refused else "",
            f"~{self.input_tokens:,} in",
            f"{most}~{self.output_tokens:,} out{assumed}",
            "price unknown" if self.cost is None else f"{most}~${self.cost:,.2f}",
            "half the usual price" if self.halved and self.cost else "",
            self.model or "",
            *self.budgets,
        ]
        return " · ".join(filter(None, told))

    def __repr__(self) -> str:
        return f"<Estimate {self}>"


@dataclass(slots=True)
class _Count:
    """What some rows ask, counted one by one."""

    rows: int = 0
    answered: int = 0
    equal: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first: Request | None = None
    base_url: str = ""

    @property
    def asked(self) -> int:
        """Rows that are sent."""
        return self.rows - self.answered - self.equal - self.refused


def estimate(
    shape: InputData,
    recipe: RowRequests,
    client: Client,
    settings: Settings,
    *,
    sample: bool = False,
) -> Estimate:
    """Return what the rows will use; with `sample`, told by some of them.

    An iterator is read to its end.
    """
    few, apart = _sampled(shape, recipe) if sample else (shape.rows(), 0)
    count = _counted(few, recipe, client, settings)
    total = count.rows if shape.total is None else shape.total
    times = apart / max(count.rows, 1) if sample else 1.0
    halved = recipe.origin.engine == "batch"
    model = (count.first and count.first.model) or settings.model or _default(count.base_url)
    cost = _cost(count, model)
    told = Estimate(
        rows=total,
        answered=round(count.answered * times),
        equal=round(count.equal * times) + (total - apart if sample else 0),
        refused=round(count.refused * times),
        input_tokens=round(count.input_tokens * times),
        output_tokens=round(count.output_tokens * times),
        cost=None if cost is None else cost * times * (BATCH_PRICE_FACTOR if halved else 1.0),
        model=model,
        bounded=bool(count.first and count.first.max_output),
        halved=halved,
    )
    used = told.input_tokens + told.output_tokens
    budgets = client.budget_outlook(settings, count.base_url, tokens=used, cost=told.cost)
    return replace(told, budgets=tuple(event_loop.shared().submit(budgets).result()))


def _counted(
    rows: Iterable[Row], recipe: RowRequests, client: Client, settings: Settings
) -> _Count:
    """Return what the rows ask of the server; what is equal, or answered, asks nothing."""
    count, seen = _Count(), set[int]()
    for part in _in_parts(rows):
        requests = list(_requests(recipe, part))
        count.rows += len(part)
        count.refused += len(part) - len(requests)
        if requests and count.first is None:
            count.first = requests[0]
            count.base_url = client.services().api_client.endpoint(count.first, settings).base_url
        keys = [equality_key(r, base_url=count.base_url) if r.reuse else b"" for r in requests]
        known = client.journal(settings).maps.answered_keys(filter(None, keys))
        for request, key in zip(requests, keys, strict=True):
            if key in known:
                count.answered += 1
            elif key and not _is_new(hash(key), seen):
                count.equal += 1
            else:
                count.input_tokens += pricing.estimate_request_tokens(request)
                count.output_tokens += request.max_output or DEFAULT_OUTPUT_TOKENS
    return count


def is_priced(recipe: RowRequests, client: Client, settings: Settings) -> bool:
    """Return whether prices are known where the rows go; no function is called for it.

    Raises
    ------
    ConfigurationError
        If a setting is wrong, or no key is known.
    """
    somewhere = Request(prompt="?", api_base=recipe.options.get("api_base"))
    return (
        pricing.provider_of(client.services().api_client.endpoint(somewhere, settings).base_url)
        is not None
    )


def have_agreed(told: Estimate, *, above: float, ask: Callable[[str], bool | None]) -> None:
    """Have the user agree to what a map may cost, if that is more than `above` dollars.

    Raises
    ------
    ConfigurationError
        If nobody can be asked; it says how to go on.
    NbcodexError
        If the user does not agree.
    """
    if told.cost is None or told.cost <= above:
        return
    agreed = ask(f"{told}. That is more than ${above:,.2f}. Go on?")
    if agreed is None:
        raise ConfigurationError(
            f"This map may cost about ${told.cost:,.2f}, which is more than Codex.ask_above "
            f"(${above:,.2f}), and nobody can be asked here. Nothing was sent.",
            advice="Pass confirm=True, set %config Codex.ask_above, or try limit=10.",
        )
    if not agreed:
        raise NbcodexError("Not begun; nothing was sent.", advice="Try some rows with limit=10.")


def _in_parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while few := list(itertools.islice(rest, TOGETHER)):
        yield few


def _requests(recipe: RowRequests, rows: Iterable[Row]) -> Iterator[Request]:
    for row in rows:
        try:
            yield recipe.request(row)
        except NbcodexError:
            continue


def _sampled(shape: InputData, recipe: RowRequests) -> tuple[list[Row], int]:
    """Return some of the rows that differ, taken evenly, and how many rows differ."""
    seen: set[int] = set()
    few: list[Row] = []
    apart, step = 0, 1
    for row in shape.rows():
        mark = recipe.mark(row)
        if mark is not None and not _is_new(mark, seen):
            continue
        if apart % step == 0:
            few.append(row)
        if len(few) > 2 * SAMPLE:
            few, step = few[::2], step * 2
        apart += 1
    return few, apart


def _is_new(mark: int, seen: set[int]) -> bool:
    """Return whether a mark is not among those that were seen, and remember it."""
    if mark in seen:
        return False
    if len(seen) < MOST:
        seen.add(mark)
    return True


def _default(base_url: str) -> str | None:
    return DEFAULT_MODEL if pricing.provider_of(base_url) == "openai" else None


def _cost(count: _Count, model: str | None) -> float | None:
    """Return the cost of what was counted by that of the mean row: a long prompt's is another."""
    if count.asked <= 0:
        return 0.0 if pricing.provider_of(count.base_url) or not count.base_url else None
    mean = Usage(
        input_tokens=count.input_tokens // count.asked,
        output_tokens=count.output_tokens // count.asked,
    )
    each = pricing.cost(mean, model, count.base_url)
    return None if each is None else each * count.asked
