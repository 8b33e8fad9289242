"""The options of a request: given by a user, checked, and completed from the settings.

Owns `RequestOptions`, the one object in which options travel. A new option is a field here and of
`models.Request`, a parameter where users give it, and its use in the request's body.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, cast, get_args

from nbcodex.errors import ConfigurationError
from nbcodex.models import Api, Origin, Request, Turn
from nbcodex.requests import structured_output
from nbcodex.requests.images import to_image
from nbcodex.settings import Settings, parse_duration

MAX_THREAD_NAME_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What is given for one request, beside its prompt. None: as the settings say."""

    model: str | None = None  # The model, or an alias of one
    system: str | None = None  # Instructions that precede the prompt
    max_output: int | None = None  # Upper bound on output tokens, reasoning included
    effort: str | None = None  # Reasoning effort, in the server's words
    params: Mapping[str, Any] | None = None  # Further parameters of the API
    patience: str | float | None = None  # Seconds, or a text such as ``10m``
    api: str | None = None  # Which API to use
    api_base: str | None = None  # Another server
    reuse: bool | None = None  # Whether the answer to an equal request in the journal is acceptable
    # Whether the server keeps the answer, so that a broken stream can be continued
    durable: bool | None = None
    schema: object = None  # A type, or a JSON schema as a mapping
    images: Iterable[Any] | None = None  # Anything that `nbcodex.requests.images.to_image` accepts
    thread: str | None = None  # The conversation that the answer joins

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Return the options among the arguments of a function, such as its `locals()`."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments})

    def given(self) -> dict[str, Any]:
        """Return the options that say something, as keyword arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v for name, v in values.items() if v is not None and v is not False}


def build_request(
    prompt: str,
    settings: Settings,
    options: RequestOptions = RequestOptions(),
    *,
    origin: Origin | None = None,
    turns: Iterable[Turn] = (),
) -> Request:
    """Return the request that a prompt and its options make.

    Raises
    ------
    ConfigurationError
        If an option is invalid; nothing is sent.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigurationError("The prompt is empty.", advice="Write what you want to know.")
    _check_types(options)
    api = options.api or settings.api
    if api not in get_args(Api):
        raise ConfigurationError(
            f"{api[:40]!r} is not an API.", advice=f"Use one of {', '.join(get_args(Api))}."
        )
    if options.thread is not None and not is_thread_name(options.thread):
        raise ConfigurationError(
            f"A thread's name has 1 to {MAX_THREAD_NAME_CHARS} printable characters.",
            advice="Such as 'plots'.",
        )
    # An alias is resolved here, once, so that the journal and the limits know the real model.
    model = options.model or settings.model
    patience = settings.patience if options.patience is None else parse_duration(options.patience)
    return Request(
        prompt=prompt,
        model=settings.aliases.get(model, model) if model else None,
        system=options.system,
        images=tuple(map(to_image, () if options.images is None else options.images)),
        turns=tuple(turns),
        thread=options.thread,
        schema=structured_output.to_schema(options.schema),
        max_output=options.max_output,
        effort=options.effort,
        params=dict(options.params or {}),
        api=cast(Api, api),
        api_base=options.api_base,
        patience=patience,
        reuse=settings.reuse if options.reuse is None else options.reuse,
        durable=bool(options.durable),
        origin=origin or Origin(),
    )


def is_thread_name(name: str) -> bool:
    """Return whether `name` can be that of a conversation."""
    return bool(name.strip()) and name.isprintable() and len(name) <= MAX_THREAD_NAME_CHARS


def _check_types(options: RequestOptions) -> None:
    """Raise a ConfigurationError where an option has the wrong type: users pass anything."""
    for name in ("model", "system", "effort", "api", "api_base", "thread"):
        value = getattr(options, name)
        if not isinstance(value, str | None):
            raise ConfigurationError(f"{name} must be a text, not {type(value).__name__}.")
    bound: object = options.max_output
    is_number = isinstance(bound, int) and not isinstance(bound, bool) and bound >= 1
    if bound is not None and not is_number:
        raise ConfigurationError("max_output must be a number of tokens, 1 or more.")
    if not isinstance(options.params, Mapping | None):
        raise ConfigurationError("params must be a mapping of API parameters, such as a dict.")
    if not isinstance(options.patience, str | int | float | None):
        raise ConfigurationError("patience must be a number of seconds, or a text such as '10m'.")
    images: object = options.images
    if isinstance(images, str | bytes) or not isinstance(images, Iterable | None):
        raise ConfigurationError("images must be a list of images.", advice="Write [image].")
