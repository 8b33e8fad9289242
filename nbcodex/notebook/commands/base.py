"""What the groups of `%codex` commands share: a session, and how a command prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from nbcodex.notebook.session import Session

Command = Callable[..., None]


class CommandGroup:
    """Commands that belong together.

    Each public method is a command, and its docstring the line that `%codex help` shows: what the
    command does, then, after a colon, its arguments.
    """

    # A new group for each command: a session reads the settings afresh.
    def __init__(self, session: Session) -> None:
        self._session, self._config = session, session.config
        self._settings = session.settings

    @classmethod
    def commands(cls) -> Iterator[tuple[str, Command]]:
        """Yield the names and functions of the group's commands, in the order of the class."""
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                yield name, member


def print_line(line: str) -> None:
    """Print a line of a command's answer."""
    print(line)  # noqa: T201 - printing is how a command answers
