"""Templates of maps: which braces are fields, and which belong to the user."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pandas
import pytest

from nbcodex.errors import ConfigurationError
from nbcodex.notebook.variables import fill
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


class Tensor:
    """A tensor as of PyTorch, whose text is shortened."""

    shape = (3,)

    def tolist(self) -> list[float]:
        return [0.1, 0.2, 0.3]

    def __str__(self) -> str:
        return "tensor([0.1, ..., 0.3])"


FLOATS = numpy.arange(1500) / 3


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (FLOATS, list(FLOATS)),
        (FLOATS.reshape(500, 3), list(FLOATS)),
        ([FLOATS], list(FLOATS)),
        ({"x": FLOATS}, list(FLOATS)),
        ([pandas.Series(FLOATS)], list(FLOATS)),
        ([pandas.DataFrame({"c": FLOATS})], list(FLOATS)),
        (list(range(5000)), list(range(5000))),
        (Tensor(), [0.1, 0.2, 0.3]),
        ((Tensor(),), [0.1, 0.2, 0.3]),
    ],
)
def test_data_is_sent_whole_with_exact_numbers(value: Any, numbers: list[float]) -> None:
    with numpy.printoptions(precision=2, suppress=True, threshold=5):
        texts = [Template("{v}").fill({"v": value}), fill("{v}", {"v": value}).text]
    for text in texts:
        assert "..." not in text
        assert [float(number) for number in re.findall(r"\d[\d.e+-]*", text)] == numbers


def test_frames_in_cells_of_a_map_are_tables_that_say_what_is_left_out() -> None:
    series = pandas.Series(range(100), name="n")
    for value in (series, series.to_frame()):
        text = Template("Sum: {v}").fill({"v": value})
        assert text.startswith("Sum: \n\n| n |\n| --- |\n| 0 |\n")
        assert text.endswith("\n… 40 more rows\n")
        assert text == fill("Sum: {v}", {"v": value}).text


class LargeTensor(Tensor):
    shape = (1000, 100)  # type: ignore[assignment]


@pytest.mark.parametrize("spec", ["", "!r"])
@pytest.mark.parametrize("value", [numpy.zeros((1000, 100)), LargeTensor()])
def test_array_that_is_too_large_for_a_prompt_is_an_error_with_its_size(
    spec: str, value: Any
) -> None:
    template, values = f"{{v{spec}}}", {"v": value}
    with pytest.raises(ConfigurationError, match=r"\(1000, 100\) has 100,000 values"):
        Template(template).fill(values)
    with pytest.raises(ConfigurationError, match=r"\(1000, 100\) has 100,000 values"):
        fill(template, values)
    assert "..." not in fill("{v!r}", {"v": FLOATS}).text
