"""How servers differ: `dialects.toml` has the values as data, each with its source."""

import re
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from nbcodex.models import Resource

_TEXT = files("nbcodex.openai_api").joinpath("dialects.toml").read_text("utf-8")
_TABLE: dict[str, Any] = tomllib.loads(_TEXT)
# The table's lists, by name: codes, phrases, names of JSON members, and regular expressions.
WORDS: dict[str, list[str]] = {name: v for name, v in _TABLE.items() if isinstance(v, list)}
REASONING_TAGS: dict[str, str] = _TABLE["reasoning_tags"]  # closing tags, by opening tag
QUOTA_TEXTS: dict[str, tuple[str, str]] = _TABLE["quota_texts"]  # what happened, what to do
SETTING_ADVICE: dict[str, str] = _TABLE["setting_advice"]  # by a phrase
# By cause: the error's class, what happened, and what to do ("": what the class advises).
REFUSALS: dict[str, tuple[str, str, str]] = _TABLE["refusals"]
ERROR_ADVICE: dict[str, str] = _TABLE["error_advice"]  # by the error's class
LIMIT_ADVICE: dict[str, str] = _TABLE["limit_advice"]  # by what the limit counts
RESOURCES: dict[str, Resource] = _TABLE["resources"]  # by the server's word for it
UNITS_S: dict[str, float] = _TABLE["units_s"]


def bare(word: str) -> str:
    """Return a code or a finish reason without case and separators, in which servers differ."""
    return re.sub("[_ -]", "", word.lower())


def has_code(codes: Iterable[str], list_name: str) -> bool:
    """Return whether any code matches a pattern of the list named `list_name`."""
    patterns = [bare(pattern) for pattern in WORDS[list_name]]
    return any(fnmatchcase(bare(code), pattern) for code in codes for pattern in patterns)


def has_phrase(text: str, list_name: str) -> bool:
    """Return whether a lower-case text contains a phrase of the list named `list_name`."""
    return any(phrase in text for phrase in WORDS[list_name])


def has_match(text: str, list_name: str) -> bool:
    """Return whether a lower-case text matches an expression of the list named `list_name`."""
    return any(re.search(pattern, text) for pattern in WORDS[list_name])
