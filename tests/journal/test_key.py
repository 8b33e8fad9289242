"""When two requests are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbcodex.journal.codec import equality_key

from .conftest import request

BASE = request("p", model="m", system="s", max_output=5, effort="low", params={"a": 1})


def key(asked: Any = BASE, **options: Any) -> bytes:
    return equality_key(asked, **{"base_url": "https://a/v1", "thread": [["u", "a"]], **options})


@pytest.mark.parametrize(
    "same",
    [
        {"id": "00000000"},
        {"created_at": 0.0},
        {"patience": 1.0},
        {"params": {"a": 1}},
    ],
)
def test_what_does_not_change_the_question_does_not_count(same: dict[str, Any]) -> None:
    """Id, time and patience do not count, nor the order of parameters."""
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
    ],
)
def test_every_option_counts(other: dict[str, Any]) -> None:
    """A changed option is another question."""
    assert key(replace(BASE, **other)) != key()


@pytest.mark.parametrize(
    "other",
    [
        {"base_url": "https://b/v1"},
        {"thread": []},
        {"thread": [["u", "b"]]},
        {"images": [b"1"]},
        {"model": "n"},
        {"api": "responses"},
    ],
)
def test_all_around_the_request_counts(other: dict[str, Any]) -> None:
    """Base URL, thread so far, images, and what was decided for the request make a difference."""
    assert key(**other) != key()


def test_images_count_by_content() -> None:
    """The same bytes are the same image, however they are held."""
    assert key(images=[b"1"]) == key(images=[bytearray(b"1")])
    assert key(images=[b"1"]) != key(images=[b"2"])
    assert key(images=[b"1", b"2"]) != key(images=[b"12"])


def test_anything_can_be_in_the_parameters() -> None:
    """Whatever a user passes on, a key is found, and never equals that of something else."""
    strange = [{1, 2}, b"x", "\ud800", float("nan"), 2**80, {"b": {"c": None}}, ("t",), object()]
    keys = {key(replace(BASE, params={"a": value})) for value in strange}
    assert len(keys) == len(strange)
