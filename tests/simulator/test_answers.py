"""Generated answers: text, directives, latency and JSON."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcodex.simulator.generated_answers import (
    SIMULATED_NOTICE,
    AnswerPlan,
    example_value,
    latency,
    plan_answer,
    tokenize,
)
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.parsed_request import IMAGE_TOKENS, Route, parse_request
from tests.simulator.helpers import MODEL


def planned(prompt: str, **knobs: Any) -> AnswerPlan:
    """Return the answer to `prompt`."""
    return plan_answer(
        parse_request({"model": MODEL, "input": prompt}, "responses", Route(endpoint="responses")),
        Knobs(**knobs),
    )


@settings(deadline=None)
@given(st.text())
def test_joined_tokens_equal_the_text(text: str) -> None:
    assert "".join(tokenize(text)) == text


def test_answer_has_heading_notice_list_and_closed_code_fence() -> None:
    text = planned("How do buckets work?").text
    assert text.startswith("# How do buckets work?\n")
    assert SIMULATED_NOTICE in text
    assert "\n- " in text
    assert "```python\n" in text
    assert text.count("```") == 2
    sentences = [planned(f"{n} [[tokens=400]]").text.rpartition("```")[2] for n in range(20)]
    assert not any(re.search(r"\s ", text) for text in sentences)


@settings(deadline=None)
@given(st.text(min_size=1))
def test_equal_prompts_have_equal_answers(prompt: str) -> None:
    if "[[fault" not in prompt:
        assert planned(prompt) == planned(prompt)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_image_counts_the_same_tokens_in_both_apis(count: int) -> None:
    url = "data:image/png;base64," + "A" * 10_000
    responses = [{"type": "input_image", "image_url": url}] * count
    chat = [{"type": "image_url", "image_url": {"url": url}}] * count
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "look"}, *responses]}]
    chat_turns = [{"role": "user", "content": [{"type": "text", "text": "look"}, *chat]}]
    for request in (
        parse_request({"model": MODEL, "input": turns}, "responses", Route(endpoint="responses")),
        parse_request({"model": MODEL, "messages": chat_turns}, "chat", Route(endpoint="chat")),
    ):
        assert plan_answer(request, Knobs()).input_tokens == 1 + IMAGE_TOKENS * count
        assert request.prompt == "look"


def test_code_of_the_answer_is_valid_python() -> None:
    code = planned("hello").text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "answer", "exec"), {"print": lambda _: None})


@pytest.mark.parametrize("tokens", [0, 1, 2, 10, 150, 800, 5_000])
def test_tokens_directive_sets_the_length(tokens: int) -> None:
    assert planned(f"Say much. [[tokens={tokens}]]").output_tokens == tokens


@pytest.mark.parametrize("text", ["yes", "", "a\n\nb [[1]]", "{}", "ä 😀 ]]"])
def test_echo_directive_sets_the_whole_text(text: str) -> None:
    assert planned(f"Repeat this. [[echo: {text}]]").text == text


def test_answer_names_the_topic_of_the_previous_turn() -> None:
    turns = [{"role": "user", "content": "about cats"}, {"role": "user", "content": "about dogs"}]
    request = parse_request(
        {"model": MODEL, "input": turns}, "responses", Route(endpoint="responses")
    )
    assert "Before that, it was *about cats*." in plan_answer(request, Knobs()).text


def test_latency_is_fixed_for_a_prompt_and_spreads_around_the_median() -> None:
    knobs = Knobs(latency=0.5, latency_sigma=0.6, seed=3)
    times = sorted(latency(f"prompt {n}", knobs) for n in range(999))
    assert latency("prompt 1", knobs) == latency("prompt 1", knobs)
    assert 0.4 < times[499] < 0.6
    assert times[0] < 0.2
    assert times[-1] > 1.5


def test_token_bias_scales_the_counted_input() -> None:
    assert planned("x" * 4_000, token_bias=1.15).input_tokens == 1_150


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "simulated"),
        ({"enum": ["red", "green"]}, "red"),
        ({"type": ["null", "string"]}, None),
        ({"type": "array", "items": {"type": "integer", "minimum": 3}}, [3, 3]),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "boolean"}}}, True),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, 1),
        ({"$ref": "#/$defs/none"}, {"simulated": True}),
        ({}, {"simulated": True}),
    ],
)
def test_example_value_fits_its_schema(schema: dict[str, Any], value: Any) -> None:
    assert example_value(schema) == value


def test_recursive_schema_has_a_finite_example() -> None:
    node = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    tree, depth = example_value(node), 0
    while tree["children"]:
        tree, depth = tree["children"][0], depth + 1
    assert (tree["children"], depth >= 1) == ([], True)
