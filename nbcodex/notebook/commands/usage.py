"""Words about figures: what was used, and what the server allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from IPython.display import display

from nbcodex.client import current
from nbcodex.errors import ConfigurationError
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.monitor import limits_text
from nbcodex.notebook.monitor.collector import watch_of
from nbcodex.rendering.figures import format_dollars
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_duration

if TYPE_CHECKING:
    from nbcodex.models import UsageTotals
    from nbcodex.requests.spending_cap import SpendingCap


class Figures(CommandGroup):
    """Usage and limits."""

    def usage(self) -> None:
        """Tell what this session has used: tokens, cost, waits."""
        totals = current().totals
        if not totals.by_model:
            print_line("Nothing has been asked in this session.")
        for model, total in totals.by_model.items():
            print_line(f"{model}: {_total(total)}")

    def budget(self, *amount: str) -> None:
        """Tell or set your own cap: budget [200k|$5|$5/day|$20/month|off]."""
        from nbcodex.requests.spending_cap import LEAST, read

        text = "".join(amount)
        if text.lower() == "off":
            self._config.own_budget = ""
            self._keep(None)
        elif text:
            cap = read(text)
            if cap.unit == "tokens" and cap.amount < LEAST:
                raise ConfigurationError(
                    f"{cap.words(cap.amount)} let nothing through.",
                    advice="Dollars are written as $5; tokens as 5000, 5k or 2M.",
                )
            if cap.period == "session":
                self._config.own_budget = text
            else:
                self._keep(cap)
        if text:
            watch_of(current()).changed.set()
        settings = self._config.settings()
        standings = event_loop.shared().submit(current().cap_usages(settings)).result()
        for standing in standings:
            print_line(str(standing))
        if not standings:
            print_line("No budget is set: %codex budget 200k, $5, $5/day or $20/month sets one.")
        elif text.lower() == "off":
            print_line("This one is set by Codex.budget (%config, or ipython_config.py).")

    def _keep(self, cap: SpendingCap | None) -> None:
        event_loop.shared().submit(current().save_cap(self._settings, cap)).result()

    def monitor(self) -> None:
        """Show all requests, live: gauges, totals, countdowns with their buttons, retries."""
        from nbcodex.notebook.monitor.widget import monitor

        shown = monitor()
        if hasattr(self._session.shell, "kernel"):
            display(shown)  # type: ignore[no-untyped-call]
        else:
            print_line(str(shown))

    def limits(self) -> None:
        """Tell the limits as they are known: what is left, refill, what is charged, holds."""
        client = current()
        known = event_loop.shared().submit(client.limits(self._settings)).result()
        now = client.clock.now()
        told = [limits_text.lines(label, each, now) for label, each in known.items()]
        for lines in filter(None, told):
            print_line("\n".join(lines))
        if not any(told):
            print_line("Nothing is known of limits before the first answer.")
        if trouble := client.limiter(self._settings).sharing_problem:
            print_line(trouble)


def _total(total: UsageTotals) -> str:
    about = "~" if total.estimated else ""
    told: Iterable[str] = (
        f"{total.requests} request{'s' * (total.requests != 1)}, {total.answers} answered",
        f"{about}{total.usage.input_tokens:,} in ({total.usage.cached_tokens:,} cached)",
        f"{about}{total.usage.output_tokens:,} out ({total.usage.reasoning_tokens:,} reasoning)",
        f"tokens of {total.unknown} unknown" if total.unknown else "",
        f"{about}{format_dollars(total.cost)}" if total.cost else "",
        f"cost of {total.unpriced} unknown" if total.unpriced else "",
        f"limits met {total.refusals} time{'s' * (total.refusals != 1)}" if total.refusals else "",
        f"waited {format_duration(total.waited)}" if total.waited else "",
    )
    return " · ".join(filter(None, told))
