"""Pictures that nobody drew: a pattern of two colours, the same each time for the same prompt."""

from __future__ import annotations

import struct
import zlib
from hashlib import blake2b

SIZE, CELL = 96, 12
"""Pixels of a side, and of a square of the pattern."""


def png(prompt: str) -> bytes:
    """Return a picture as a PNG file."""
    digest = blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
    light, dark = digest[:3], bytes(value // 3 for value in digest[3:6])
    rows = (_row(digest, light, dark, y // CELL) for y in range(SIZE))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(b"".join(rows), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _row(digest: bytes, light: bytes, dark: bytes, y: int) -> bytes:
    cells = SIZE // CELL
    mirrored = (min(x, cells - 1 - x) for x in range(cells))
    colours = (light if digest[y % 8] >> x & 1 else dark for x in mirrored)
    return b"\0" + b"".join(colour * CELL for colour in colours)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
