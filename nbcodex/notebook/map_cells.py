"""Maps in a notebook: `%%codex --map NAME`, going on with one, and how the journal lists one.

Owns what such a cell binds and shows when it has ended. Must not know how rows are answered.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbcodex.errors import EntryError, NbcodexError, render, shorten
from nbcodex.mapping import map_runner
from nbcodex.mapping.estimate import Estimate
from nbcodex.mapping.map_api import MapOptions, describe_unknown_rows, prepare_map, resume_map
from nbcodex.mapping.map_run import MapRun
from nbcodex.mapping.map_runner import active_runners
from nbcodex.notebook import options as cell_options
from nbcodex.notebook.commands.base import print_line
from nbcodex.notebook.variables import images_of
from nbcodex.rendering.html import printable
from nbcodex.rendering.markdown import escape_inline
from nbcodex.runtime.clock import format_time

if TYPE_CHECKING:
    from nbcodex.journal.codec import Entry
    from nbcodex.notebook.session import Session

ROWS, WIDTH = 5, 120
"""How many answers a cell shows of its map, and how much of each."""

NOT_LATER = "--at-reset does not go with a map, which waits for its limits as it goes on"

_OF_A_CELL = ("background", "raw", "eval", "format", "thread", "new")
"""What is said of one prompt and its answer: a map is no conversation, and shows a table."""


def ask(session: Session, chosen: Namespace, template: str) -> None:
    """Ask a cell's template for each row of the variable that ``--map`` names.

    Raises
    ------
    UsageError
        If there is no such variable, or an option does not go with it.
    """
    for option in _OF_A_CELL:
        if getattr(chosen, option):
            raise UsageError(f"%%codex: --{option} does not go with --map")
    names = session.shell.user_ns
    if chosen.map not in names:
        raise UsageError(f"%%codex: --map {chosen.map}: there is no such variable")
    output = cell_options.output_spec(chosen, names)
    options = {
        name: value or None for name, value in cell_options.request_options(chosen, output).items()
    }
    options["images"] = images_of(chosen.image, session.shell)
    dry_run = getattr(chosen, "dry_run", False)
    map_options = MapOptions(dry_run=dry_run, request=options)
    made = prepare_map(template, names[chosen.map], map_options, variable=chosen.out)
    if isinstance(made, Estimate):
        print_line(str(made))
        return
    go_through(session, made)


def go_through(session: Session, run: MapRun) -> None:
    """Go through a map below the cell and bind its variable, with what there is if it stops."""
    replies: list[Any] = []
    run.on_stats = session.map_listener(preview=partial(table, run, replies))
    try:
        if run.keeps_replies:
            map_runner.run_map(run)
        else:
            replies.extend(map_runner.stream_map(run))
    finally:
        session.assign(run.origin.variable, run.result if run.keeps_replies else replies)


def table(run: MapRun, replies: list[Any], as_text: bool) -> str:
    """Return the first answers, as plain text or as a Markdown table."""
    found = run.replies_in_order() if run.keeps_replies else replies
    rows = [
        (str(number), shorten(reply.text if reply else f"({reply.error or reply.status})", WIDTH))
        for number, reply in enumerate(found[:ROWS])
    ]
    if len(found) > ROWS:
        rows.append(("…", f"{len(found) - ROWS:,} more"))
    if as_text or not rows:
        return "\n".join(f"{number}  {printable(text)}" for number, text in rows)
    lines = [f"| {number} | {escape_inline(text)} |" for number, text in rows]
    return "\n".join(["| row | answer |", "| --- | --- |", *lines])


def resumed(session: Session, which: str, *, ending: bool = False) -> bool:
    """Go on with the map that `which` names; return whether there is one.

    With `ending`, what is with a provider is ended there, and what it has answered is fetched.
    """
    run = resume_map(which, cancel_jobs=ending)
    if run is None:
        return False
    go_through(session, run)
    if told := describe_unknown_rows(run):
        print_line(f"{run.id}: {told}")
    if not run.origin.variable:
        print_line("nbcodex.map.last.result holds the result.")
    return True


def all_resumed(
    session: Session, notebook: str | None, *, alone: bool = False, later: bool = False
) -> int:
    """Go on with all maps of a notebook, or of all, that are not finished; return how many.

    One that cannot go on is told of, and the next one goes on. With `later` none does: a map that
    goes on waits for its limits by itself.

    Raises
    ------
    NbcodexError
        If the only one cannot go on, and it is `alone`: nothing else is to be gone on with.
    """
    going = {runner.run.id for runner in active_runners()}
    batches = session.journal.maps.unfinished(notebook=notebook)
    unfinished = [batch.id for batch in batches if batch.id not in going]
    for batch in unfinished:
        if later:
            print_line(f"{batch} is left: {NOT_LATER}. `%codex resume {batch}` goes on with it.")
            continue
        try:
            resumed(session, batch)
        except NbcodexError as error:
            if alone and len(unfinished) == 1:
                raise
            print_line("\n".join(render(f"{batch}: {error.title}", error.message, error.advice)))
    return len(unfinished)


def line(session: Session, batch: str, entry: Entry, now: float) -> str:
    """Return the line of the journal's list that stands for all rows of a map."""
    counts = session.journal.maps.summary(batch).counts
    told = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    if (of := entry.request.origin.row_count or 0) > counts.total():
        told += f" of {of:,} rows"
    when = format_time(entry.added_at, now=now)
    return f"{batch} map: {told}  {when}  {shorten(entry.request.prompt, 40)}"


def rows_of(session: Session, which: str) -> list[Entry]:
    """Return the rows of the map that `which` names; none where it names none."""
    batches = session.journal.maps
    try:
        batch = batches.find_id(which)
    except EntryError:
        return []
    return batches.entries(batch) if batch else []
