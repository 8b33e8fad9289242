"""What a server charges for an answer, found out by keeping three ledgers and comparing.

*kept*: input and the whole of the bound on output, for good. *refunded*: the same, what was not
used given back at the end. *actual*: input at admission, output at the end. Pure arithmetic. No
header tells which; the snapshots do, since the three drift apart by what each gets wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbcodex.ratelimit.token_bucket import LevelMark, TokenBucket

ChargePolicy = Literal["kept", "refunded", "actual"]
CHARGE_POLICIES: tuple[ChargePolicy, ...] = ("kept", "refunded", "actual")
KEPT, ACTUAL = 0, 2
"""Index of the policy that is safe under every server, and of the one that charges later."""

WINDOW, STALE = 0.4, 5.0
"""Seconds of snapshots that are judged together: order on the way is noise, and evens out. A window
that says nothing for longer is begun anew."""
APART = 3.0
"""How many usual requests the ledgers must differ by before a window says anything."""
MEMORY, CONVINCED, DISMISSED = 0.8, 1.5, 0.5
"""What a judgement is worth one window later; the lead in judgements that changes the policy, and
the one by which what speaks against a policy is believed."""


@dataclass(slots=True)
class ChargePolicyEstimator:
    """Three ledgers over the same events, and how well each foretells the snapshots.

    Parameters
    ----------
    tanks : list of Tank
        One for each policy.
    scores : list of float
        What each got wrong lately; lower is better.
    drift : list of float
        The sum of each ledger's errors in the window that is under way.
    since : float or None
        When that window began.
    chosen : int
        Index of the policy believed in.
    usual : float
        Tokens of a usual request.
    """

    tanks: list[TokenBucket] = field(
        default_factory=lambda: [TokenBucket() for _ in CHARGE_POLICIES]
    )
    scores: list[float] = field(default_factory=lambda: [0.0] * len(CHARGE_POLICIES))
    drift: list[float] = field(default_factory=lambda: [0.0] * len(CHARGE_POLICIES))
    since: float | None = None
    chosen: int = KEPT
    usual: float = 0.0

    @property
    def policy(self) -> ChargePolicy:
        """The policy believed in."""
        return CHARGE_POLICIES[self.chosen]

    @property
    def tank(self) -> TokenBucket:
        """The ledger believed in."""
        return self.tanks[self.chosen]

    @property
    def may_owe(self) -> bool:
        """Whether answers may yet be charged at their end: no evidence speaks against it.

        Snapshots put right what a wrong policy has reckoned, but not what has not been charged yet.
        """
        return self.scores[ACTUAL] - self.scores[self.chosen] < DISMISSED

    def admit(self, tokens: float, output: float, now: float) -> tuple[LevelMark, ...]:
        """Enter a request of `tokens` input and at most `output` output."""
        whole = tokens + output
        self.usual += (whole - self.usual) * (0.02 if self.usual else 1.0)
        charges = (whole, whole, tokens)
        return tuple(t.take(c, now) for t, c in zip(self.tanks, charges, strict=True))

    def settle(self, output: float, used: float, now: float) -> tuple[float, ...]:
        """Enter the end of a request that used `used` of `output`; return what each gives back."""
        back = (0.0, output - used, -used)
        for tank, amount in zip(self.tanks, back, strict=True):
            tank.take(-amount, now)
        return back

    def void(self, tokens: float, output: float, now: float) -> None:
        """Take a request out again that was never charged."""
        whole = tokens + output
        for tank, amount in zip(self.tanks, (whole, whole, tokens), strict=True):
            tank.give_back(amount, now)

    def observe(
        self,
        marks: tuple[LevelMark, ...],
        remaining: float,
        *,
        gone: float,
        taken_at: float,
        now: float,
        usual: bool,
    ) -> tuple[float, ...]:
        """Put all three right by a snapshot; return what each had wrong."""
        pairs = zip(self.tanks, marks, strict=True)
        errors = tuple(t.error(m, remaining, gone=gone) for t, m in pairs)
        for index, (tank, error) in enumerate(zip(self.tanks, errors, strict=True)):
            if tank.known:
                self.drift[index] += error
            tank.correct(error, now, taken_at=taken_at, usual=usual)
        return errors

    def judge(self, at: float, *, patient: bool = False) -> bool:
        """Close the window if it says enough; return whether the belief has changed.

        Parameters
        ----------
        at : float
            The instant of the newest snapshot.
        patient : bool
            Whether snapshots are rare, and a window may be long.
        """
        if self.since is None:
            self._open(at)
            return False
        age, apart = at - self.since, max(self.drift) - min(self.drift)
        if age < WINDOW or apart <= APART * self.usual:
            if age > STALE and not patient:
                self._open(at)
            return False
        wrong = [abs(d) for d in self.drift]
        least = min(wrong)
        for index, error in enumerate(wrong):
            self.scores[index] = MEMORY * self.scores[index] + min(1.0, (error - least) / apart)
        self._open(at)
        return self._choose()

    def hope(self, now: float) -> None:
        """Believe in whatever allows most among what the evidence does not speak against.

        Where answers carry no limits, only a refusal tells anything: what is never tried is never
        learnt.
        """
        best = min(self.scores)
        likely = [i for i, score in enumerate(self.scores) if score - best < CONVINCED]
        self.chosen = max(likely, key=lambda i: self.tanks[i].level_at(now))

    def doubt(self) -> None:
        """Go back to the safe policy, and ask for evidence anew."""
        self.chosen = KEPT
        self.scores = [0.0] * len(CHARGE_POLICIES)
        self.since, self.drift = None, [0.0] * len(CHARGE_POLICIES)

    def _open(self, at: float) -> None:
        self.since, self.drift = at, [0.0] * len(CHARGE_POLICIES)

    def _choose(self) -> bool:
        best = min(range(len(CHARGE_POLICIES)), key=self.scores.__getitem__)
        if self.scores[self.chosen] - self.scores[best] < CONVINCED:
            return False
        self.chosen = best
        return True


PRIOR = 5.0
"""Requests that used all their output, assumed before any answer has come."""
RECENT = 1_000
"""Answers after which the older ones count half."""


@dataclass(slots=True)
class OutputEstimator:
    """The mean share, not misled by the short answers, which are the first to end.

    Of `asked` tokens `used` were used by the answers that have ended; the time that those still
    under way have taken so far counts as if nothing had come of it yet.
    """

    asked: float = 0.0
    used: float = 0.0
    took: float = 0.0
    ended: int = 0
    under_way: int = 0
    asked_under_way: float = 0.0
    starts: float = 0.0

    def begin(self, asked: float, now: float) -> None:
        """A request goes."""
        self.under_way += 1
        self.asked_under_way += asked
        self.starts += now

    def drop(self, asked: float, at: float) -> None:
        """A request that went at `at` is no longer under way."""
        self.under_way -= 1
        self.asked_under_way -= asked
        self.starts -= at
        if not self.under_way:
            self.asked_under_way = self.starts = 0.0

    def end(self, asked: float, used: float, took: float) -> None:
        """An answer has ended."""
        self.asked += asked
        self.used += used
        self.took += took
        self.ended += 1
        if self.ended >= RECENT:
            self.asked, self.used, self.took = self.asked / 2, self.used / 2, self.took / 2
            self.ended //= 2

    def lasts(self, now: float) -> float:
        """Return for how long the answers under way go on, by the mean of those that have ended.

        Where they began one after another, they end so, too: the last of them after the whole mean.
        """
        if not self.ended or not self.under_way:
            return 0.0
        whole, age = self.took / self.ended, now - self.starts / self.under_way
        return max(0.0, min(whole, 2 * (whole - age)))

    def share(self, now: float) -> float:
        """Return the share of its bound that an answer uses, on average."""
        if not self.ended or not self.asked:
            return 1.0
        pending = max(0.0, self.under_way * now - self.starts)
        used = self.used * (1.0 + pending / self.took if self.took else 2.0)
        weight = PRIOR / (PRIOR + self.ended)
        return min(1.0, weight + (1.0 - weight) * used / self.asked)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request asks of the limits.

    Parameters
    ----------
    tokens : float
        Our estimate of its input.
    output : float
        The most output that it may use, as the server reckons it.
    """

    tokens: float
    output: float


@dataclass(slots=True)
class Permit:
    """Leave to send one request, at an instant.

    Parameters
    ----------
    bucket : str
        Name of the bucket.
    cost : Cost
        What it asks for.
    at : float
        When it may go.
    number : int
        Its place in the order of sending.
    probe : bool
        Whether it goes through a hold.
    marks, turn : Mark
        The token ledgers and the tank of requests, just after it was taken from them.
    tokens : float
        The input as it was charged here, the fit included.
    heard, closed : bool
        Whether the server has answered; whether it is over.
    sent_at : float
        When it really went: infinite as long as whoever has it is not ready.
    home, born : int
        The bucket that it was taken from, and the share of its holder in which it is counted.
    astray : bool
        Whether that bucket is lost, so that its marks mean nothing.
    """

    bucket: str
    cost: Cost
    at: float
    number: int
    probe: bool
    marks: tuple[LevelMark, ...]
    turn: LevelMark
    tokens: float
    heard: bool = False
    closed: bool = False
    sent_at: float = 0.0
    home: int = 0
    born: int = 0
    astray: bool = False

    def become(self, other: Permit) -> None:
        """Take back what happened to it since it was like `other`."""
        self.marks, self.heard, self.closed = other.marks, other.heard, other.closed
        self.born, self.astray = other.born, other.astray

    def shift(self, amounts: tuple[float, ...]) -> None:
        """Let the token ledgers have held more at the mark."""
        pairs = zip(self.marks, amounts, strict=True)
        self.marks = tuple(LevelMark(mark.level + amount, mark.shift) for mark, amount in pairs)
