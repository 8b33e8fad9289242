"""Opens what all requests of a process share: journals, limiters and the API client.

Its methods may be called from any thread, unless they say otherwise.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbcodex.events import BackingOff, Ending, Event
from nbcodex.models import UsageTotals
from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.settings import JOURNAL_FILENAME, Secret, Settings, data_folder

if TYPE_CHECKING:
    import httpx2

    from nbcodex.journal.journal import Journal
    from nbcodex.ratelimit.limiter import Limiter
    from nbcodex.requests.runner import Services

# The 90 days are `journal.database.RETENTION_S`.
_FIRST_USE_NOTICE = (
    "from now on prompts and answers are kept in {folder} for 90 days, readable by you alone "
    "(%codex forget erases, %config Codex.journal = False keeps none)"
)

# A front end that restarts a kernel kills it after this time; the journal must be closed by then.
SHUTDOWN_TIMEOUT_S = 5.0


class SessionTotals:
    """A listener that sums up what this process has used, by model."""

    def __init__(self) -> None:
        self.by_model: defaultdict[str, UsageTotals] = defaultdict(UsageTotals)
        self._refusals: Counter[str] = Counter()  # of running requests, by id

    def __call__(self, event: Event) -> None:
        """Count an event, on the loop's thread."""
        if isinstance(event, BackingOff) and event.limit is not None:
            self._refusals[event.request_id] += 1
        elif isinstance(event, Ending):
            refusals = self._refusals.pop(event.request_id, 0)
            # A reused answer, or a request that was never sent, has used nothing.
            if event.reply.attempts:
                model = event.reply.model or "unknown"
                self.by_model[model] += UsageTotals.of(event.reply, refusals=refusals)

    @property
    def total(self) -> UsageTotals:
        """The totals of all models together."""
        return sum(self.by_model.values(), UsageTotals())


class ProcessResources:
    """The journals, limiters and services of a process, each opened on first use."""

    def __init__(
        self, *, clock: Clock | None = None, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self.clock = clock or BootClock()
        self.totals = SessionTotals()  # what this process has used
        self._transport = transport  # replaces the network, in the simulator and in tests
        self._services: Services | None = None
        # By data folder and Redis URL; None: the one of `Settings.private_limits`.
        self._limiters: dict[tuple[Path, Secret | None] | None, Limiter] = {}
        self._notices = ""  # sentences to be shown to the user once
        self._unannounced: set[Path] = set()  # folders of new journals that hold no request yet
        self._journals: dict[Path | None, Journal] = {}  # by folder; None: in memory
        self._journals_lock, self._services_lock = threading.Lock(), threading.Lock()

    def services(self) -> Services:
        """Return the services; the first call creates them."""
        # Several cells may call it first at the same time, in subshells and threads.
        with self._services_lock:
            if self._services is None:
                from nbcodex.openai_api.api_client import ApiClient
                from nbcodex.requests.runner import Services

                atexit.register(self.close)
                self._services = Services(
                    api_client=ApiClient(clock=self.clock, transport=self._transport),
                    clock=self.clock,
                    limiter=self.limiter,
                    journal=self.journal,
                    spending_journal=self.spending_journal,
                )
            return self._services

    def limiter(self, settings: Settings) -> Limiter:
        """Return the limiter for these settings; called on the loop's thread."""
        from nbcodex.ratelimit.limiter import Limiter
        from nbcodex.ratelimit.worker import SharedLimiter, open_store

        if settings.private_limits:
            return self._limiters.setdefault(None, Limiter())
        # Shared by all processes with this folder or Redis, also where prompts are not kept: it
        # holds numbers only, under names that are hashes.
        key = folder, url = data_folder(settings), settings.redis_url
        if key not in self._limiters:
            open_shared = partial(open_store, folder, redis_url=url, notify=self._add_notice)
            limiter = SharedLimiter(open_shared, clock=self.clock, on_problem=self._add_notice)
            self._limiters[key] = limiter
        return self._limiters[key]

    def _add_notice(self, notice: str) -> None:
        self._notices = f"{self._notices} {notice}".strip()

    def take_notices(self, settings: Settings) -> str:
        """Return the sentences to be shown once, below a request that was made with `settings`."""
        folder = data_folder(settings)
        # The demo says itself where its requests are kept.
        if settings.journal and not settings.private_limits and folder in self._unannounced:
            self._unannounced.discard(folder)
            self._add_notice(_FIRST_USE_NOTICE.format(folder=folder))
        notices, self._notices = self._notices, ""
        return notices

    def journal(self, settings: Settings) -> Journal:
        """Return the journal for these settings, on disk or in memory; each is opened once."""
        folder = data_folder(settings) if settings.journal else None
        if folder and folder not in self._journals and not (folder / JOURNAL_FILENAME).exists():
            self._unannounced.add(folder)
        return self._open_journal(folder)

    def journal_on_disk(self, settings: Settings) -> Journal | None:
        """Return the journal on disk, if there is one, even with the setting `journal` off."""
        folder = data_folder(settings)
        is_used = folder in self._journals or (folder / JOURNAL_FILENAME).exists()
        return self._open_journal(folder) if is_used else None

    def spending_journal(self, settings: Settings, *, create: bool = False) -> Journal:
        """Return the journal that counts what is spent: if possible the one on disk.

        With `create`, it is on disk even if the file has to be created for the counters alone.
        """
        # Numbers reveal nothing, and switching off the journal must not lift a cap of a day. The
        # demo (`private_limits`) costs nothing, so its spending is counted apart.
        if settings.journal or settings.private_limits:
            return self.journal(settings)
        from nbcodex.requests.budget import parse_cap

        folder = data_folder(settings)
        create = create or any(parse_cap(cap).period != "session" for cap in settings.budgets)
        is_on_disk = create or (folder / JOURNAL_FILENAME).exists()
        return self._open_journal(folder if is_on_disk else None)

    def _open_journal(self, folder: Path | None) -> Journal:
        from nbcodex.journal.journal import Journal

        with self._journals_lock:
            if folder not in self._journals:
                self._journals[folder] = Journal(folder, clock=self.clock)
            return self._journals[folder]

    def close(self) -> None:
        """Close the journals and limiters, as the process ends."""
        for journal in self._journals.values():
            # What was interrupted this late was interrupted by the restart, not by the user.
            journal.shut_down(max_interruption_age=SHUTDOWN_TIMEOUT_S)
        for limiter in self._limiters.values():
            limiter.close()
