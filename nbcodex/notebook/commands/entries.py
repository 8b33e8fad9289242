"""Commands about requests and maps, about conversations, and about the code in answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex import host
from nbcodex.client import get_client
from nbcodex.errors import EntryError, EntryNotFoundError, NbcodexError, Stopped, render, shorten
from nbcodex.events import EndAction
from nbcodex.journal.journal import Journal
from nbcodex.journal.owner import ACTIVE_STATUSES
from nbcodex.journal.reads import Entry
from nbcodex.mapping import map_runner, upload
from nbcodex.mapping.map_runner import MapRunner, active_runners
from nbcodex.models import Request, match_prefix, new_id
from nbcodex.notebook import map_cells
from nbcodex.notebook.display import OutputOptions
from nbcodex.notebook.session import Session
from nbcodex.openai_api import pricing
from nbcodex.openai_api.endpoints import check_server
from nbcodex.rendering import formats, html
from nbcodex.rendering.figures import figures_line
from nbcodex.requests.conversation import MAIN_THREAD
from nbcodex.requests.entry_writer import not_resumable
from nbcodex.requests.handle import Handle
from nbcodex.requests.options import build_request
from nbcodex.runtime import event_loop
from nbcodex.runtime.clock import format_time
from nbcodex.settings import DEMO_FOLDER_NAME, Settings, data_folder

MAX_LISTED_ENTRIES = 20
MAP_END_TIMEOUT_S = 3.0  # `cancel` and `park` wait no longer for a map of another thread to end
ERASE_TIMEOUT_S, MAX_PARALLEL_ERASURES = 30.0, 8  # of what the provider keeps


def show_journal(session: Session, prefix: str = "") -> None:
    """List the requests, newest first, or show one in full: journal [ID]."""
    journal, now = session.journal, get_client().clock.wall()
    if prefix and (rows := map_cells.find_rows(session, prefix)):
        print("\n".join(_entry_line(row, now) for row in rows))
        return
    if prefix:
        entry = journal.find_entry(prefix)
        origin, note = entry.request.origin, entry.cost_uncertainty
        lines = [
            f"{entry.id}: {'abandoned' if entry.abandoned else entry.status}",
            f"{note}: it was sent, but its outcome is unknown" if note else "",
            f"notebook: {origin.notebook}" if origin.notebook else "",
            f"variable: {origin.variable}" if origin.variable else "",
            f"\n{html.printable(entry.request.prompt)}\n",
            html.printable(entry.reply.text),
            f"\n{figures_line(entry.reply)}",
            entry.error or "",
        ]
        print("\n".join(filter(None, lines)))
        return
    entries = journal.recent_entries(MAX_LISTED_ENTRIES)
    for entry in entries:
        if map_id := entry.request.origin.map_id:
            print(map_cells.journal_line(session, map_id, entry, now))
        else:
            print(_entry_line(entry, now))
    if len(entries) == MAX_LISTED_ENTRIES:
        print(f"These are the newest {MAX_LISTED_ENTRIES}; `%codex journal ID` shows any entry.")
    if not entries:
        print("The journal is empty.")
    if journal.problem:
        print(journal.problem)


def resume(session: Session, prefix: str = "all", *flags: str) -> None:
    """Resume what is open: resume [ID|all] [--everywhere] [--at-reset] [--new-server]."""
    if prefix.startswith("--"):
        prefix, flags = "all", (prefix, *flags)
    if unknown := set(flags) - {"--everywhere", "--at-reset", "--new-server"}:
        raise UsageError(f"%codex resume: there is no option {unknown.pop()}")
    at_reset, any_server = "--at-reset" in flags, "--new-server" in flags
    journal, map_count, failures = session.journal, 0, dict[str, NbcodexError]()
    if prefix == "all":
        notebook = None if "--everywhere" in flags else session.notebook
        entries = journal.resumable_entries(notebook=notebook)
        map_count, error = map_cells.resume_all(
            session, notebook, at_reset=at_reset, any_server=any_server
        )
        failures = {str(error): error} if error else {}
    elif at_reset and map_cells.find_rows(session, prefix):
        raise UsageError(f"%codex resume: {map_cells.NOT_AT_RESET}")
    elif map_cells.resume_one(session, prefix, any_server=any_server):
        return
    else:
        entries = [journal.find_entry(prefix)]
        if not entries[0].resumable:
            raise not_resumable(entries[0].id)
    if not (entries or map_count):
        print("Nothing is parked or abandoned here.")
        if journal.problem:  # entries may exist that could not be read
            print(journal.problem)
    # All are started before the first is shown, so that they queue in their order, oldest first.
    handles = []
    for entry in entries:
        if entry.possibly_paid:
            when = "when its kernel died" if entry.abandoned else "when it ended"
            print(f"{entry.id} was running {when}: it may be paid twice.")
        not_before = entry.resume_at if at_reset else None
        handle = get_client().resume(
            entry, session.settings, not_before=not_before, any_server=any_server
        )
        handles.append(handle)
        handle.start()
    for index, (entry, handle) in enumerate(zip(entries, handles, strict=True)):
        heading = f"{entry.id} · {shorten(entry.request.prompt, 60)}"
        options = _output_options(entry.request, heading)
        if at_reset:
            session.answer_in_background(handle, options)
            continue
        try:
            session.show_answer(handle, options, earlier_text=entry.reply.text)
        except Stopped:
            # Stop ends all of them: cells that run later must not find them running.
            for other in handles[index:]:
                other.end("stop")
            raise
        except NbcodexError as error:
            failures.setdefault(str(error), error)  # the same failure of several is shown once
    # Failures come last, so that they do not hide the answers of the other requests.
    if failures:
        *printed, raised = failures.values()
        for failure in printed:
            print("\n".join(render(failure.title, failure.message, failure.advice)))
        raise raised


def retry(session: Session, prefix: str, flag: str = "") -> None:
    """Send the same prompt again, as a new request: retry ID [--new-server]."""
    client, request = get_client(), session.journal.find_entry(prefix).request
    if flag not in {"", "--new-server"}:
        raise UsageError(f"%codex retry: there is no option {flag}")
    if not flag:
        # Raises if the entry was written for another server.
        check_server(request, client.endpoint(request, session.settings), command="retry")
    # In its conversation, the new answer takes the position of the earlier one.
    origin = replace(session.new_origin(request.origin.variable), position=request.origin.position)
    # Without `reuse`, because another answer than the stored one is wanted.
    request = replace(
        request, id=new_id(), created_at=client.clock.wall(), origin=origin, reuse=False
    )
    handle = client.create_handle(request, session.settings)
    session.show_answer(handle, _output_options(request, shorten(request.prompt, 60)))


def cancel(session: Session, prefix: str = "all") -> None:
    """Cancel running requests of this kernel, or a map at the Batch API: cancel [ID|all]."""
    # A map (its id begins with m) may have a batch job at the provider without running here.
    is_map = prefix.startswith("m") and not any(_find_running(prefix))
    if is_map and map_cells.resume_one(session, prefix, cancel_jobs=True):
        return
    for runner in _end_running("cancel", prefix):
        if runner.ended.is_set() and runner.run.origin.engine == "batch":
            map_cells.resume_one(session, runner.run.id, cancel_jobs=True)


def park(_: Session, prefix: str = "all") -> None:
    """Park running requests or a map, to resume them later: park [ID|all]."""
    _end_running("park", prefix)


def _end_running(action: EndAction, prefix: str) -> list[MapRunner]:
    """Cancel or park the requests and maps with a prefix, print each outcome, return the maps."""
    runners, handles = _find_running(prefix)
    ids = [runner.run.id for runner in runners] + [handle.request.id for handle in handles]
    if not ids:
        subject = "Nothing" if prefix == "all" else f"No request {prefix[:40]!r}"
        raise NbcodexError(
            f"{subject} is running in this kernel.", advice="`%codex journal` lists requests."
        )
    if prefix != "all" and len(ids) > 1:
        message = f"{prefix[:40]!r} may be {', '.join(ids)}."
        raise NbcodexError(message, advice="Type more of the id.")
    for runner in runners:
        runner.end(action)
    # All end before the first is waited for: together they take only as long as the slowest.
    for handle in handles:
        handle.end(action)
    for runner in runners:
        runner.ended.wait(timeout=MAP_END_TIMEOUT_S)
        print(map_runner.describe_outcome(runner.run))
    for handle in handles:
        print(f"{handle.request.id}: {handle.wait().reply.status}")
    return runners


def forget(session: Session, prefix: str) -> None:
    """Delete an entry, or the whole journal, permanently: forget ID|all."""
    # Besides the journal in use, the user's and the demo's journals on disk are erased.
    home = data_folder(Settings.read())
    on_disk = [
        get_client().journal_on_disk(replace(session.settings, home=folder))
        for folder in (home, home / DEMO_FOLDER_NAME)
    ]
    journals = list(dict.fromkeys(filter(None, (session.journal, *on_disk))))
    if prefix != "all":
        # A prefix that is ambiguous in one journal must not erase an entry of another one.
        found: dict[Journal, list[Entry]] = {}
        for journal in journals:
            with contextlib.suppress(EntryNotFoundError):
                found[journal] = journal.durable_entries(prefix)
        if not found:
            raise EntryNotFoundError(f"No entry of the journal begins with {prefix[:40]!r}.")
        if len(found) > 1:
            places = " or ".join(each.location for each in found)  # "in FILE or in FILE"
            message = f"{prefix[:40]!r} may be an entry {places}."
            raise EntryError(message, advice="Type more of the id.")
        ((journal, durable),) = found.items()
        print(f"{event_loop.run(journal.delete(prefix))} erased.")
        _erase_remote_copies(session, [journal], durable)
        return
    counts = []
    for journal in journals:
        count = journal.count_entries()
        if count or journal is on_disk[0]:  # the user's own is named even if it is empty
            counts.append(f"{count:,} request{'s' * (count != 1)} {journal.location}")  # "in FILE"
    contents = " and ".join(counts) or f"0 requests {journals[0].location}"
    # In a front end that cannot ask, the word "all" in the command is the confirmation.
    if host.current.confirm(f"Erase {contents}, permanently?") is False:
        print("Nothing was erased.")
        return
    durable = [entry for journal in journals for entry in journal.durable_entries()]
    erased = sum(event_loop.run(journal.delete()) for journal in journals)
    print(f"{erased} erased: {contents}.")
    _erase_remote_copies(session, journals, durable)


def _erase_remote_copies(session: Session, journals: list[Journal], durable: list[Entry]) -> None:
    """Erase what the provider has of deleted entries, and print what is left, and where."""
    kept = event_loop.run(_erase_at_provider(journals, durable, session.settings))
    if (more := len(kept) - MAX_LISTED_ENTRIES) > 0:
        kept[-more:] = [f"{more:,} more such answers and jobs"]
    history = session.shell.history_manager
    if history and getattr(history, "enabled", False) and str(history.hist_file) != ":memory:":
        kept.append(f"IPython's own history in {history.hist_file}")
    print(f"Not erased: {', '.join([*kept, 'outputs in notebooks'])} (see `%codex help privacy`).")


async def _erase_at_provider(
    journals: list[Journal], durable: list[Entry], settings: Settings
) -> list[str]:
    """Erase durable answers, and files of batch jobs without rows; return what is not erased."""
    services, deadline = get_client().services(), time.monotonic() + ERASE_TIMEOUT_S

    async def erase(entry: Entry) -> str:
        request, position, client = entry.request, entry.stream_position, services.api_client
        if position is None:  # the answer is not durable, or its attempt never got an id
            return ""
        # Without its answer, a request that is running would be sent again.
        is_running = entry.status in ACTIVE_STATUSES and not entry.abandoned
        with contextlib.suppress(NbcodexError):
            check_server(request, await client.await_endpoint(request, settings))
            if not is_running and time.monotonic() < deadline:
                if not entry.reply:  # the server may still be working on it
                    await client.cancel_response(request, settings, position=position)
                if await client.delete_response(request, settings, position=position):
                    return ""
        server = request.origin.server or "its server"
        return f"the durable answer {position.response_id} at {server}"

    kept: list[str] = []
    for start in range(0, len(durable), MAX_PARALLEL_ERASURES):
        group = durable[start : start + MAX_PARALLEL_ERASURES]
        kept += filter(None, await asyncio.gather(*map(erase, group)))
    for jobs in (journal.batch_jobs for journal in journals):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ERASE_TIMEOUT_S):
                await upload.erase_leftovers(jobs, services, settings)
        for job in await jobs.unerased_jobs():  # named by the provider's id, or else by ours
            kept.append(f"files of the batch job {job.remote_id or job.tag} at {job.base_url}")
    return kept


def _find_running(prefix: str) -> tuple[list[MapRunner], list[Handle]]:
    """Return the running maps, and the requests outside of these, whose id has a prefix."""
    prefix = "" if prefix == "all" else prefix  # every id begins with the empty text
    runners = {runner.run.id: runner for runner in active_runners()}
    map_ids = match_prefix(prefix, runners)
    handles = {
        handle.request.id: handle
        for handle in get_client().active_handles()
        if handle.request.origin.map_id not in map_ids  # because a map ends its rows itself
    }
    request_ids = match_prefix(prefix, handles)
    return [runners[id_] for id_ in map_ids], [handles[id_] for id_ in request_ids]


def _output_options(request: Request, heading: str) -> OutputOptions:
    # The journal does not contain the format, but a schema implies JSON.
    return OutputOptions(format="json" if request.schema else "markdown", heading=heading)


def _entry_line(entry: Entry, now: float) -> str:
    status = "abandoned" if entry.abandoned else entry.status
    added = format_time(entry.added_at, now=now)
    until = f" (not before {format_time(entry.resume_at, now=now)})" if entry.resume_at else ""
    note = f" ({entry.cost_uncertainty})" if entry.cost_uncertainty else ""
    return f"{entry.id}  {status:<11} {added:<16} {shorten(entry.request.prompt, 60)}{until}{note}"


def insert(session: Session, number: str = "1") -> None:
    """Put a code block of the last answer into a new cell, without running it: insert [N]."""
    last = session.config.last_reply
    if last is None:
        raise NbcodexError("There is no answer yet.", advice="Ask with `%%codex -f code`.")
    if last.status == "running":
        raise NbcodexError(f"{last.id} is still running.", advice="Try again when it has finished.")
    blocks = formats.code_blocks(last)
    if not blocks:
        raise NbcodexError("The last answer contains no code.", advice="Ask with `-f code`.")
    if not number.isdecimal() or not 1 <= int(number) <= len(blocks):
        raise UsageError(f"%codex insert: a number from 1 to {len(blocks)}, not {number[:20]}")
    block = blocks[int(number) - 1]
    if block.problem:
        raise NbcodexError(
            f"The code of block {number} may be incomplete: {block.problem}.",
            advice="Copy it from the answer if you want it all the same.",
        )
    session.shell.set_next_input(block.code, replace=False)
    if block.warning:
        print(f"Read the code before you run it: {block.warning}.")
    # VS Code and Colab ignore `set_next_input`; from this output, the code can be copied.
    mime_bundle = {"text/html": html.code_listing([block.code]), "text/plain": block.code}
    display(mime_bundle, raw=True)  # type: ignore[no-untyped-call]


def fix(session: Session, cell: str = "") -> None:
    """Explain the last error and put a corrected cell below, without running it: fix [CELL]."""
    error = session.config.last_error
    if error is None:
        raise NbcodexError(
            "There is no error to explain.",
            advice="`%codex fix` explains the last error that a cell raised.",
        )
    where = f" in cell {error.cell_number}" if error.cell_number else ""
    if cell and cell != str(error.cell_number):
        raise UsageError(
            "%codex fix: only the last error can be explained, and it was"
            f"{where or ' not in a cell'}. "
            f"{{Err[{cell[:10]}]}} in a prompt is the error of another cell"
        )
    # Without a thread: a question about an error does not belong to the conversation.
    request = build_request(error.as_prompt(), session.settings, origin=session.new_origin())
    # The heading is the error, because the user has not written the prompt.
    options = OutputOptions(format="fix", heading=error.traceback.rpartition("\n")[2] + where)
    session.show_answer(get_client().create_handle(request, session.settings), options)


def new(session: Session, thread: str = MAIN_THREAD) -> None:
    """Start the conversation afresh, as `reset` does: new [THREAD]."""
    conversations, stored = get_client().conversations, session.journal.conversations
    conversations.start_chapter(session.notebook, thread, stored)
    print(
        f"The conversation{_thread_suffix(thread)} starts afresh: earlier turns are not sent again."
    )


def history(session: Session, thread: str = MAIN_THREAD) -> None:
    """Show the turns that the next cell sends along: history [THREAD]."""
    stored, max_turns = session.journal.conversations, session.settings.max_history
    turns = get_client().conversations.next_turns(session.notebook, thread, stored, max_turns)
    for number, turn in enumerate(turns, start=1):
        images = f" [{len(turn.images)} images]" if turn.images else ""
        prompt, answer = shorten(turn.prompt, 70), shorten(turn.answer, 70)
        print(f"{number:>3}  {prompt}{images}\n     → {answer}")
    where = f" in the conversation{_thread_suffix(thread)}" if thread != MAIN_THREAD else ""
    if not turns:
        print(f"There are no turns{where} yet: the next cell sends its prompt alone.")
        return
    tokens, count = sum(map(pricing.estimate_turn_tokens, turns)), len(turns)
    print(
        f"{count} turn{'s' * (count > 1)}{where}, about {tokens:,} token{'s' * (tokens != 1)}; "
        f"`%codex new{_thread_suffix(thread)}` starts afresh."
    )


def _thread_suffix(thread: str) -> str:
    """Return a blank and the thread's name; an empty text for the main thread."""
    return "" if thread == MAIN_THREAD else f" {shorten(thread, 60)}"
