"""What Tab completes in the lines of `%%codex` and `%codex`: never by way of the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nbcodex.settings import DEFAULT_MODEL, JOURNAL_FILENAME, data_folder

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.notebook.config import Codex

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_RECENT = 50
"""How many entries of the journal are offered."""

_WITH_ID = {"journal", "resume", "retry", "cancel", "park", "forget"}
_WITH_ALL = {"resume", "cancel", "park", "forget"}
_SWITCHES = {
    "demo": ("on", "calm", "off"),
    "budget": ("off",),
    "resume": ("--everywhere", "--at-reset"),
}


def install(shell: InteractiveShell, config: Codex) -> None:
    """Have Tab ask us in our magics' lines."""
    uninstall(shell)
    if (matchers := _matchers(shell)) is not None:
        matchers.append(_Matcher(shell, config))


def uninstall(shell: InteractiveShell) -> None:
    """Have it ask us no longer."""
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
        self.__qualname__ = "codex"

    def __call__(self, context: Any) -> dict[str, Any]:
        from IPython.core.completer import SimpleCompletion  # whoever calls has it already

        try:
            names, word = self._offered(context)
        except Exception:  # a wrong setting, or no journal: Tab is not the place to say so
            names, word = [], ""
        # Ours are all that makes sense here: Jedi would take the line for Python.
        return {
            "completions": [
                SimpleCompletion(text=name, type="magic") for name in names if name.startswith(word)
            ],
            "matched_fragment": word,
            "suppress": bool(names),
            "ordered": True,
        }

    def _offered(self, context: Any) -> tuple[list[str], str]:
        """Return what may stand where the cursor is, and the beginning of it that is there."""
        before: str = context.text_until_cursor
        magic, *words = before.split() or [""]
        if before[-1:].isspace():
            words.append("")
        if not words:
            return [], ""
        if magic == "%%codex" and context.cursor_line == 0:
            return list(_of_cell(words, self._shell, self._config)), words[-1]
        if magic == "%codex":
            return list(_of_line(words, self._shell, self._config)), words[-1]
        return [], ""


def _of_cell(words: list[str], shell: InteractiveShell, config: Codex) -> Iterable[str]:
    """Return what may stand in the place of the last of a cell's words."""
    from nbcodex.notebook import options

    actions = options.parser()._actions
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
            return [name for name in shell.user_ns if not name.startswith("_")]
        case _:
            return [str(choice) for choice in before.choices or ()]


def _of_line(words: list[str], shell: InteractiveShell, config: Codex) -> Iterable[str]:
    """Return what may stand in the place of the last of a line's words."""
    from nbcodex.notebook import commands

    if len(words) == 1:
        return commands.all_commands()
    word = words[0]
    offered = list(_SWITCHES.get(word, ()))
    if word in _WITH_ID:
        offered += [entry.id for entry in _entries(shell, config)]
    if word in _WITH_ALL:
        offered.append("all")
    if word == "alias" and len(words) > 2:
        offered += _models(config)
    if word == "dealias":
        offered += config.aliases
    if word == "help":
        offered += commands.page_names()
    return offered


def _models(config: Codex) -> list[str]:
    """Return the models that are known without asking."""
    named = (config.settings().model, DEFAULT_MODEL)
    return list(dict.fromkeys([*config.offered, *config.aliases, *filter(None, named)]))


def _entries(shell: InteractiveShell, config: Codex) -> list[Any]:
    """Return what was asked lately; a journal that does not exist yet is not made for that."""
    from nbcodex.notebook.session import Session

    settings = config.settings()
    if settings.journal and not (data_folder(settings) / JOURNAL_FILENAME).exists():
        return []
    return list(Session(shell, config).journal.recent_entries(_RECENT))
