"""Where a cell's names come from: the caller's scope, options with fields, pasted code."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.error import UsageError

from nbcodex.errors import ConfigurationError
from nbcodex.notebook.variables import fill
from tests.simulated import Simulated

FUNCTION = """
topic = "global"
def ask(topic):
    get_ipython().run_cell_magic("codex", "--no-history -o found", "About {topic} and {extra}.")
    return found.status
extra = "more"
state = ask("local")
"""
COMPREHENSION = """
def ask(subject):
    return [get_ipython().run_cell_magic("codex", "--no-history", "{subject} {n}") for n in [1, 2]]
ask("row")
"""


def test_locals_of_a_function_come_before_globals(ip: Any, simulator: Simulated) -> None:
    """A function's locals are filled in, then the notebook's variables; `-o` is a global."""
    ip.run_cell(FUNCTION).raise_error()
    assert simulator.prompts == ["About local and more."]
    assert ip.user_ns["found"].status == ip.user_ns["state"] == "done"


def test_schema_and_rows_may_come_from_a_startup_file(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPython hides the names of startup files as its own."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    given = {"startup_schema": schema, "startup_rows": ["a", "b"]}
    for name, value in given.items():
        monkeypatch.setitem(ip.user_ns, name, value)
        monkeypatch.setitem(ip.user_ns_hidden, name, value)
    ip.run_cell_magic(
        "codex", "--no-history --schema startup_schema -o found", '[[echo: {"n": 1}]]'
    )
    assert ip.user_ns["found"].parsed == {"n": 1}
    ip.run_cell_magic("codex", "--map startup_rows", "About {}")
    assert simulator.prompts[1:] == ["About a", "About b"]


def test_names_around_a_comprehension_are_filled_in(ip: Any, simulator: Simulated) -> None:
    """The comprehension's variable and the function's parameter."""
    ip.run_cell(COMPREHENSION).raise_error()
    assert simulator.prompts == ["row 1", "row 2"]


def test_names_of_a_script_that_run_executes_are_filled_in(
    ip: Any, simulator: Simulated, tmp_path: Path
) -> None:
    """A script's own globals come first, and its next line finds the variable of `-o`."""
    script = tmp_path / "script.py"
    script.write_text(
        "topic = 'script'\n"
        "get_ipython().run_cell_magic('codex', '--no-history -o reply', 'About {topic}.')\n"
        "seen = reply.status\n"
    )
    ip.user_ns["topic"] = "notebook"
    ip.run_line_magic("run", str(script))
    assert simulator.prompts == ["About script."]
    assert ip.user_ns["seen"] == ip.user_ns["reply"].status == "done"


def test_options_find_names_of_the_caller(ip: Any, simulator: Simulated) -> None:
    """A schema and the text of an option may be locals."""
    ip.run_cell(
        "def ask(shape, rules):\n"
        "    get_ipython().run_cell_magic('codex', '--no-history --schema shape "
        '--system "{rules}" -o pet\', \'[[echo: {"name": "x"}]]\')\n'
        "ask({'type': 'object', 'properties': {'name': {'type': 'string'}}}, 'Be brief.')\n"
    ).raise_error()
    assert ip.user_ns["pet"].parsed == {"name": "x"}
    assert "Be brief." in str(simulator.core.log[-1].body)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ('--system "{rules}"', "No jokes."),
        ('--system "Rules: {rules} {n:03d}"', "Rules: No jokes. 007"),
        ('--system "$rules"', "No jokes."),
        ("-m $m", "gpt-5.6-mini"),
        ("{m}", "gpt-5.6-mini"),
        ("$m", "gpt-5.6-mini"),
        ("--model={m}", "gpt-5.6-mini"),
        ("--effort {level}", "low"),
        ('-p \'{"metadata": {"by": "{rules}"}}\'', "No jokes."),
    ],
)
def test_fields_in_options_are_filled_in(
    ip: Any, simulator: Simulated, line: str, sent: str
) -> None:
    """Neither braces nor a dollar name reach the server as they were written."""
    ip.push({"rules": "No jokes.", "m": "gpt-5.6-mini", "n": 7, "level": "low"})
    ip.run_cell_magic("codex", line, "hello")
    body = str(simulator.core.log[-1].body)
    assert f"'{sent}'" in body
    assert not {"{rules", "$rules", "{m}", "$m", "{level}"} & set(body.split("'"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('--system "{absent}"', "{absent} is not a variable"),
        ('--system "Follow $rules here"', "write {rules} instead of $rules"),
        ("-m $absent", "{absent} is not a variable"),
        ("{absent}", "{absent} is not a variable"),
        ("--effort {absent}", "{absent} is not a variable"),
        ("--thread {absent}", "{absent} is not a variable"),
        ('--system "{os.getcwd()}"', "cannot be filled in here"),
    ],
)
def test_fields_in_options_that_cannot_be_filled_in_are_refused(
    ip: Any, simulator: Simulated, line: str, says: str
) -> None:
    """An option is never sent with its braces by mistake."""
    ip.push({"rules": "No jokes.", "os": os})
    with pytest.raises(UsageError) as caught:
        ip.run_cell_magic("codex", line, "hello")
    assert says in str(caught.value)
    assert simulator.prompts == []


def test_thread_name_from_a_variable_is_checked(ip: Any, simulator: Simulated) -> None:
    for name in ("", "x" * 101):
        ip.push({"name": name})
        with pytest.raises(ConfigurationError, match="A thread's name has 1 to 100"):
            ip.run_cell_magic("codex", "--thread {name}", "hello")
    assert simulator.prompts == []


def test_other_braces_in_options_stay(ip: Any, simulator: Simulated) -> None:
    """JSON, LaTeX, prices and doubled braces are text in an option as in a prompt."""
    ip.push({"rules": "x"})
    text = r"Answer as {'a': 1} in \frac{a}{b} for $5, {{rules}}."
    ip.run_cell_magic("codex", f'--system "{text}"', "hello")
    expected = r"Answer as {'a': 1} in \frac{a}{b} for $5, {rules}."
    assert expected in str(simulator.core.log[-1].body["instructions"])


@pytest.mark.parametrize(
    "source",
    [
        "os.system('touch ran')",
        "o.environ",
        "box.f(os.getcwd)",
        "name.__class__",
        "name._private",
        "_hidden",
        "rows[_hidden]",
    ],
)
def test_modules_and_private_names_are_left_as_written(source: str) -> None:
    """Pasted code does not run, and the figures list it."""
    names = {"os": os, "o": os, "name": "Ada", "_hidden": 1, "rows": [1, 2]}
    names["box"] = SimpleNamespace(f=lambda value: value())
    done = fill(f"Log of {{name}}: {{{source}}}", names)
    assert done.text == f"Log of Ada: {{{source}}}"
    assert done.restricted == [source]
    assert done.notes[-1] == f"{{{source}}} left as written"


FLOATS = {
    "id": [20231234.0, 20231235.0, float("nan")],
    "position": [52.520008, 13.404954, 0.1 + 0.2],
    "tiny": [1.5e-300, 1e22, 123456.789],
}


def _cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_floats_of_a_pandas_table_keep_their_value() -> None:
    """The text reads back as the same number; integers beside NaN have no decimals."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FLOATS)
    rows = _cells(fill("{df}", {"df": frame}).text)
    assert [row[0] for row in rows] == ["20231234", "20231235", "nan"]
    for row, (_, position, tiny) in zip(rows, frame.itertuples(index=False), strict=True):
        assert (float(row[1]), float(row[2])) == (position, tiny)
    assert rows[2][1] == "0.30000000000000004"
    series = fill("{s}", {"s": frame["position"]}).text
    assert "52.520008" in series
    assert "| 20231234 |" in fill("{df}", {"df": frame.set_index("id")}).text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_of_lower_precision_are_shortest_in_their_own(dtype: str) -> None:
    """52.52 as a float32 is not shown as the double that is nearest to it."""
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    values = numpy.array([52.52, 0.1, 2048.0, float("nan"), 65504.0], dtype=dtype)
    rows = _cells(fill("{df}", {"df": pandas.DataFrame({"x": values})}).text)
    assert rows[1] == ["0.1"]
    assert rows[2] == ["2048"]
    code = {"float16": "e", "float32": "f"}[dtype]
    for (text,), value in zip(rows, values.tolist(), strict=True):
        assert struct.pack(code, float(text)) == struct.pack(code, value)


def test_floats_of_polars_and_numpy_keep_their_value() -> None:
    """A polars frame, in both precisions, and an array."""
    polars, numpy = pytest.importorskip("polars"), pytest.importorskip("numpy")
    frame = polars.DataFrame({"a": [20231234.5, 52.520008], "b": [0.1, 52.52]})
    frame = frame.with_columns(polars.col("b").cast(polars.Float32))
    assert _cells(fill("{df}", {"df": frame}).text) == [
        ["20231234.5", "0.1"],
        ["52.520008", "52.52"],
    ]
    text = fill("{a}", {"a": numpy.array([123456789.123, 0.5])}).text
    assert [float(part) for part in text.strip("[]").split()] == [123456789.123, 0.5]


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://gateway.example.org/v1", "gateway.example.org"),
        ("http://gateway:8000/v1", "http://gateway:8000"),  # cleartext needs an entry that says so
    ],
)
def test_the_line_that_sets_a_key_can_be_pasted(ip: Any, url: str, entry: str) -> None:
    """The advice of a missing key is a line that works in a cell."""
    with pytest.raises(ConfigurationError) as caught:
        ip.run_cell_magic("codex", f"--api-base {url} --dry-run", "hello")
    line = re.findall(r"`(%config [^`]+)`", caught.value.advice)[0]
    ip.run_cell(line).raise_error()
    assert list(ip.find_line_magic("codex").__self__._config.keys) == [entry]
