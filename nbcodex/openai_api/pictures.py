"""Pictures that a model makes: how they are asked for, and how they come. Pure.

The tool ``image_generation`` is the Responses API's, as OpenAI's guide to image generation shows
it: the picture is the `result` of an item ``image_generation_call``, in base64.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterable, Mapping
from typing import Any

from nbcodex.models import Image

TOOL = "image_generation"
CALL = "image_generation_call"
CANNOT = (
    "Pictures need the Responses API's tool image_generation: this model or server may lack it."
)

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
)


def params() -> dict[str, Any]:
    """Return the parameters that let the model make a picture, and nothing else."""
    return {"tools": [{"type": TOOL}], "tool_choice": {"type": TOOL}}


def wanted(params: Mapping[str, Any]) -> bool:
    """Whether a request's parameters ask for pictures."""
    tools = params.get("tools")
    given = tools if isinstance(tools, list | tuple) else ()
    return any(isinstance(tool, Mapping) and tool.get("type") == TOOL for tool in given)


def of_items(items: Iterable[object]) -> list[Image]:
    """Return the pictures among the items of an answer; what is no picture is left out.

    What a file holds is told by its own first bytes, for the server may say anything.
    """
    found = []
    for item in items:
        if isinstance(item, Mapping) and item.get("type") == CALL:
            data = _decoded(item.get("result"))
            if kind := _media_type(data):
                found.append(Image(data, kind))
    return found


def _decoded(value: object) -> bytes:
    try:
        return b64decode(value, validate=True) if isinstance(value, str) else b""
    except (ValueError, binascii.Error):
        return b""


def _media_type(data: bytes) -> str | None:
    for signature, at, kind in _SIGNATURES:
        if data[at : at + len(signature)] == signature:
            return kind
    return None
