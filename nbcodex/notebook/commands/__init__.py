"""`%codex WORD`: the line magic's words, one module for those that belong together."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex.errors import did_you_mean
from nbcodex.notebook.commands import pages
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.commands.code import Code
from nbcodex.notebook.commands.entries import Entries
from nbcodex.notebook.commands.setup import Setup
from nbcodex.notebook.commands.talk import Talk
from nbcodex.notebook.commands.usage import Figures
from nbcodex.notebook.session import Session

Deed = Callable[..., None]


class About(CommandGroup):
    """What can be done, and with what."""

    def help(self, *topic: str) -> None:
        """List the commands and the pages, or show a page: help [TOPIC]."""
        if topic:
            self._help_on("-".join(topic).lower())
            return
        for room in ROOMS:
            print_line(f"\n{inspect.getdoc(room)}")
            for word, deed in _deeds(room):
                if deed.__name__ == word:  # a second name is told with the first
                    print_line(_explained(word, deed))
        print_line("\nPages.")
        for name in pages.topics():
            print_line(f"  {f'%codex help {name}':<{_COLUMN - 2}}{pages.title(name)}")
        print_line("\n%%codex? explains the cell magic, %config Codex the settings.")

    def _help_on(self, name: str) -> None:
        """Show a page, or a command's line of help."""
        known = words()
        if name in known and name not in pages.topics():
            print_line(_explained(name, known[name][1]))
            return
        topic = pages.find(name, known)
        if hasattr(self._session.shell, "kernel"):
            page = {"text/markdown": pages.markdown(topic), "text/plain": pages.plain_text(topic)}
            display(page, raw=True)  # type: ignore[no-untyped-call]
        else:
            print_line(pages.plain_text(topic))

    def version(self) -> None:
        """Tell the versions in use."""
        parts = ("nbcodex", "openai", "tenacity", "ipython", "ipywidgets", "anywidget")
        print_line(" · ".join(f"{name} {version(name)}" for name in parts))
        print_line(f"Python {platform.python_version()} on {platform.system()}")


ROOMS: tuple[type[CommandGroup], ...] = (Entries, Talk, Code, Figures, Setup, About)

_COLUMN = 32
"""Where in a line of help it is told what a word does."""

_SYNONYMS = {"list": "models", "register": "alias", "delete": "dealias", "error": "fix"}
"""Words of `%ai` that mean the same."""


def words() -> dict[str, tuple[type[CommandGroup], Deed]]:
    """Return every word, its room and what it does, in the order in which they are listed."""
    return {name: (room, deed) for room in ROOMS for name, deed in _deeds(room)}


def run(session: Session, line: str) -> None:
    """Do what `line` says.

    Raises
    ------
    UsageError
        If there is no such word, or its arguments make no sense.
    """
    word, *rest = line.split() or ["help"]
    known = words()
    word = _SYNONYMS.get(word, word)
    if word not in known:
        hint = did_you_mean(word, known)
        raise UsageError(f"%codex: there is no command {word[:40]}{hint} See %codex help")
    room, deed = known[word]
    try:
        inspect.signature(deed).bind(None, *rest)
    except TypeError:
        raise UsageError(f"%codex {word}: {deed.__doc__}") from None
    deed(room(session), *rest)


def _explained(word: str, deed: Deed) -> str:
    """Return a word with what it takes, and what it does, from its line of help."""
    does, _, takes = (inspect.getdoc(deed) or "").removesuffix(".").rpartition(": ")
    if takes.split()[:1] != [word]:
        does, takes = f"{does}: {takes}" if does else takes, word
    usage = f"  %codex {takes}"
    gap = " " * (_COLUMN - len(usage)) if len(usage) < _COLUMN else "\n" + " " * _COLUMN
    return f"{usage}{gap}{does}"


def _deeds(room: type[CommandGroup]) -> Iterator[tuple[str, Any]]:
    for name, deed in vars(room).items():
        if inspect.isfunction(deed) and not name.startswith("_"):
            yield name, deed
