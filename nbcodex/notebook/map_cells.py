"""Maps in a notebook: `%%codex --map NAME`, resuming maps, and how the journal lists one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

from IPython.core.error import UsageError

from nbcodex.api import keep_run
from nbcodex.errors import EntryError, NbcodexError, shorten
from nbcodex.journal.reads import Entry
from nbcodex.mapping import map_runner
from nbcodex.mapping.estimate import Estimate
from nbcodex.mapping.map_api import describe_unstored_rows, prepare_map, resume_map
from nbcodex.mapping.map_run import MapRun
from nbcodex.mapping.map_runner import active_runners
from nbcodex.notebook import cell_options
from nbcodex.notebook.session import Session
from nbcodex.notebook.variables import images_of, user_variables
from nbcodex.rendering.html import printable
from nbcodex.rendering.markdown import escape_inline
from nbcodex.runtime.clock import format_time

# A cell shows the beginnings of the first answers, since its variable has all of them.
PREVIEW_ROWS = 5
PREVIEW_CHARS = 120

# `%codex resume --at-reset` sends each request when the limit that it was parked for has reset.
NOT_AT_RESET = "--at-reset cannot be used with a map, which waits for its limits while it runs"

# Options for the display of one answer, and for a conversation, which a map does not have.
_ONE_PROMPT_OPTIONS = ("background", "raw", "eval", "format", "thread", "new")


def run_map_cell(session: Session, args: Namespace, cell: str) -> None:
    """Send a cell, which is a template, for each row of the variable that ``--map`` names."""
    cell_options.fill_options(args, user_variables(session.shell, session.caller_scope))
    for option in _ONE_PROMPT_OPTIONS:
        if getattr(args, option):
            raise UsageError(f"%%codex: --{option} cannot be used with --map")
    # With the variables of IPython's startup files, which `user_variables` leaves out.
    names = {**session.shell.user_ns, **session.caller_scope.names}
    if args.map not in names:
        raise UsageError(f"%%codex: --map {args.map}: there is no such variable")
    options, _format = cell_options.request_options(args, names)
    options = replace(options, images=images_of(args.image, session.shell, session.caller_scope))
    prepared = prepare_map(
        cell.removesuffix("\n"),
        names[args.map],
        options,
        settings=session.settings,
        origin=session.new_origin(args.out),
        dry_run=args.dry_run,
    )
    if isinstance(prepared, Estimate):
        print(str(prepared))
    else:
        _run(session, prepared)


def _run(session: Session, run: MapRun) -> None:
    """Run a map below the cell and assign its variable; if it ends early, with what there is."""
    # A map over an iterator yields its replies, any other map keeps them and yields none.
    replies: list[Any] = []
    # For `nbcodex.map.last` and `nbcodex.map.recent`.
    keep_run(run, session.map_listener(preview=partial(_preview, run, replies)))
    try:
        replies.extend(map_runner.stream_map(run))
    finally:
        session.assign(run.origin.variable, run.result if run.keeps_replies else replies)


def _preview(run: MapRun, replies: list[Any]) -> tuple[str, str]:
    """Return the first answers as plain text and as a Markdown table, both empty without rows."""
    found = run.replies_in_order() if run.keeps_replies else replies
    rows = []
    for number, reply in enumerate(found[:PREVIEW_ROWS]):
        text = reply.text if reply else f"({reply.error or reply.status})"  # true if complete
        rows.append((str(number), shorten(text, PREVIEW_CHARS)))
    if len(found) > PREVIEW_ROWS:
        rows.append(("…", f"{len(found) - PREVIEW_ROWS:,} more"))
    lines = [f"{number}  {printable(text)}" for number, text in rows]
    head = ["| row | answer |", "| --- | --- |"] if rows else []
    table = [*head, *(f"| {number} | {escape_inline(text)} |" for number, text in rows)]
    return "\n".join(lines), "\n".join(table)


def resume_one(
    session: Session, id_or_prefix: str, *, any_server: bool = False, cancel_jobs: bool = False
) -> bool:
    """Resume a map as `resume_map` does, and show it; return whether there is one with this id."""
    run = resume_map(id_or_prefix, any_server=any_server, cancel_jobs=cancel_jobs)
    if run is None:
        return False
    _run(session, run)
    if unstored_rows := describe_unstored_rows(run):  # they never reached the journal
        print(f"{run.id}: {unstored_rows}")
    if not run.origin.variable:
        print(f"nbcodex.map.recent[{run.id!r}].result holds the result.")
    return True


def resume_all(
    session: Session, notebook: str | None, *, at_reset: bool = False, any_server: bool = False
) -> tuple[int, NbcodexError | None]:
    """Resume a notebook's maps, or all; return their number, and an error that names the failed."""
    # A map that is running in this kernel has parked rows in the journal, too.
    running = {runner.run.id for runner in active_runners()}
    unfinished = session.journal.maps.unfinished(notebook=notebook)
    ids = [map_id for map_id in unfinished if map_id not in running]
    failed_ids: dict[str, list[str]] = {}  # by the message of their error
    last_error = None
    for map_id in ids:
        if at_reset:
            print(f"{map_id} was not resumed: {NOT_AT_RESET}. `%codex resume {map_id}` resumes it.")
            continue
        try:
            resume_one(session, map_id, any_server=any_server)
        except NbcodexError as error:  # which must not keep the others from being resumed
            last_error = error
            failed_ids.setdefault(error.message, []).append(map_id)
    count = sum(map(len, failed_ids.values()))
    if count > 1:
        reasons = [f"{why} ({', '.join(names)})" for why, names in failed_ids.items()]
        text = f"{count} of {len(ids)} maps are not finished: {'; '.join(reasons)}"
        last_error = NbcodexError(text, advice="`%codex resume ID` continues one of them.")
    return len(ids), last_error


def journal_line(session: Session, map_id: str, entry: Entry, now: float) -> str:
    """Return the line that lists a map in the journal; `entry` is that of one of its rows."""
    counts = session.journal.maps.count_rows(map_id)
    rows = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    # Rows that were never started may have no entry.
    total = entry.request.origin.row_count or 0
    of = f" of {total:,} rows" if total > counts.total() else ""
    when = format_time(entry.added_at, now=now)
    # In the columns of commands/entries.py, where the id of a request has twelve characters.
    return f"{map_id:<12}  {'map':<11} {when:<16} {shorten(entry.request.prompt, 40)}: {rows}{of}"


def find_rows(session: Session, id_or_prefix: str) -> list[Entry]:
    """Return the rows of a map; none if there is no map of that id."""
    maps = session.journal.maps
    try:
        map_id = maps.find_id(id_or_prefix)
    except EntryError:
        return []
    return maps.entries(map_id) if map_id else []
