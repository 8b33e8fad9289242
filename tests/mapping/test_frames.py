"""What templates take from frames and other rows, and the columns that come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import polars
import pydantic
import pytest
from pydantic import BaseModel, model_validator

import nbcodex
from nbcodex import api, host
from nbcodex.errors import BudgetError, ConfigurationError, NbcodexError, Stopped
from nbcodex.mapping import map_runner
from nbcodex.mapping.map_api import resume_map
from nbcodex.settings import Settings
from nbcodex.simulator import Fault

from .conftest import SimulatedClient, texts
from .test_map import press_stop

pytestmark = pytest.mark.slow

ECHO = "[[echo: {text}]]"
FRAME = pandas.DataFrame({"order": [1, 2], "Product Name": ["lamp", "bed"]})


class Label(BaseModel):
    label: str
    score: int


class Unfit(BaseModel):
    label: str
    score: int

    @model_validator(mode="after")
    def _refuse(self) -> Any:
        raise ValueError("unfit")


def last() -> Any:
    return nbcodex.map.last  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
@pytest.mark.parametrize(
    "template",
    [
        "{Produkt Name} {order}",
        "{product name}",
        "{Product Name[0]} {order}",
        "{ order }",
        "{order.upper()}",
        "{len(order)} of {order}",
        "{order:.2q}",
        "{ordr!z}",
    ],
)
def test_misspelt_or_unsupported_fields_are_refused_before_sending(
    simulated: SimulatedClient, kind: Any, template: str
) -> None:
    with pytest.raises(ConfigurationError, match="is not a field"):
        nbcodex.map(template, kind(FRAME.to_dict("list")))
    assert simulated.prompts == []


@pytest.mark.parametrize(
    ("template", "data", "answers"),
    [
        ("{Product Name!r} {order:03d}", FRAME, ["'lamp' 001", "'bed' 002"]),
        ("{0}-{1:.1f}", [("a", 1.25), ("b", 2)], ["a-1.2", "b-2.0"]),
        ("{0} of {item[1]}", {"x": ["a", "b"]}, ["a of b"]),
        ("{0}", pandas.DataFrame([["a"], ["b"]]), ["a", "b"]),
        ("{when:%d.%m.%Y}", pandas.DataFrame({"when": [pandas.Timestamp(2026, 11, 3)]}), None),
        ('{order} {"a": 1} {foo: bar} {x + y}', FRAME[:1], ['1 {"a": 1} {foo: bar} {x + y}']),
    ],
)
def test_fields_with_spaces_positions_and_formats_are_filled(
    simulated: SimulatedClient, template: str, data: Any, answers: list[str] | None
) -> None:
    nbcodex.map(f"[[echo: {template}]]", data)
    assert texts(last()) == (answers or ["03.11.2026"])


@pytest.mark.parametrize("template", ["Translate this.", "{0}", '{"a": 1}'])
def test_template_without_a_field_needs_confirmation(
    simulated: SimulatedClient, template: str
) -> None:
    answers = iter([None, False, True])
    host.current.confirm = lambda _: next(answers)
    with pytest.raises(ConfigurationError, match="no field"):
        nbcodex.map(template, ["a", "b"])
    with pytest.raises(NbcodexError, match="Not started"):
        nbcodex.map(template, iter(["a", "b"]))
    assert simulated.prompts == []
    assert len(nbcodex.map(template, ["a", "b"])) == 2
    assert len(nbcodex.map(template, ["a", "b"], confirm=True)) == 2


@pytest.mark.parametrize("names", [["a", "b", "a"], ["1", "b", 1]])
def test_two_columns_of_one_name_are_refused(simulated: SimulatedClient, names: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="Columns 0 and 2"):
        nbcodex.map("{b}", pandas.DataFrame([[1, 2, 3]], columns=names))
    assert simulated.prompts == []


@pytest.mark.parametrize(
    ("data", "limit", "answers"),
    [
        (pandas.DataFrame({"text": [20231234, None, 7]}), None, ["20231234", "", "7"]),
        (pandas.DataFrame({"text": [20231234, None, 7]}), 1, ["20231234"]),
        (pandas.Series([None, 2**40], name="text"), None, ["", str(2**40)]),
        (polars.DataFrame({"text": [20231234, None]}), None, ["20231234", ""]),
        (pandas.DataFrame({"text": [1.0, 2.5, None]}), None, ["1.0", "2.5", ""]),
        (pandas.DataFrame({"text": [1.0, 2.0]}), None, ["1.0", "2.0"]),
    ],
)
def test_integers_beside_missing_values_stay_integers(
    simulated: SimulatedClient, data: Any, limit: int | None, answers: list[str]
) -> None:
    nbcodex.map(ECHO, data, limit=limit)
    assert texts(last()) == answers


@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_cut_answers_are_counted_and_marked(simulated: SimulatedClient, kind: Any) -> None:
    reports: list[Any] = []
    host.current.map_listener = lambda: reports.append
    frame = kind({"tokens": [60, 4]})
    result = nbcodex.map("Write. [[tokens={tokens}]]", frame, max_output=16)
    assert [*result["finish"]] == ["max_output_tokens", "stop"]
    assert (reports[-1].done, reports[-1].cut) == (2, 1)
    assert "2 of 2 answered (1 cut by output limit or filter)" in repr(last())


@pytest.mark.parametrize("in_other_process", [False, True])
@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_rerun_fills_the_same_columns(
    simulated: SimulatedClient, kind: Any, in_other_process: bool
) -> None:
    frame = nbcodex.map(ECHO, kind({"id": [1, 2], "text": ["a", None]}))
    names = [*frame.columns]
    assert names[:3] == ["id", "text", "answer"]
    assert names[-1] == "id_2"
    if in_other_process:
        simulated.restart_process()
    data = frame.to_dict("list") if kind is pandas.DataFrame else frame.to_dict(as_series=False)
    frame = nbcodex.map(ECHO, kind(data | {"text": ["a", "b"]}))
    assert [*frame.columns] == names
    assert [*frame["answer"]] == ["a", "b"]
    assert [*frame["error"]] == [None, None]


def test_rerun_answers_rows_that_were_added_above(simulated: SimulatedClient) -> None:
    first = nbcodex.map(ECHO, pandas.DataFrame({"text": ["a"]}))
    frame = first.reindex([1, 0])
    frame["text"] = ["b", "a"]
    frame = nbcodex.map(ECHO, frame)
    assert [*frame.columns] == [*first.columns]
    assert [*frame["answer"]] == ["b", "a"]


@pytest.mark.parametrize("template", ["[[echo: other {text}]]", "[[echo: {answer}]]"])
def test_another_map_adds_columns_beside_those_of_the_first(
    simulated: SimulatedClient, template: str
) -> None:
    frame = nbcodex.map(ECHO, pandas.DataFrame({"text": ["a"]}))
    frame = nbcodex.map(template, frame)
    assert frame["answer"][0] == "a"
    assert frame["answer_2"][0] in {"other a", "a"}


@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_schema_field_named_like_a_result_column_is_numbered(
    simulated: SimulatedClient, kind: Any
) -> None:
    schema = {"properties": {"cost": {"type": "integer"}, "answer": {"type": "string"}}}
    schema = {"type": "object", **schema, "required": ["cost", "answer"]}
    result = nbcodex.map("{text}", kind({"text": ["a"]}), schema=schema)
    assert [*result["cost_2"]] == [1]
    assert [*result["answer_2"]] == ["simulated"]
    assert result["answer"][0].startswith("{")
    again = nbcodex.map("{text}", result, schema=schema)
    assert [*again.columns] == [*result.columns]


@pytest.mark.parametrize("options", [{"model": "gpt-5.6-luna"}, {"system": "Be brief."}])
def test_answers_of_another_model_are_not_replaced(
    simulated: SimulatedClient, options: Any
) -> None:
    frame = nbcodex.map(ECHO, pandas.DataFrame({"text": ["a"]}))
    frame = nbcodex.map(ECHO, frame, **options)
    assert {"answer", "answer_2"} <= {*frame.columns}


@pytest.mark.parametrize("taken", ["id", "cost", "error"])
@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_only_the_colliding_column_is_numbered(
    simulated: SimulatedClient, kind: Any, taken: str
) -> None:
    result = nbcodex.map(ECHO, kind({taken: [7], "text": ["a"]}))
    assert [*result[taken]] == [7]
    assert [*result["answer"]] == ["a"]
    assert f"{taken}_2" in result.columns
    assert "answer_2" not in result.columns


@pytest.mark.parametrize("in_other_process", [False, True])
@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_schema_fields_are_columns_of_one_type_after_a_resume(
    simulated: SimulatedClient,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    in_other_process: bool,
) -> None:
    press_stop(monkeypatch, after=20)
    with pytest.raises(Stopped):
        nbcodex.map("{text}", kind({"text": [f"row {n}" for n in range(120)]}), schema=Label)
    if in_other_process:
        simulated.restart_process()
    run = resume_map(last().id)
    assert run is not None
    api.keep_run(run, lambda _stats: None)
    result = map_runner.run_map(run)
    assert isinstance(result, kind)
    assert {*result["label"]} == {"simulated"}
    assert {type(value) for value in result["parsed"]} == {dict}
    assert str(result["score"].dtype) == "Int64"
    assert len({type(reply.parsed) for reply in last()}) == 1


@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_objects_of_rows_with_schemas_of_their_own_are_a_column(
    simulated: SimulatedClient, kind: Any
) -> None:
    def prompt(row: Any) -> dict[str, Any]:
        return {"prompt": row["text"], "schema": Label if row["text"] == "b" else None}

    result = nbcodex.map(prompt, kind({"text": ["a", "b"]}))
    assert list(result.columns)[1:3] == ["answer", "parsed"]
    assert result["parsed"][0] is None
    assert result["parsed"][1]["label"] == "simulated"


@pytest.mark.parametrize("is_script", [False, True])
@pytest.mark.parametrize("kind", [pandas.DataFrame, polars.DataFrame])
def test_columns_and_errors_where_no_answer_fits_the_schema(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, kind: Any, is_script: bool
) -> None:
    """The columns are those of other maps; the text is where the error says."""
    monkeypatch.setattr(host.current, "is_script", is_script)
    frame = kind({"text": ["a", "b"]})
    result = nbcodex.map("{text}", frame, schema=Unfit)
    assert list(result.columns)[1:5] == ["answer", "label", "score", "parsed"]
    assert "asked twice. The answer: Value error, unfit." in result["error"][0]
    assert "Its text is kept in the row's Reply" in result["error"][0]
    assert all(reply.text and not reply for reply in last())
    assert "parsed" not in nbcodex.map("{text}", frame).columns
    long = pydantic.create_model("Long", **{f"field_{n}": (str, ...) for n in range(50)})
    nbcodex.map("{}", ["a"], schema=long, max_output=16)
    option = "max_output" if is_script else "--max-output"
    assert f"Raise {option}." in last()[0].error


def test_polars_results_with_a_schema_survive_parquet(
    simulated: SimulatedClient, tmp_path: Path
) -> None:
    result = nbcodex.map("{text}", polars.DataFrame({"text": ["a", "b"]}), schema=Label)
    result.write_parquet(tmp_path / "answers.parquet")
    assert polars.read_parquet(tmp_path / "answers.parquet").equals(result)


def test_pandas_results_with_a_schema_survive_json(
    simulated: SimulatedClient, tmp_path: Path
) -> None:
    result = nbcodex.map("{text}", pandas.DataFrame({"text": ["a", "b"]}), schema=Label)
    result.to_json(tmp_path / "answers.json")
    assert pandas.read_json(tmp_path / "answers.json")["parsed"][1]["label"] == "simulated"


@pytest.mark.parametrize("data", [["a", "b", "c"], {"x": "a"}, pandas.Series(["a", "b"])])
def test_exhausted_budget_ends_the_map_with_its_error(
    simulated: SimulatedClient, data: Any
) -> None:
    host.current.settings = lambda: replace(Settings.read(), budgets=("1 token",))
    with pytest.raises(BudgetError) as caught:
        nbcodex.map("[[echo: {}]]", data)
    assert f"%codex resume {last().id}" in caught.value.advice
    assert simulated.prompts == []
    assert last().failed == {}
    assert len(last().parked) >= 1


@pytest.mark.parametrize("status", [500, 502, 503])
def test_fault_that_meets_every_row_is_shown_and_ends_the_map(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("nbcodex.mapping.backends.MAX_FAULTY_ATTEMPTS", 2)
    monkeypatch.setattr("nbcodex.mapping.map_run.REPORT_INTERVAL_S", 0.05)
    simulated.simulator.script([Fault("http", status=status, message="no model loaded")] * 30)
    reports: list[Any] = []
    host.current.map_listener = lambda: reports.append
    with pytest.raises(NbcodexError, match="no model loaded") as caught:
        nbcodex.map("[[echo: {}]]", ["a", "b", "c"])
    assert f"%codex resume {last().id}" in caught.value.advice
    assert any("no model loaded. Next attempt in" in each.stage for each in reports)
    assert last().failed == {}


def test_fault_of_some_rows_is_retried(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbcodex.mapping.backends.MAX_FAULTY_ATTEMPTS", 1)
    simulated.simulator.script([None, Fault("http", status=500)])
    assert texts(nbcodex.map("[[echo: {}]]", ["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "row_key", "key"),
    [
        (pandas.DataFrame({"text": ["a", None]}, index=[7, 9]), None, 9),
        ({("x", 1): {"text": "a"}, ("x", 2): {"text": None}}, None, ("x", 2)),
        ([{"text": "a", "n": 4}, {"text": None, "n": 5}], "n", 5),
        ([{"text": "a"}, {"text": None}], None, 1),
    ],
)
def test_keys_of_failed_rows_keep_their_type(
    simulated: SimulatedClient, data: Any, row_key: str | None, key: Any
) -> None:
    nbcodex.map(ECHO, data, row_key=row_key)
    assert [*last().failed] == [key]


@pytest.mark.parametrize("later", ["map", "resume"])
def test_result_of_a_map_stays_available_beside_a_later_one(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    press_stop(monkeypatch, after=1)
    with pytest.raises(Stopped):
        nbcodex.map("[[echo: {}]]", [f"row {n}" for n in range(100)])
    stopped = last().id
    result = nbcodex.map(ECHO, pandas.DataFrame({"text": ["a"]}))
    finished = last().id
    if later == "resume":
        run = resume_map(stopped)
        assert run is not None
        map_runner.run_map(run)
    else:
        nbcodex.map(ECHO, [{"text": "b"}])
    recent = nbcodex.map.recent  # type: ignore[attr-defined]
    assert recent[finished].result.equals(result)
    assert len(recent[stopped]) == 100


@pytest.mark.parametrize("kind", [list, tuple])
def test_resume_in_another_process_returns_the_kind_of_the_data(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    rows = [f"row {n}" for n in range(100)]
    press_stop(monkeypatch, after=20)
    with pytest.raises(Stopped):
        nbcodex.map("[[echo: {}]]", kind(rows))
    simulated.restart_process()
    run = resume_map(last().id)
    assert run is not None
    result = map_runner.run_map(run)
    assert type(result) is kind
    assert texts(result) == rows
