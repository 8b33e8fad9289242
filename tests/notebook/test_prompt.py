"""A prompt's ``{names}`` are filled in, and no other brace is touched."""

from __future__ import annotations

import ast
import builtins
import datetime
import os
import random
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcodex.errors import ConfigurationError
from nbcodex.models import RequestOptions
from nbcodex.notebook.variables import fill
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.requests.options import build_request
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Knobs, Simulator
from nbcodex.templating import MAX_TABLE_CHARS, MAX_TABLE_COLUMNS, MAX_TABLE_ROWS
from tests.simulator_transport import SimulatorTransport
from tests.virtual import LoopClock, run_virtual

EXAMPLES = int(os.environ.get("PROMPT_EXAMPLES", "3000"))


class Frame:
    """Stands in for a pandas DataFrame."""

    def __init__(self, names: list[Any], rows: list[tuple[Any, ...]], index: Any = None) -> None:
        self._names, self._rows = names, rows
        self.index = RangeIndex() if index is None else index

    columns = property(lambda self: self._names)
    shape = property(lambda self: (len(self._rows), len(self._names)))

    def itertuples(self, *, index: bool, name: None) -> Iterator[tuple[Any, ...]]:
        for label, row in zip(self.index, self._rows, strict=False):
            yield (label, *row) if index else row


class RangeIndex:
    """Stands in for the index of a frame that has no other."""

    name = None

    def __iter__(self) -> Iterator[int]:
        return iter(range(10**9))


class Labels(list[str]):
    """Stands in for an index with a name."""

    name = "day"


class PolarsFrame:
    """Stands in for a polars DataFrame."""

    columns = property(lambda self: ["a", "b"])
    shape = property(lambda self: (2, 2))

    def iter_rows(self) -> Iterator[tuple[Any, ...]]:
        return iter([(1, "x"), (2, None)])


class Series:
    """Stands in for a series of either library."""

    def to_frame(self) -> Frame:
        return Frame(["s"], [(1,), (2,)])


class Figure:
    """Stands in for a matplotlib figure."""

    def savefig(self) -> None: ...
    def add_subplot(self) -> None: ...


class Picture:
    """Stands in for a PIL image."""

    def save(self) -> None: ...
    def tobytes(self) -> None: ...
    def thumbnail(self) -> None: ...


class Unspeakable(Exception):  # noqa: N818 the name is the point
    """Fails to say what it is."""

    def __str__(self) -> str:
        raise RuntimeError


def fails(error: BaseException) -> Any:
    """Return a callable that raises."""

    def call() -> None:
        raise error

    return call


NAMES = {
    "name": "Ada",
    "price": 1234.5678,
    "n": 1,
    "ö": "umlaut",
    "braces": "{name} {{name}} {n}",
    "In": ["", "x = 1", "y", "print('{name}')"],
    "Out": {3: 42},
    "Err": {3: "KeyError: 'k'"},
    "x": {"a b": [SimpleNamespace(y="deep")], "}": "closed", 'q"': "quoted"},
    "rows": list(range(10)),
    "grid": {(1, 2): "two"},
    "pick": {"k": "v"}.get,
    "join": lambda *parts, sep="-": sep.join(map(str, parts)),
    "day": datetime.date(2026, 1, 2),
    "true": True,
    "empty": "",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dear {name}, {name}!", "Dear Ada, Ada!"),
        ("{price:.2f} {price:,.1f} {n:>4} {n:04d}", "1234.57 1,234.6    1 0001"),
        ("{name!r} {ö!a} {name!s:>5} {name!r:<7}|", "'Ada' 'umlaut'   Ada 'Ada'  |"),
        ("{In[3]} | {Out[3]} | {Err[3]}", "print('{name}') | 42 | KeyError: 'k'"),
        ('{x["a b"][0].y}', "deep"),
        ("{x['}']} {x['q\"']}", "closed quoted"),
        ("{rows[-1]} {rows[1:3]} {rows[::-4]} {rows[n]}", "9 [1, 2] [9, 5, 1] 1"),
        ("{grid[1, 2]}", "two"),
        ("{pick('k')} {name.upper()} {name.upper().lower()}", "v ADA ada"),
        ("{join(1, -2, name, sep='/')} {join(rows[2])}", "1/-2/Ada 2"),
        ("{day:%d.%m.%Y}", "02.01.2026"),
        ("{ö}", "umlaut"),
        ("a{empty}b", "ab"),
        ("{{name}} {{x['a b']}} {{price:.2f}}", "{name} {x['a b']} {price:.2f}"),
        ("{{{name}}}", "{{name}}"),
        ("{'name': {name}}", "{'name': Ada}"),
        ("file_{n}.csv", "file_1.csv"),
        ("{nobody:{n}} {name: {n}}", "{nobody:1} {name: 1}"),
        (r"\textbf{Dear {name}}", r"\textbf{Dear Ada}"),
        (r"\alpha {name}", r"\alpha Ada"),
    ],
)
def test_fields_are_replaced_by_values(text: str, expected: str) -> None:
    """Attributes, indexes, calls, conversions and formats work in fields."""
    assert fill(text, NAMES).text == expected


@pytest.mark.parametrize(
    "text",
    [
        "{'foo': 'bar'}",
        '{"name": "x", "n": [1, 2]}',
        "{}",
        "{ name }",
        "{name }x{",
        "{name: string; n: number}",
        "const {name, n} = props",
        "{n + 1} {n*2} {n if n else 2} {n == 1} {not n}",
        "{n for n in rows}",
        "{lambda: n} {n := 2} {n=}",
        "{name, n} {*rows} {**x}",
        "{x[n + 1]} {join(*rows)} {join(**x)} {rows[lambda: 1]} {join(f'')}",
        "${name} $${n}",
        r"\frac{n}{name} \textbf{name} \sqrt[3]{n} \begin{name} \operatorname*{n}",
        r"\frac{\alpha_{1}}{n}",
        "(a|b){1,3} [a-z]{2}",
        "{name!x} {name!}",
        "{name\n}",
        "{1name} {.name} {-n} {[name]} {(name)}",
        "{{ name }} {{missing}} {{% if n %}}",
        "function f() {return n}",
        "if (n) {\n  name()\n}",
        "{" * 50 + "name",
        "{True} {None} {class}",
        r"{x['\d']+1}",
        "{n:{n}} {name:{n}} {n!r:>{n}} {n:{missing}}",
    ],
)
def test_other_braces_stay_as_written(text: str) -> None:
    """JSON, LaTeX, TypeScript, regular expressions, sets and arithmetic are not fields."""
    done = fill(text, NAMES)
    assert (done.text, done.filled_fields, done.missing) == (text, [], [])


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{custmer.name}", ["custmer.name"]),
        ("{custmer.name:.2f} and {othr[0]}", ["custmer.name", "othr[0]"]),
        ("{name} {nam}", ["nam"]),
        ("{rows[m]}", ["rows[m]"]),
        (r"\frac{m}{k} ${m} {{m}}", []),
        ("{len(rows)}", ["len(rows)"]),
    ],
)
def test_unknown_names_are_reported_and_stay(text: str, missing: list[str]) -> None:
    """A field with an unknown name is reported, and stays in the text."""
    done = fill(text, NAMES)
    assert done.missing == missing
    assert all(f"{{{chain}" in done.text for chain in missing)


def test_values_are_not_searched_for_fields() -> None:
    """Braces in a value stay as they are."""
    assert fill("{braces}{In[3]}", NAMES).text == "{name} {{name}} {n}print('{name}')"
    assert fill("{a}{b}", {"a": "{", "b": "b}"}).text == "{b}"


@pytest.mark.slow
@given(st.text("{}name$\\ !:.[]'\"", max_size=40))
def test_any_value_arrives_unchanged(value: str) -> None:
    """Any text arrives as it is."""
    assert fill("<{value}>", {"value": value, "name": "!"}).text == f"<{value}>"


WORDS = st.sampled_from(
    [
        *("{", "}", "{{", "}}", "name", "x", "a.b", "[0]", "['k']", "(1)", "(", ")", "$", "\\"),
        *("\\frac", "!r", ":.2f", ":", "'", '"', " ", "\n", ",", "=", "-1", "🦉", "ö", "\ud800"),
    ]
)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(WORDS, st.text(max_size=3)), max_size=25).map("".join))
def test_text_without_known_names_is_unchanged(text: str) -> None:
    """Without known names nothing changes, nothing is evaluated and nothing raises."""
    done = fill(text, {"in_no_text": 1})
    assert (done.text, done.filled_fields, done.images) == (text, [], [])


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.one_of(WORDS, st.text(max_size=3)), max_size=25).map("".join))
def test_only_known_names_in_braces_are_filled(text: str) -> None:
    """Every filled expression begins with an existing name, and was written in braces."""
    done = fill(text, {"name": "", "x": ""}) if _calm(text) else None
    for chain in done.filled_fields if done else ():
        assert f"{{{chain}" in text
        assert chain.startswith(("name", "x"))


PIECES = [
    *("{", "}", "{{", "}}", "$", "${", "$$", "\\", "\\frac", "\\frac{", "\\text{", "[", "]", "("),
    *("name", "x", "df", "In[3]", "Out", "nobody", "a.b", "'k'", '"', "'", ":", ": ", ",", "!r"),
    *("=", "`", ")", "\n", " ", "\t", "🦉", "👩\u200d🚀", "ö", "你", "\u202e", "\x00", "0", "-1"),
    *("%", "#", "\\{", "\\}", ":.2f}"),
]
BEGUN = re.compile(r"\{(?:name|x|df|In|Out|Err)(?!\w)")


@pytest.mark.slow
def test_a_hundred_thousand_prompts_without_fields_are_unchanged() -> None:
    """Prompts without a brace before a known name are unchanged."""
    chance, known = random.Random(7), {"name": "!", "x": "!", "df": "!", "In": ["!"] * 9, "Out": {}}
    passed = changed = 0
    while passed < 100_000:
        text = "".join(chance.choices(PIECES, k=chance.randrange(1, 14)))
        if BEGUN.search(text):
            continue
        passed += 1
        done = fill(text, known)
        changed += (done.text, done.filled_fields, done.images) != (text, [], [])
    assert changed == 0


@pytest.mark.slow
def test_prompts_reach_the_server_unchanged() -> None:
    """Neither API changes a prompt on its way to the server."""
    chance = random.Random(8)
    prompts = [p for p in ("".join(chance.choices(PIECES, k=9)) for _ in range(500)) if p.strip()]
    settings = Settings(api_key=Secret("sk-x"), base_url="http://127.0.0.1/v1", model="gpt-5.6-sol")

    async def main() -> list[str]:
        clock = LoopClock()
        core = Simulator(Knobs(tpm=None, rpm=None, latency=0.0, speed=1e6), clock=clock)
        api_client = ApiClient(clock=clock, transport=SimulatorTransport(core))
        for number, prompt in enumerate(prompts):
            request = build_request(
                prompt, settings, RequestOptions(api=("responses", "chat")[number % 2])
            )
            async for _ in api_client.stream(request, settings, model="gpt-5.6-sol"):
                pass
        return [seen.prompt for seen in core.log]

    assert run_virtual(main()) == prompts


def _calm(text: str) -> bool:
    # what would fail in evaluation is another test's
    return not any(sign in text for sign in (".", "[", "(", ":"))


def test_fields_are_evaluated_once_and_in_order() -> None:
    """Expressions are evaluated as often as they occur, from left to right."""
    seen: list[int] = []

    def note(number: int) -> int:
        seen.append(number)
        return number

    done = fill("{note(2)} {note(1)} {note(2)} {{note(3)}} ${note(4)}", {"note": note})
    assert seen == [2, 1, 2]
    assert done.filled_fields == ["note(2)", "note(1)", "note(2)"]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("{d['k']}", {"d": {}}, "{d['k']} in the prompt failed: KeyError: 'k'."),
        ("{n.x}", {"n": 1}, "AttributeError: 'int' object has no attribute 'x'"),
        ("{n()}", {"n": 1}, "TypeError: 'int' object is not callable"),
        ("{s:.2f}", {"s": "a"}, "ValueError: Unknown format code 'f'"),
        ("{f()}", {"f": fails(Unspeakable())}, "failed: Unspeakable."),
        ("{f()}", {"f": fails(ValueError("x" * 9999))}, "ValueError: xxx"),
        ("{f()}", {"f": fails(ValueError("a\nb"))}, "ValueError: a b"),
    ],
)
def test_a_failing_expression_is_named(text: str, names: dict[str, Any], message: str) -> None:
    """An exception in an expression becomes a short error of nbcodex."""
    with pytest.raises(ConfigurationError) as caught:
        fill(text, names)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_stop_during_evaluation_stops() -> None:
    """Stop during an evaluation is not turned into an error."""
    with pytest.raises(KeyboardInterrupt):
        fill("{f()}", {"f": fails(KeyboardInterrupt())})


def test_expressions_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expressions are walked: neither `eval` nor `exec` is called."""

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    assert fill("{name.upper()}", NAMES).text == "ADA"


def test_a_frame_becomes_a_markdown_table() -> None:
    """A frame is a Markdown table on lines of its own, without its plain index."""
    frame = Frame(["a", "b|c"], [(1, 2.123456789), ("x|y\nz", None)])
    assert fill("Data: {df}Go", {"df": frame}).text == (
        "Data: \n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2.123456789 |\n| x\\|y z | None |\nGo"
    )


def test_a_meaningful_index_is_a_column() -> None:
    """Labels of rows are kept."""
    frame = Frame(["a"], [(1,), (2,)], Labels(["Mon", "Tue"]))
    assert fill("{df}", {"df": frame}).text == (
        "| day | a |\n| --- | --- |\n| Mon | 1 |\n| Tue | 2 |\n"
    )


def test_a_large_frame_is_cut_with_a_count() -> None:
    """Rows and columns beyond the limit are counted in the text."""
    frame = Frame([f"c{i}" for i in range(25)], [tuple(range(25))] * 1000)
    lines = fill("{df}", {"df": frame}).text.splitlines()
    assert lines[-2:] == ["… 940 more rows", "… 5 more columns"]
    assert len(lines) == 2 + MAX_TABLE_ROWS + 2
    assert {line.count("|") for line in lines[:-2]} == {MAX_TABLE_COLUMNS + 1}


def test_a_frame_with_long_cells_is_cut_by_size() -> None:
    """Rows are left out so that a table stays within its limit."""
    frame = Frame([f"c{i}" for i in range(20)], [("y" * 999,) * 20] * 50)
    text = fill("{df}", {"df": frame}).text
    assert len(text) < MAX_TABLE_CHARS + 1000
    assert text.splitlines()[-1] == "… 46 more rows"


def test_notes_list_filled_and_missing_names() -> None:
    """Each filled name is listed once, and each missing one."""
    done = fill("{name} {n} {name} {nam} {nam}", NAMES)
    assert done.notes == ["{name}, {n} filled in", "{nam} not found"]
    many = fill("".join(f"{{rows[{n}]}}" for n in range(9)), NAMES)
    assert many.notes[0].endswith("{rows[4]}, 4 more filled in")


def test_polars_and_series_become_tables() -> None:
    """A polars frame, and a series of either library."""
    assert fill("{p}", {"p": PolarsFrame()}).text == (
        "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | None |\n"
    )
    assert fill("{s}", {"s": Series()}).text == "| s |\n| --- |\n| 1 |\n| 2 |\n"


def test_a_frame_with_a_conversion_is_not_a_table() -> None:
    """`!r` gives the repr."""
    frame = Frame(["a"], [(1,)])
    assert fill("{df!r}", {"df": frame}).text == repr(frame)


def test_pandas_frames_and_columns_become_tables() -> None:
    """Checked with pandas itself, if it is installed."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(100), "b": 1.5})
    lines = fill("{df}", {"df": frame}).text.splitlines()
    assert lines[0] == "| a | b |"
    assert lines[2] == "| 0 | 1.5 |"
    assert lines[-1] == "… 40 more rows"
    assert fill("{df.a[0]} {df['b'].mean():.1f}", {"df": frame}).text == "0 1.5"
    assert fill("{df.a}", {"df": frame[:2]}).text == "| a |\n| --- |\n| 0 |\n| 1 |\n"
    assert fill("{df[['b']]}", {"df": frame[3:4].set_index("a")}).text == (
        "| a | b |\n| --- | --- |\n| 3 | 1.5 |\n"
    )


def test_polars_frames_and_columns_become_tables() -> None:
    """Checked with polars itself, if it is installed."""
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": [1], "b": ["x"]})
    assert fill("{df}", {"df": frame}).text == "| a | b |\n| --- | --- |\n| 1 | x |\n"
    assert fill("{df['a']}", {"df": frame}).text == "| a |\n| --- |\n| 1 |\n"


def test_images_leave_numbered_placeholders() -> None:
    """A figure or an image leaves its number in the text, the same one for the same image."""
    figure, picture = Figure(), Picture()
    done = fill("{f} {p} {f}", {"f": figure, "p": picture})
    assert done.text == "[image 1] [image 2] [image 1]"
    assert done.images == [figure, picture]


def test_pil_and_matplotlib_images_are_recognised() -> None:
    """Checked with PIL and matplotlib, if they are installed."""
    image = pytest.importorskip("PIL.Image").new("RGB", (1, 1))
    assert fill("{i}", {"i": image}).images == [image]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert fill("{i}", {"i": figure}).images == [figure]


def test_an_object_with_every_attribute_is_text() -> None:
    """A proxy that has any attribute is neither a frame nor an image."""

    class Proxy:
        def __getattr__(self, name: str) -> object:
            return self

        def __str__(self) -> str:
            return "proxy"

    done = fill("{p}", {"p": Proxy()})
    assert (done.text, done.images) == ("proxy", [])


def test_equal_expressions_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that occurs a thousand times is parsed once."""
    calls: list[str] = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda *a, **k: calls.append(a[0]) or parse(*a, **k))
    fill("{name}" * 1000, NAMES)
    assert calls == ["name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        *("{", "}", "{{", "}}", "{}", "{name", "{name[", "{name['", "{name(", "{name.", '{x["'),
        *("{name}", "{name:", "{name!", "\\a{", "\\a[", "\\", "{x['{x[\"", "$", "{m}", "{{name}"),
        *("\\a{}", "name"),
    ],
)
def test_time_grows_linearly_with_braces(piece: str) -> None:
    """Time grows with the length and no faster."""
    times = []
    for size in (100_000, 1_000_000):
        start = time.process_time()
        fill(piece * (size // len(piece)), NAMES)
        times.append(time.process_time() - start)
    assert times[1] < max(2.0, 30 * times[0])


@pytest.mark.slow
def test_many_different_names_are_fast() -> None:
    """A hundred thousand expressions are parsed within a minute."""
    start = time.process_time()
    fill("".join(f"{{m{i}}}" for i in range(100_000)), NAMES)
    assert time.process_time() - start < 60
