"""Words about what was asked: the journal, and taking up, ending and erasing what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from nbcodex.client import current
from nbcodex.errors import NbcodexError, Stopped, render, shorten
from nbcodex.journal.entry import not_resumable
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_runner import MapRunner, active_runners
from nbcodex.notebook import identity, map_cells
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.session import View
from nbcodex.rendering.figures import figures_line
from nbcodex.rendering.html import printable
from nbcodex.requests.handle import Handle
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_time

if TYPE_CHECKING:
    from nbcodex.journal.codec import Entry
    from nbcodex.mapping.map_run import EndAction
    from nbcodex.models import Request

LISTED = 20
"""Entries that the journal's list shows."""

PUTTING_AWAY = 3.0
"""Seconds that a command waits for a map of another thread to be put away."""


class Entries(CommandGroup):
    """What was asked."""

    def journal(self, id: str = "") -> None:  # noqa: A002 - as the user types it
        """List what was asked, newest first; with an ID, tell all of one: journal [ID]."""
        if id and (rows := map_cells.rows_of(self._session, id)):
            for row in rows:
                print_line(_line(row, current().clock.wall()))
            return
        if id:
            print_line(_whole(self._session.journal.find_entry(id)))
            return
        entries = self._session.journal.recent_entries(LISTED)
        now = current().clock.wall()
        for entry in entries:
            batch = entry.request.origin.map_id
            print_line(
                map_cells.line(self._session, batch, entry, now) if batch else _line(entry, now)
            )
        if len(entries) == LISTED:
            print_line(
                f"The newest {LISTED}; `%codex journal ID` tells all of one, however old it is."
            )
        if not entries:
            print_line("The journal is empty.")
        if trouble := self._session.journal.problem:
            print_line(trouble)

    def resume(self, which: str = "all", *flags: str) -> None:
        """Go on with what is parked or abandoned: resume [ID|all] [--everywhere] [--at-reset]."""
        flags = (which, *flags) if which.startswith("--") else flags
        if unknown := set(flags) - {"--everywhere", "--at-reset"}:
            raise UsageError(f"%codex resume: there is no option {unknown.pop()}")
        journal, maps, later = self._session.journal, 0, "--at-reset" in flags
        if which == "all" or which.startswith("--"):
            here = None if "--everywhere" in flags else self._session.notebook
            entries = journal.resumable_entries(notebook=here)
            maps = map_cells.all_resumed(self._session, here, alone=not entries, later=later)
        elif later and map_cells.rows_of(self._session, which):
            raise UsageError(f"%codex resume: {map_cells.NOT_LATER}")
        elif map_cells.resumed(self._session, which):
            return
        else:
            entries = [journal.find_entry(which)]
            if not entries[0].resumable:
                raise not_resumable(entries[0].id)
        if not (entries or maps):
            print_line("Nothing is parked or abandoned here.")
            if journal.problem:  # and so nobody knows what the file holds
                print_line(journal.problem)
        handles = [self._taken_up(entry, later=later) for entry in entries]
        for number, (entry, handle) in enumerate(zip(entries, handles, strict=True)):
            view = _view(entry.request, f"{entry.id} · {shorten(entry.request.prompt, 60)}")
            if later:
                self._session.answer_later(handle, view)
                continue
            try:
                self._session.answer(handle, view, kept=entry.reply.text)
            except Stopped:
                for other in handles[number:]:
                    other.stop()
                raise
            except NbcodexError as error:
                if len(handles) == 1:
                    raise
                print_line("\n".join(render(error.title, error.message, error.advice)))

    def _taken_up(self, entry: Entry, *, later: bool) -> Handle:
        """Return a handle on its way: at once, or when the limit that it waits for resets."""
        if entry.possibly_paid:
            when = "when its kernel died" if entry.abandoned else "when it ended"
            print_line(f"{entry.id} was under way {when}: it may be paid twice.")
        until = entry.resume_at if later else None
        handle = current().resume(entry, self._settings, not_before=until)
        handle.start()
        return handle

    def retry(self, id: str) -> None:  # noqa: A002
        """Ask the same again, as a new request: retry ID."""
        request = self._session.journal.find_entry(id).request
        variable = request.origin.variable
        again = current().copy_request(
            request, origin=identity.current_origin(self._session.shell, variable=variable)
        )
        handle = current().handle(again, self._settings)
        self._session.answer(handle, _view(request, shorten(request.prompt, 60)))

    def cancel(self, id: str = "all") -> None:  # noqa: A002
        """End what is under way in this kernel, or a map at the Batch API: cancel [ID|all]."""
        under_way = any(_named(id))
        if (
            not under_way
            and id.startswith("m")
            and map_cells.resumed(self._session, id, ending=True)
        ):
            return
        for runner in self._order("cancel", id):
            if runner.ended and runner.run.origin.engine == "batch":
                map_cells.resumed(self._session, runner.run.id, ending=True)

    def park(self, id: str = "all") -> None:  # noqa: A002
        """Keep requests that are under way, or a map, for later: park [ID|all]."""
        self._order("park", id)

    def _order(self, what: EndAction, id_: str) -> list[MapRunner]:
        """End what an id means, and tell it; return the maps among it."""
        maps, alone = _named(id_)
        found = [runner.run.id for runner in maps] + [h.request.id for h in alone]
        if not found:
            raise NbcodexError(
                "No such request is under way in this kernel."
                if id_ != "all"
                else "Nothing is under way in this kernel.",
                advice="`%codex journal` lists them.",
            )
        if id_ != "all" and len(found) > 1:
            raise NbcodexError(
                f"{id_[:40]!r} may be {', '.join(found)}.", advice="Give more of the id."
            )
        for runner in maps:
            runner.end(what)
        for handle in alone:
            handle.end(what)
        for runner in maps:
            runner.wait_ended(timeout=PUTTING_AWAY)
            print_line(map_runner.describe_outcome(runner.run, runner.end_action or what))
        for handle in alone:
            print_line(f"{handle.request.id}: {handle.wait().reply.status}")
        return maps

    def forget(self, id: str) -> None:  # noqa: A002
        """Erase an entry, or the whole journal, for good: forget ID|all."""
        erased = event_loop.shared().submit(
            self._session.journal.delete(None if id == "all" else id)
        )
        print_line(f"{erased.result()} erased.")


def _named(id_: str) -> tuple[list[MapRunner], list[Handle]]:
    """Return the maps under way that `id_` names, or begins, and requests that are not of these."""
    maps = [each for each in active_runners() if id_ == "all" or each.run.id.startswith(id_)]
    rows_of = {runner.run.id for runner in maps}
    live = [
        each for each in current().active_handles() if each.request.origin.map_id not in rows_of
    ]
    alone = [each for each in live if id_ == "all" or each.request.id.startswith(id_)]
    return maps, [each for each in alone if each.request.id == id_] or alone


def _view(request: Request, heading: str) -> View:
    """Return how an answer of the journal is shown: of formats, it knows JSON alone."""
    return View(form="json" if request.schema else "markdown", heading=heading)


def _line(entry: Entry, now: float) -> str:
    state = "abandoned" if entry.abandoned else entry.status
    when = format_time(entry.added_at, now=now)
    until = f" (can go at {format_time(entry.resume_at, now=now)})" if entry.resume_at else ""
    doubt = f" ({entry.price_uncertainty})" if entry.price_uncertainty else ""
    return f"{entry.id}  {state:<11} {when:<16} {shorten(entry.request.prompt, 60)}{until}{doubt}"


def _whole(entry: Entry) -> str:
    told = [
        f"{entry.id}: {'abandoned' if entry.abandoned else entry.status}",
        f"{entry.price_uncertainty}: it was sent, and what became of it is not known"
        if entry.price_uncertainty
        else "",
        f"notebook: {entry.notebook}" if entry.notebook else "",
        f"variable: {entry.variable}" if entry.variable else "",
        f"\n{printable(entry.request.prompt)}\n",
        printable(entry.reply.text),
        f"\n{figures_line(entry.reply)}",
        entry.error or "",
    ]
    return "\n".join(filter(None, told))
