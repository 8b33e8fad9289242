"""Makes a request of a prompt, options and settings; checks the options, and converts images."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any, get_args

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Api, Image, Origin, Request, RequestOptions
from nbcodex.requests import structured_output
from nbcodex.settings import Settings, parse_duration
from nbcodex.templating import type_has

MAX_THREAD_NAME_CHARS = 100
MAX_IMAGE_BYTES = 20 * 2**20  # of the image's file; OpenAI long accepted no larger ones

# Methods by which a matplotlib figure and a PIL image are recognized.
_FIGURE_METHODS, _PIL_METHODS = ("savefig", "add_subplot"), ("save", "tobytes", "thumbnail")
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}  # Pillow's, which PNG can hold


def build_request(
    prompt: str,
    settings: Settings,
    options: RequestOptions | None = None,
    *,
    origin: Origin | None = None,
) -> Request:
    """Return the request, or raise a ConfigurationError if an option is invalid."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigurationError("The prompt is empty.", advice="Write what you want to know.")
    options = options or RequestOptions()
    values = {field.name: getattr(options, field.name) for field in fields(RequestOptions)}
    options = RequestOptions(**{name: plain_scalar(value) for name, value in values.items()})
    _check_types(options)
    api = options.api or settings.api
    if api not in get_args(Api):
        raise ConfigurationError(
            f"{api[:40]!r} is not an API.", advice=f"Use one of {', '.join(get_args(Api))}."
        )
    if options.thread is not None:
        check_thread_name(options.thread)
    given = {name: getattr(options, name) for name in values if values[name] is not None}
    # An alias is resolved here, so that the journal and the limits have the name of the model.
    model = options.model or settings.model
    patience = settings.patience if options.patience is None else parse_duration(options.patience)
    converted: dict[str, Any] = {
        "model": settings.aliases.get(model, model) if model else None,
        "images": tuple(map(to_image, () if options.images is None else options.images)),
        "schema": structured_output.to_schema(options.schema),
        "params": {
            name: json.loads(structured_output.json_text(value, f"The parameter {name!r}"))
            for name, value in (options.params or {}).items()
        },
        "max_output": to_count(options.max_output, "max_output", "tokens"),
        "api": api,
        "patience": patience,
        "reuse": settings.reuse if options.reuse is None else options.reuse,
        "origin": origin or Origin(),
    }
    return Request(prompt=prompt, **{**given, **converted})


def plain_scalar(value: Any) -> Any:
    """Return Python's own type of a number or truth value of NumPy and the like; else `value`."""
    is_scalar = type_has(value, "tolist") and getattr(value, "shape", None) == ()
    return value.tolist() if is_scalar else value


def to_count(value: Any, name: str, unit: str) -> int | None:
    """Return a whole number, 1 or more, of any type; None for None."""
    if value is None:
        return None
    value = plain_scalar(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and value >= 1 and value == value // 1:
        return int(value)
    given = f"{shorten(repr(value), 40)} ({type(value).__name__})"
    raise ConfigurationError(f"{name} must be a whole number of {unit}, 1 or more, not {given}.")


def check_thread_name(name: str) -> None:
    """Raise a ConfigurationError if `name` cannot be that of a conversation."""
    if not (name.strip() and name.isprintable() and len(name) <= MAX_THREAD_NAME_CHARS):
        raise ConfigurationError(
            f"A thread's name has 1 to {MAX_THREAD_NAME_CHARS} printable characters.",
            advice="Such as 'plots'.",
        )


def _check_types(options: RequestOptions) -> None:
    for field in fields(RequestOptions):
        name, value = field.name, getattr(options, field.name)
        if field.type == "str | None" and not isinstance(value, str | None):
            raise ConfigurationError(f"{name} must be a string, not {type(value).__name__}.")
    if not isinstance(options.params, Mapping | None):
        raise ConfigurationError("params must be a mapping of API parameters, such as a dict.")
    if not isinstance(options.patience, str | Real | None):
        raise ConfigurationError("patience must be a number of seconds, or a string such as '10m'.")
    images: object = options.images
    if isinstance(images, str | bytes) or not isinstance(images, Iterable | None):
        raise ConfigurationError("images must be a list of images.", advice="Write [image].")


# Images. No imaging library is imported: objects are recognized by their methods.


def to_image(value: Any) -> Image:
    """Return an image as it is sent; raise a ConfigurationError if it cannot be.

    `value` is an `Image`, a file's contents or its path, a matplotlib figure or axes, a PIL image,
    or anything that a notebook displays as a PNG.
    """
    image, data, source = None, b"", "The data given"
    if isinstance(value, Image):
        image = value
    elif isinstance(value, str | Path):
        source = f"The file {shorten(str(value), 100)}"
        try:
            with Path(value).expanduser().open("rb") as file:
                # One byte too many is enough to reject it: the file may be an endless device.
                data = file.read(MAX_IMAGE_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"The image {shorten(str(value), 100)} cannot be read: {shorten(why, 100)}.",
                advice="Nothing was sent. Give its path, as seen from the notebook's folder.",
            ) from None
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
    elif (png := _draw(value)) is not None:
        data, source = png, f"The drawing of {type(value).__name__}"
    else:
        raise ConfigurationError(
            f"A value of type {type(value).__name__} is not an image.",
            advice="Give a path, bytes, a matplotlib figure or a PIL image.",
        )
    image = image or Image.from_bytes(data)
    if image is None:
        raise ConfigurationError(
            f"{source} is not an image that can be sent: a PNG, JPEG, GIF or WebP.",
            advice="Open other formats with Pillow, and give the image itself.",
        )
    if len(image.data) > MAX_IMAGE_BYTES:
        raise ConfigurationError(
            f"An image is larger than {MAX_IMAGE_BYTES // 2**20} MiB; nothing was sent.",
            advice="Make it smaller, such as with PIL.Image.thumbnail or a lower dpi.",
        )
    return image


def is_drawable(value: object) -> bool:
    """Return whether `value` looks like a matplotlib figure or a PIL image."""
    return type_has(value, *_FIGURE_METHODS) or type_has(value, *_PIL_METHODS)


def _draw(value: Any) -> bytes | None:
    """Return the bytes of a PNG file, if `value` is an object that can draw itself."""
    if type_has(value, *_FIGURE_METHODS):
        return _save_as_png(value, value.savefig)
    # Axes: seaborn and pandas return them rather than the figure.
    if type_has(value, "get_figure", "plot"):
        return _draw(value.get_figure())
    if type_has(value, *_PIL_METHODS):
        # A PNG holds neither CMYK nor floating point.
        image = value if value.mode in _PNG_MODES else value.convert("RGBA")
        return _save_as_png(value, image.save)
    if type_has(value, "_repr_png_"):
        # IPython allows a pair of data and metadata, and base64 in place of bytes.
        png = value._repr_png_()
        png = png[0] if isinstance(png, tuple) else png
        return b64decode(png) if isinstance(png, str) else png
    return None


def _save_as_png(value: object, save: Callable[..., object]) -> bytes:
    file = io.BytesIO()
    try:
        save(file, format="png")
    except Exception as error:
        raise ConfigurationError(
            f"This {type(value).__name__} cannot be drawn: {shorten(str(error), 200)}.",
            advice="Nothing was sent.",
        ) from error
    return file.getvalue()
