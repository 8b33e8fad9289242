"""The user's own caps at work: what is used, and what is refused before it is sent.

Owns what this process has set aside, and the warnings. The counters of days and months are the
journal's. A cap is a help against mistakes: whoever can change the settings can lift it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from nbcodex.errors import BudgetError
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount, Spending
from nbcodex.models import Reply, Request
from nbcodex.openai_api import pricing
from nbcodex.requests.cost_estimate import DEFAULT_OUTPUT_TOKENS, Estimate, estimate
from nbcodex.requests.spending_cap import CapUsage, SpendingCap, read
from nbcodex.runtime.clock import Clock, format_duration

WARNINGS = (0.75, 0.90, 0.95)
"""Shares of a cap at which its user is told."""
FRESH = 5.0
"""Seconds after which another kernel may have changed the caps that the journal keeps."""
NOTHING = SpendAmount()


class Budget:
    """What this process may use, and has used. Lives on the event loop's thread.

    Parameters
    ----------
    clock : Clock
        Whose calendar counts.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._session = NOTHING
        self._kernels = Spending()
        self._kept: tuple[SpendingCap, ...] = ()
        self._read_at = float("-inf")
        self._day = ""
        self._reading: asyncio.Task[None] | None = None
        self._open: dict[str, tuple[SpendAmount, tuple[SpendingCap, ...]]] = {}
        self._aside = NOTHING
        self._warned: set[tuple[SpendingCap, float]] = set()
        self._answers = self._output = 0

    @property
    def usual(self) -> int:
        """Output tokens of this session's usual answer."""
        return self._output // self._answers if self._answers else DEFAULT_OUTPUT_TOKENS

    def foresee(self, journal: Journal) -> None:
        """Have read by the time of `admit` what that will ask for, if it is not known.

        Called before the request is committed, it does not wait for the disk.
        """
        if not self._is_fresh():
            self._begin_to_read(journal)

    async def admit(
        self,
        request: Request,
        *,
        caps: Iterable[SpendingCap],
        journal: Journal,
        model: str | None,
        base_url: str,
        share: float = 1.0,
        so_far: SpendAmount = NOTHING,
    ) -> None:
        """Set aside what the request may come to, at a share of the usual price.

        That is its next answer and what it has used `so_far`, in attempts that broke off.

        Raises
        ------
        BudgetError
            If a cap would be passed, or cannot be watched; nothing is sent then.
        """
        await self._refresh(journal)
        caps = (*caps, *self._kept)
        if not caps or (request.id in self._open and so_far == NOTHING):
            return
        if any(cap.unit == "dollars" for cap in caps):
            await asyncio.to_thread(pricing.load_prices)
        expected = estimate(request, model=model, base_url=base_url, usual=self.usual)
        if expected.cost is not None:
            expected = replace(expected, cost=expected.cost * share)
        # Of a server on this machine the unknown price is nothing.
        free = expected.cost is None and pricing.is_local_server(base_url)
        watched = [cap for cap in caps if not (free and cap.unit == "dollars")]
        lasting = [cap for cap in watched if cap.period != "session"]
        self._drop(request.id)
        amount = expected.spent.plus(so_far)
        for cap in watched:
            self._check_price(request, expected, cap)
            if cap not in lasting:
                self._check(request, expected, amount, cap)
        self._open[request.id] = amount, caps
        self._aside = self._aside.plus(amount)
        try:
            if lasting:
                await self._set_aside(request, expected, amount, lasting, journal)
        except BaseException:
            self._drop(request.id)
            raise

    async def _set_aside(
        self,
        request: Request,
        expected: Estimate,
        amount: SpendAmount,
        caps: Sequence[SpendingCap],
        journal: Journal,
    ) -> None:
        """Set an amount aside for all kernels, if the caps allow it that count them all.

        Raises
        ------
        BudgetError
            If one does not.
        """

        def allowed(seen: Spending) -> bool:
            return all(_fits(amount, cap, _used(seen, cap)) for cap in caps)

        today = self._today()
        # That is as it was before: each cap is held against it once more, to say which refuses.
        self._kernels = await journal.reserve_budget(
            request.id, amount, today=today, allowed=allowed
        )
        for cap in caps:
            self._check(request, expected, amount, cap)

    def _check_price(self, request: Request, expected: Estimate, cap: SpendingCap) -> None:
        if cap.unit == "dollars" and expected.cost is None:
            raise BudgetError(
                f"No price is known for this model, so your budget of {cap} cannot be watched.",
                advice=f"Set one in tokens (`%codex budget 200k`) or none (`%codex budget off`), "
                f"then `%codex resume {request.id}`.",
            )

    def _check(
        self, request: Request, expected: Estimate, amount: SpendAmount, cap: SpendingCap
    ) -> None:
        used = self._in_use(cap)
        if not _fits(amount, cap, used):
            used += amount.minus(expected.spent).in_unit(cap.unit)
            reset = self._reset(cap)
            anew = (
                f"; it starts anew in {format_duration(reset - self._clock.wall())}"
                if reset
                else ""
            )
            raise BudgetError(
                f"It would pass your budget of {cap}: {cap.words(used)} are used or set aside, and "
                f"it is estimated at {expected}.",
                advice=f"Raise it (`%codex budget …`), then `%codex resume {request.id}`{anew}.",
                resume_at=reset,
            )

    def settle(
        self, request_id: str, reply: Reply, *, otherwise: SpendAmount | None = None
    ) -> tuple[str, ...]:
        """Count what a request came to; return warnings, each once, in a few words.

        Where nobody knows, it counts as `otherwise`, or as what was set aside for it.
        """
        aside = self.aside_for(request_id) if otherwise is None else otherwise
        caps = self._drop(request_id)
        if reply.reused or not reply.attempts:
            return ()
        if reply:
            self._answers += 1
            self._output += reply.usage.output_tokens or 0
        spent = SpendAmount.of_reply(reply, assumed=aside)
        self._session = self._session.plus(spent)
        if not reply.simulated:
            day, month = self._kernels.day.plus(spent), self._kernels.month.plus(spent)
            self._kernels = replace(self._kernels, day=day, month=month)
        return tuple(filter(None, map(self._warning, caps)))

    def aside_for(self, request_id: str) -> SpendAmount:
        """Return what is set aside for a request."""
        amount, _ = self._open.get(request_id, (NOTHING, ()))
        return amount

    def _drop(self, request_id: str) -> tuple[SpendingCap, ...]:
        """Set nothing aside any more for a request; return the caps that it was held against."""
        amount, caps = self._open.pop(request_id, (NOTHING, ()))
        self._aside = self._aside.minus(amount) if self._open else NOTHING
        return caps

    def _warning(self, cap: SpendingCap) -> str:
        standing = self._standing(cap)
        passed = [w for w in WARNINGS if standing.share >= w and (cap, w) not in self._warned]
        self._warned |= {(cap, level) for level in passed}
        return str(standing) if passed else ""

    def cap_usages(self, caps: Iterable[SpendingCap]) -> list[CapUsage]:
        """Return how far the caps in force are used up, as far as is known."""
        return [self._standing(cap) for cap in (*caps, *self._kept)]

    def _standing(self, cap: SpendingCap) -> CapUsage:
        used = self._session if cap.period == "session" else _since(self._kernels, cap)
        return CapUsage(cap, used.in_unit(cap.unit))

    async def look(self, journal: Journal, caps: Iterable[SpendingCap]) -> list[CapUsage]:
        """Return how far the caps in force are used up, other kernels included."""
        await self._refresh(journal)
        return self.cap_usages(caps)

    async def outlook(
        self, journal: Journal, caps: Iterable[SpendingCap], expected: SpendAmount, *, watched: bool
    ) -> list[str]:
        """Return in words what is left of each cap in force for what is `expected` to be used.

        Not `watched`: its cost is unknown, and not sure to be nothing.
        """
        await self._refresh(journal)
        return [self._outlook(cap, expected, watched=watched) for cap in (*caps, *self._kept)]

    def _outlook(self, cap: SpendingCap, expected: SpendAmount, *, watched: bool) -> str:
        if cap.unit == "dollars" and not watched:
            return f"your budget of {cap} lets nothing through whose price is unknown"
        used = self._in_use(cap)
        if not _fits(expected, cap, used):
            left = cap.words(max(0.0, cap.amount - used))
            return f"more than is left of your budget: {left} of {cap}"
        return f"budget: {CapUsage(cap, used)}"

    async def keep(self, journal: Journal, cap: SpendingCap | None) -> None:
        """Let every kernel of this user hold to `cap` from now on; None lifts it."""
        await journal.set_budget("" if cap is None else cap.text)
        self._read_at = float("-inf")

    async def _refresh(self, journal: Journal) -> None:
        """Read what other kernels have used and set, once for all who come meanwhile."""
        if not self._is_fresh():
            # A lock would let them go one by one, and with many under way it never gets free.
            await asyncio.shield(self._begin_to_read(journal))

    def _begin_to_read(self, journal: Journal) -> asyncio.Task[None]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read(journal))
        return self._reading

    async def _read(self, journal: Journal) -> None:
        now, today = self._clock.now(), self._today()
        self._kernels = await journal.read_spending(today)
        self._read_at, self._day = now, today
        self._kept = (read(self._kernels.budget),) if self._kernels.budget else ()

    def _is_fresh(self) -> bool:
        return self._clock.now() - self._read_at < FRESH and self._today() == self._day

    def _in_use(self, cap: SpendingCap) -> float:
        if cap.period == "session":
            return self._session.in_unit(cap.unit) + self._aside.in_unit(cap.unit)
        return _used(self._kernels, cap)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock.wall()).date().isoformat()

    def _reset(self, cap: SpendingCap) -> float | None:
        """Return when the cap starts anew, in seconds since the epoch."""
        if cap.period == "session":
            return None
        today = datetime.fromtimestamp(self._clock.wall()).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        if cap.period == "day":
            return (today + timedelta(days=1)).timestamp()
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


def _since(seen: Spending, cap: SpendingCap) -> SpendAmount:
    """Return what all kernels have used in the time that the cap is about."""
    return seen.day if cap.period == "day" else seen.month


def _used(seen: Spending, cap: SpendingCap) -> float:
    """Return what all kernels have used and set aside."""
    return _since(seen, cap).in_unit(cap.unit) + seen.reserved.in_unit(cap.unit)


def _fits(expected: SpendAmount, cap: SpendingCap, used: float) -> bool:
    return used + expected.in_unit(cap.unit) <= cap.amount
