"""The commands of the line magic `%codex`: their table, their help, and the documentation pages."""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from IPython.core.error import UsageError
from IPython.display import display

from nbcodex.errors import did_you_mean
from nbcodex.models import match_prefix
from nbcodex.notebook.commands import entries, setup, usage
from nbcodex.notebook.session import Session

HELP_COLUMN = 32  # the column of the explanations in the list of commands

PAGES_FOLDER = Path(__file__).parents[2] / "docs"

# Pictures are left out of pages, because their files are not in the package.
_COMMENT_OR_PICTURE = re.compile(r"<!--.*?-->\n*|^!\[[^\]]*\]\(\S*\)\n\n", re.DOTALL | re.MULTILINE)
_PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\.md(?:#[\w-]*)?\)")  # ``[maps](maps.md#stop)``
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")  # ``[text](https://example.org)``
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)  # ``## Title``
_EMPHASIS = re.compile(r"\*\*|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])")  # the marks of ``**bold**``


def show_help(_: Session, *topic: str) -> None:
    """List the commands and the pages, or show a page: help [TOPIC]."""
    if not topic:
        for title, group in COMMAND_GROUPS.items():
            print(f"\n{title}.")
            for name in group:
                print(_help_line(name))
        print("\nPages.")
        for page in page_names():
            title = page_markdown(page).partition("\n")[0].lstrip("# ")
            print(f"  {f'%codex help {page}':<{HELP_COLUMN - 2}}{title}")
        print("\n%%codex? explains the cell magic, %config Codex the settings.")
        return
    name = "-".join(topic).lower()
    if name in COMMANDS and name not in page_names():
        print(_help_line(name))
        return
    page = find_page(name)
    mime_bundle = {"text/markdown": page_markdown(page), "text/plain": page_text(page)}
    display(mime_bundle, raw=True)  # type: ignore[no-untyped-call]


def show_version(_: Session) -> None:
    """Show the versions in use."""
    packages = ("nbcodex", "openai", "tenacity", "ipython", "ipywidgets", "anywidget")
    print(" · ".join(f"{name} {version(name)}" for name in packages))
    print(f"Python {platform.python_version()} on {platform.system()}")


# A command is called with the words after its name. Its docstring is its help: an explanation and,
# after a colon, the syntax if there are arguments. Tab completes the arguments that it names.
COMMAND_GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Requests and maps": {
        "journal": entries.show_journal,
        "resume": entries.resume,
        "retry": entries.retry,
        "cancel": entries.cancel,
        "park": entries.park,
        "forget": entries.forget,
    },
    "The conversation of this notebook": {"new": entries.new, "history": entries.history},
    # `insert` takes code from an answer; `fix` asks for a correction of a cell that failed.
    "Code from answers. It is never run": {"insert": entries.insert, "fix": entries.fix},
    "Usage and limits": {
        "usage": usage.show_usage,
        "budget": usage.budget,
        "monitor": usage.show_monitor,
        "limits": usage.show_limits,
    },
    "The connection to a server": {
        "models": setup.list_models,
        "alias": setup.alias,
        "dealias": setup.dealias,
        "login": setup.login,
        "demo": setup.demo,
        "doctor": setup.run_doctor,
    },
    "Help": {"help": show_help, "version": show_version},
}
COMMANDS = {name: command for group in COMMAND_GROUPS.values() for name, command in group.items()}

# All but `reset` are the names of these commands in Jupyter AI's `%ai`.
_SYNONYMS = {
    "reset": "new",
    "list": "models",
    "register": "alias",
    "delete": "dealias",
    "error": "fix",
}


def run(session: Session, line: str) -> None:
    """Run the command in a line of `%codex`, or raise a UsageError if there is none."""
    # Not split by shlex, because no argument contains blanks or needs quotes.
    name, *arguments = line.split() or ["help"]
    name = _SYNONYMS.get(name, name)
    if name not in COMMANDS:
        hint = f"{did_you_mean(name, COMMANDS)} A prompt goes below a line %%codex."
        raise UsageError(f"%codex: there is no command {name[:40]}{hint} See %codex help")
    command = COMMANDS[name]
    try:
        # Before the call, so that a TypeError inside of the command is not mistaken for this one.
        inspect.signature(command).bind(session, *arguments)
    except TypeError:
        raise UsageError(f"%codex {name}: {command.__doc__}") from None
    command(session, *arguments)


def syntax_and_explanation(name: str) -> tuple[str, str]:
    """Return how a command is typed, such as ``help [TOPIC]``, and what it does."""
    explanation, _, syntax = (COMMANDS[name].__doc__ or "").removesuffix(".").rpartition(": ")
    if syntax.split()[:1] == [name]:
        return syntax, explanation
    # The colon belongs to the sentence: the command has no arguments.
    return name, f"{explanation}: {syntax}" if explanation else syntax


def _help_line(name: str) -> str:
    syntax, explanation = syntax_and_explanation(name)
    command = f"  %codex {syntax}"
    line_break = "" if len(command) < HELP_COLUMN else f"\n{'':<{HELP_COLUMN}}"
    return f"{command:<{HELP_COLUMN}}{line_break}{explanation}"


def page_names() -> list[str]:
    """Return the names of the pages, in alphabetical order."""
    return sorted(path.stem for path in PAGES_FOLDER.glob("*.md"))


def find_page(prefix: str) -> str:
    """Return the only page whose name begins with `prefix`, or raise a UsageError."""
    found = match_prefix(prefix, page_names())
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"%codex help: {prefix[:40]} may be {' or '.join(found)}")
    hint = did_you_mean(prefix, [*page_names(), *COMMANDS])
    raise UsageError(f"%codex help: there is no topic {prefix[:40]!r}{hint} See %codex help")


def page_markdown(topic: str) -> str:
    """Return a page as Markdown. Links to other pages become the commands that show them."""
    text = (PAGES_FOLDER / f"{topic}.md").read_text(encoding="utf-8")
    return _PAGE_LINK.sub(r"\1 (`%codex help \2`)", _COMMENT_OR_PICTURE.sub("", text)).rstrip()


def page_text(topic: str) -> str:
    """Return a page for a terminal: code indented, the rest without Markdown's marks."""
    parts = re.split(r"^```\w*\n(.*?)^```$", page_markdown(topic), flags=re.DOTALL | re.MULTILINE)
    for index, part in enumerate(parts):
        if index % 2:  # the code between two fences
            parts[index] = re.sub(r"^(?=.)", "    ", part, flags=re.MULTILINE).rstrip("\n")
        else:
            linked = _LINK.sub(r"\1 (\2)", part)
            underlined = _HEADING.sub(
                lambda h: f"{h[2]}\n{('=' if h[1] == '#' else '-') * len(h[2])}", linked
            )
            parts[index] = _EMPHASIS.sub("", underlined)
    return "".join(parts)
