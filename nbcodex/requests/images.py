"""Images that accompany a prompt: files, bytes, and objects that can draw themselves.

Owns which formats are sent as they are, and how large an image may be. Imports no imaging library:
objects are recognized by their methods, and a value that has them has brought its library along.
"""

from __future__ import annotations

import io
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Image

# OpenAI's limit for years; the base64 that is sent is a third larger.
MAX_IMAGE_BYTES = 20 * 2**20

_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}  # those of Pillow that PNG can hold


def to_image(value: Any) -> Image:
    """Return an image as it is sent.

    Parameters
    ----------
    value : Image, bytes, str, Path or object
        A file's contents, its path, a matplotlib figure or axes, a PIL image, or anything that is
        displayed as a PNG in a notebook.

    Raises
    ------
    ConfigurationError
        If it is not an image, cannot be read, or is too large.
    """
    if isinstance(value, Image):
        return _check_size(value)
    if isinstance(value, str | Path):
        return _from_bytes(_read(Path(value)), f"The file {shorten(str(value), 100)}")
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
    return _is_figure(value) or _is_pil(value)


def media_type(data: bytes) -> str | None:
    """Return a file's media type by its first bytes; None if no server accepts it."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def _read(path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            # One byte more than allowed is enough to refuse it: the file may be a device.
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"The image {shorten(str(path), 100)} cannot be read: {shorten(why, 100)}.",
            advice="Nothing was sent. Give its path, as seen from the notebook's folder.",
        ) from None


def _from_bytes(data: bytes, what: str) -> Image:
    kind = media_type(data)
    if kind is None:
        raise ConfigurationError(
            f"{what} is not an image that can be sent: a PNG, JPEG, GIF or WebP.",
            advice="Open other formats with Pillow, and give the image itself.",
        )
    return _check_size(Image(data, kind))


def _check_size(image: Image) -> Image:
    if len(image.data) > MAX_IMAGE_BYTES:
        raise ConfigurationError(
            f"An image is larger than {MAX_IMAGE_BYTES // 2**20} MiB; nothing was sent.",
            advice="Make it smaller, such as with PIL.Image.thumbnail or a lower dpi.",
        )
    return image


def _draw(value: Any) -> bytes | None:
    """Return `value` as a file, if it can draw itself."""
    if _is_figure(value):
        return _save(value, lambda file: value.savefig(file, format="png"))
    # Axes: seaborn and pandas return them rather than the figure.
    if _has_methods(value, "get_figure", "plot"):
        return _draw(value.get_figure())
    if _is_pil(value):
        # A PNG holds neither CMYK nor floating point.
        image = value if value.mode in _PNG_MODES else value.convert("RGBA")
        return _save(value, lambda file: image.save(file, format="PNG"))
    if _has_methods(value, "_repr_png_"):
        shown = value._repr_png_()
        shown = shown[0] if isinstance(shown, tuple) else shown
        return b64decode(shown) if isinstance(shown, str) else shown
    return None


def _save(value: object, save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    try:
        save(file)
    except Exception as error:
        raise ConfigurationError(
            f"This {type(value).__name__} cannot be drawn: {shorten(str(error), 200)}.",
            advice="Nothing was sent.",
        ) from error
    return file.getvalue()


def _is_figure(value: object) -> bool:
    return _has_methods(value, "savefig", "add_subplot")


def _is_pil(value: object) -> bool:
    return _has_methods(value, "save", "tobytes", "thumbnail")


def _has_methods(value: object, *names: str) -> bool:
    # Looked up in the type: an instance of a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)
