"""What a server charges for an answer, found out by keeping three ledgers and comparing.

*kept*: input and the whole of the bound on output, for good. *refunded*: the same, what was not
used given back at the end. *actual*: input at admission, output at the end. Pure arithmetic. No
header tells which; the snapshots do, since the three drift apart by what each gets wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbcodex.ratelimit.tank import Mark, Tank

Policy = Literal["kept", "refunded", "actual"]
POLICIES: tuple[Policy, ...] = ("kept", "refunded", "actual")
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
class Shadows:
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

    tanks: list[Tank] = field(default_factory=lambda: [Tank() for _ in POLICIES])
    scores: list[float] = field(default_factory=lambda: [0.0] * len(POLICIES))
    drift: list[float] = field(default_factory=lambda: [0.0] * len(POLICIES))
    since: float | None = None
    chosen: int = KEPT
    usual: float = 0.0

    @property
    def policy(self) -> Policy:
        """The policy believed in."""
        return POLICIES[self.chosen]

    @property
    def tank(self) -> Tank:
        """The ledger believed in."""
        return self.tanks[self.chosen]

    @property
    def may_owe(self) -> bool:
        """Whether answers may yet be charged at their end: no evidence speaks against it.

        Snapshots put right what a wrong policy has reckoned, but not what has not been charged yet.
        """
        return self.scores[ACTUAL] - self.scores[self.chosen] < DISMISSED

    def admit(self, tokens: float, output: float, now: float) -> tuple[Mark, ...]:
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
        marks: tuple[Mark, ...],
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
        self.scores = [0.0] * len(POLICIES)
        self.since, self.drift = None, [0.0] * len(POLICIES)

    def _open(self, at: float) -> None:
        self.since, self.drift = at, [0.0] * len(POLICIES)

    def _choose(self) -> bool:
        best = min(range(len(POLICIES)), key=self.scores.__getitem__)
        if self.scores[self.chosen] - self.scores[best] < CONVINCED:
            return False
        self.chosen = best
        return True
