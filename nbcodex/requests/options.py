"""The options of a request: given by a user, checked, and completed from the settings.

Owns `RequestOptions`, the one object in which options travel, and the conversion of images. A new
option is a field here and of `models.Request`, a parameter where users give it, and its use in the
request's body.
"""

from __future__ import annotations

import io
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, cast, get_args

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Api, Image, Origin, Request, Turn
from nbcodex.requests import structured_output
from nbcodex.settings import Settings, parse_duration

MAX_THREAD_NAME_CHARS = 100
MAX_IMAGE_BYTES = 20 * 2**20  # OpenAI's limit for years; the base64 that is sent is a third larger

_FIGURE_METHODS, _PIL_METHODS = ("savefig", "add_subplot"), ("save", "tobytes", "thumbnail")
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}  # those of Pillow that PNG can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What is given for one request, beside its prompt. None: as the settings say."""

    model: str | None = None  # the model, or an alias of one
    system: str | None = None  # instructions that precede the prompt
    max_output: int | None = None  # upper bound on output tokens, reasoning included
    effort: str | None = None  # reasoning effort, in the server's words
    params: Mapping[str, Any] | None = None  # further parameters of the API
    patience: str | float | None = None  # seconds, or a string such as ``10m``
    api: str | None = None
    api_base: str | None = None  # another server
    reuse: bool | None = None  # whether the answer to an equal request in the journal is acceptable
    durable: bool | None = None  # whether the server keeps the answer, to continue a broken stream
    schema: object = None  # a type, or a JSON schema as a mapping
    images: Iterable[Any] | None = None  # anything that `to_image` accepts
    thread: str | None = None  # the conversation that the answer joins

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Return the options among the arguments of a function, such as its `locals()`."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})


def build_request(
    prompt: str,
    settings: Settings,
    options: RequestOptions = RequestOptions(),
    *,
    origin: Origin | None = None,
    turns: Iterable[Turn] = (),
) -> Request:
    """Return the request of a prompt and its options, or raise a ConfigurationError."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigurationError("The prompt is empty.", advice="Write what you want to know.")
    _check_types(options)
    api = options.api or settings.api
    if api not in get_args(Api):
        raise ConfigurationError(
            f"{api[:40]!r} is not an API.", advice=f"Use one of {', '.join(get_args(Api))}."
        )
    if options.thread is not None:
        check_thread_name(options.thread)
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


def check_thread_name(name: str) -> None:
    """Raise a ConfigurationError if `name` cannot be that of a conversation."""
    if not (name.strip() and name.isprintable() and len(name) <= MAX_THREAD_NAME_CHARS):
        raise ConfigurationError(
            f"A thread's name has 1 to {MAX_THREAD_NAME_CHARS} printable characters.",
            advice="Such as 'plots'.",
        )


def _check_types(options: RequestOptions) -> None:
    """Raise a ConfigurationError where an option has the wrong type: users pass anything."""
    for name in ("model", "system", "effort", "api", "api_base", "thread"):
        value = getattr(options, name)
        if not isinstance(value, str | None):
            raise ConfigurationError(f"{name} must be a string, not {type(value).__name__}.")
    bound: object = options.max_output
    is_number = isinstance(bound, int) and not isinstance(bound, bool) and bound >= 1
    if bound is not None and not is_number:
        raise ConfigurationError("max_output must be a number of tokens, 1 or more.")
    if not isinstance(options.params, Mapping | None):
        raise ConfigurationError("params must be a mapping of API parameters, such as a dict.")
    if not isinstance(options.patience, str | int | float | None):
        raise ConfigurationError("patience must be a number of seconds, or a string such as '10m'.")
    images: object = options.images
    if isinstance(images, str | bytes) or not isinstance(images, Iterable | None):
        raise ConfigurationError("images must be a list of images.", advice="Write [image].")


# Images. No imaging library is imported: objects are recognized by their methods, and a value that
# has them has brought its library along.


def to_image(value: Any) -> Image:
    """Return an image as it is sent; raise a ConfigurationError if it cannot be.

    `value` is an `Image`, a file's contents or its path, a matplotlib figure or axes, a PIL image,
    or anything that a notebook displays as a PNG.
    """
    if isinstance(value, Image):
        return _check_size(value)
    if isinstance(value, str | Path):
        try:
            with Path(value).expanduser().open("rb") as file:
                # One byte more than allowed is enough to refuse it: the file may be a device.
                data = file.read(MAX_IMAGE_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"The image {shorten(str(value), 100)} cannot be read: {shorten(why, 100)}.",
                advice="Nothing was sent. Give its path, as seen from the notebook's folder.",
            ) from None
        return _from_bytes(data, f"The file {shorten(str(value), 100)}")
    if isinstance(value, bytes | bytearray | memoryview):
        return _from_bytes(bytes(value), "The data given")
    if (drawn := _draw(value)) is not None:
        return _from_bytes(drawn, f"The drawing of {type(value).__name__}")
    raise ConfigurationError(
        f"A value of type {type(value).__name__} is not an image.",
        advice="Give a path, bytes, a matplotlib figure or a PIL image.",
    )


def is_drawable(value: object) -> bool:
    """Return whether `value` is a matplotlib figure or a PIL image."""
    return _has_methods(value, *_FIGURE_METHODS) or _has_methods(value, *_PIL_METHODS)


def _from_bytes(data: bytes, what: str) -> Image:
    image = Image.from_bytes(data)
    if image is None:
        raise ConfigurationError(
            f"{what} is not an image that can be sent: a PNG, JPEG, GIF or WebP.",
            advice="Open other formats with Pillow, and give the image itself.",
        )
    return _check_size(image)


def _check_size(image: Image) -> Image:
    if len(image.data) > MAX_IMAGE_BYTES:
        raise ConfigurationError(
            f"An image is larger than {MAX_IMAGE_BYTES // 2**20} MiB; nothing was sent.",
            advice="Make it smaller, such as with PIL.Image.thumbnail or a lower dpi.",
        )
    return image


def _draw(value: Any) -> bytes | None:
    """Return `value` as a file, if it can draw itself."""
    if _has_methods(value, *_FIGURE_METHODS):
        return _save(value, value.savefig)
    # Axes: seaborn and pandas return them rather than the figure.
    if _has_methods(value, "get_figure", "plot"):
        return _draw(value.get_figure())
    if _has_methods(value, *_PIL_METHODS):
        # A PNG holds neither CMYK nor floating point.
        image = value if value.mode in _PNG_MODES else value.convert("RGBA")
        return _save(value, image.save)
    if _has_methods(value, "_repr_png_"):
        shown = value._repr_png_()
        shown = shown[0] if isinstance(shown, tuple) else shown
        return b64decode(shown) if isinstance(shown, str) else shown
    return None


def _save(value: object, save: Callable[..., object]) -> bytes:
    file = io.BytesIO()
    try:
        save(file, format="png")
    except Exception as error:
        raise ConfigurationError(
            f"This {type(value).__name__} cannot be drawn: {shorten(str(error), 200)}.",
            advice="Nothing was sent.",
        ) from error
    return file.getvalue()


def _has_methods(value: object, *names: str) -> bool:
    # Looked up in the type: an instance of a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)
