"""Pictures that go with a prompt: files, bytes, and what can draw itself, as `Image` records.

Owns which formats are sent as they are, and how large one may be. Imports no library of pictures:
they are told by what they can do, and a value that can do it has brought its library along.
"""

from __future__ import annotations

import io
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbcodex.errors import ConfigurationError, shorten
from nbcodex.models import Image

LARGEST = 20 * 2**20
"""Bytes of one picture: what OpenAI took for years, and 27 MB as the base64 that is sent."""

_FORMATS = "A picture is a PNG, JPEG, GIF or WebP."
_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}
"""Modes of Pillow that a PNG can hold."""


def picture(value: Any) -> Image:
    """Return a picture as it is sent.

    Parameters
    ----------
    value : Image, bytes, str, Path or object
        A file's contents, its path, a matplotlib figure or axes, a PIL image, or anything that
        shows itself as a PNG in a notebook.

    Raises
    ------
    ConfigurationError
        If it is none, cannot be read, or is too large.
    """
    if isinstance(value, Image):
        return _sized(value)
    if isinstance(value, str | Path):
        return _told(_read(Path(value)), f"The file {shorten(str(value), 100)}")
    if isinstance(value, bytes | bytearray | memoryview):
        return _told(bytes(value), "What was given as a picture")
    if (drawn := _drawn(value)) is not None:
        return _told(drawn, f"What this {type(value).__name__} draws")
    raise ConfigurationError(
        f"A {type(value).__name__} is no picture.",
        advice="Give a path, bytes, a matplotlib figure or a PIL image.",
    )


def is_drawable(value: object) -> bool:
    """Whether `value` is a matplotlib figure or a PIL image."""
    return _is_figure(value) or _is_pil(value)


def media_type(data: bytes) -> str | None:
    """Return what a file holds, by its first bytes; None if no server takes it as a picture."""
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
            return file.read(LARGEST + 1)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"The picture {shorten(str(path), 100)} cannot be read: {shorten(why, 100)}.",
            advice="Nothing was sent. Give its path, as seen from the notebook's folder.",
        ) from None


def _told(data: bytes, what: str) -> Image:
    """Return the file's contents as a picture, told by its first bytes."""
    kind = media_type(data)
    if kind is None:
        raise ConfigurationError(
            f"{what} is no picture that can be sent. {_FORMATS}",
            advice="Open others with Pillow, and give the image itself.",
        )
    return _sized(Image(data, kind))


def _sized(image: Image) -> Image:
    if len(image.data) > LARGEST:
        raise ConfigurationError(
            f"A picture is larger than {LARGEST // 2**20} MiB; nothing was sent.",
            advice="Make it smaller, such as with PIL.Image.thumbnail or a lower dpi.",
        )
    return image


def _drawn(value: Any) -> bytes | None:
    """Return `value` as a file, if it can draw itself."""
    if _is_figure(value):
        return _saved(value, lambda file: value.savefig(file, format="png"))
    if _has(value, "get_figure", "plot"):
        return _drawn(value.get_figure())
    if _is_pil(value):
        image = value if value.mode in _MODES else value.convert("RGBA")
        return _saved(value, lambda file: image.save(file, format="PNG"))
    if _has(value, "_repr_png_"):
        shown = value._repr_png_()
        shown = shown[0] if isinstance(shown, tuple) else shown
        return b64decode(shown) if isinstance(shown, str) else shown
    return None


def _saved(value: object, save: Callable[[io.BytesIO], object]) -> bytes:
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
    return _has(value, "savefig", "add_subplot")


def _is_pil(value: object) -> bool:
    return _has(value, "save", "tobytes", "thumbnail")


def _has(value: object, *names: str) -> bool:
    # Asked of the type: a proxy or a mock has every attribute.
    return all(hasattr(type(value), name) for name in names)
