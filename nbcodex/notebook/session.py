"""One shell's requests: shown where they were asked, bound to their variables.

Owns what happens between a handle and the notebook. Must not know how options are written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from nbcodex import host
from nbcodex.client import current
from nbcodex.errors import EntryError, Stopped, shorten
from nbcodex.events import Ending, Failed
from nbcodex.models import MapListener, Reply, Request
from nbcodex.notebook import identity
from nbcodex.notebook.display import cell_output
from nbcodex.notebook.display.cell_output import Screen
from nbcodex.notebook.monitor.collector import watch_of
from nbcodex.rendering import formats
from nbcodex.requests.handle import Handle, PendingReply, reply_or_raise
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.journal.codec import Entry
    from nbcodex.journal.journal import Journal
    from nbcodex.journal.maps import MapSummary
    from nbcodex.notebook.config import Codex
    from nbcodex.notebook.display.panel import ActionName
    from nbcodex.rendering.formats import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a request is shown.

    Parameters
    ----------
    form : Format
        What the answer stays as.
    lazily : bool
        Whether nothing is shown unless the request has to wait.
    notes : collection of str
        What is said beside the figures.
    heading : str
        What stands above the answer, where the prompt does not.
    """

    form: Format = "markdown"
    lazily: bool = False
    notes: Collection[str] = ()
    heading: str = ""


PLAIN = View()


class Session:
    """What a shell and its settings mean for requests."""

    def __init__(self, shell: InteractiveShell, config: Codex) -> None:
        self.shell, self.config = shell, config
        self._pid = os.getpid()
        host.current.settings = config.settings
        host.current.follow = self._follow
        host.current.notebook = partial(identity.notebook_id, shell)
        host.current.origin = partial(identity.current_origin, shell)
        host.current.watch = self.watcher
        host.current.confirm = _confirmed
        self.settings: Settings = config.settings()
        watch_of(current())

    @property
    def notebook(self) -> str:
        """The notebook that entries of the journal belong to."""
        return identity.notebook_id(self.shell)

    @property
    def journal(self) -> Journal:
        """The journal in force."""
        return current().journal(self.settings)

    def unfinished(self) -> list[Entry]:
        """Return what is parked or abandoned in this notebook."""
        return self.journal.resumable_entries(notebook=self.notebook)

    def unfinished_maps(self) -> list[MapSummary]:
        """Return the maps of this notebook with parked or abandoned rows."""
        return self.journal.maps.unfinished(notebook=self.notebook)

    def answer(self, handle: Handle, view: View = PLAIN, *, kept: str = "") -> Reply:
        """Follow a request below the cell, bind its variable, and return the reply or raise.

        `kept` is the text of an earlier try, which a reply that ends without a word leaves.
        """

        def then(reply: Reply) -> None:
            wordless = kept and not reply.text and reply.status != "done"
            value = replace(reply, text=kept) if wordless else reply
            self.bind(handle.request.origin.variable, value)

        ending = self._shown(handle, self._screen(handle, view), then=then)
        return reply_or_raise(ending, handle.request)

    def insert_code(self, reply: Reply, view: View) -> None:
        """Put the code of an answer, where that was asked for, into a new cell; it is not run.

        Only the thread that runs the cell may: from another, it lands below any cell.
        """
        if view.form in {"code", "fix"} and (blocks := formats.extract_code(reply.text)):
            self.shell.set_next_input(blocks[0], replace=False)

    def answer_later(self, handle: Handle, view: View = PLAIN) -> None:
        """Let a request go its way while other cells run; its answer lands in this cell."""
        pending, name = PendingReply(handle), handle.request.origin.variable
        if name:
            self.shell.user_ns[name] = pending
        self.config.last = pending
        screen = self._screen(handle, view, later=True)
        screen.open()
        then = partial(self._settle, name, pending)
        following = partial(self._shown, handle, screen, then=then)
        handle.start()
        threading.Thread(target=following, name=f"codex-{pending.id}", daemon=True).start()
        handle.wait_until_committed()

    def rehearse(self, request: Request, notes: Collection[str] = ()) -> None:
        """Tell what a request would come to; nothing is sent."""
        here, client = event_loop.shared(), current()
        model, estimate = here.submit(client.estimate(request, self.settings)).result()
        base_url = client.services().api_client.endpoint(request, self.settings).base_url
        tokens = estimate.input_tokens + estimate.output_tokens
        budgets = client.budget_outlook(self.settings, base_url, tokens=tokens, cost=estimate.cost)
        told = [
            shorten(model or "", 80),
            str(estimate),
            "" if estimate.cost else "cost unknown",
            *here.submit(budgets).result(),
            *notes,
        ]
        print(f"Dry run, nothing was sent: {' · '.join(filter(None, told))}")  # noqa: T201 - its answer

    def watcher(self, *, preview: Callable[[bool], str] = lambda _: "") -> MapListener:
        """Return who shows below the cell how far a map has come."""
        if os.getpid() != self._pid:
            return lambda _: None  # a forked child has no display
        from nbcodex.notebook.display import map_output

        place = map_output.place(self.shell, self.settings.display)
        return map_output.Chart(place, current().clock, preview=preview, news=self._news)

    def bind(self, name: str | None, value: object) -> None:
        """Give a variable of the notebook a value, which is the cell's as well."""
        if name:
            self.shell.user_ns[name] = value
        if isinstance(value, Reply):
            self.config.last = value
        self.shell.user_ns["Out"][identity.cell_number(self.shell)] = value

    def _settle(self, name: str | None, pending: PendingReply, reply: Reply) -> None:
        # The variable may have been given another value meanwhile, which is then kept.
        if name and self.shell.user_ns.get(name) is pending:
            self.shell.user_ns[name] = reply

    def _follow(self, handle: Handle) -> Ending:
        """Wait for what `nbcodex.ask` asked."""
        if os.getpid() != self._pid:
            return handle.follow()  # a forked child has no display
        return self._shown(handle, self._screen(handle, View(lazily=True)))

    def _shown(
        self, handle: Handle, screen: Screen, *, then: Callable[[Reply], None] = lambda _: None
    ) -> Ending:
        """Follow a request on a screen, and leave the answer there, come what may."""
        stopped: Stopped | None = None
        try:
            ending = handle.follow(screen.paint, tick=lambda: screen.tick)
        except Stopped as error:
            stopped = error
            reply = error.reply
        else:
            reply = None if _never_ours(ending) else ending.reply

        def leave() -> None:
            self._note_the_journal(screen)
            screen.close()
            if reply is not None:
                then(reply)

        struck = _surely(leave)
        if stopped is not None or struck:
            raise stopped or Stopped("Stopped, when the request had just ended.", reply=reply)
        return ending

    def _note_the_journal(self, screen: Screen) -> None:
        """Say what the user has to know of the journal."""
        if told := self._news():
            screen.note(told)

    def _news(self) -> str:
        """Return what cannot be kept, or once, that prompts are kept at all."""
        news, current().notices = current().notices, ""
        return self.journal.problem or news

    def _screen(self, handle: Handle, view: View, *, later: bool = False) -> Screen:
        orders: dict[ActionName, Callable[[], None]] = {
            "cancel": handle.cancel,
            "retry": handle.retry_now,
            "park": handle.park,
        }
        place = cell_output.place(
            self.shell,
            current().clock,
            choice=self.settings.display,
            on_action=lambda action: orders[cast("ActionName", action)](),
            offers=tuple(orders),
            heading=view.heading,
            later=later,
        )
        return Screen(
            place,
            form=view.form,
            lazily=view.lazily,
            remote_images=self.settings.remote_images,
            notes=view.notes,
            heading=view.heading,
            began=current().clock.now(),
            later=later,
        )


def _confirmed(question: str) -> bool | None:
    """Ask the user; None where the front end cannot."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
    except Exception:  # whatever a front end without an input line has for it
        return None


def _never_ours(ending: Ending) -> bool:
    """Whether another took the request up, so that nothing here is to lose its value to it."""
    return isinstance(ending, Failed) and isinstance(ending.error, EntryError)


def _surely(deed: Callable[[], None]) -> bool:
    """Do it, again and again if interrupts strike; return whether one did."""
    struck = False
    while True:
        try:
            deed()
        except KeyboardInterrupt:
            struck = True
        else:
            return struck
