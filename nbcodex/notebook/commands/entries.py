"""Commands about requests and maps: list, resume, repeat, end and delete them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from nbcodex import host
from nbcodex.client import current
from nbcodex.errors import EntryError, NbcodexError, Stopped, render, shorten
from nbcodex.journal.entry import not_resumable
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_runner import MapRunner, active_runners
from nbcodex.models import match_prefix
from nbcodex.notebook import identity, map_cells
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.session import View
from nbcodex.rendering.figures import figures_line
from nbcodex.rendering.html import printable
from nbcodex.requests.handle import Handle
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_time

if TYPE_CHECKING:
    from nbcodex.events import EndAction
    from nbcodex.journal.codec import Entry
    from nbcodex.journal.journal import Journal
    from nbcodex.models import Request

LISTED_ENTRIES = 20
MAP_END_TIMEOUT_S = 3.0  # how long a command waits until another thread has ended its map


class RequestCommands(CommandGroup):
    """Requests and maps."""

    def journal(self, id: str = "") -> None:  # noqa: A002 - as the user types it
        """List the requests, newest first, or show one in full: journal [ID]."""
        journal, now = self._session.journal, current().clock.wall()
        if id and (rows := map_cells.rows_of(self._session, id)):
            for row in rows:
                print_line(_entry_line(row, now))
            return
        if id:
            print_line(_full_entry(journal.find_entry(id)))
            return
        entries = journal.recent_entries(LISTED_ENTRIES)
        for entry in entries:
            if map_id := entry.request.origin.map_id:
                print_line(map_cells.journal_line(self._session, map_id, entry, now))
            else:
                print_line(_entry_line(entry, now))
        if len(entries) == LISTED_ENTRIES:
            print_line(
                f"These are the newest {LISTED_ENTRIES}; `%codex journal ID` shows any entry."
            )
        if not entries:
            print_line("The journal is empty.")
        if journal.problem:
            print_line(journal.problem)

    def resume(self, which: str = "all", *flags: str) -> None:
        """Resume parked and abandoned requests: resume [ID|all] [--everywhere] [--at-reset]."""
        flags = (which, *flags) if which.startswith("--") else flags
        if unknown := set(flags) - {"--everywhere", "--at-reset"}:
            raise UsageError(f"%codex resume: there is no option {unknown.pop()}")
        journal, maps, at_reset = self._session.journal, 0, "--at-reset" in flags
        if which == "all" or which.startswith("--"):
            notebook = None if "--everywhere" in flags else self._session.notebook
            entries = journal.resumable_entries(notebook=notebook)
            maps = map_cells.resume_all(
                self._session, notebook, only_maps=not entries, at_reset=at_reset
            )
        elif at_reset and map_cells.rows_of(self._session, which):
            raise UsageError(f"%codex resume: {map_cells.NOT_AT_RESET}")
        elif map_cells.resume_one(self._session, which):
            return
        else:
            entries = [journal.find_entry(which)]
            if not entries[0].resumable:
                raise not_resumable(entries[0].id)
        if not (entries or maps):
            print_line("Nothing is parked or abandoned here.")
            if journal.problem:  # then entries may exist that could not be read
                print_line(journal.problem)
        # All are started before the first is shown: they queue together, oldest first.
        handles = [self._start_again(entry, at_reset=at_reset) for entry in entries]
        for number, (entry, handle) in enumerate(zip(entries, handles, strict=True)):
            view = _view(entry.request, f"{entry.id} · {shorten(entry.request.prompt, 60)}")
            if at_reset:
                self._session.answer_in_background(handle, view)
                continue
            try:
                self._session.show_answer(handle, view, earlier_text=entry.reply.text)
            except Stopped:
                # Stop means all of them: the following cells must not find them running.
                for other in handles[number:]:
                    other.end("stop")
                raise
            except NbcodexError as error:
                # Of several, a failed one must not keep the others' answers from being shown.
                if len(handles) == 1:
                    raise
                print_line("\n".join(render(error.title, error.message, error.advice)))

    def _start_again(self, entry: Entry, *, at_reset: bool) -> Handle:
        """Start an entry's request now, or when the limit that it waits for resets."""
        if entry.possibly_paid:
            when = "when its kernel died" if entry.abandoned else "when it ended"
            print_line(f"{entry.id} was running {when}: it may be paid twice.")
        handle = current().resume(
            entry, self._settings, not_before=entry.resume_at if at_reset else None
        )
        handle.start()
        return handle

    def retry(self, id: str) -> None:  # noqa: A002
        """Send the same prompt again, as a new request: retry ID."""
        request = self._session.journal.find_entry(id).request
        origin = identity.current_origin(self._session.shell, variable=request.origin.variable)
        handle = current().handle(current().copy_request(request, origin=origin), self._settings)
        self._session.show_answer(handle, _view(request, shorten(request.prompt, 60)))

    def cancel(self, id: str = "all") -> None:  # noqa: A002
        """Cancel running requests of this kernel, or a map at the Batch API: cancel [ID|all]."""
        is_running = any(_running(id))
        # A map whose rows are at the provider is not running here, but can be cancelled there.
        is_map = not is_running and id.startswith("m")
        if is_map and map_cells.resume_one(self._session, id, cancel_jobs=True):
            return
        for runner in self._end("cancel", id):
            if runner.ended and runner.run.origin.engine == "batch":
                map_cells.resume_one(self._session, runner.run.id, cancel_jobs=True)

    def park(self, id: str = "all") -> None:  # noqa: A002
        """Park running requests or a map, to resume them later: park [ID|all]."""
        self._end("park", id)

    def _end(self, action: EndAction, prefix: str) -> list[MapRunner]:
        """Cancel or park what an id names, print the outcomes, and return the maps among it."""
        maps, handles = _running(prefix)
        found = [runner.run.id for runner in maps] + [h.request.id for h in handles]
        if not found:
            what = "Nothing" if prefix == "all" else f"No request {prefix[:40]!r}"
            raise NbcodexError(
                f"{what} is running in this kernel.", advice="`%codex journal` lists requests."
            )
        if prefix != "all" and len(found) > 1:
            raise NbcodexError(
                f"{prefix[:40]!r} may be {', '.join(found)}.", advice="Type more of the id."
            )
        for runner in maps:
            runner.end(action)
        # All are ended before any is waited for, so that ending takes as long as the slowest.
        for handle in handles:
            handle.end(action)
        for runner in maps:
            runner.wait_ended(timeout=MAP_END_TIMEOUT_S)
            print_line(map_runner.describe_outcome(runner.run))
        for handle in handles:
            print_line(f"{handle.request.id}: {handle.wait().reply.status}")
        return maps

    def forget(self, id: str) -> None:  # noqa: A002
        """Delete an entry, or the whole journal, permanently: forget ID|all."""
        # What is on disk counts as kept even while the journal is off, or the demo on.
        journals = [self._session.journal]
        on_disk = current().journal_on_disk(self._settings)
        if on_disk is not None and on_disk is not journals[0]:
            journals.append(on_disk)
        if id != "all":
            print_line(f"{_erase_one(journals, id)} erased.")
            return
        places = [
            f"{_count(journal.count_entries())} {journal.place}"
            for journal in journals
            if journal is on_disk or journal.count_entries()
        ]
        where = " and ".join(places) or f"0 requests {journals[0].place}"
        # A front end without an input line cannot be asked; the command itself says "all".
        if host.current.confirm(f"Erase {where}, permanently?") is False:
            print_line("Nothing was erased.")
            return
        erased = sum(event_loop.shared().submit(each.delete()).result() for each in journals)
        print_line(f"{erased} erased: {where}.")


def _erase_one(journals: list[Journal], prefix: str) -> int:
    """Erase the entry or map that a prefix names in the first journal that has it."""
    for journal in journals[:-1]:
        with contextlib.suppress(EntryError):
            return event_loop.shared().submit(journal.delete(prefix)).result()
    return event_loop.shared().submit(journals[-1].delete(prefix)).result()


def _count(requests: int) -> str:
    return f"{requests:,} request{'s' * (requests != 1)}"


def _running(prefix: str) -> tuple[list[MapRunner], list[Handle]]:
    """Return the running maps, and the requests outside of these, whose id has a prefix."""
    everything = prefix == "all"
    maps = {runner.run.id: runner for runner in active_runners()}
    named_maps = list(maps) if everything else match_prefix(prefix, maps)
    handles = {
        handle.request.id: handle
        for handle in current().active_handles()
        # The rows of a map that is ended as a whole are ended with it.
        if handle.request.origin.map_id not in named_maps
    }
    named = list(handles) if everything else match_prefix(prefix, handles)
    return [maps[name] for name in named_maps], [handles[name] for name in named]


def _view(request: Request, heading: str) -> View:
    # The journal does not keep the format, but a schema implies JSON.
    return View(format="json" if request.schema else "markdown", heading=heading)


def _entry_line(entry: Entry, now: float) -> str:
    state = "abandoned" if entry.abandoned else entry.status
    when = format_time(entry.added_at, now=now)
    until = f" (can be sent at {format_time(entry.resume_at, now=now)})" if entry.resume_at else ""
    note = f" ({entry.price_uncertainty})" if entry.price_uncertainty else ""
    return f"{entry.id}  {state:<11} {when:<16} {shorten(entry.request.prompt, 60)}{until}{note}"


def _full_entry(entry: Entry) -> str:
    uncertainty = entry.price_uncertainty
    lines = [
        f"{entry.id}: {'abandoned' if entry.abandoned else entry.status}",
        f"{uncertainty}: it was sent, but its outcome is unknown" if uncertainty else "",
        f"notebook: {entry.notebook}" if entry.notebook else "",
        f"variable: {entry.variable}" if entry.variable else "",
        f"\n{printable(entry.request.prompt)}\n",
        printable(entry.reply.text),
        f"\n{figures_line(entry.reply)}",
        entry.error or "",
    ]
    return "\n".join(filter(None, lines))
