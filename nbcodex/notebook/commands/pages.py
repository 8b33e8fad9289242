"""The documentation pages that `%codex help TOPIC` shows.

Finds and reads the Markdown files in `nbcodex/docs`. Must not know the shell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from IPython.core.error import UsageError

from nbcodex.errors import did_you_mean

FOLDER = Path(__file__).parents[2] / "docs"

_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
_PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\.md(?:#[\w-]*)?\)")
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
_MARKUP = re.compile(r"\*\*|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])")


def topics() -> list[str]:
    """Return the names of the pages, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def title(topic: str) -> str:
    """Return the heading of a page."""
    with (FOLDER / f"{topic}.md").open(encoding="utf-8") as page:
        return page.readline().lstrip("# ").strip()


def find(name: str, others: Iterable[str] = ()) -> str:
    """Return the topic that `name` is, or begins.

    Raises
    ------
    UsageError
        If no topic, or more than one, begins with `name`. Near topics are named, and those of
        `others`, which can be asked about as well.
    """
    known = topics()
    if name in known:
        return name
    found = [topic for topic in known if topic.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"%codex help: {name[:40]} may be {' or '.join(found)}")
    hint = did_you_mean(name, [*known, *others])
    raise UsageError(f"%codex help: there is no topic {name[:40]!r}{hint} See %codex help")


def markdown(topic: str) -> str:
    """Return a page as Markdown. Links to other pages become the commands that show them."""
    text = (FOLDER / f"{topic}.md").read_text(encoding="utf-8")
    return _PAGE_LINK.sub(r"\1 (`%codex help \2`)", _COMMENT.sub("", text)).rstrip()


def plain_text(topic: str) -> str:
    """Return a page for a terminal: code as it is, prose without marks."""
    parts = re.split(r"^```\w*\n(.*?)^```$", markdown(topic), flags=re.DOTALL | re.MULTILINE)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = re.sub(r"^(?=.)", "    ", part, flags=re.MULTILINE).rstrip("\n")
        else:
            linked = _LINK.sub(lambda found: f"{found[1]} ({found[2]})", part)
            parts[index] = _MARKUP.sub("", re.sub(r"^#+ ", "", linked, flags=re.MULTILINE))
    return "".join(parts)
