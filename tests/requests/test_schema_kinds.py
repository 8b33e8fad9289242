"""Schemas of all kinds, from the call to a server that is as strict as OpenAI's and back."""

from __future__ import annotations

import dataclasses
import enum
import json
import threading
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, HttpUrl, RootModel, TypeAdapter
from typing_extensions import TypedDict

import nbcodex

STRICT_KEYWORDS = set(
    """type title description enum const anyOf $ref $defs properties required items format pattern
    additionalProperties multipleOf minimum maximum exclusiveMinimum exclusiveMaximum minItems
    maxItems""".split()  # noqa: SIM905
)
STRICT_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "uuid"}


def strict_problems(part: Any, root: Any, *, is_root: bool = False) -> Iterator[str]:
    """Yield what OpenAI's strict mode refuses in a schema."""
    if not isinstance(part, dict):
        yield f"{part!r} is not of type 'object'"
        return
    yield from (f"'{name}' is not permitted" for name in set(part) - STRICT_KEYWORDS)
    if is_root and (part.get("type") != "object" or "anyOf" in part):
        yield "schema must be a JSON Schema of 'type: \"object\"'"
    if "$ref" in part:
        if set(part) != {"$ref"}:
            yield "$ref cannot have keywords"
        target = root
        for step in part["$ref"].removeprefix("#").split("/")[1:]:
            target = target.get(step, {})
        if not target:
            yield f"reference {part['$ref']} cannot be resolved"
        return
    if "type" not in part and "anyOf" not in part:
        yield "schema must have a 'type' key"
    if part.get("format", "date") not in STRICT_FORMATS:
        yield f"'{part['format']}' is not a valid format"
    kinds = part.get("type")
    if "object" in (kinds if isinstance(kinds, list) else [kinds]):
        if part.get("additionalProperties") is not False:
            yield "'additionalProperties' is required to be supplied and to be false"
        if sorted(part.get("required", ())) != sorted(part.get("properties", ())):
            yield "'required' is required to include every key in properties"
    if "array" in (kinds if isinstance(kinds, list) else [kinds]) and "items" not in part:
        yield "array schema missing items"
    children = [*part.get("anyOf", ()), *part.get("properties", {}).values()]
    children += [*part.get("$defs", {}).values(), *([part["items"]] if "items" in part else [])]
    for child in children:
        yield from strict_problems(child, root)


class SchemaServer:
    """Has Chat Completions alone; refuses what strict mode refuses, else gives its answers."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.refusal = ""  # the error message for every schema that holds `refused_word`
        self.refused_word = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.sent.append(body)
                status, kind, data = outer.answer(body)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        declared = (body.get("response_format") or {}).get("json_schema")
        if declared:
            problem = ""
            if declared.get("strict"):
                found = strict_problems(declared["schema"], declared["schema"], is_root=True)
                problem = (
                    f"Invalid schema for response_format: {x}" if (x := next(found, "")) else ""
                )
            if declared["schema"].get("type") != "object":
                problem = "schema must be a JSON Schema of 'type: \"object\"'"
            if self.refusal and self.refused_word in json.dumps(declared["schema"]):
                problem = self.refusal
            if problem:
                error = {"message": problem, "type": "invalid_request_error", "code": None}
                return 400, "application/json", json.dumps({"error": error}).encode()
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        chunks = [{**base, "choices": [choice]}, {**base, "choices": [], "usage": usage}]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        return 200, "text/event-stream", f"{events}data: [DONE]\n\n".encode()

    @property
    def modes(self) -> list[str]:
        """How each request stated its schema: strict, loose, or prompt."""
        formats = [body.get("response_format") for body in self.sent]
        return [
            ("strict" if f["json_schema"]["strict"] else "loose") if f else "prompt"
            for f in formats
        ]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SchemaServer]:
    started = SchemaServer()
    thread = threading.Thread(target=started.http.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdefghij")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{started.http.server_address[1]}/v1")
    yield started
    started.http.shutdown()
    thread.join()
    started.http.server_close()


def ask(schema: object) -> Any:
    return nbcodex.ask("Who?", schema=schema, model="m", api="chat", patience=5)


def wrapped(value: str) -> str:
    return f'{{"value": {value}}}'


class Person(BaseModel):
    name: str
    born: int


class Node(BaseModel):
    name: str
    children: list[Node] = []


class Author(BaseModel):
    books: list[Book]


class Book(BaseModel):
    title: str
    author: Author | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    barks: bool


class Pet(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Box(TypedDict):
    width: int


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


People = RootModel[list[Person]]

NAMES = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "nickname": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["author", "critic"]},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["city"],
        },
    },
    "required": ["name"],
}


# Types of all kinds, through pydantic.


@pytest.mark.parametrize(
    ("schema", "answer", "parsed"),
    [
        (list[Person], wrapped('[{"name": "Lem", "born": 1921}]'), [Person(name="Lem", born=1921)]),
        (
            People,
            wrapped('[{"name": "Lem", "born": 1921}]'),
            People([Person(name="Lem", born=1921)]),
        ),
        (Box, '{"width": 3}', {"width": 3}),
        (Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (list[Point], wrapped('[{"x": 1, "y": 2}]'), [Point(1, 2)]),
        (Colour, wrapped('"red"'), Colour.RED),
        (Literal["yes", "no"], wrapped('"no"'), "no"),
        (Cat | Dog, wrapped('{"kind": "dog", "barks": true}'), Dog(kind="dog", barks=True)),
        (bool, wrapped("true"), True),
        (list[Decimal], wrapped('["0.12345678901234567890"]'), [Decimal("0.12345678901234567890")]),
        (TypeAdapter(list[int]), wrapped("[1]"), [1]),
    ],
    ids=str,
)
def test_types_of_all_kinds_are_sent_strictly_and_parsed(
    server: SchemaServer, schema: object, answer: str, parsed: object
) -> None:
    server.answers = [answer]
    assert ask(schema).parsed == parsed
    assert server.modes == ["strict"]


@pytest.mark.parametrize(
    ("schema", "wrong", "right"),
    [
        (list[Person], wrapped('[{"name": "Lem"}]'), wrapped("[]")),
        (Literal["yes", "no"], wrapped('"maybe"'), wrapped('"no"')),
        (Colour, wrapped('"green"'), wrapped('"blue"')),
    ],
)
def test_answer_that_is_no_value_of_the_type_is_asked_for_again(
    server: SchemaServer, schema: object, wrong: str, right: str
) -> None:
    server.answers = [wrong, right]
    assert ask(schema).parsed is not None
    assert len(server.sent) == 2


@pytest.mark.parametrize(
    ("schema", "parsed"),
    [
        ({"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}, [1]),
        (
            {"$defs": {"N": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/N"}},
            [3],
        ),
        (
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}},
            [1, [2, [3]]],
        ),
    ],
)
def test_dict_schema_of_other_than_an_object_is_wrapped(
    server: SchemaServer, schema: object, parsed: object
) -> None:
    server.answers = [wrapped(json.dumps(parsed))]
    assert ask(schema).parsed == parsed
    assert server.modes == ["strict"]


# References.


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (Node, '{"name": "a", "children": [{"name": "b", "children": []}]}'),
        (Author, '{"books": [{"title": "Solaris", "author": {"books": []}}]}'),
        (Book, '{"title": "Solaris", "author": null}'),
        (
            {
                "$ref": "#/$defs/Item",
                "$defs": {
                    "Item": {
                        "type": "object",
                        "properties": {
                            "next": {"anyOf": [{"$ref": "#/$defs/Item"}, {"type": "null"}]}
                        },
                        "required": ["next"],
                    }
                },
            },
            '{"next": {"next": null}}',
        ),
    ],
)
def test_schema_that_refers_to_itself_is_sent_strictly(
    server: SchemaServer, schema: object, answer: str
) -> None:
    server.answers = [answer]
    reply = ask(schema)
    assert reply.parsed
    assert server.modes == ["strict"]
    assert "$defs" in server.sent[0]["response_format"]["json_schema"]["schema"]


# Unions, and what a server refuses.


@pytest.mark.parametrize("schema", [Pet, Pet.model_json_schema()], ids=["class", "dict"])
def test_discriminated_union_is_sent_without_one_of(server: SchemaServer, schema: object) -> None:
    server.answers = ['{"pet": {"kind": "cat", "lives": 9}}']
    assert ask(schema).parsed
    assert server.modes == ["strict"]
    assert "oneOf" not in json.dumps(server.sent)


@pytest.mark.parametrize(
    "message",
    [
        "Invalid schema for response_format 'Node': too deep",
        "Unknown name \"$defs\" at 'generation_config.response_schema': Cannot find field.",
        "The provided JSON schema contains features not supported by xgrammar.",
        "failed to parse grammar",
        "For 'object' type, property 'additionalProperties' is not supported",
        "This model does not support structured outputs.",
    ],
)
def test_refusal_of_one_schema_leaves_the_mode_to_others(
    server: SchemaServer, message: str
) -> None:
    server.answers = ['{"name": "a", "children": [], "born": 1}']
    server.refusal, server.refused_word = message, '"$defs"'
    first, second, again = ask(Node), ask(Person), ask(Node)
    assert server.modes == ["strict", "prompt", "strict", "prompt"]
    assert first.parsed.name == second.parsed.name == again.parsed.name == "a"


# What strict mode does not know.


class Odd(BaseModel):
    url: HttpUrl
    span: tuple[int, int]
    tags: set[str]
    path: Path
    price: Decimal


class Loose(BaseModel):
    anything: Any
    some: list  # type: ignore[type-arg]


ODD = '{"url": "https://a.example/", "span": [1, 2], "tags": ["x"], "path": "p", "price": 1.5}'


def test_keywords_that_strict_mode_does_not_know_are_left_out(server: SchemaServer) -> None:
    server.answers = [ODD]
    assert ask(Odd).parsed.span == (1, 2)
    assert server.modes == ["strict"]


@pytest.mark.parametrize(
    "wrong",
    [
        ODD.replace("https://a.example/", "nowhere"),
        ODD.replace("[1, 2]", "[1, 2, 3]"),
    ],
)
def test_what_is_left_out_is_validated_here(server: SchemaServer, wrong: str) -> None:
    server.answers = [wrong, ODD]
    assert ask(Odd).parsed
    assert len(server.sent) == 2


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (Loose, '{"anything": {"a": 1}, "some": [1, "b"]}'),
        (dict[str, int], '{"a": 1}'),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, '{"a": [1]}'),
        ({"properties": {"a": {}}}, '{"a": [1]}'),
        ({"type": "array"}, '{"value": [1, "b"]}'),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "boolean"}},
                "if": {"properties": {"a": {"const": True}}},
                "then": {"required": ["b"]},
            },
            '{"a": true, "b": 2}',
        ),
    ],
)
def test_schema_without_strict_equivalent_is_sent_loosely(
    server: SchemaServer, schema: object, answer: str
) -> None:
    server.answers = [answer]
    assert ask(schema).parsed
    assert server.modes == ["loose"]


# Optional fields.


class Aged(BaseModel):
    name: str
    legs: int = 4
    nick: str | None = "none given"


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ('{"name": "Lem"}', {"name": "Lem"}),
        ('{"name": "Lem", "nickname": null, "age": null}', {"name": "Lem"}),
        (
            '{"name": "Lem", "kind": null, "address": {"city": "Lwów", "zip": null}}',
            {"name": "Lem", "address": {"city": "Lwów"}},
        ),
    ],
)
def test_optional_fields_may_be_null_or_missing(
    server: SchemaServer, answer: str, parsed: object
) -> None:
    server.answers = [answer]
    assert ask(NAMES).parsed == parsed
    assert server.modes == ["strict"]
    sent = server.sent[0]["response_format"]["json_schema"]["schema"]["properties"]
    assert sent["name"] == {"type": "string"}
    assert {"type": "null"} in sent["nickname"]["anyOf"]


def test_default_of_a_class_stands_for_null(server: SchemaServer) -> None:
    server.answers = ['{"name": "Rex", "legs": null, "nick": null}']
    assert ask(Aged).parsed == Aged(name="Rex", legs=4, nick=None)


@pytest.mark.parametrize(
    ("schema", "answer", "parsed"),
    [
        (
            {"type": "array", "items": NAMES},
            wrapped('[{"name": "Lem", "age": null}]'),
            [{"name": "Lem"}],
        ),
        (
            {"type": "object", "properties": {"who": {"anyOf": [{"type": "integer"}, NAMES]}}},
            '{"who": {"name": "Lem", "age": null}}',
            {"who": {"name": "Lem"}},
        ),
        (
            {
                "type": "object",
                "properties": {"who": {"$ref": "#/$defs/who"}},
                "$defs": {"who": NAMES},
            },
            '{"who": {"name": "Lem", "age": null}}',
            {"who": {"name": "Lem"}},
        ),
    ],
    ids=["list", "union", "reference"],
)
def test_nulls_are_removed_at_every_depth(
    server: SchemaServer, schema: object, answer: str, parsed: object
) -> None:
    server.answers = [answer]
    assert ask(schema).parsed == parsed


# Validation of dict schemas.


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ('{"name": 3}', "name: 3, not of the type string"),
        ('{"name": null}', "name: null, not of the type string"),
        ('{"name": "Lem", "kind": "poet"}', "kind: 'poet' is not one of"),
        ('{"name": "Lem", "age": -1}', "age: -1 is less than the minimum"),
        ('{"name": "Lem", "address": {"city": 5}}', "address.city: 5, not of the type string"),
        ('{"name": "Lem", "address": {}}', "address: 'city' is a required property"),
    ],
)
def test_answer_that_violates_a_dict_schema_is_asked_for_again(
    server: SchemaServer, wrong: str, says: str
) -> None:
    server.answers = [wrong, '{"name": "Lem"}']
    assert ask(NAMES).parsed == {"name": "Lem"}
    assert says in server.sent[1]["messages"][-1]["content"]
    server.answers = [wrong]
    with pytest.raises(nbcodex.NbcodexError, match="does not fit"):
        ask(NAMES)


@pytest.mark.parametrize(
    ("draft", "is_accepted"),
    [
        ("https://json-schema.org/draft/2020-12/schema", False),
        ("http://json-schema.org/draft-04/schema#", True),
    ],
)
def test_dict_schema_is_read_by_the_draft_that_it_names(
    server: SchemaServer, draft: str, is_accepted: bool
) -> None:
    """The keyword `const` came with draft 6."""
    server.answers = ['{"a": 2}']
    schema = {"$schema": draft, "type": "object", "properties": {"a": {"const": 1}}}
    if is_accepted:
        assert ask(schema).parsed == {"a": 2}
    else:
        with pytest.raises(nbcodex.NbcodexError, match="does not fit"):
            ask(schema)
