"""Tab completion in the lines of `%%codex` and `%codex`. Never uses the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nbcodex.settings import DEFAULT_MODEL, JOURNAL_FILENAME, data_folder

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.config import Codex

# The known levels; the server decides which of them a model takes.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
COMPLETED_ENTRIES = 50  # how many of the newest journal entries are offered

_COMMANDS_WITH_ID = {"journal", "resume", "retry", "cancel", "park", "forget"}
_COMMANDS_WITH_ALL = {"resume", "cancel", "park", "forget"}
_COMMAND_WORDS = {
    "demo": ("on", "calm", "off"),
    "budget": ("off", "reset"),
    "resume": ("--everywhere", "--at-reset"),
}


def install(shell: InteractiveShell, config: Codex) -> None:
    """Complete the lines of our magics in a shell."""
    uninstall(shell)
    if (matchers := _matchers(shell)) is not None:
        matchers.append(_Matcher(shell, config))


def uninstall(shell: InteractiveShell) -> None:
    """Remove the completion, even that of a class from before a reload."""
    if (matchers := _matchers(shell)) is not None:
        matchers[:] = [m for m in matchers if type(m).__name__ != _Matcher.__name__]


def _matchers(shell: InteractiveShell) -> list[Any] | None:
    return getattr(getattr(shell, "Completer", None), "custom_matchers", None)


class _Matcher:
    """A matcher as IPython's completer calls it, in the second version of that protocol."""

    matcher_api_version = 2
    matcher_identifier = "codex"
    matcher_priority = 100.0

    def __init__(self, shell: InteractiveShell, config: Codex) -> None:
        self._shell, self._config = shell, config
        # IPython reads this attribute even of matchers with an identifier; instances have none.
        self.__qualname__ = "codex"

    def __call__(self, context: Any) -> dict[str, Any]:
        from IPython.core.completer import SimpleCompletion  # IPython has imported it already

        try:
            names, word = self._candidates(context)
        except Exception:  # an invalid setting or a missing journal is reported elsewhere
            names, word = [], ""
        # Other matchers are suppressed: Jedi would complete the line as Python.
        return {
            "completions": [
                SimpleCompletion(text=name, type="magic") for name in names if name.startswith(word)
            ],
            "matched_fragment": word,
            "suppress": bool(names),
            "ordered": True,
        }

    def _candidates(self, context: Any) -> tuple[list[str], str]:
        """Return the candidates at the cursor, and the word before it that they complete."""
        before: str = context.text_until_cursor
        magic, *words = before.split() or [""]
        if before[-1:].isspace():
            words.append("")
        if not words:
            return [], ""
        if magic == "%%codex" and context.cursor_line == 0:
            return list(_cell_candidates(words, self._shell, self._config)), words[-1]
        if magic == "%codex":
            return list(_line_candidates(words, self._shell, self._config)), words[-1]
        return [], ""


def _cell_candidates(words: list[str], shell: InteractiveShell, config: Codex) -> Iterable[str]:
    """Return the candidates for the last word of a cell's first line."""
    from nbcodex.notebook import cell_options

    actions = cell_options.parser()._actions
    option = words[-2] if len(words) > 1 else ""
    before = next((a for a in actions if option in a.option_strings), None)
    if before is None or before.nargs == 0:
        names = [name for action in actions for name in action.option_strings if name[1] == "-"]
        is_first = not any(not word.startswith("-") for word in words[:-1])
        return [*names, *(_models(config) if is_first else [])]
    match before.dest:
        case "model":
            return _models(config)
        case "effort":
            return _EFFORTS
        case "thread":
            return sorted({e.request.thread for e in _entries(shell, config) if e.request.thread})
        case "out" | "schema" | "map":
            # Of any type: checking each value could run a property of the user's object.
            return [name for name in shell.user_ns if not name.startswith("_")]
        case _:
            return [str(choice) for choice in before.choices or ()]


def _line_candidates(words: list[str], shell: InteractiveShell, config: Codex) -> Iterable[str]:
    """Return the candidates for the last word of a `%codex` line."""
    from nbcodex.notebook import commands

    if len(words) == 1:
        return commands.all_commands()
    word = words[0]
    offered = list(_COMMAND_WORDS.get(word, ()))
    if word in _COMMANDS_WITH_ID:
        offered += [entry.id for entry in _entries(shell, config)]
    if word in _COMMANDS_WITH_ALL:
        offered.append("all")
    if word == "alias" and len(words) > 2:
        offered += _models(config)
    if word == "dealias":
        offered += config.aliases
    if word == "help":
        offered += commands.page_names()
    return offered


def _models(config: Codex) -> list[str]:
    """Return the models that are known without a request."""
    named = (config.settings().model, DEFAULT_MODEL)
    return list(dict.fromkeys([*config.offered, *config.aliases, *filter(None, named)]))


def _entries(shell: InteractiveShell, config: Codex) -> list[Any]:
    """Return the newest journal entries, without creating a journal that does not exist."""
    from nbcodex.notebook.session import Session

    settings = config.settings()
    # Opening the journal would create its file, and Tab must change nothing.
    if settings.journal and not (data_folder(settings) / JOURNAL_FILENAME).exists():
        return []
    return list(Session(shell, config).journal.recent_entries(COMPLETED_ENTRIES))
