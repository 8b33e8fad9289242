"""The user's own caps at work: what is used, and what is refused before it is sent.

Owns what this process has set aside, and the warnings. The counters of days and months are the
journal's. A cap is a help against mistakes: whoever can change the settings can lift it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from nbcodex.cap import Cap, Period, Standing, read
from nbcodex.clock import Clock, spell
from nbcodex.errors import BudgetError
from nbcodex.estimate import USUAL, Estimate, estimate
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import Spent
from nbcodex.records import Reply, Request
from nbcodex.wire import prices

WARNINGS = (0.75, 0.90, 0.95)
"""Shares of a cap at which its user is told."""
FRESH = 5.0
"""Seconds after which another kernel may have changed the caps that the journal keeps."""


class Budget:
    """What this process may use, and has used. Lives on the event loop's thread.

    Parameters
    ----------
    clock : Clock
        Whose calendar counts.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used: dict[Period, Spent] = {"session": Spent(), "day": Spent(), "month": Spent()}
        self._kept: tuple[Cap, ...] = ()
        self._read_at = float("-inf")
        self._day = ""
        self._reading: asyncio.Task[None] | None = None
        self._open: dict[str, tuple[Estimate, tuple[Cap, ...]]] = {}
        self._aside = Spent()
        self._warned: set[tuple[Cap, float]] = set()
        self._answers = self._output = 0

    @property
    def usual(self) -> int:
        """Output tokens of this session's usual answer."""
        return self._output // self._answers if self._answers else USUAL

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
        caps: Iterable[Cap],
        journal: Journal,
        model: str | None,
        base_url: str,
        share: float = 1.0,
    ) -> None:
        """Set aside what the request may come to, at a share of the usual price.

        Raises
        ------
        BudgetError
            If a cap would be passed, or cannot be watched; nothing is sent then.
        """
        await self._refresh(journal)
        caps = (*caps, *self._kept)
        if not caps or request.id in self._open:
            return
        if any(cap.unit == "dollars" for cap in caps):
            await asyncio.to_thread(prices.load)
        expected = estimate(request, model=model, base_url=base_url, usual=self.usual)
        if expected.cost is not None:
            expected = replace(expected, cost=expected.cost * share)
        for cap in caps:
            self._check(request, expected, cap, base_url)
        self._open[request.id] = expected, caps
        self._aside = self._aside.plus(expected.spent)

    def _check(self, request: Request, expected: Estimate, cap: Cap, base_url: str) -> None:
        if cap.unit == "dollars" and expected.cost is None:
            if prices.may_be_free(base_url):
                return
            raise BudgetError(
                f"No price is known for this model, so your budget of {cap} cannot be watched.",
                advice=f"Set one in tokens (`%codex budget 200k`) or none (`%codex budget off`), "
                f"then `%codex resume {request.id}`.",
            )
        used = self._in_use(cap)
        if used + expected.spent.of(cap.unit) > cap.amount:
            reset = self._reset(cap)
            anew = f"; it starts anew in {spell(reset - self._clock.wall())}" if reset else ""
            raise BudgetError(
                f"It would pass your budget of {cap}: {cap.words(used)} are used or set aside, and "
                f"it is estimated at {expected}.",
                advice=f"Raise it (`%codex budget …`), then `%codex resume {request.id}`{anew}.",
                resume_at=reset,
            )

    def settle(self, request_id: str, reply: Reply) -> tuple[str, ...]:
        """Count what a request came to; return warnings, each once, in a few words."""
        expected, caps = self._open.pop(request_id, (None, ()))
        if expected is not None:
            self._aside = self._aside.minus(expected.spent) if self._open else Spent()
        if reply.reused or not reply.attempts:
            return ()
        if reply:
            self._answers += 1
            self._output += reply.usage.output_tokens or 0
        spent = Spent.by(reply, otherwise=expected.spent if expected else Spent())
        for period, used in self._used.items():
            if period == "session" or not reply.simulated:
                self._used[period] = used.plus(spent)
        return tuple(filter(None, map(self._warning, caps)))

    def _warning(self, cap: Cap) -> str:
        standing = Standing(cap, self._used[cap.period].of(cap.unit))
        passed = [w for w in WARNINGS if standing.share >= w and (cap, w) not in self._warned]
        self._warned |= {(cap, level) for level in passed}
        return str(standing) if passed else ""

    def standings(self, caps: Iterable[Cap]) -> list[Standing]:
        """Return how far the caps in force are used up, as far as is known."""
        everything = (*caps, *self._kept)
        return [Standing(cap, self._used[cap.period].of(cap.unit)) for cap in everything]

    async def look(self, journal: Journal, caps: Iterable[Cap]) -> list[Standing]:
        """Return how far the caps in force are used up, other kernels included."""
        await self._refresh(journal)
        return self.standings(caps)

    async def outlook(
        self, journal: Journal, caps: Iterable[Cap], expected: Spent, *, watched: bool
    ) -> list[str]:
        """Return in words what is left of each cap in force for what is `expected` to be used.

        Not `watched`: its cost is unknown, and not sure to be nothing.
        """
        await self._refresh(journal)
        return [self._outlook(cap, expected, watched=watched) for cap in (*caps, *self._kept)]

    def _outlook(self, cap: Cap, expected: Spent, *, watched: bool) -> str:
        if cap.unit == "dollars" and not watched:
            return f"your budget of {cap} lets nothing through whose price is unknown"
        used = self._in_use(cap)
        if used + expected.of(cap.unit) > cap.amount:
            left = cap.words(max(0.0, cap.amount - used))
            return f"more than is left of your budget: {left} of {cap}"
        return f"budget: {Standing(cap, used)}"

    async def keep(self, journal: Journal, cap: Cap | None) -> None:
        """Let every kernel of this user hold to `cap` from now on; None lifts it."""
        await journal.keep_budget("" if cap is None else cap.text)
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
        text, day, month = await journal.spending(today)
        self._read_at, self._day = now, today
        self._used["day"], self._used["month"] = day, month
        self._kept = (read(text),) if text else ()

    def _is_fresh(self) -> bool:
        return self._clock.now() - self._read_at < FRESH and self._today() == self._day

    def _in_use(self, cap: Cap) -> float:
        return self._used[cap.period].of(cap.unit) + self._aside.of(cap.unit)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock.wall()).date().isoformat()

    def _reset(self, cap: Cap) -> float | None:
        """Return when the cap starts anew, in seconds since the epoch."""
        if cap.period == "session":
            return None
        today = datetime.fromtimestamp(self._clock.wall()).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        if cap.period == "day":
            return (today + timedelta(days=1)).timestamp()
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()
