"""What `%codex WORD` does. Each public method is a word; its docstring is its line of help."""

from __future__ import annotations

import difflib
import getpass
import inspect
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from nbcodex import loop
from nbcodex.client import current
from nbcodex.clock import spell, time_of_day
from nbcodex.errors import NbcodexError, Stopped, brief, render
from nbcodex.handle import Handle
from nbcodex.notebook import identity
from nbcodex.notebook.display import printable
from nbcodex.notebook.figures import figures, money
from nbcodex.notebook.session import Session, View
from nbcodex.settings import Secret

if TYPE_CHECKING:
    from nbcodex.engine import Order
    from nbcodex.journal.entry import Entry
    from nbcodex.records import Gauge
    from nbcodex.totals import Total


class Commands:
    """The line magic's words, in one session."""

    def __init__(self, session: Session) -> None:
        self._session, self._config = session, session.config
        self._settings = session.settings

    def run(self, line: str) -> None:
        """Do what `line` says."""
        word, *rest = line.split() or ["help"]
        deeds = _deeds()
        if word not in deeds:
            near = difflib.get_close_matches(word, deeds, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"%codex: there is no command {word[:40]}{hint} See %codex help")
        deed = getattr(self, word)
        try:
            inspect.signature(deed).bind(*rest)
        except TypeError:
            raise UsageError(f"%codex {word}: {deed.__doc__}") from None
        deed(*rest)

    def help(self) -> None:
        """List the commands."""
        for word, line in _deeds().items():
            _tell(f"%codex {word:<8} {line}")
        _tell("%%codex? explains the cell magic, %config Codex the settings.")

    def version(self) -> None:
        """Tell the versions in use."""
        parts = ("nbcodex", "openai", "tenacity", "ipython", "ipywidgets", "anywidget")
        _tell(" · ".join(f"{name} {version(name)}" for name in parts))
        _tell(f"Python {platform.python_version()} on {platform.system()}")

    def usage(self) -> None:
        """Tell what this session has used: tokens, cost, waits."""
        totals = current().totals
        if not totals.by_model:
            _tell("Nothing has been asked in this session.")
        for model, total in totals.by_model.items():
            _tell(f"{model}: {_total(total)}")

    def limits(self) -> None:
        """Tell the limits that the server's answers have named, as far as known."""
        known = current().engine().ledger.known()
        if not known:
            _tell("No answer has told any limits yet.")
        now = current().clock.now()
        for name, (snapshot, hold) in known.items():
            gauges = (
                [("tokens", snapshot.tokens), ("requests", snapshot.requests)] if snapshot else []
            )
            told = [_gauge(kind, gauge) for kind, gauge in gauges if gauge]
            if hold and hold.until > now:
                told.append(f"held for another {spell(hold.until - now)}")
            server, *_, model = name.split(" ")
            _tell(f"{model} at {server}: {', '.join(told) or 'no limits told'}")

    def models(self) -> None:
        """List the models that the server offers to this key."""
        names = loop.running().submit(current().models(self._settings)).result()
        _tell("\n".join(names) or "The server names none.")

    def journal(self, id: str = "") -> None:  # noqa: A002 - as the user types it
        """List what was asked, newest first; with an ID, tell all of one: journal [ID]."""
        if id:
            _tell(_whole(self._session.journal.entry(id)))
            return
        entries = self._session.journal.entries(20)
        now = current().clock.wall()
        for entry in entries:
            _tell(_line(entry, now))
        if not entries:
            _tell("The journal is empty.")
        if trouble := self._session.journal.trouble:
            _tell(trouble)

    def resume(self, which: str = "all", *flags: str) -> None:
        """Go on with what is parked or abandoned: resume [ID|all] [--everywhere] [--at-reset]."""
        flags = (which, *flags) if which.startswith("--") else flags
        if unknown := set(flags) - {"--everywhere", "--at-reset"}:
            raise UsageError(f"%codex resume: there is no option {unknown.pop()}")
        journal = self._session.journal
        if which == "all" or which.startswith("--"):
            here = None if "--everywhere" in flags else self._session.notebook
            entries = journal.resumable(notebook=here)
        else:
            entries = [journal.entry(which)]
        if not entries:
            _tell("Nothing is parked or abandoned here.")
        handles = [self._taken_up(entry, later="--at-reset" in flags) for entry in entries]
        for number, (entry, handle) in enumerate(zip(entries, handles, strict=True)):
            view = View(heading=f"{entry.id} · {brief(entry.request.prompt, 60)}")
            if "--at-reset" in flags:
                self._session.answer_later(handle, view)
                continue
            try:
                self._session.answer(handle, view)
            except Stopped:
                for other in handles[number:]:
                    other.order("stop")
                raise
            except NbcodexError as error:
                if len(handles) == 1:
                    raise
                _tell("\n".join(render(error.title, error.message, error.advice)))

    def _taken_up(self, entry: Entry, *, later: bool) -> Handle:
        """Return a handle on its way: at once, or when the limit that it waits for resets."""
        if entry.possibly_paid:
            _tell(f"{entry.id} was under way when its kernel died: it may be paid twice.")
        until = entry.resume_at if later else None
        handle = current().resume(entry, self._settings, not_before=until)
        handle.start()
        return handle

    def retry(self, id: str) -> None:  # noqa: A002
        """Ask the same again, as a new request: retry ID."""
        request = self._session.journal.entry(id).request
        variable = request.origin.variable
        again = current().again(
            request, origin=identity.origin(self._session.shell, variable=variable)
        )
        handle = current().handle(again, self._settings)
        self._session.answer(handle, View(heading=brief(request.prompt, 60)))

    def cancel(self, id: str = "all") -> None:  # noqa: A002
        """End requests that are under way in this kernel: cancel [ID|all]."""
        self._order("cancel", id)

    def park(self, id: str = "all") -> None:  # noqa: A002
        """Keep requests that are under way for later: park [ID|all]."""
        self._order("park", id)

    def _order(self, what: Order, id_: str) -> None:
        live = [h for h in current().live() if id_ == "all" or h.request.id.startswith(id_)]
        if not live:
            raise NbcodexError(
                "No such request is under way in this kernel.",
                advice="`%codex journal` lists them.",
            )
        for handle in live:
            handle.order(what)
            handle.wait()
            _tell(f"{handle.request.id}: {handle.wait().reply.status}")

    def forget(self, id: str) -> None:  # noqa: A002
        """Erase an entry, or the whole journal, for good: forget ID|all."""
        erased = loop.running().submit(self._session.journal.forget(None if id == "all" else id))
        _tell(f"{erased.result()} erased.")

    def login(self, host: str = "") -> None:
        """Ask for an API key without echo, and keep it in memory: login [HOST]."""
        from nbcodex.wire.providers import host_of

        host = (host or host_of(self._settings)).lower()
        try:
            key = getpass.getpass(f"API key for {host}: ")
        except Exception as error:
            raise NbcodexError(
                f"This front end cannot ask for a key ({type(error).__name__}).",
                advice="Set OPENAI_API_KEY in the environment that starts the kernel.",
            ) from None
        if not key.strip():
            raise NbcodexError("No key was given; nothing has changed.")
        self._config.keys = {**self._config.keys, host: Secret(key)}
        _tell(f"The key for {host} is kept in memory until the kernel ends.")

    def demo(self, switch: str = "on") -> None:
        """Ask a simulator with low limits from now on, no key needed: demo [off]."""
        if switch not in {"on", "off"}:
            raise UsageError("%codex demo: on or off")
        from nbcodex.notebook import demo

        if switch == "on":
            self._config.demo = demo.start()
            _tell(demo.WELCOME)
        else:
            self._config.demo = None
            demo.stop()
            _tell("The demo is off: requests go to the real API.")

    def doctor(self) -> None:
        """Tell which settings are in force, and what to do about those that do not fit."""
        from nbcodex import doctor

        for line in doctor.report(self._settings):
            _tell(line)


def _deeds() -> dict[str, str]:
    """Return the words and their lines of help."""
    members = inspect.getmembers(Commands, inspect.isfunction)
    return {
        name: inspect.getdoc(deed) or ""
        for name, deed in members
        if not name.startswith("_") and name != "run"
    }


def _tell(line: str) -> None:
    print(line)  # noqa: T201 - a command's answer is what it prints


def _line(entry: Entry, now: float) -> str:
    state = "abandoned" if entry.abandoned else entry.status
    when = time_of_day(entry.added_at, now=now)
    until = f" (can go at {time_of_day(entry.resume_at, now=now)})" if entry.resume_at else ""
    return f"{entry.id}  {state:<11} {when:<16} {brief(entry.request.prompt, 60)}{until}"


def _whole(entry: Entry) -> str:
    told = [
        f"{entry.id}: {'abandoned' if entry.abandoned else entry.status}",
        f"notebook: {entry.notebook}" if entry.notebook else "",
        f"variable: {entry.variable}" if entry.variable else "",
        f"\n{printable(entry.request.prompt)}\n",
        printable(entry.reply.text),
        f"\n{figures(entry.reply)}",
        entry.error or "",
    ]
    return "\n".join(filter(None, told))


def _total(total: Total) -> str:
    told: Iterable[str] = (
        f"{total.requests} requests, {total.finished} answered",
        f"{total.input_tokens:,} in ({total.cached_tokens:,} cached)",
        f"{total.output_tokens:,} out ({total.reasoning_tokens:,} reasoning)",
        f"tokens of {total.unknown} unknown" if total.unknown else "",
        money(total.cost) if total.cost else "",
        f"cost of {total.unpriced} unknown" if total.unpriced else "",
        f"{total.limits} limits met" if total.limits else "",
        f"waited {spell(total.waited)}" if total.waited else "",
    )
    return " · ".join(filter(None, told))


def _gauge(kind: str, gauge: Gauge) -> str:
    full = f", full in {spell(gauge.full_in)}" if gauge.full_in else ""
    return f"{gauge.remaining:,.0f} of {gauge.limit:,.0f} {kind} left{full}"
