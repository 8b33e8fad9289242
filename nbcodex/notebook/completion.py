"""Tab completion in the lines of `%%codex` and `%codex`. It never uses the network.

It is loaded with the extension, so it imports the options, commands and entries at the first Tab.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

from IPython.core import completer
from IPython.core.interactiveshell import InteractiveShell

from nbcodex.notebook.config import Codex
from nbcodex.settings import DEFAULT_MODEL

# Reasoning efforts of OpenAI's models; which of them a model accepts is up to the server.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
MAX_OFFERED_ENTRIES = 50  # of the newest journal entries, whose ids are offered

_MATCHER_ID = "codex"
_ARGUMENT = re.compile(r"[^\[\]| ]+")  # ``on``, ``calm`` and ``off`` in ``[on|calm|off]``
_LITERAL_ARGUMENT = re.compile(r"[a-z-]+")  # ``off`` or ``--at-reset``, but not ``ID``


def install(shell: InteractiveShell, config: Codex) -> None:
    """Complete the lines of our magics in a shell."""

    # Asked before IPython's own matchers, whose priority is 0.
    @completer.context_matcher(identifier=_MATCHER_ID, priority=100)  # type: ignore[untyped-decorator]
    def complete(context: completer.CompletionContext) -> completer.SimpleMatcherResult:
        magic, *words = context.text_until_cursor.split() or [""]
        if context.text_until_cursor[-1:].isspace():
            words.append("")
        names: list[str] = []
        # An error, such as that of an invalid setting, is left to the cell that uses it.
        with contextlib.suppress(Exception):
            if words and magic == "%%codex" and context.cursor_line == 0:
                names = list(_cell_candidates(words, shell, config))
            elif words and magic == "%codex":
                names = list(_line_candidates(words, config))
        word = words[-1] if words else ""
        # A server can list a million models, of which IPython would show no more.
        matching = [name for name in names if name.startswith(word)][: completer.MATCHES_LIMIT]
        return {
            "completions": [completer.SimpleCompletion(text=n, type="magic") for n in matching],
            "matched_fragment": word,
            "suppress": bool(names),  # Jedi would complete the line as Python
            "ordered": True,
        }

    shell.Completer.custom_matchers.append(complete)


def uninstall(shell: InteractiveShell) -> None:
    """Remove the completion, even one that was installed before this module was reloaded."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _MATCHER_ID]


def _cell_candidates(words: list[str], shell: InteractiveShell, config: Codex) -> Iterable[str]:
    """Return the candidates for the last word of a cell's first line."""
    from nbcodex.notebook import cell_options

    actions = cell_options.parser()._actions
    word_before = words[-2] if len(words) > 1 else ""
    option = next((a for a in actions if word_before in a.option_strings), None)
    if option is None or option.nargs == 0:  # not the value of an option, but the next option
        names = [n for action in actions for n in action.option_strings if n.startswith("--")]
        may_be_model = all(word.startswith("-") for word in words[:-1])
        return [*names, *(_models(config) if may_be_model else [])]
    match option.dest:
        case "model":
            return _models(config)
        case "effort":
            return _EFFORTS
        case "thread":
            return sorted({e.request.thread for e in _entries(config) if e.request.thread})
        case "out" | "schema" | "map":
            # Of any type, because a check of each value could run code of the user's objects.
            return [name for name in shell.user_ns if not name.startswith("_")]
        case _:
            return [str(choice) for choice in option.choices or ()]


def _line_candidates(words: list[str], config: Codex) -> Iterable[str]:
    """Yield the candidates for the last word of a `%codex` line."""
    from nbcodex.notebook import commands

    command = words[0]
    if len(words) == 1:
        yield from commands.COMMANDS
    elif command in commands.COMMANDS:
        syntax, _ = commands.syntax_and_explanation(command)
        for argument in _ARGUMENT.findall(" ".join(syntax.split()[len(words) - 1 :])):
            match argument:
                case "ID":
                    yield from (entry.id for entry in _entries(config))
                case "ALIAS":
                    yield from config.aliases
                case "TARGET":
                    yield from _models(config)
                case "TOPIC":
                    yield from commands.page_names()
                case _ if _LITERAL_ARGUMENT.fullmatch(argument):
                    yield argument


def _models(config: Codex) -> list[str]:
    """Return the models that are known without a request."""
    defaults = filter(None, (config.settings().model, DEFAULT_MODEL))
    return list(dict.fromkeys([*config.listed_models, *config.aliases, *defaults]))


def _entries(config: Codex) -> list[Any]:
    """Return the newest journal entries, without creating a journal that does not exist."""
    from nbcodex.client import get_client

    settings = config.settings()
    # `journal` would create the file, and Tab must change nothing; a journal in memory has no file.
    find_journal = get_client().journal_on_disk if settings.journal else get_client().journal
    journal = find_journal(settings)
    return list(journal.recent_entries(MAX_OFFERED_ENTRIES)) if journal else []
