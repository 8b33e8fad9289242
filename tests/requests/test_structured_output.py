"""Schemas: what is sent, how an answer is parsed, and when it is asked for once more."""

from __future__ import annotations

import json
import sys
import threading
import typing
from dataclasses import replace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, field_validator

from nbcodex.errors import (
    AnswerError,
    ConfigurationError,
    NbcodexError,
    QuotaError,
    TransportError,
    advice_for_script,
)
from nbcodex.events import Event, Failed, Finished
from nbcodex.journal import codec
from nbcodex.models import Origin, Request, Usage
from nbcodex.openai_api.answers import CompletedAnswer, TextDelta
from nbcodex.openai_api.sent_schema import sent_form
from nbcodex.ratelimit.schedule import MIN_SEND_GAP_S
from nbcodex.rendering.html import printable
from nbcodex.requests import structured_output
from nbcodex.requests.structured_output import SchemaMismatchError
from tests.scripted import STARTED, USAGE, ScriptedServices, answer, ending
from tests.virtual import run_virtual


class Pet(BaseModel):
    name: str
    legs: int = Field(default=4, ge=0)

    @field_validator("name")
    @classmethod
    def _is_no_number(cls, name: str) -> str:
        if name == "crash":
            raise ZeroDivisionError("a user's own defect")
        return name


class Owner(BaseModel):
    pets: list[Pet]
    best: Pet | None = None


class Open(BaseModel):
    ages: dict[str, int]


PET: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}}


ENDLESS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}},
    "$defs": {"a": {"$ref": "#/$defs/a"}},
}


def objects(part: Any) -> list[dict[str, Any]]:
    """Return every object's schema within a schema."""
    found = [part] if isinstance(part, dict) and part.get("type") == "object" else []
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return found + [o for i in inner for o in objects(i)]


def declared(given: object) -> Any:
    schema = structured_output.to_schema(given)
    assert schema
    return schema


def test_class_becomes_a_strict_schema() -> None:
    schema = declared(Owner)
    assert (schema.name, schema.strict, schema.model) == ("Owner", True, Owner)
    sent, is_strict = sent_form(schema)
    assert is_strict
    assert len(objects(sent)) == 2
    for part in objects(sent):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
        assert not any("default" in field for field in part["properties"].values())


def test_schema_with_open_objects_is_not_strict() -> None:
    schema = declared(Open)
    assert not schema.strict
    assert schema.definition["properties"]["ages"]["additionalProperties"] == {"type": "integer"}


def test_users_schema_is_not_changed() -> None:
    before = json.dumps(PET)
    assert sent_form(declared(PET))[0]["required"] == ["name"]
    assert declared(PET).definition == PET
    assert json.dumps(PET) == before


@pytest.mark.parametrize(
    "wrong",
    [
        "Pet",
        1,
        Pet(name="x"),
        {},
        object(),
        threading.Lock,
        {"type": "object", "x": {1, 2}},
        {"type": "nonsense"},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "string", "pattern": "("},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/Nowhere"}}},
        {"type": "array", "items": {"$ref": "https://schemas.invalid/person"}},
    ],
)
def test_value_that_is_not_a_schema_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        structured_output.to_schema(wrong)
    assert caught.value.advice


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pydantic accepts it there")
def test_typed_dict_that_pydantic_rejects_names_the_one_that_it_accepts() -> None:
    movie = typing.TypedDict("movie", {"title": str})  # noqa: UP013
    with pytest.raises(ConfigurationError) as caught:
        structured_output.to_schema(movie)
    assert caught.value.advice == "Import TypedDict from typing_extensions."


@pytest.mark.parametrize("fence", ["", "```json\n", "~~~\n", "```\n"])
def test_answer_is_parsed_with_or_without_fence(fence: str) -> None:
    text = f'{fence}{{"name": "Rex", "legs": 3}}\n{fence[:3]}'
    assert structured_output.parse_answer(declared(Pet), text) == Pet(name="Rex", legs=3)
    assert structured_output.parse_answer(declared(PET), text) == {"name": "Rex", "legs": 3}


PET_TEXT = '{"name": "Rex", "legs": 4}'


@pytest.mark.parametrize(
    "wrap",
    [
        "Here is the JSON:\n```json\n{}\n```",
        "Sure!\n{}",
        "```json\n{}\n```\nLet me know [if] you need {more}.",
        "{}\n\nI hope this helps.",
    ],
)
def test_json_in_a_sentence_is_found(wrap: str) -> None:
    for given in (Pet, Pet.model_json_schema()):
        schema = declared(given)
        found = structured_output.parse_answer(schema, wrap.replace("{}", PET_TEXT))
        assert found == structured_output.parse_answer(schema, PET_TEXT)


@pytest.mark.parametrize(
    "text",
    [
        f"{PET_TEXT} or {PET_TEXT}",  # which of the two?
        f"[{PET_TEXT}, {PET_TEXT}",  # cut
        f"First: {PET_TEXT}. Then: {PET_TEXT[:-1]}",
        f"{PET_TEXT}\n" * 250_000,  # of a model in a loop
        '{"name": "C:\\Projects \\d+", "legs": 4}',  # no escape of Markdown
    ],
)
def test_ambiguous_or_cut_json_is_not_taken(text: str) -> None:
    with pytest.raises(structured_output.SchemaMismatchError):
        structured_output.parse_answer(declared(Pet), text)


@pytest.mark.parametrize(
    "schema", [structured_output.ANY_JSON, structured_output.to_schema(list[int])]
)
def test_citation_is_not_an_answer(schema: Any) -> None:
    with pytest.raises(structured_output.SchemaMismatchError):
        structured_output.parse_answer(schema, "I could not find this [1].")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "one\ntwo\tthree"}', "one\ntwo\tthree"),
        (r'{"a": "\*bold\* \_x\_ \\"}', "*bold* _x_ \\"),
    ],
)
def test_json_with_raw_breaks_or_markdowns_backslashes_is_read(text: str, value: str) -> None:
    definition = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert structured_output.parse_answer(declared(definition), text) == {"a": value}


@pytest.mark.parametrize("wrap", [json.dumps, "[{}]".format, lambda text: json.dumps(f"[{text}]")])
def test_answer_that_is_encoded_twice_or_in_a_list_is_parsed(wrap: Any) -> None:
    text = wrap('{"name": "Rex", "legs": 3}')
    assert structured_output.parse_answer(declared(Pet), text) == Pet(name="Rex", legs=3)
    with pytest.raises(SchemaMismatchError):
        structured_output.parse_answer(declared(Pet), wrap('{"legs": 3}'))


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        (Pet, "Rex", "Invalid JSON"),
        (Pet, '{"name": "Rex", "legs": -1}', "legs"),
        (Pet, '{"name": "crash"}', "ZeroDivisionError"),
        (PET, "[1]", "a list, not of the type object"),
        (ENDLESS, '{"a": 1}', "could not be checked"),
        ({**PET, "required": ["name"]}, "{}", "'name' is a required property"),
        (PET, '{"name": NaN}', "NaN"),
        (PET, "[" * 200_000, "not valid JSON"),
        (PET, "9" * 10_000, "not valid JSON"),
    ],
)
def test_mismatch_is_described_briefly(given: object, text: str, message: str) -> None:
    with pytest.raises(SchemaMismatchError, match=message) as caught:
        structured_output.parse_answer(declared(given), text)
    assert len(str(caught.value)) < 700


def test_journal_stores_schema_without_its_class() -> None:
    request = Request(prompt="?", schema=declared(Pet))
    back = codec.decode(Request, codec.encode(request))
    assert back is not None
    assert back.schema is not None
    assert back.schema == request.schema
    assert back.schema.model is None


@pytest.mark.parametrize(
    ("given", "good", "value", "bad"),
    [
        (Pet, '{"name": "Rex", "legs": null}', {"name": "Rex"}, '{"name": 1}'),
        (list[Pet], '{"value": [{"name": "Rex"}]}', [{"name": "Rex"}], '{"value": {}}'),
        (Literal["a", "b"], '{"value": "a"}', "a", '{"value": "c"}'),
    ],
)
def test_schema_of_the_journal_validates_without_the_class(
    given: object, good: str, value: object, bad: str
) -> None:
    kept = codec.decode(Request, codec.encode(Request(prompt="?", schema=declared(given))))
    assert kept is not None
    schema = kept.schema
    assert structured_output.parse_answer(schema, good) == value
    with pytest.raises(SchemaMismatchError):
        structured_output.parse_answer(schema, bad)


# Requests with a schema.


def run_request(*attempts: Any, **asked: Any) -> tuple[list[Event], ScriptedServices]:
    asked = {"prompt": "Which?", "schema": declared(Pet), **asked}

    async def main() -> tuple[list[Event], ScriptedServices]:
        scripted = ScriptedServices(*attempts)
        return await scripted.run(Request(**asked)), scripted

    return run_virtual(main())


GOOD, BAD = '{"name": "Rex", "legs": 3}', '{"name": "Rex", "legs": -1}'


def test_reply_holds_the_validated_instance() -> None:
    received, _ = run_request(answer(GOOD))
    assert isinstance(ending(received), Finished)
    assert ending(received).reply.parsed == Pet(name="Rex", legs=3)


def test_mismatch_is_repaired_once() -> None:
    """The second request holds the first answer and what is wrong; tokens are added up."""
    received, scripted = run_request(answer(BAD), [5.0, *answer(GOOD)])
    (_, first), (_, second) = scripted.api_client.seen
    assert (first.prompt, second.turns[0].prompt, second.turns[0].answer) == (
        "Which?",
        "Which?",
        BAD,
    )
    assert "legs" in second.prompt
    reply = ending(received).reply
    assert reply.parsed == Pet(name="Rex", legs=3)
    assert reply.usage == Usage(input_tokens=20, output_tokens=10)
    assert "asked again" in reply.notes[0]
    assert reply.waited == pytest.approx(5.0 + MIN_SEND_GAP_S)  # paid from the patience
    assert reply.queued == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("attempts", "asked", "message"),
    [
        ((answer(BAD), answer(BAD)), {}, "asked twice"),
        ((answer(BAD),), {"patience": 0.0}, "does not fit"),
        ((answer(BAD), [QuotaError("No credit.")]), {}, "could not be asked again: No credit"),
        ((answer(BAD), [TransportError("cut")] * 9), {"patience": 0.1}, "could not be asked"),
        ((answer("no"),), {"schema": structured_output.ANY_JSON}, "does not fit JSON"),
    ],
)
def test_second_mismatch_fails_and_keeps_the_answer(
    attempts: Any, asked: Any, message: str
) -> None:
    received, _ = run_request(*attempts, **asked)
    last = ending(received)
    assert isinstance(last, Failed)
    assert isinstance(last.error, AnswerError)
    assert message in str(last.error)
    assert last.reply.text in (BAD, "no")
    assert last.reply.usage.output_tokens in (5, 10)
    assert last.reply.notes == ("not what was asked for",)  # this says all of it
    assert not last.reply


def cut(text: str, **more: Any) -> list[Any]:
    fields = {"usage": USAGE, "model": "m", "cut": None, "response_id": None, **more}
    return [STARTED, *([TextDelta(text)] if text else []), CompletedAnswer(text=text, **fields)]


def without_usage(text: str) -> list[Any]:
    return cut(text, usage=Usage())


def estimate(text: str) -> Usage:
    received, _ = run_request(without_usage(text), patience=0.0)
    usage: Usage = ending(received).reply.usage
    return usage


@pytest.mark.parametrize("second", [GOOD, BAD])
def test_estimated_usage_is_that_of_both_answers(second: str) -> None:
    """If the server states none."""
    received, _ = run_request(without_usage(BAD * 9), without_usage(second))
    usage, first = ending(received).reply.usage, estimate(BAD * 9)
    assert usage.estimated
    assert (usage.output_tokens or 0) == (first.output_tokens or 0) + (
        estimate(second).output_tokens or 0
    )
    # The second prompt holds the first prompt and its answer.
    assert (usage.input_tokens or 0) > 2 * (first.input_tokens or 0) + (first.output_tokens or 0)


@pytest.mark.parametrize("second", [[QuotaError("No credit.")], [60.0, *answer(GOOD)]])
@pytest.mark.parametrize("first", [answer(BAD), without_usage(BAD)])
def test_usage_of_the_first_answer_is_counted_without_a_second(first: Any, second: Any) -> None:
    async def main() -> list[Event]:
        scripted = ScriptedServices(first, second)
        return await scripted.run(Request(prompt="Which?", schema=declared(Pet)), (5.0, "stop"))

    reply = ending(run_virtual(main())).reply
    assert reply.usage.total_tokens == (
        15 if first[-1].usage == USAGE else estimate(BAD).total_tokens
    )


def test_advice_about_an_unfit_answer_is_for_the_place_where_it_is_shown() -> None:
    asked = Request(prompt="?", schema=declared(Pet))
    with pytest.raises(AnswerError) as caught:
        structured_output.parse_final_answer(asked, "no")
    assert "The answer: Invalid JSON" in str(caught.value)
    assert "-o" in caught.value.advice
    assert advice_for_script(caught.value.advice) == "Its text is kept in this error's `reply`."
    row = replace(asked, origin=Origin(map_id="m1"))
    with pytest.raises(AnswerError) as caught:
        structured_output.parse_final_answer(row, "no")
    assert "row's Reply" in caught.value.advice
    assert advice_for_script(caught.value.advice) == caught.value.advice


@pytest.mark.parametrize("text", ["\U0003fffd", "\ue000"])
def test_character_that_this_python_does_not_know_is_an_answer(text: str) -> None:
    """Such as an emoji of a later Unicode version, or one for private use."""
    received, _ = run_request(cut(text), schema=None)
    assert ending(received).reply.text == printable(text) == text


@pytest.mark.parametrize(
    ("attempt", "asked", "message", "notes"),
    [
        (
            cut("I will not.", declined=True),
            {},
            "The model refuses: I will not.",
            ("the model refuses",),
        ),
        (cut('{"name": ', cut="max_output_tokens"), {}, "Raise --max-output", ()),
        (cut('{"name": ', cut="max_answer"), {}, "Rephrase the prompt", ()),  # the model loops
        (cut("", cut="content_filter"), {"schema": None}, "content filter withheld", ()),
        (cut("", cut="content_filter"), {}, "content filter withheld", ()),
    ],
)
def test_refusal_cut_or_filtered_answer_is_not_repaired(
    attempt: Any, asked: Any, message: str, notes: tuple[str, ...]
) -> None:
    received, scripted = run_request(attempt, **asked)
    assert message in str(ending(received).error)
    assert ending(received).reply.notes == notes
    assert len(scripted.api_client.seen) == 1


def test_refusal_without_schema_is_an_answer_with_a_note() -> None:
    received, _ = run_request(cut("I will not.", declined=True), schema=None)
    assert ending(received).reply
    assert ending(received).reply.notes == ("the model refuses",)


def test_answer_cut_by_max_output_is_finished() -> None:
    received, _ = run_request(cut("Half of", cut="max_output_tokens"), schema=None)
    assert ending(received).reply.cut == "max_output_tokens"
    assert ending(received).reply


@pytest.mark.parametrize(
    ("text", "reason", "message", "notes"),
    [
        ("", None, "empty", ("the answer is empty",)),
        (" \n", None, "empty", ("the answer is empty",)),
        ("\u200b\x00\u2028", None, "empty", ("the answer is empty",)),
        ("", "max_output_tokens", "Raise --max-output", ("the answer is empty",)),
        ("Half of", "content_filter", "the rest of the answer", ()),
        ("Half of", "banana", "banana", ()),
        ("Half of", "tool_calls", "call", ("the model asked for a function call",)),
    ],
)
def test_answer_that_is_no_success_fails_once_and_keeps_its_text(
    text: str, reason: str | None, message: str, notes: tuple[str, ...]
) -> None:
    received, scripted = run_request(cut(text, cut=reason), schema=None)
    assert message in str(ending(received).error)
    assert not ending(received).reply
    assert ending(received).reply.notes == notes
    assert ending(received).reply.text == text
    assert len(scripted.api_client.seen) == 1


def test_stop_ends_a_repair() -> None:
    async def main() -> list[Event]:
        scripted = ScriptedServices(answer(BAD), [60.0, *answer(GOOD)])
        return await scripted.run(Request(prompt="?", schema=declared(Pet)), (5.0, "stop"))

    assert ending(run_virtual(main())).reply.status == "interrupted"


def test_answer_error_is_an_nbcodex_error() -> None:
    assert issubclass(AnswerError, NbcodexError)
