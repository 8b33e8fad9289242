"""Images: files, bytes and objects that can draw themselves, recognized by their contents."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbcodex.errors import ConfigurationError
from nbcodex.models import Image, RequestOptions
from nbcodex.requests import options
from nbcodex.requests.options import build_request, to_image
from nbcodex.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 8


class Unnamed:
    """Shows itself as a PNG, as a notebook's display objects do."""

    def _repr_png_(self) -> bytes:
        return PNG


class Broken:
    """A figure that cannot be drawn."""

    def savefig(self, file: object, *, format: str) -> None:  # noqa: A002
        raise RuntimeError("no backend")

    def add_subplot(self) -> None: ...


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0JFIF", "image/jpeg"),
        (b"GIF89a...", "image/gif"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp"),
    ],
)
def test_media_type_is_read_from_the_first_bytes(data: bytes, kind: str) -> None:
    assert to_image(data) == Image(data, kind)
    assert to_image(bytearray(data)) == Image(data, kind)


def test_file_is_read_without_regard_to_its_name(tmp_path: Path) -> None:
    path = tmp_path / "chart.txt"
    path.write_bytes(PNG)
    assert to_image(str(path)) == to_image(path) == Image(PNG, "image/png")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"BM6", "not an image that can be sent"),
        (b"", "not an image that can be sent"),
        ("nowhere.png", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read"),
        (42, "type int is not an image"),
        (None, "type NoneType is not an image"),
        (Broken(), "cannot be drawn: no backend"),
        (PNG + b"0" * options.MAX_IMAGE_BYTES, "larger than 20 MiB"),
        (Image(PNG + b"0" * options.MAX_IMAGE_BYTES), "larger than 20 MiB"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_value_that_is_not_an_image_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        to_image(value)


def test_display_object_gives_its_png() -> None:
    assert to_image(Unnamed()) == Image(PNG, "image/png")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "F", "P", "1"])
def test_pillow_images_become_png(mode: str) -> None:
    """Every mode arrives as a PNG of the same size, converted where a PNG cannot hold it."""
    pil = pytest.importorskip("PIL.Image")
    made = to_image(pil.new(mode, (3, 2)))
    assert pil.open(io.BytesIO(made.data)).size == (3, 2)
    assert made.media_type == "image/png"


def test_figures_and_axes_become_png() -> None:
    """A matplotlib figure, and axes by their figure, without pyplot or a display."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    assert to_image(figure).media_type == to_image(axes).media_type == "image/png"


def test_ask_takes_paths_bytes_and_images(tmp_path: Path) -> None:
    """`images=` of `ask` takes a list of anything that is an image, and nothing but a list."""
    (tmp_path / "a").write_bytes(PNG)
    request = build_request(
        "hi", Settings(), RequestOptions(images=[tmp_path / "a", PNG, Image(PNG)])
    )
    assert request.images == (Image(PNG),) * 3
    for wrong in ("a.png", PNG, 3):
        with pytest.raises(ConfigurationError, match="a list of images"):
            build_request("hi", Settings(), RequestOptions(images=wrong))  # type: ignore[arg-type]


def test_no_imaging_library_is_imported() -> None:
    code = (
        "import sys; from nbcodex.requests.options import to_image\n"
        f"to_image({PNG!r})\n"
        "try: to_image(object())\nexcept Exception: pass\n"
        "print(*{'PIL', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
