"""When two requests have the same equality key."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from nbcodex.journal.codec import equality_key
from nbcodex.models import Image, Request, Turn

from .conftest import request

BASE = request("p", model="m", system="s", max_output=5, effort="low", params={"a": 1})


def key(asked: Any = BASE, *, base_url: str = "https://a/v1") -> bytes:
    return equality_key(asked, base_url=base_url)


def images(*data: Any) -> Any:
    return replace(BASE, images=tuple(map(Image, data)))


@pytest.mark.parametrize(
    "same",
    [
        {"id": "00000000"},
        {"created_at": 0.0},
        {"patience": 1.0},
        {"params": {"a": 1}},
    ],
)
def test_fields_that_do_not_change_the_answer_do_not_count(same: dict[str, Any]) -> None:
    assert key(replace(BASE, **same)) == key()


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "q"},
        {"model": "n"},
        {"system": None},
        {"max_output": 6},
        {"effort": "high"},
        {"params": {"a": 2}},
        {"params": {"a": "1"}},
        {"params": {"a": [1]}},
        {"params": {"a": True}},
        {"api": "chat"},
        {"turns": (Turn(prompt="u", answer="a"),)},
        {"images": (Image(b"1"),)},
    ],
)
def test_every_other_field_counts(other: dict[str, Any]) -> None:
    assert key(replace(BASE, **other)) != key()


def test_the_server_counts() -> None:
    assert key(base_url="https://b/v1") != key()
    assert key(base_url="https://a/v1/") == key()


def test_images_count_by_content() -> None:
    """The same bytes are the same image, in any type."""
    assert key(images(b"1")) == key(images(bytearray(b"1")))
    assert key(images(b"1")) != key(images(b"2"))
    assert key(images(b"1", b"2")) != key(images(b"12"))


def test_parameters_of_any_type_have_keys_of_their_own() -> None:
    strange = [{1, 2}, b"x", "\ud800", float("nan"), 2**80, {"b": {"c": None}}, ("t",), object()]
    keys = {key(replace(BASE, params={"a": value})) for value in strange}
    assert len(keys) == len(strange)


def test_key_of_a_request_without_a_later_option_is_that_of_release_0_1() -> None:
    """A field that a later version adds counts only where it does not have its default."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class LaterRequest(Request):
        later: int | None = None

    values = {field.name: getattr(BASE, field.name) for field in fields(BASE)}
    assert key(LaterRequest(**values)) == key()
    assert key(LaterRequest(**values, later=7)) != key()
