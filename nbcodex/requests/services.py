"""What all requests of a process share."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from nbcodex.journal.journal import Journal
from nbcodex.openai_api import pricing
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.ratelimit import backoff
from nbcodex.ratelimit.limiter import Limiter
from nbcodex.requests import budget
from nbcodex.runtime.clock import Clock
from nbcodex.settings import Settings


class Services:
    """The way to the server, the journal, the limiters and the budgets.

    Parameters
    ----------
    api_client : ApiClient
        The way to the server.
    journal : callable
        Returns what survives the process, by the settings: awaited before anything is sent, and
        before anything is told to have ended.
    limiter : callable
        Returns where it is asked who may send, and when, by the settings.
    clock : Clock
        The time.
    chance : random.Random
        Source of jitter.
    """

    def __init__(
        self,
        *,
        api_client: ApiClient,
        journal: Callable[[Settings], Journal],
        limiter: Callable[[Settings], Limiter],
        clock: Clock,
        chance: random.Random | None = None,
    ) -> None:
        self.api_client = api_client
        self.journal = journal
        self.limiter = limiter
        self.clock = clock
        self.chance = chance or random.Random()  # noqa: S311 - jitter, not cryptography
        self.budget = budget.Budget(clock)
        self._loading: threading.Thread | None = None
        self.simulators: set[str] = set()
        self._retry_budgets: dict[str, backoff.RetryBudget] = {}

    def load_prices(self, base_url: str) -> None:
        """Have the price tables ready by the end of the first answer, if they will be needed."""
        if not self._loading and pricing.provider_of(base_url):
            self._loading = threading.Thread(target=pricing.load_prices, daemon=True)
            self._loading.start()

    def retry_budget(self, base_url: str) -> backoff.RetryBudget:
        """Return the retry budget that all requests to one server share."""
        return self._retry_budgets.setdefault(base_url, backoff.RetryBudget())
