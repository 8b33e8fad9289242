"""The line magic `%codex`: finds and runs a command, and shows help and the documentation pages.

The commands themselves are in the other modules, one for each group that belongs together.
"""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex.errors import did_you_mean
from nbcodex.models import match_prefix
from nbcodex.notebook.commands.base import Command, CommandGroup, print_line
from nbcodex.notebook.commands.cells import CodeCommands, ConversationCommands
from nbcodex.notebook.commands.entries import RequestCommands
from nbcodex.notebook.commands.setup import SetupCommands
from nbcodex.notebook.commands.usage import UsageCommands
from nbcodex.notebook.session import Session

HELP_COLUMN = 32  # where a line of help begins to explain a command

PAGES_FOLDER = Path(__file__).parents[2] / "docs"

# A picture is a file of the checkout, and not in the package.
_COMMENT_OR_PICTURE = re.compile(r"<!--.*?-->\n*|^!\[[^\]]*\]\(\S*\)\n\n", re.DOTALL | re.MULTILINE)
_PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\.md(?:#[\w-]*)?\)")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
_MARKUP = re.compile(r"\*\*|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])")


class HelpCommands(CommandGroup):
    """Help."""

    def help(self, *topic: str) -> None:
        """List the commands and the pages, or show a page: help [TOPIC]."""
        if topic:
            self._show_topic("-".join(topic).lower())
            return
        for group in GROUPS:
            print_line(f"\n{inspect.getdoc(group)}")
            for name, command in group.commands():
                if command.__name__ == name:  # a synonym is mentioned with its command
                    print_line(_help_line(name, command))
        print_line("\nPages.")
        for name in page_names():
            print_line(f"  {f'%codex help {name}':<{HELP_COLUMN - 2}}{page_title(name)}")
        print_line("\n%%codex? explains the cell magic, %config Codex the settings.")

    def _show_topic(self, name: str) -> None:
        commands = all_commands()
        if name in commands and name not in page_names():
            print_line(_help_line(name, commands[name][1]))
            return
        topic = find_page(name, commands)
        if hasattr(self._session.shell, "kernel"):
            page = {"text/markdown": page_markdown(topic), "text/plain": page_text(topic)}
            display(page, raw=True)  # type: ignore[no-untyped-call]
        else:
            print_line(page_text(topic))

    def version(self) -> None:
        """Show the versions in use."""
        packages = ("nbcodex", "openai", "tenacity", "ipython", "ipywidgets", "anywidget")
        print_line(" · ".join(f"{name} {version(name)}" for name in packages))
        print_line(f"Python {platform.python_version()} on {platform.system()}")


GROUPS: tuple[type[CommandGroup], ...] = (
    RequestCommands,
    ConversationCommands,
    CodeCommands,
    UsageCommands,
    SetupCommands,
    HelpCommands,
)

# What Jupyter AI's `%ai` calls these commands.
_SYNONYMS = {"list": "models", "register": "alias", "delete": "dealias", "error": "fix"}


def all_commands() -> dict[str, tuple[type[CommandGroup], Command]]:
    """Return the group and the function of each command, in the order of the help."""
    return {name: (group, command) for group in GROUPS for name, command in group.commands()}


def run(session: Session, line: str) -> None:
    """Run the command in a line of `%codex`.

    Raises
    ------
    UsageError
        If the command does not exist, or its arguments do not fit.
    """
    # Not shlex: no command takes a value with blanks, and `%codex budget $5/day` has no quotes.
    name, *arguments = line.split() or ["help"]
    commands = all_commands()
    name = _SYNONYMS.get(name, name)
    if name not in commands:
        hint = did_you_mean(name, commands)
        raise UsageError(f"%codex: there is no command {name[:40]}{hint} See %codex help")
    group, command = commands[name]
    try:
        # Checked beforehand, so that a TypeError from inside a command is not mistaken for this.
        inspect.signature(command).bind(None, *arguments)
    except TypeError:
        raise UsageError(f"%codex {name}: {command.__doc__}") from None
    command(group(session), *arguments)


def _help_line(name: str, command: Command) -> str:
    """Return a command's line of help: its arguments, then what it does."""
    explanation, _, usage = (inspect.getdoc(command) or "").removesuffix(".").rpartition(": ")
    if usage.split()[:1] != [name]:  # the colon belongs to the sentence: no arguments are named
        explanation = f"{explanation}: {usage}" if explanation else usage
        usage = name
    usage = f"  %codex {usage}"
    gap = " " * (HELP_COLUMN - len(usage))
    return f"{usage}{gap or chr(10) + ' ' * HELP_COLUMN}{explanation}"


def page_names() -> list[str]:
    """Return the names of the pages, in alphabetical order."""
    return sorted(path.stem for path in PAGES_FOLDER.glob("*.md"))


def page_title(topic: str) -> str:
    """Return the heading of a page."""
    with (PAGES_FOLDER / f"{topic}.md").open(encoding="utf-8") as page:
        return page.readline().lstrip("# ").strip()


def find_page(name: str, others: Iterable[str] = ()) -> str:
    """Return the topic that `name` is, or begins.

    Raises
    ------
    UsageError
        If no topic, or more than one, begins with `name`. Near topics are named, and those of
        `others`, which can be asked about as well.
    """
    known = page_names()
    found = match_prefix(name, known)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"%codex help: {name[:40]} may be {' or '.join(found)}")
    hint = did_you_mean(name, [*known, *others])
    raise UsageError(f"%codex help: there is no topic {name[:40]!r}{hint} See %codex help")


def page_markdown(topic: str) -> str:
    """Return a page as Markdown. Links to other pages become the commands that show them."""
    text = (PAGES_FOLDER / f"{topic}.md").read_text(encoding="utf-8")
    return _PAGE_LINK.sub(r"\1 (`%codex help \2`)", _COMMENT_OR_PICTURE.sub("", text)).rstrip()


def page_text(topic: str) -> str:
    """Return a page for a terminal: code unchanged, prose without markup."""
    parts = re.split(r"^```\w*\n(.*?)^```$", page_markdown(topic), flags=re.DOTALL | re.MULTILINE)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = re.sub(r"^(?=.)", "    ", part, flags=re.MULTILINE).rstrip("\n")
        else:
            linked = _LINK.sub(lambda found: f"{found[1]} ({found[2]})", part)
            parts[index] = _MARKUP.sub("", _HEADING.sub(_underlined, linked))
    return "".join(parts)


def _underlined(heading: re.Match[str]) -> str:
    return f"{heading[2]}\n{('=' if heading[1] == '#' else '-') * len(heading[2])}"
