"""What a shell offers to a prompt: the notebook's own variables, and its histories.

Owns which names count: what IPython puts beside the user's own does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.notebook import safe_eval
from nbcodex.notebook.cell_errors import cell_errors
from nbcodex.requests.images import picture

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.models import Image

_HISTORIES = ("In", "Out", "Err")


class _Results(dict[int, object]):
    """`Out`, which says what is missing."""

    def __missing__(self, number: object) -> object:
        raise KeyError(f"cell {number} showed no result")


def variables(shell: InteractiveShell, text: str = "") -> dict[str, object]:
    """Return the notebook's own variables: `exit`, `open` and what else IPython adds are none.

    Its histories count only where `text` names one of their entries, never as a whole.
    """
    added, nothing = shell.user_ns_hidden, object()
    named = {name for name in _HISTORIES if f"{{{name}[" in text}
    histories: dict[str, object] = {"Err": cell_errors} if "Err" in named else {}
    if "Out" in named and isinstance(results := shell.user_ns.get("Out"), dict):
        histories["Out"] = _Results(results)
    return {
        name: value
        for name, value in shell.user_ns.items()
        if name in named or value is not added.get(name, nothing)
    } | histories


def pictures(expressions: Iterable[str], shell: InteractiveShell) -> list[Image]:
    """Return the pictures that `--image` names: a file's path, or a chain of the notebook's names.

    Raises
    ------
    ConfigurationError
        If one of them is no picture.
    """
    return [picture(_value(text, variables(shell, f"{{{text}"))) for text in expressions]


def _value(text: str, names: Mapping[str, object]) -> object:
    """Return the value of an expression; a text that is none is a path, as is one of a file."""
    chain = safe_eval.parse(text)
    if chain is None or _is_file(text) or safe_eval.root_name(chain) not in names:
        return Path(text)
    try:
        return safe_eval.evaluate(chain, names)
    except Exception as error:
        raise ConfigurationError(
            f"--image {shorten(text, 80)} failed: {safe_eval.describe_error(error)}.",
            advice="Nothing was sent.",
        ) from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
