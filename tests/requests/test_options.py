"""Numbers of any library are options, as Python's own are."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbcodex
from nbcodex.errors import ConfigurationError
from nbcodex.models import Request, RequestOptions
from nbcodex.requests.options import build_request
from nbcodex.settings import Settings


def request_with(**options: Any) -> Request:
    return build_request("hi", Settings(), RequestOptions(**options))


@pytest.mark.parametrize(
    "value", [np.int64(50), np.uint8(50), np.float32(50), 50.0, np.array(50), Fraction(50)]
)
def test_max_output_can_be_any_whole_number(value: Any) -> None:
    max_output = request_with(max_output=value).max_output
    assert (max_output, type(max_output)) == (50, int)


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, np.float64("nan"), np.float64("inf"), np.True_, True, "50", Decimal(50)]
)
def test_invalid_max_output_names_the_value_and_its_type(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_output must be a whole number") as caught:
        request_with(max_output=value)
    assert type(np.asarray(value).item()).__name__ in caught.value.message


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (np.int64(7), 7),
        (np.float32(0.2), 0.2),
        (np.float64(0.1), 0.1),
        (np.True_, True),
        (Fraction(1, 2), 0.5),
        (np.array(["END"]), ["END"]),
        (pd.Series([1, 2]), [1, 2]),
        ({"a": [np.int8(1), {"b": np.False_}]}, {"a": [1, {"b": False}]}),
    ],
)
def test_parameters_of_numpy_are_sent_as_json(value: Any, sent: Any) -> None:
    params = request_with(params={"x": value}).params
    assert json.dumps(params) == json.dumps({"x": sent})


@pytest.mark.parametrize(
    ("value", "why"),
    [(Decimal(1), "Decimal"), (np.datetime64("2026-01-01"), "date"), (np.float32("nan"), "range")],
)
def test_parameter_that_is_not_json_is_named_with_its_type(value: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match="The parameter 'seed' is not JSON") as caught:
        request_with(params={"seed": value})
    assert why in caught.value.message
    with pytest.raises(ConfigurationError, match=f"The schema is not JSON .*{why}"):
        request_with(schema={"minimum": value})


def test_schema_can_hold_numbers_of_numpy() -> None:
    values = pd.Series([3, 9])
    schema = request_with(schema={"enum": list(values.unique()), "minimum": values.min()}).schema
    assert schema
    assert json.dumps(schema.definition) == '{"enum": [3, 9], "minimum": 3}'


@pytest.mark.parametrize("value", [np.float32(5), np.int64(5), np.array(5.0)])
def test_patience_can_be_any_number_of_seconds(value: Any) -> None:
    assert request_with(patience=value).patience == 5.0


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_truth_values_of_numpy_become_those_of_python(value: Any) -> None:
    assert type(request_with(reuse=value, durable=value).reuse) is bool
    assert type(request_with(reuse=value, durable=value).durable) is bool


def test_limit_of_a_map_can_be_any_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NBCODEX_MODEL", "gpt-5.6-sol")
    for limit in (np.int64(1), 1.0):
        assert nbcodex.map("{}", ["a", "b"], limit=limit, dry_run=True)
    with pytest.raises(ConfigurationError, match=r"limit must be .* rows, .* 1\.5 \(float\)"):
        nbcodex.map("{}", ["a", "b"], limit=1.5, dry_run=True)
