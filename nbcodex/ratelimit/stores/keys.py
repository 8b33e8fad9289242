"""What buckets are called where many can read it: names that tell nothing, the same on all hosts.

A slow hash of what all who share a bucket know, so nothing has to be agreed upon, nor can be lost;
a weak API key behind it cannot be tried out cheaply. Must not know the store.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from nbcodex.models import Limit
from nbcodex.ratelimit.shares import Share, Shared
from nbcodex.ratelimit.window import Window

_SALT = b"nbcodex, a bucket's name in Redis"

CHECK = "nbcodex:{check}"
"""The key of no bucket, on which a store is tried out."""


@cache
def key_of(name: str) -> str:
    """Return the key of a bucket: in braces its tag, by which a cluster keeps together what is one.

    The key ends in the layout of a bucket, so that two versions do not undo each other's work.
    """
    tag = hashlib.scrypt(name.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=16).hex()
    return f"nbcodex:{{{tag}}}:{_layout()}"


@cache
def _layout() -> str:
    """Return a name for how a bucket is packed."""
    return hashlib.blake2b(
        _form([Shared(), Share(), Window("tokens", 0.0), Limit()]).encode(), digest_size=4
    ).hexdigest()


def _form(value: Any) -> str:
    if is_dataclass(value):
        return f"({' '.join(f.name + _form(getattr(value, f.name)) for f in fields(value))})"
    return "".join(map(_form, value)) if isinstance(value, list) else ""
