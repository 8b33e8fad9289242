"""The user's own caps: how they are written, what a request may cost, and whether they allow it.

This process counts what it has spent and reserved in its session; the journal counts what all
kernels spend by day and month. A cap protects against mistakes, not against its user, who can
change the settings.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from nbcodex.errors import Advice, BudgetError, ConfigurationError
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.models import Reply, Request, Usage
from nbcodex.openai_api import pricing
from nbcodex.ratelimit.charge_policy import Need
from nbcodex.runtime.clock import Clock, format_duration

Unit = Literal["tokens", "dollars"]
Period = Literal["session", "day", "month"]

# Fewer tokens are a mistake: a dollar sign was forgotten, or `%config` has expanded it.
MIN_CAP_TOKENS = 100
WARNING_SHARES = (0.75, 0.90, 0.95)  # of a cap: when so much is used, the reply gets a note
# Between two reads of the journal's counters: a read waits until writes before it are on disk.
REFRESH_INTERVAL_S = 5.0
DEFAULT_OUTPUT_TOKENS = 500  # expected of an answer until the session has had one
# Reserved from rate limits without `max_output`; the limiter learns which share is really used.
UNBOUNDED_OUTPUT_TOKENS = 1_000

# Matches ``200k``, ``1.5m/day``, ``200,000tokens``, ``$5``, ``20usdpermonth``.
_CAP = re.compile(
    r"(?P<sign>\$)?(?P<number>\d[\d,_]*\.?\d*|\.\d+)(?P<scale>[km])?"
    r"(?:(?P<dollars>\$|usd|dollars?)|(?P<tokens>tokens?))?"
    r"(?:(?:/|per)(?P<period>day|month|session))?"
)
_SCALES = {None: 1.0, "k": 1e3, "m": 1e6}
_PERIOD_WORDS = {"session": "for this session", "day": "for today", "month": "for this month"}
_NO_SPEND = SpendAmount()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingCap:
    """How much may be used in a period."""

    amount: float  # tokens, input and output together, or US dollars
    unit: Unit
    period: Period = "session"  # until the kernel ends, or by the calendar

    def __str__(self) -> str:
        return f"{self.format(self.amount)} {_PERIOD_WORDS[self.period]}"

    @property
    def source_text(self) -> str:
        """The cap in the notation that `parse_cap` reads."""
        return f"{self.amount}{'usd' if self.unit == 'dollars' else ''}/{self.period}"

    def format(self, amount: float) -> str:
        """Return an amount in the cap's unit."""
        if self.unit == "tokens":
            return f"{amount:,.0f} token{'s' * (round(amount) != 1)}"
        return f"${amount:,.2f}" if amount >= 0.01 or not amount else f"${amount:.4f}"

    def describe_used(self, used: float) -> str:
        """Return text such as ``50 of 200 tokens for today used (25%)``."""
        return f"{self.format(used).split()[0]} of {self} used ({used / self.amount:.0%})"

    def allows(self, amount: SpendAmount, *, used: float) -> bool:
        """Return whether `amount` may be used in addition to `used`."""
        return used + amount.in_unit(self.unit) <= self.amount

    def used_by_kernels(self, spending: Spending, *, with_reserved: bool) -> float:
        """Return what all kernels have used of this cap of a day or month, in its unit."""
        spent = spending.day if self.period == "day" else spending.month
        return spent.in_unit(self.unit) + spending.reserved.in_unit(self.unit) * with_reserved

    def resets_at(self, now: float) -> float | None:
        """Return when the period ends, if it does; `now` and this are seconds since the epoch."""
        if self.period == "session":
            return None
        today = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
        if self.period == "day":
            return (today + timedelta(days=1)).timestamp()
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


def parse_cap(text: str, *, check_minimum: bool = False) -> SpendingCap:
    """Return the cap that a user writes as ``$5`` or ``1.5M/day``; else a ConfigurationError."""
    if found := _CAP.fullmatch("".join(text.split()).lower()):
        amount = float(re.sub("[,_]", "", found["number"])) * _SCALES[found["scale"]]
        unit: Unit = "dollars" if found["sign"] or found["dollars"] else "tokens"
        if amount and not (found["sign"] and found["tokens"]):
            period: Any = found["period"] or "session"
            cap = SpendingCap(amount=amount, unit=unit, period=period)
            if not check_minimum or unit == "dollars" or amount >= MIN_CAP_TOKENS:
                return cap
            raise ConfigurationError(
                f"A budget of {cap.format(amount)} is too small for any request.",
                advice="Write tokens as 5000, 5k or 2M, and dollars as $5 (in %config, which reads "
                "$5 as a variable, as 5usd).",
            )
    raise ConfigurationError(
        f"{text[:40]!r} is not a budget.",
        advice="Write tokens as 200k or 2M/day, dollars as $5 or $20/month, or off.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEstimate:
    """What a request may cost."""

    input_tokens: int
    output_tokens: int  # the request's `max_output`, else the length of an average answer
    bounded: bool = False  # whether it is the `max_output`
    cost: float | None = None  # US dollars; None where no price is known
    paid_tools: tuple[str, ...] = ()  # `cost` has one call of each that has a price

    def __str__(self) -> str:
        output = f"{'at most' if self.bounded else 'perhaps'} {self.output_tokens:,} out"
        tokens = f"~{self.input_tokens:,} in, {output}"
        about = "at least" if self.paid_tools else "about"
        return f"{tokens}, {about} ${self.cost:.4f}" if self.cost else tokens

    @property
    def amount(self) -> SpendAmount:
        """The estimate as an amount that is spent."""
        return SpendAmount(tokens=self.input_tokens + self.output_tokens, dollars=self.cost or 0.0)


def rate_limit_need(request: Request) -> Need:
    """Return what a request needs of the rate limits."""
    output = UNBOUNDED_OUTPUT_TOKENS if request.max_output is None else request.max_output
    input_tokens = pricing.estimate_request_tokens(request)
    return Need(float(input_tokens), float(output), has_max_output=request.max_output is not None)


class Budget:
    """What this process may use, and has used. Its methods run on the event loop's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._session = _NO_SPEND  # spent by this process
        self._all_kernels = Spending()  # as last read from the journal
        self._shared_caps: tuple[SpendingCap, ...] = ()  # in all kernels; kept in the journal
        # When the journal's counters were read: an instant, and an ISO date.
        self._read_at, self._read_on = float("-inf"), ""
        self._reading: asyncio.Task[None] | None = None
        # By request id: what is reserved, and the caps that it was checked against.
        self._reservations: dict[str, tuple[SpendAmount, tuple[SpendingCap, ...]]] = {}
        self._reserved = _NO_SPEND  # the sum of the reservations
        self._warned: set[tuple[SpendingCap, float]] = set()  # shares whose note was returned
        self._answers = self._answer_tokens = 0  # of this session, for the average

    def estimate(
        self, request: Request, *, model: str | None, base_url: str, service_tier: str | None = None
    ) -> RequestEstimate:
        """Return what `request` may cost; the first call takes 0.2 s to load the prices."""
        input_tokens = pricing.estimate_request_tokens(request)
        average = self._answer_tokens // self._answers if self._answers else DEFAULT_OUTPUT_TOKENS
        output_tokens = request.max_output or average
        tier = service_tier or pricing.requested_tier(request)
        usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens, service_tier=tier)
        tools = pricing.paid_tools(request, model)
        return RequestEstimate(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            bounded=request.max_output is not None,
            cost=pricing.cost(replace(usage, hosted_tool_calls=tools), model, base_url),
            paid_tools=tools,
        )

    async def reserve(
        self,
        request: Request,
        *,
        caps: Iterable[str],
        journal: Journal,
        model: str | None,
        base_url: str,
        service_tier: str | None = None,
        broken: SpendAmount = _NO_SPEND,
    ) -> None:
        """Reserve what a request may cost: its next answer, and what `broken` attempts have used.

        Raises a BudgetError if this would exceed a cap, or if a cap cannot be checked.
        """
        await self.refresh(journal)
        in_force = self._in_force(caps)
        if not in_force or (request.id in self._reservations and broken == _NO_SPEND):
            return
        # Caps in tokens need no price tables.
        if any(cap.unit == "dollars" for cap in in_force):
            await asyncio.to_thread(pricing.load_prices)
        expected = self.estimate(request, model=model, base_url=base_url, service_tier=service_tier)
        # A server on this machine has no price, because it costs nothing.
        is_free = expected.cost is None and pricing.is_local_server(base_url)
        checked = [cap for cap in in_force if not (is_free and cap.unit == "dollars")]
        # The journal counts what is spent in a day or month, and this process in its session.
        calendar_caps = [cap for cap in checked if cap.period != "session"]
        # A request that is sent again replaces its reservation by one with its broken attempts.
        self.release(request.id)
        amount = expected.amount + broken
        for cap in checked:
            if cap.unit == "dollars" and expected.cost is None:
                budgets = "Set one in tokens (`%codex budget 200k`) or none (`%codex budget off`)"
                raise BudgetError(
                    f"No price is known for this model, so your budget of {cap} cannot be checked.",
                    advice=Advice(
                        f"{budgets}, then `%codex resume {request.id}`.",
                        script=f"{budgets} in a notebook, then ask again.",
                    ),
                )
            if cap not in calendar_caps:
                self._check_cap(request, expected, amount, cap)
        # Reserved before the journal is awaited, so that other requests take it into account.
        self._reservations[request.id] = amount, in_force
        self._reserved += amount
        try:
            if calendar_caps:
                # The journal decides, in one transaction. It returns the figures from before that,
                # by which the check below finds the cap that is exceeded.
                self._all_kernels = await journal.reserve_budget(
                    request.id,
                    amount,
                    today=self._today(),
                    allowed=lambda spending: all(
                        cap.allows(amount, used=cap.used_by_kernels(spending, with_reserved=True))
                        for cap in calendar_caps
                    ),
                )
            for cap in calendar_caps:
                self._check_cap(request, expected, amount, cap)
        except BaseException:
            self.release(request.id)
            raise

    def _check_cap(
        self, request: Request, expected: RequestEstimate, amount: SpendAmount, cap: SpendingCap
    ) -> None:
        """Raise a BudgetError if `amount`, what is `expected` and broken attempts, is too much."""
        used = self._used(cap, with_reserved=True)
        if cap.allows(amount, used=used):
            return
        # The message counts broken attempts as used: what is needed is the next answer alone.
        needed = expected.amount.in_unit(cap.unit)
        used += amount.in_unit(cap.unit) - needed
        now, reset = self._clock.wall(), ""
        if resets_at := cap.resets_at(now):
            reset = f"; it resets in {format_duration(resets_at - now)}"
        raise BudgetError(
            f"This request would exceed your budget of {cap}: {cap.format(used).split()[0]} are "
            f"used or reserved, and it needs {'up to' if expected.bounded else 'about'} "
            f"{cap.format(needed).split()[0]}.",
            advice=Advice(
                f"Raise it (`%codex budget …`), then `%codex resume {request.id}`{reset}.",
                script=f"Raise it (`%codex budget …` in a notebook), then ask again{reset}.",
            ),
            resume_at=resets_at,
        )

    def commit(
        self, request_id: str, reply: Reply, *, if_unknown: SpendAmount | None = None
    ) -> tuple[str, ...]:
        """Count what a reply used (`if_unknown` or reserved, if unknown); return new warnings."""
        assumed = self.reserved_for(request_id) if if_unknown is None else if_unknown
        caps = self.release(request_id)
        if reply.reused or not reply.attempts:
            return ()
        if reply.status == "done":
            self._answers += 1
            self._answer_tokens += reply.usage.output_tokens or 0
        spent = SpendAmount.of_reply(reply, if_unknown=assumed)
        self._session += spent
        # Simulated answers cost nothing, so they are not counted for days and months.
        if not reply.simulated:
            day, month = self._all_kernels.day + spent, self._all_kernels.month + spent
            self._all_kernels = replace(self._all_kernels, day=day, month=month)
        warnings = []
        for cap in caps:
            used = self._used(cap)
            passed = {(cap, share) for share in WARNING_SHARES if used >= share * cap.amount}
            if not passed <= self._warned:
                self._warned |= passed
                warnings.append(cap.describe_used(used))
        return tuple(warnings)

    def reserved_for(self, request_id: str) -> SpendAmount:
        """Return what is reserved for a request."""
        return self._reservations.get(request_id, (_NO_SPEND, ()))[0]

    def release(self, request_id: str) -> tuple[SpendingCap, ...]:
        """Drop a request's reservation; return the caps that it was checked against."""
        amount, caps = self._reservations.pop(request_id, (_NO_SPEND, ()))
        # Zero when nothing is reserved: differences of floats would leave a remainder.
        self._reserved = self._reserved - amount if self._reservations else _NO_SPEND
        return caps

    def usage_lines(self, caps: Iterable[str]) -> list[str]:
        """Return, as text, how much of each cap in force is used, as of the last `refresh`."""
        return [cap.describe_used(self._used(cap)) for cap in self._in_force(caps)]

    def remaining_lines(
        self, caps: Iterable[str], *, base_url: str, tokens: int, cost: float | None
    ) -> list[str]:
        """Return, as text, whether each cap in force allows `tokens` and a known `cost`."""
        expected, lines = SpendAmount(tokens=tokens, dollars=cost or 0.0), []
        # A server on this machine costs nothing.
        is_priced = cost is not None or pricing.is_local_server(base_url)
        for cap in self._in_force(caps):
            used = self._used(cap, with_reserved=True)
            if cap.unit == "dollars" and not is_priced:
                lines.append(f"your budget of {cap} allows nothing without a known price")
            elif not cap.allows(expected, used=used):
                left = cap.format(max(0.0, cap.amount - used))
                lines.append(f"more than is left of your budget: {left} of {cap}")
            else:
                lines.append(f"budget: {cap.describe_used(used)}")
        return lines

    async def set_shared_cap(self, journal: Journal, cap: SpendingCap | None) -> None:
        """Set the cap that applies in all kernels of this user; None removes it."""
        await journal.set_budget("" if cap is None else cap.source_text)
        self._read_at = float("-inf")

    async def reset(self, journal: Journal) -> None:
        """Set what is used to zero; the reservations of running requests stay."""
        await journal.reset_spending()
        self._session = _NO_SPEND
        self._warned.clear()
        self._read_at = float("-inf")

    def start_reading(self, journal: Journal) -> asyncio.Task[None] | None:
        """Start to read the journal's counters and shared cap, unless they were read just now."""
        is_recent = self._clock.now() - self._read_at < REFRESH_INTERVAL_S
        if is_recent and self._today() == self._read_on:
            return None
        # All callers await the same task: with a lock, each would wait for all those before it.
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(journal))
        return self._reading

    async def refresh(self, journal: Journal) -> None:
        """Read the journal's counters and shared cap, unless they were read just now."""
        if task := self.start_reading(journal):
            await asyncio.shield(task)

    async def _read(self, journal: Journal) -> None:
        now, today = self._clock.now(), self._today()
        self._all_kernels = await journal.read_spending(today)
        self._read_at, self._read_on = now, today
        text = self._all_kernels.budget
        self._shared_caps = (parse_cap(text),) if text else ()

    def _in_force(self, caps: Iterable[str]) -> tuple[SpendingCap, ...]:
        return (*map(parse_cap, caps), *self._shared_caps)

    def _used(self, cap: SpendingCap, *, with_reserved: bool = False) -> float:
        if cap.period != "session":
            return cap.used_by_kernels(self._all_kernels, with_reserved=with_reserved)
        return self._session.in_unit(cap.unit) + self._reserved.in_unit(cap.unit) * with_reserved

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock.wall()).date().isoformat()
