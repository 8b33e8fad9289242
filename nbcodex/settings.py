"""What the user and the environment have configured, read afresh for each request.

Owns the order of precedence: options of the request, `%config Codex`, the environment, the default.
It imports neither traitlets nor the SDK, which take long to load.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from nbcodex.errors import ConfigurationError

if TYPE_CHECKING:
    from nbcodex.models import Api

OPENAI_BASE_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-5.6-sol"

Display = Literal["auto", "widget", "text"]

_ENVIRONMENT = {
    "OPENAI_API_KEY": "api_key",
    "OPENAI_BASE_URL": "base_url",
    "OPENAI_ORG_ID": "organization",
    "OPENAI_PROJECT_ID": "project",
    "AZURE_OPENAI_ENDPOINT": "azure_endpoint",
    "AZURE_OPENAI_API_KEY": "azure_key",
    "AZURE_OPENAI_AD_TOKEN": "azure_ad_token",
    "OPENAI_API_VERSION": "api_version",
    "NBCODEX_MODEL": "model",
    "NBCODEX_HOME": "home",
    "NBCODEX_REDIS_URL": "redis_url",
}
_SECRETS = {"api_key", "azure_key", "azure_ad_token", "redis_url"}

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", re.IGNORECASE)  # "1.5h", "250 ms"


class Secret:
    """A key or token, which is shown only by `reveal`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        # Keys that are pasted often end in a newline, which HTTP headers do not allow.
        self._value = value.strip()

    def reveal(self) -> str:
        """Return the secret itself, for the API client alone."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(…)"

    # Pickles end up in files and in other processes' memory.
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a secret cannot be pickled: it stays in this process")


def parse_duration(text: str | float) -> float:
    """Return seconds for ``90s``, ``10m``, ``1h30m``, ``250ms`` or a plain number of seconds."""
    plain = str(text).strip()
    parts = _DURATION_PART.findall(plain)
    if parts and not _DURATION_PART.sub("", plain).strip():
        seconds = sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)
    else:
        try:
            seconds = float(plain)
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigurationError(
            f"{str(text)[:40]!r} is not a duration.", advice="Write it like 90s, 10m or 2h."
        )
    return seconds


JOURNAL_FILENAME = "journal.sqlite3"  # prompts and answers
DEMO_FOLDER_NAME = "demo"  # below the data folder: the journal of simulated requests
LIMITER_FILENAME = "ledger.sqlite"  # what is known of limits: numbers, under names that are hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a request depends on besides its own options."""

    # `_ENVIRONMENT` names the variables of these and other fields.
    api_key: Secret | None = None
    key_base_url: str = ""  # of the server that `api_key` is for; empty: that of `base_url`
    base_url: str | None = None
    organization: str | None = None
    project: str | None = None
    azure_endpoint: str | None = None
    azure_key: Secret | None = None
    azure_ad_token: Secret | None = None
    api_version: str | None = None
    # Keys of further servers, by address: ``name`` (the usual ports), ``name:port``, ``name:*``
    # (all ports), or ``http://name:port`` where the key may travel unencrypted.
    keys: Mapping[str, Secret] = field(default_factory=dict)
    # Returns an ``AsyncOpenAI`` for any other provider; the fields above are then ignored.
    client: Callable[[], Any] | None = None
    model: str | None = None  # None: the server's default, or its only model
    api: Api = "auto"
    patience: float = 600.0  # seconds of waiting after failures before a request is parked
    # Seconds without data after which a stream counts as broken. Before the first text, while
    # models reason, five times as long.
    idle_timeout: float = 60.0
    # Characters after which an answer is cut, its reasoning included: four times the longest
    # output of any model, so that only a model in a loop reaches it.
    max_answer: int = 2_000_000
    display: Display = "auto"  # how requests are shown; ``auto``: as the front end can
    remote_images: bool = False  # whether images in answers are loaded from other servers
    journal: bool = True  # whether requests are kept on disk, or until the process ends
    reuse: bool = False  # whether the answer to an equal request is taken from the journal
    budgets: tuple[str, ...] = ()  # the user's caps, such as ``200k`` or ``$5/day``; all apply
    ask_above: float = 1.0  # US dollars: a map that may cost more asks for confirmation
    keep_files: bool = False  # whether the provider keeps a batch job's files when it is done
    home: Path | None = None  # where files are kept; None: the platform's data folder
    aliases: Mapping[str, str] = field(default_factory=dict)  # short names of models
    max_history: int | None = None  # how many earlier turns a request sees; None: all that fit
    redis_url: Secret | None = None  # where machines with one key share its limits
    private_limits: bool = False  # rate limits are not shared: the server runs in this process

    # Read for every request, not at import: `os.environ` and `%config` change in a running kernel.
    @classmethod
    def read(
        cls, configured: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> Self:
        """Return the settings in force now; `configured` has those of `%config`, by field."""
        values: dict[str, Any] = {
            name: value.strip()
            for variable, name in _ENVIRONMENT.items()
            if (value := environ.get(variable, "")).strip()
        }
        # A base URL from `%config` must not take the environment's key to another server.
        values["key_base_url"] = values.get("base_url", OPENAI_BASE_URL)
        values |= {k: v for k, v in (configured or {}).items() if v is not None and v != ""}
        return cls(**cls.convert(values))

    @staticmethod
    def convert(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of fields in the fields' own types."""
        return {name: _as_field(name, value) for name, value in values.items()}

    def secrets(self) -> list[str]:
        """Return every secret in force, longest first, for redaction."""
        configured = [self.api_key, self.azure_key, self.azure_ad_token, self.redis_url]
        configured += self.keys.values()
        return sorted({s.reveal() for s in configured if s}, key=len, reverse=True)


def _as_field(name: str, value: Any) -> Any:
    if name in _SECRETS:
        return value if isinstance(value, Secret) else Secret(value)
    if name == "keys":
        keys = {}
        for server, key in value.items():
            # Servers are compared in lower case and without the path of a URL.
            scheme, separator, rest = server.strip().lower().rpartition("://")
            address = f"{scheme}{separator}{rest.partition('/')[0]}"
            keys[address] = key if isinstance(key, Secret) else Secret(key)
        return keys
    if name in {"patience", "idle_timeout"}:
        seconds = parse_duration(value)
        if name == "idle_timeout" and not seconds:
            raise ConfigurationError(
                "An idle timeout of 0 would break every stream.", advice="Write 60s, for example."
            )
        return seconds
    if name == "home":
        return Path(value).expanduser()
    return value


def data_folder(settings: Settings) -> Path:
    """Return the folder where files are kept."""
    if settings.home is not None:
        return settings.home
    import platformdirs  # here, because it takes milliseconds

    return platformdirs.user_data_path("nbcodex", appauthor=False)
