"""Templates of maps: which braces are fields, and which belong to the user."""

from __future__ import annotations

from typing import Any

import pandas
import pytest

from nbcodex.errors import ConfigurationError
from nbcodex.templating import Template

ROW: dict[str, Any] = {
    "text": "hello",
    "price": 3.14159,
    "item": ["a", {"b": 1}],
    "when": pandas.Timestamp("2026-11-24"),
    "Product name": "lamp",
    "nothing": None,
    "nan": float("nan"),
    "na": pandas.NA,
}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Say {text}", "Say hello"),
        ("{text!r} {text:>7}", "'hello'   hello"),
        ("{price:.2f}", "3.14"),
        ("{} {item[0]} {[0]} {item[1][b]}", "['a', {'b': 1}] a a 1"),
        ("{when.year}", "2026"),
        ("{Product name}", "lamp"),
        ("{{text}}", "{text}"),
        ('Answer as {"text": "…"}', 'Answer as {"text": "…"}'),
        ('{"a": {"b": "{text}"}}', '{"a": {"b": "hello"}}'),
        (r"\frac{text}{price} and ${text}", r"\frac{text}{price} and ${text}"),
        ("{'foo': 1} {1} { text } {a, b} {foo: bar}", "{'foo': 1} {1} { text } {a, b} {foo: bar}"),
        ("no braces", "no braces"),
    ],
)
def test_fields_are_filled_and_other_braces_kept(template: str, prompt: str) -> None:
    assert Template(template, ROW).fill(ROW) == prompt


def test_braces_in_values_are_not_filled() -> None:
    assert Template("{a}{b}").fill({"a": "{b}", "b": "x"}) == "{b}x"


@pytest.mark.parametrize("name", ["nothing", "nan", "na"])
def test_missing_value_is_an_error(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no value in its column"):
        Template(f"{{{name}}}").fill(ROW)


@pytest.mark.parametrize("template", ["{text.nope}", "{item[9]}", "{text:d}", "{item[1][c]}"])
def test_field_that_a_value_does_not_have_is_an_error(template: str) -> None:
    with pytest.raises(ConfigurationError, match="failed"):
        Template(template).fill(ROW)


def test_missing_column_error_lists_the_present_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Template("{lang} {text}").check_columns(["text", "id"])
    assert "has {lang}, the data has {text}, {id}" in caught.value.message
    assert "{{name}}" in caught.value.advice
