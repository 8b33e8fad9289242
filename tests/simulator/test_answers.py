"""What is answered: text that looks like an answer, the same each time."""

from __future__ import annotations

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
from nbcodex.simulator.parsed_request import IMAGE_TOKENS, parse_request
from tests.simulator.asking import MODEL


def planned(prompt: str, **knobs: Any) -> AnswerPlan:
    """Return the answer to `prompt`."""
    return plan_answer(
        parse_request({"model": MODEL, "input": prompt}, api="responses"), Knobs(**knobs)
    )


@settings(deadline=None)
@given(st.text())
def test_tokens_joined_are_the_text(text: str) -> None:
    """No character is lost or added, whatever the text."""
    assert "".join(tokenize(text)) == text


def test_an_answer_looks_like_one() -> None:
    """A heading, the line that marks it, a list and fenced code, and all fences closed."""
    text = planned("How do buckets work?").text
    assert text.startswith("# How do buckets work\n")
    assert SIMULATED_NOTICE in text
    assert "\n- " in text
    assert "```python\n" in text
    assert text.count("```") == 2


@settings(deadline=None)
@given(st.text(min_size=1))
def test_the_same_prompt_has_the_same_answer(prompt: str) -> None:
    """Any prompt has an answer, and always the same one."""
    if "[[fault" not in prompt:
        assert planned(prompt) == planned(prompt)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_are_input_tokens(count: int) -> None:
    """Each picture counts the same in both APIs, whatever it shows; only its text is the prompt."""
    url = "data:image/png;base64," + "A" * 10_000
    responses = [{"type": "input_image", "image_url": url}] * count
    chat = [{"type": "image_url", "image_url": {"url": url}}] * count
    said = [{"role": "user", "content": [{"type": "input_text", "text": "look"}, *responses]}]
    heard = [{"role": "user", "content": [{"type": "text", "text": "look"}, *chat]}]
    for asked in (
        parse_request({"model": MODEL, "input": said}, api="responses"),
        parse_request({"model": MODEL, "messages": heard}, api="chat"),
    ):
        assert plan_answer(asked, Knobs()).input_tokens == 1 + IMAGE_TOKENS * count
        assert asked.prompt == "look"


def test_the_code_in_it_runs() -> None:
    """What looks like Python is Python."""
    code = planned("hello").text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "answer", "exec"), {"print": lambda _: None})


@pytest.mark.parametrize("tokens", [0, 1, 2, 10, 150, 800, 5_000])
def test_a_prompt_sets_the_length(tokens: int) -> None:
    """`[[tokens=N]]` gives exactly N tokens."""
    assert planned(f"Say much. [[tokens={tokens}]]").output_tokens == tokens


@pytest.mark.parametrize("text", ["yes", "", "a\n\nb [[1]]", "{}", "ä 😀 ]]"])
def test_a_prompt_sets_the_words(text: str) -> None:
    """`[[echo: text]]` gives the text and nothing else."""
    assert planned(f"Repeat this. [[echo: {text}]]").text == text


def test_a_later_turn_knows_the_one_before() -> None:
    """In a conversation, the answer names what was asked before."""
    said = [{"role": "user", "content": "about cats"}, {"role": "user", "content": "about dogs"}]
    asked = parse_request({"model": MODEL, "input": said}, api="responses")
    assert "Before that, it was *about cats*." in plan_answer(asked, Knobs()).text


def test_latency_belongs_to_the_prompt() -> None:
    """The same input has the same latency, whenever it comes; others spread around the median."""
    knobs = Knobs(latency=0.5, latency_sigma=0.6, seed=3)
    times = sorted(latency(f"prompt {n}", knobs) for n in range(999))
    assert latency("prompt 1", knobs) == latency("prompt 1", knobs)
    assert 0.4 < times[499] < 0.6
    assert times[0] < 0.2
    assert times[-1] > 1.5


def test_the_bias_changes_what_is_counted() -> None:
    """A tokenizer that counts 15% more charges 15% more for the same input."""
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
def test_an_example_has_its_schema(schema: dict[str, Any], value: Any) -> None:
    """Each construct of a schema has a value that fits it."""
    assert example_value(schema) == value


def test_a_schema_that_holds_itself_has_an_example() -> None:
    """A tree of trees ends in trees without children."""
    node = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    tree, depth = example_value(node), 0
    while tree["children"]:
        tree, depth = tree["children"][0], depth + 1
    assert (tree["children"], depth >= 1) == ([], True)
