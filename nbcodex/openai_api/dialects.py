"""How servers differ: `dialects.toml` has the values as data, each with its source."""

import tomllib
from importlib.resources import files
from typing import Any

_TABLE: dict[str, Any] = tomllib.loads(
    files("nbcodex.openai_api").joinpath("dialects.toml").read_text("utf-8")
)

QUOTA_CODES = frozenset(_TABLE["quota_codes"])
QUOTA_PHRASES = tuple(_TABLE["quota_phrases"])
CREDIT_PHRASES = tuple(_TABLE["credit_phrases"])
TEMPORARY_PHRASES = tuple(_TABLE["temporary_phrases"])
TOO_LARGE_CODES = frozenset(_TABLE["too_large_codes"])
MODEL_CODES = frozenset(_TABLE["model_codes"])
MODEL_PHRASES = tuple(_TABLE["model_phrases"])
GROWTH_CODE: str = _TABLE["growth_code"]
PARALLEL_CODE: str = _TABLE["parallel_code"]
OVERLOADED_WORDS = tuple(_TABLE["overloaded_words"])
OVERLOADED_PHRASES = tuple(_TABLE["overloaded_phrases"])
LIMIT_PHRASES = tuple(_TABLE["limit_phrases"])
LIMIT_CODES = frozenset(_TABLE["limit_codes"])
LIMIT_CODE_PREFIXES = tuple(_TABLE["limit_code_prefixes"])
CREDENTIALS_CODES = frozenset(_TABLE["credentials_codes"])
REQUEST_CODES = frozenset(_TABLE["request_codes"])
REQUEST_CODE_PREFIXES = tuple(_TABLE["request_code_prefixes"])
REQUEST_CODE_SUFFIXES = tuple(_TABLE["request_code_suffixes"])
WRAPPED_REQUEST_CODES = frozenset(_TABLE["wrapped_request_codes"])
TOO_LARGE_PHRASES = tuple(_TABLE["too_large_phrases"])
UNSUPPORTED_PHRASES = tuple(_TABLE["unsupported_phrases"])
NO_SUCH_CALL_PHRASES = tuple(_TABLE["no_such_call_phrases"])
REASONING_MEMBERS = tuple(_TABLE["reasoning_members"])
HEADER_FIGURES = frozenset(_TABLE["header_figures"])
HEADER_RESOURCES = frozenset(_TABLE["header_resources"])
NORMAL_ENDINGS = frozenset(_TABLE["normal_endings"])
MAX_OUTPUT_ENDINGS = frozenset(_TABLE["max_output_endings"])
FILTER_ENDINGS = frozenset(_TABLE["filter_endings"])
TOOL_ENDINGS = frozenset(_TABLE["tool_endings"])
FAILED_ENDINGS = frozenset(_TABLE["failed_endings"])

REASONING_TAGS: dict[str, str] = _TABLE["reasoning_tags"]
QUOTA_TEXTS: dict[str, tuple[str, str]] = _TABLE["quota_texts"]
WINDOWS_S: dict[str, float] = _TABLE["windows_s"]
