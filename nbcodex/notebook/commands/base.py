"""What stands behind the words of `%codex`: a session, and how they answer."""

from __future__ import annotations

from nbcodex.notebook.session import Session


class CommandGroup:
    """Words that belong together. Each public method is one; its docstring is its line of help."""

    def __init__(self, session: Session) -> None:
        self._session, self._config = session, session.config
        self._settings = session.settings


def print_line(line: str) -> None:
    """Answer."""
    print(line)  # noqa: T201 - a command's answer is what it prints
