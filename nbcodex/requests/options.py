"""How a request is made of what a user says: checked, and completed from the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from nbcodex.errors import ConfigurationError
from nbcodex.models import Api, Image, Origin, Request, Turn
from nbcodex.requests import structured_output
from nbcodex.requests.images import picture
from nbcodex.settings import Settings, parse_duration

LONGEST_NAME = 100
"""Characters of a thread's name."""

_APIS = ("auto", "responses", "chat")


def build_request(
    prompt: str,
    settings: Settings,
    *,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: str | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool = False,
    origin: Origin | None = None,
    images: Iterable[Any] = (),
    turns: Iterable[Turn] = (),
    thread: str | None = None,
    schema: object = None,
) -> Request:
    """Return the request that a prompt and its options make.

    Raises
    ------
    ConfigurationError
        If an option makes no sense; nothing is sent.
    """
    words = {"model": model, "system": system, "effort": effort, "api": api, "api_base": api_base}
    _check(prompt, {**words, "thread": thread}, max_output, params, patience)
    if (api := api or settings.api) not in _APIS:
        raise ConfigurationError(f"There is no API {api[:40]!r}.", advice=f"One of {_APIS}.")
    if thread is not None and not is_thread(thread):
        raise ConfigurationError("A thread's name is a word or a few.", advice="Such as 'plots'.")
    return Request(
        prompt=prompt,
        model=settings.aliases.get(named, named) if (named := model or settings.model) else None,
        system=system,
        images=_pictures(images),
        turns=tuple(turns),
        thread=thread,
        schema=structured_output.to_schema(schema),
        max_output=max_output,
        effort=effort,
        params=dict(params or {}),
        api=cast(Api, api),
        api_base=api_base,
        patience=settings.patience if patience is None else parse_duration(patience),
        reuse=settings.reuse if reuse is None else reuse,
        durable=durable,
        origin=origin or Origin(),
    )


def _check(
    prompt: object,
    words: Mapping[str, object],
    max_output: object,
    params: object,
    patience: object,
) -> None:
    """Raise a ConfigurationError where an option is of a kind that it cannot be."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigurationError("The prompt is empty.", advice="Write what you want to know.")
    for name, value in words.items():
        if not isinstance(value, str | None):
            raise ConfigurationError(f"{name} is a text, not {type(value).__name__}.")
    whole = isinstance(max_output, int) and not isinstance(max_output, bool) and max_output >= 1
    if max_output is not None and not whole:
        raise ConfigurationError("max_output is a number of tokens, 1 or more.")
    if not isinstance(params, Mapping | None):
        raise ConfigurationError("params is a mapping of API parameters, such as a dict.")
    if not isinstance(patience, str | int | float | None):
        raise ConfigurationError("patience is a number of seconds, or a text such as '10m'.")


def is_thread(name: str) -> bool:
    """Whether `name` can be that of a conversation."""
    return bool(name.strip()) and name.isprintable() and len(name) <= LONGEST_NAME


def _pictures(images: Iterable[Any]) -> tuple[Image, ...]:
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise ConfigurationError("images is a list of pictures.", advice="Write [picture].")
    return tuple(map(picture, images))
