"""The limits of the second look-alike: continuously refilled token buckets, and charges.

Must not know sockets or answers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from tests.servers.wording import ASSUMED, Ask, Fields, RefusedError, error_of

Policy = Literal["kept", "refunded", "actual"]

ORGANIZATION = "org-lookalike"
MINUTE = 60.0


def duration(seconds: float) -> str:
    """Return a duration as Go writes it: ``17ms``, ``1s``, ``6m0s``, ``8m51.438s``, ``1h0m0s``."""
    thousandths = round(max(0.0, seconds) * 1000)
    if 0 < thousandths < 1000:
        return f"{thousandths}ms"
    minutes, rest = divmod(thousandths, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + text


@dataclass(slots=True)
class Bucket:
    """A bucket of one minute's limit; charges after the answer can leave a debt."""

    word: str
    limit: float
    level: float
    at: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """Return the level."""
        at = time.monotonic()
        self.level += (at - self.at) * self.limit / MINUTE
        self.level, self.at = min(self.limit, self.level), at
        return self.level

    def take(self, amount: float) -> None:
        self.level = min(self.limit, self.now() - amount)

    def lacks(self, amount: float) -> float:
        """Return the seconds until `amount` is available."""
        return max(0.0, amount - self.now()) / self.limit * MINUTE

    def headers(self) -> dict[str, str]:
        level = self.now()
        return {
            f"x-ratelimit-limit-{self.word}": str(round(self.limit)),
            f"x-ratelimit-remaining-{self.word}": str(max(0, int(level))),
            f"x-ratelimit-reset-{self.word}": duration(
                (self.limit - level) / self.limit * MINUTE  # until it is full
            ),
        }

    def refusal(self, model: str, requested: int, *, level: float | None = None) -> Fields:
        """Return the error of a refused request, at the current level or at `level`."""
        level = self.now() if level is None else level
        short = f"{self.word[0].upper()}PM"
        where = f"for {model} in organization {ORGANIZATION} on {self.word} per min ({short})"
        limit, used = round(self.limit), round(self.limit - level)
        if requested > limit:
            message = (
                f"Request too large {where}: Limit {limit}, Requested {requested}. "
                "The input or output tokens must be reduced in order to run successfully."
            )
        else:
            message = (
                f"Rate limit reached {where}: Limit {limit}, Used {used}, Requested {requested}. "
                f"Please try again in {duration((requested - level) / self.limit * MINUTE)}."
            )
        more = " Visit https://platform.openai.com/account/rate-limits to learn more."
        return error_of(self.word, "rate_limit_exceeded", message + more)


@dataclass(slots=True)
class Account:
    """The limits of one key and model."""

    policy: Policy
    tokens: Bucket
    requests: Bucket

    def admit(self, ask: Ask) -> int:
        """Charge a request, and return the charge.

        Raises
        ------
        RefusedError
            If a limit is exhausted. A request refused for its tokens counts as a request; one
            refused by the request limit does not, or `Used` would exceed `Limit`.
        """
        if self.requests.now() < 1:
            raise self._refusal(self.requests, ask, 1)
        self.requests.take(1)
        if ask.whole > self.tokens.limit:
            raise self._refusal(self.tokens, ask, ask.whole)
        charge = ask.input_tokens if self.policy == "actual" else ask.whole
        if charge > self.tokens.now():
            raise self._refusal(self.tokens, ask, charge)
        self.tokens.take(charge)
        return charge

    def _refusal(self, bucket: Bucket, ask: Ask, requested: int) -> RefusedError:
        headers = self.headers()
        if requested <= bucket.limit:
            wait = bucket.lacks(requested)
            headers["retry-after-ms"] = str(max(1, round(wait * 1000)))
            headers["retry-after"] = str(math.ceil(wait))
        return RefusedError(429, bucket.refusal(ask.model, requested), headers)

    def settle(self, ask: Ask, used: int) -> int:
        """Settle the charge of an answer that has ended; return the difference."""
        match self.policy:
            case "kept":
                return 0
            case "refunded":
                more = used - (ask.bound or ASSUMED)
            case "actual":
                more = used
        self.tokens.take(more)
        return more

    def headers(self) -> dict[str, str]:
        return self.requests.headers() | self.tokens.headers()
