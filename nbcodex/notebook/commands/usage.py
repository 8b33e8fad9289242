"""Commands about usage, the budget and the server's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.display import display

from nbcodex.client import current
from nbcodex.errors import ConfigurationError
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.monitor.collector import collector_of
from nbcodex.notebook.monitor.view import limit_lines
from nbcodex.rendering.figures import totals_line
from nbcodex.runtime import event_loop

if TYPE_CHECKING:
    from nbcodex.requests.budget import SpendingCap


class UsageCommands(CommandGroup):
    """Usage and limits."""

    def usage(self) -> None:
        """Show what this session has used: tokens, cost, waits."""
        totals = current().totals
        if not totals.by_model:
            print_line("No request has been sent in this session.")
        for model, total in totals.by_model.items():
            print_line(f"{model}: {totals_line(total)}")

    def budget(self, *amount: str) -> None:
        """Show or set your own cap: budget [200k|$5|$5/day|$20/month|off]."""
        from nbcodex.requests.budget import MIN_CAP_TOKENS, parse_cap

        text = "".join(amount)
        if text.lower() == "off":
            self._config.own_budget = ""
            self._save_cap(None)
        elif text:
            cap = parse_cap(text)
            if cap.unit == "tokens" and cap.amount < MIN_CAP_TOKENS:
                raise ConfigurationError(
                    f"A budget of {cap.format(cap.amount)} is too small for any request.",
                    advice="Write dollars as $5, and tokens as 5000, 5k or 2M.",
                )
            # A cap of a day or month holds for all kernels, so it is in the journal.
            if cap.period == "session":
                self._config.own_budget = text
            else:
                self._save_cap(cap)
        if text:
            collector_of(current()).changed.set()
        settings = self._config.settings()
        caps = event_loop.shared().submit(current().cap_usages(settings)).result()
        for cap_usage in caps:
            print_line(str(cap_usage))
        if not caps:
            print_line("No budget is set: %codex budget 200k, $5, $5/day or $20/month sets one.")
        elif text.lower() == "off":
            print_line("This budget is set by Codex.budget (%config, or ipython_config.py).")

    def _save_cap(self, cap: SpendingCap | None) -> None:
        event_loop.shared().submit(current().save_cap(self._settings, cap)).result()

    def monitor(self) -> None:
        """Show all requests live: limits, totals, countdowns with buttons, retries."""
        from nbcodex.notebook.monitor.widget import monitor

        shown = monitor()
        if hasattr(self._session.shell, "kernel"):
            display(shown)  # type: ignore[no-untyped-call]
        else:
            print_line(str(shown))

    def limits(self) -> None:
        """Show the known limits: what is left, refill, charge policy, cooldowns."""
        client = current()
        known = event_loop.shared().submit(client.limits(self._settings)).result()
        now = client.clock.now()
        texts = [limit_lines(label, each, now) for label, each in known.items()]
        for lines in filter(None, texts):
            print_line("\n".join(lines))
        if not any(texts):
            print_line("No limits are known before the first answer.")
        if problem := client.limiter(self._settings).sharing_problem:
            print_line(problem)
