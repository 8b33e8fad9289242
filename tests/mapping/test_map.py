"""`nbcodex.map` with the whole stack below it, against the simulator."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pandas
import polars
import pytest

import nbcodex
from nbcodex import host
from nbcodex.client import Client
from nbcodex.errors import (
    ConfigurationError,
    CredentialsError,
    MissingKeyError,
    NbcodexError,
    Stopped,
)
from nbcodex.mapping import map_api, map_runner
from nbcodex.mapping.estimate import Estimate, estimate
from nbcodex.mapping.inputs import read_input
from nbcodex.mapping.map_api import resume_map
from nbcodex.mapping.rows import RowRequests
from nbcodex.models import Origin, Request, RequestOptions
from nbcodex.notebook import map_cells
from nbcodex.notebook.commands.entries import resume
from nbcodex.runtime import event_loop
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Fault
from tests.simulated import KEY
from tests.simulator_transport import SimulatorTransport

from .conftest import SimulatedClient, texts

ECHO = "[[echo: {}]]"
ROOT = Path(__file__).parents[2]


def last() -> Any:
    return nbcodex.map.last  # type: ignore[attr-defined]


def test_list_is_answered_in_order(simulated: SimulatedClient) -> None:
    rows = [f"{'x' * (50 - n)} {n}" for n in range(50)]
    assert texts(nbcodex.map(ECHO, rows)) == rows


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (("a", "b"), ("a", "b")),
        ({"one": "a", 2: "b"}, {"one": "a", 2: "b"}),
        ([], []),
        ({}, {}),
        (range(2), ["0", "1"]),
    ],
)
def test_result_is_of_the_same_kind_as_the_data(
    simulated: SimulatedClient, data: Any, expected: Any
) -> None:
    result = nbcodex.map(ECHO, data)
    plain = {k: r.text for k, r in result.items()} if isinstance(result, dict) else None
    assert (plain if plain is not None else type(result)(r.text for r in result)) == expected


def test_pandas_frame_is_copied_with_result_columns(simulated: SimulatedClient) -> None:
    frame = pandas.DataFrame({"text": ["a", None, "c"], "answer": [1, 2, 3]}, index=[7, 8, 9])
    result = nbcodex.map("[[echo: {text}]]", frame)
    assert list(frame.columns) == ["text", "answer"]
    assert list(result.index) == [7, 8, 9]
    assert list(result["answer"]) == [1, 2, 3]
    assert list(result["answer_2"].fillna("")) == ["a", "", "c"]
    assert "no value in its column 'text'" in result["error"][8]
    assert result["input_tokens"].sum() > 0
    assert last().failed.keys() == {8}


def test_polars_frame_gets_typed_result_columns(simulated: SimulatedClient) -> None:
    frame = polars.DataFrame({"text": ["a", None], "lang": ["de", "fr"]})
    result = nbcodex.map("[[echo: {text} {lang}]]", frame)
    assert result["answer"].to_list() == ["a de", None]
    assert result.schema["output_tokens"] == polars.Int64


def test_series_is_answered_as_a_frame_of_one_column(simulated: SimulatedClient) -> None:
    result = nbcodex.map(ECHO, pandas.Series(["a", "b"], name="text"))
    assert list(result["answer"]) == ["a", "b"]
    assert nbcodex.map(ECHO, polars.Series("text", ["a"]))["answer"].to_list() == ["a"]


def test_iterator_is_read_one_window_ahead(simulated: SimulatedClient) -> None:
    read = itertools.count()
    replies = nbcodex.map(ECHO, (f"n{n}" for n in read))
    assert texts(itertools.islice(replies, 40)) == [f"n{n}" for n in range(40)]
    replies.close()
    assert next(read) < 40 + 1024 + 512
    assert len(last()) == 0


def test_amap_answers_lists_and_iterators_on_the_callers_loop(simulated: SimulatedClient) -> None:

    async def main() -> tuple[list[str], list[str]]:
        listed = await nbcodex.amap(ECHO, ["a", "b"])
        lazily = [reply async for reply in await nbcodex.amap(ECHO, iter("cd"))]
        return texts(listed), texts(lazily)

    assert asyncio.run(main()) == (["a", "b"], ["c", "d"])


def test_function_runs_in_the_callers_thread(simulated: SimulatedClient) -> None:
    threads = set()

    def prompt(row: dict[str, Any]) -> Any:
        threads.add(threading.current_thread())
        return {"prompt": f"[[echo: {row['text']}]]", "max_output": 100}

    assert texts(nbcodex.map(prompt, [{"text": "a"}, {"text": "b"}])) == ["a", "b"]
    assert threads == {threading.current_thread()}


def test_options_of_one_row_extend_those_of_all_rows(simulated: SimulatedClient) -> None:

    def prompt(item: str) -> Any:
        return {"prompt": ECHO.format(item), "max_output": 100}

    for _ in range(2):
        nbcodex.map(prompt, ["a", "b"], reuse=False)
    assert len(simulated.prompts) == 4
    shape = read_input(["a"])
    requests = RowRequests(
        prompt,
        shape,
        RequestOptions(patience=1.0),
        row_key=None,
        settings=Settings(),
        origin=Origin(),
    )
    assert requests.request(next(shape.rows())).patience == 1.0


def test_equal_rows_are_sent_once_unless_their_keys_differ(simulated: SimulatedClient) -> None:
    assert texts(nbcodex.map(ECHO, ["a", "a", "a"])) == ["a", "a", "a"]
    assert len(simulated.prompts) == 1
    number = itertools.count()
    nbcodex.map(ECHO, ["a", "a", "a"], row_key=lambda _: next(number))
    assert len(simulated.prompts) == 4


def test_rerun_in_another_process_sends_only_what_is_missing(simulated: SimulatedClient) -> None:
    nbcodex.map(ECHO, ["a", "b"])
    simulated.restart_process()
    replies = nbcodex.map(ECHO, ["c", "b", "a"])
    assert texts(replies) == ["c", "b", "a"]
    assert [reply.reused for reply in replies] == [False, True, True]
    assert len(simulated.prompts) == 3
    assert not any(reply.reused for reply in nbcodex.map(ECHO, ["a"], reuse=False))


def test_failed_rows_are_false_replies_listed_by_row_key(simulated: SimulatedClient) -> None:
    rows = [
        {"id": "one", "p": "[[echo: 1]]"},
        {"id": "two", "p": "[[fault=too_large]] x"},
        {"id": "3", "p": " "},
    ]
    replies = nbcodex.map("{p}", rows, row_key="id")
    assert [bool(reply) for reply in replies] == [True, False, False]
    assert replies[0].error is None
    assert last().failed.keys() == {"two", "3"}
    assert "prompt is empty" in last().failed["3"]
    assert "1 of 3 answered, 2 failed" in repr(last())


def test_row_that_fails_before_it_is_sent_has_the_advice_for_scripts(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.current, "is_script", True)

    def prompt(row: str) -> str:
        if row == "b":
            raise ConfigurationError("Too long.", advice="Raise --max-output.")
        return row

    nbcodex.map(prompt, ["a", "b"])
    assert "Raise max_output." in last()[1].error


def test_failed_rows_with_one_label_are_listed_separately(simulated: SimulatedClient) -> None:
    rows = ["[[fault=too_large]] x", "[[echo: ok]]", "[[fault=too_large]] y"]
    nbcodex.map("{}", pandas.Series(rows, index=[0, 0, 0]))
    assert last().failed.keys() == {0, "0 (row 2)"}


@pytest.mark.parametrize("option", ["thread", "turns"])
def test_rows_cannot_join_a_conversation(simulated: SimulatedClient, option: str) -> None:
    with pytest.raises(ConfigurationError, match="except thread"):
        nbcodex.map(lambda item: {"prompt": item, option: "t"}, ["a"])
    assert option not in inspect.signature(nbcodex.map).parameters


def test_images_from_a_generator_reach_every_row(simulated: SimulatedClient) -> None:
    dot = b"\x89PNG\r\n\x1a\n" + bytes(50)
    nbcodex.map(ECHO, ["a", "b"], images=(each for each in [dot]))
    sent = [str(seen.body).count("input_image") for seen in simulated.simulator.log if seen.api]
    assert sent == [1, 1]


def test_column_names_may_contain_spaces(simulated: SimulatedClient) -> None:
    rows = [{"first name": "Ann"}, {"first name": "Bob"}]
    assert texts(nbcodex.map("[[echo: {first name}]]", rows)) == ["Ann", "Bob"]


def test_on_error_raise_parks_the_rest_after_the_first_failure(simulated: SimulatedClient) -> None:
    with pytest.raises(NbcodexError) as caught:
        nbcodex.map(
            "{}", ["[[fault=too_large]] x", *(f"[[echo: {n}]]" for n in range(9))], on_error="raise"
        )
    assert f"%codex resume {last().id}" in caught.value.advice


def test_refused_key_ends_the_map_early(simulated: SimulatedClient) -> None:
    simulated.simulator.change_knobs(keys=("another",))
    with pytest.raises(CredentialsError):
        nbcodex.map(ECHO, list(range(2_000)))
    assert len(simulated.prompts) < 700


@pytest.mark.parametrize(
    ("template", "data", "options", "message"),
    [
        ("{text} {lang}", [{"text": "a"}], {}, "has {lang}"),
        ("{text}", [{"text": "a"}, {"txt": "b"}], {}, "row 1"),
        ("{text}", pandas.DataFrame({"a": [1]}), {}, "the data has {a}"),
        ("{}", pandas.DataFrame({"a": [1]}), {}, "has {item}"),
        ("{}", "one text", {}, "one text"),
        ("{}", 7, {}, "int"),
        ("{}", polars.DataFrame({"a": [1]}).lazy(), {}, "has not been run"),
        ("", ["a"], {}, "template is empty"),
        (None, ["a"], {}, "NoneType"),
        ("{}", ["a"], {"limit": 0}, "limit"),
        ("{}", ["a"], {"on_error": "ignore"}, "on_error"),
        ("{}", ["a"], {"engine": "diesel"}, "unknown"),
        (lambda item: {"prompt": item, "modle": "x"}, ["a"], {}, "did you mean model?"),
        ("{}", ["a"], {"max_output": 0}, "max_output"),
        ("{}", ["a"], {"row_key": "id"}, "not a column of row 0"),
        ("{}", ["a"], {"row_key": 3}, "row_key"),
        (lambda item: item.nothing, ["a", "b"], {}, "AttributeError"),
        (lambda item: 3, ["a", "b"], {}, "returned int"),
        ("{x.y}", [{"x": 1}], {"on_error": "raise"}, "AttributeError"),
    ],
)
def test_invalid_arguments_are_refused_before_sending(
    simulated: SimulatedClient, template: Any, data: Any, options: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        nbcodex.map(template, data, **options)
    assert message in str(caught.value)
    assert simulated.prompts == []


def test_limit_uses_only_the_first_rows(simulated: SimulatedClient) -> None:
    assert texts(nbcodex.map(ECHO, ["a", "b", "c"], limit=2)) == ["a", "b"]
    assert len(nbcodex.map("[[echo: {t}]]", pandas.DataFrame({"t": list("abc")}), limit=2)) == 2
    assert texts(nbcodex.map(ECHO, iter("abc"), limit=1)) == ["a"]


def test_dry_run_estimates_and_sends_nothing(simulated: SimulatedClient) -> None:
    nbcodex.map(ECHO, ["a"])
    expected = nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True, max_output=100)
    assert isinstance(expected, Estimate)
    assert (expected.rows, expected.answered) == (3, 0)
    expected = nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True)
    assert (expected.rows, expected.answered, expected.output_tokens) == (3, 1, 1_000)
    assert "1 answered before" in str(expected)
    assert len(simulated.prompts) == 1


@pytest.mark.parametrize("words", [ECHO, ECHO.format])
def test_estimate_counts_equal_rows_once(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    """In a dry run, and in the question before an expensive map, which is based on a sample."""
    monkeypatch.setattr("nbcodex.openai_api.pricing.cost", lambda *_: 0.5)
    rows = [f"city {n % 5}" for n in range(1_000)]
    expected = nbcodex.map(words, rows, dry_run=True, max_output=16)
    assert (expected.rows, expected.equal, expected.output_tokens, expected.cost) == (
        1_000,
        995,
        80,
        2.5,
    )
    assert "1,000 rows · 995 equal to others · " in str(expected)
    apart = nbcodex.map(words, rows, dry_run=True, max_output=16, reuse=False)
    assert (apart.equal, apart.cost) == (0, 500.0)
    questions: list[str] = []
    host.current.confirm = lambda question: bool(questions.append(question)) or True
    nbcodex.map(words, rows)
    assert len(simulated.prompts) == 5
    # Equal prompts of a function are known only for the rows that it was called for.
    assert ("$2.50" if words is ECHO else "$10.00") in questions[0]


def test_sampled_estimate_is_close_to_the_full_one(simulated: SimulatedClient) -> None:
    called = []

    def prompt(item: int) -> str:
        called.append(item)
        return "x" * item

    rows = list(range(1, 5_001))
    requests = RowRequests(
        prompt,
        read_input(rows),
        RequestOptions(),
        row_key=None,
        settings=Settings.read(),
        origin=Origin(),
    )
    expected = estimate(read_input(rows), requests, simulated.client, from_sample=True)
    assert len(called) < 500
    whole = estimate(read_input(rows), requests, simulated.client)
    assert expected.rows == whole.rows == 5_000
    assert expected.input_tokens == pytest.approx(whole.input_tokens, rel=0.02)
    assert expected.output_tokens == pytest.approx(whole.output_tokens, rel=0.02)


def test_dry_run_warns_of_an_insufficient_budget(simulated: SimulatedClient) -> None:
    host.current.settings = lambda: replace(Settings.read(), budgets=("1000 tokens",))
    expected = str(nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True, max_output=1_000))
    assert "more than is left of your budget: 1,000 tokens of 1,000 tokens" in expected


def test_expensive_map_needs_confirmation(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[bool | None] = iter([False, None, True])
    questions = []

    def ask(question: str) -> bool | None:
        questions.append(question)
        return next(answers)

    monkeypatch.setattr("nbcodex.openai_api.pricing.cost", lambda *_: 0.5)
    host.current.confirm = ask
    with pytest.raises(NbcodexError, match="Not started"):
        nbcodex.map(ECHO, ["a", "b", "c"])
    with pytest.raises(ConfigurationError, match=r"confirm=True"):
        nbcodex.map(ECHO, ["a", "b", "c"])
    assert simulated.prompts == []
    assert texts(nbcodex.map(ECHO, ["a", "b", "c"])) == ["a", "b", "c"]
    assert "$1.50" in questions[0]
    assert texts(nbcodex.map(ECHO, ["d", "e", "f"], confirm=True)) == ["d", "e", "f"]
    assert len(questions) == 3


def test_client_of_an_async_factory_is_made_before_the_estimate(simulated: SimulatedClient) -> None:
    async def factory() -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=KEY, base_url="https://api.openai.com/v1")

    host.current.settings = lambda: replace(Settings.read(), client=factory, ask_above=0.0)
    host.current.confirm = lambda _: False
    with pytest.raises(NbcodexError, match="Not started"):
        nbcodex.map(ECHO, ["a"])
    simulated.restart_process()
    assert nbcodex.map(ECHO, ["a"], dry_run=True).cost > 0


def press_stop(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Raise KeyboardInterrupt while the map waits, once `after` rows are answered.

    A map of 200 rows is then longer than what is active at once and what is parked at once.
    """
    from nbcodex.mapping.backends import LiveBackend

    monkeypatch.setattr("nbcodex.mapping.backends.MAX_ACTIVE_ROWS", 80)
    monkeypatch.setattr("nbcodex.mapping.map_run.PARK_CHUNK_ROWS", 50)
    real = LiveBackend.next_endings

    def next_endings(self: LiveBackend, *, timeout: float) -> Any:
        if self.counter.stats.done >= after and timeout:
            monkeypatch.setattr(LiveBackend, "next_endings", real)
            raise KeyboardInterrupt
        return real(self, timeout=min(timeout, 0.01))

    monkeypatch.setattr(LiveBackend, "next_endings", next_endings)


@pytest.mark.slow
@pytest.mark.parametrize("in_other_process", [False, True])
def test_stop_parks_the_rest_and_resume_sends_only_that(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, in_other_process: bool
) -> None:
    """Here or in another process."""
    rows = [f"row {n}" for n in range(200)]
    press_stop(monkeypatch, after=20)
    with pytest.raises(Stopped) as caught:
        nbcodex.map(ECHO, rows)
    stopped = last()
    done = {n for n, reply in enumerate(stopped) if reply}
    assert 20 <= len(done) < 200
    assert f"%codex resume {stopped.id}" in caught.value.advice
    assert stopped.failed == {}
    asked = simulated.prompts.count
    if in_other_process:
        simulated.restart_process()
    run = resume_map(stopped.id[:6])
    assert run is not None
    result = map_runner.run_map(run)
    assert last().failed == {}
    assert [r for r in result if not r.text] == []
    assert texts(result) == rows
    assert len(last()) == 200
    assert all(asked(f"[[echo: row {n}]]") == 1 for n in done)
    with pytest.raises(NbcodexError, match="Nothing"):
        resume_map(stopped.id)
    assert resume_map("nothing-like-it") is None


@pytest.mark.parametrize("in_other_process", [False, True])
def test_resumed_equal_rows_are_sent_once(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, *, in_other_process: bool
) -> None:
    rows = [f"row {n % 3}" for n in range(300)]
    press_stop(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows)
    before = {row: simulated.prompts.count(ECHO.format(row)) for row in set(rows)}
    if in_other_process:
        simulated.restart_process()
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert all(simulated.prompts.count(ECHO.format(row)) <= n + 1 for row, n in before.items())


def test_resume_uses_answers_that_another_kernel_got(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"row {n}" for n in range(100)]
    press_stop(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows, reuse=False)
    here, other = last(), Client(transport=SimulatorTransport(simulated.simulator))
    journal = simulated.client.journal(host.current.settings())
    # The read waits until all are written.
    assert journal.maps.count_rows(here.id).total() == 100
    with monkeypatch.context() as patch:
        patch.setattr("nbcodex.client._current", other)
        patch.setattr(map_api, "kept_runs", {})
        other_run = resume_map(here.id)
        assert other_run is not None
        map_runner.run_map(other_run)
        other.close()
    asked = len(simulated.prompts)
    run = resume_map(here.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert len(simulated.prompts) == asked


class InterruptedRow(dict[str, str]):
    """A row that raises KeyboardInterrupt where the test says so, once."""

    at = ""

    def interrupt(self, at: str) -> None:
        if self.at == at:
            self.at = ""
            raise KeyboardInterrupt

    def items(self) -> Any:
        self.interrupt("row")
        return super().items()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["row", "prompt", "key"])
def test_interrupt_in_user_code_loses_no_row(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr("nbcodex.mapping.map_run.PARK_CHUNK_ROWS", 40)  # several are parked
    rows = [InterruptedRow(n=str(n)) for n in range(100)]
    rows[7].at = at

    def prompt(row: InterruptedRow) -> str:
        row.interrupt("prompt")
        return ECHO.format(row["n"])

    def key(row: InterruptedRow) -> str:
        row.interrupt("key")
        return row["n"]

    with pytest.raises(Stopped):
        nbcodex.map(prompt, rows, row_key=key, confirm=True)
    journal = simulated.client.journal(host.current.settings())
    assert journal.maps.count_rows(last().id).total() == 100
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == [row["n"] for row in rows]


def test_rows_after_many_without_a_request_are_parked(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ECHO.format(n) for n in range(200)]
    press_stop(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map("{}", [*prompts[:100], *[" "] * 600, *prompts[100:]])
    journal = simulated.client.journal(host.current.settings())
    assert journal.maps.count_rows(last().id).total() == 200


@pytest.mark.slow
def test_resume_uses_the_present_settings(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(Settings.read(), budgets=("1 token",))
    host.current.settings = lambda: settings
    rows = [str(n) for n in range(200)]
    press_stop(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows)
    settings = replace(settings, budgets=(), api_key=Secret("sk-another-key-0123456789"))
    simulated.simulator.change_knobs(keys=("sk-another-key-0123456789",))
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows


def test_map_running_in_another_kernel_cannot_be_resumed(simulated: SimulatedClient) -> None:
    origin = Origin(map_id="m77", row_index=0, row_count=1)
    request = Request(prompt="[[echo: x]]", id="m77-0", origin=origin)
    journal = simulated.client.journal(host.current.settings())
    event_loop.shared().submit(journal.insert(request)).result()
    with pytest.raises(NbcodexError, match="another kernel"):
        resume_map("m77")
    assert simulated.prompts == []


def session_with(journal: Any) -> Any:
    """Return a notebook session with all that a resumed map needs."""
    return SimpleNamespace(
        map_listener=lambda **_: lambda _: None,
        assign=lambda *_: None,
        journal=journal,
        notebook=None,
        settings=host.current.settings(),
    )


def run_with_error(error: Exception) -> bool:
    raise error


def parked_row(journal: Any, batch: str) -> Request:
    """Return the only row of a map, which was never sent."""
    origin = Origin(map_id=batch, row_index=0, row_count=1)
    request = Request(prompt=f"[[echo: {batch}]]", id=f"{batch}-0", origin=origin)
    journal.maps.insert_parked([(request, batch.encode())])
    return request


def test_resume_all_continues_after_a_map_that_cannot_be_resumed(
    simulated: SimulatedClient,
) -> None:
    journal = simulated.client.journal(host.current.settings())
    active = parked_row(journal, "m77")
    active = replace(active, id="m77-1", origin=replace(active.origin, row_index=1))
    event_loop.shared().submit(journal.insert(active)).result()  # as if by another kernel
    parked_row(journal, "m78")
    with pytest.raises(NbcodexError, match="The map m77 is running in another kernel"):
        resume(session_with(journal))
    assert simulated.prompts == ["[[echo: m78]]"]


@pytest.mark.parametrize("map_ids", [["m77", "m78"], ["m77", "m78", "m79"]])
def test_error_that_meets_several_resumed_maps_is_raised_once_and_names_them(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch, map_ids: list[str]
) -> None:
    journal = simulated.client.journal(host.current.settings())
    for map_id in map_ids:
        parked_row(journal, map_id)
    monkeypatch.setattr(
        map_cells, "resume_one", lambda *_, **__: run_with_error(MissingKeyError("No key."))
    )
    with pytest.raises(NbcodexError) as caught:
        resume(session_with(journal))
    count, names = len(map_ids), ", ".join(map_ids)
    assert caught.value.message == f"{count} of {count} maps are not finished: No key. ({names})"


def test_maps_that_fail_differently_are_named_with_their_reasons(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = simulated.client.journal(host.current.settings())
    for map_id in ("m77", "m78", "m79"):
        parked_row(journal, map_id)
    reasons = {"m77": "No key.", "m78": "No quota."}
    monkeypatch.setattr(
        map_cells,
        "resume_one",
        lambda _, map_id, **__: (
            map_id not in reasons or run_with_error(NbcodexError(reasons[map_id]))
        ),
    )
    with pytest.raises(NbcodexError, match=r"2 of 3 maps .*No key. \(m77\); No quota. \(m78\)"):
        resume(session_with(journal))


def test_resume_all_skips_active_maps(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = simulated.client.journal(host.current.settings())
    parked_row(journal, "m77")
    runner = SimpleNamespace(run=SimpleNamespace(id="m77"))
    monkeypatch.setattr(map_cells, "active_runners", lambda: [runner])
    assert map_cells.resume_all(session_with(journal), None) == (0, None)


def test_resume_reports_rows_missing_from_the_journal(
    simulated: SimulatedClient, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = simulated.client.journal(host.current.settings())
    for item in (0, 3):
        origin = Origin(map_id="m77", row_index=item, row_count=1_500)
        request = Request(prompt=f"[[echo: {item}]]", id=f"m77-{item}", origin=origin)
        journal.maps.insert_parked([(request, b"%d" % item)])
    session = session_with(journal)
    assert map_cells.resume_one(session, "m77")
    assert [reply.text for reply in last() if reply] == ["0", "3"]
    notice = "1,498 of its 1,500 rows never reached the journal: run the map again"
    assert f"m77: {notice}" in capsys.readouterr().out
    simulated.restart_process()
    with pytest.raises(NbcodexError, match="Nothing of the map m77 is left") as caught:
        resume_map("m77")
    assert caught.value.advice.startswith(notice)
    journal = session.journal = simulated.client.journal(host.current.settings())
    (entry,) = journal.recent_entries()
    line = map_cells.journal_line(session, "m77", entry, 0.0)
    assert line.startswith("m77 ")
    assert "2 done of 1,500 rows" in line


def test_missing_key_ends_the_map_first(
    simulated: SimulatedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(MissingKeyError):
        nbcodex.map(ECHO, list(range(1_000)))
    with pytest.raises(MissingKeyError):
        list(nbcodex.map(ECHO, iter(range(1_000))))


def test_function_is_called_once_if_no_price_is_known(simulated: SimulatedClient) -> None:
    called = []

    def prompt(item: str) -> str:
        called.append(item)
        return f"[[echo: {item}]]"

    host.current.settings = lambda: replace(
        Settings.read(), base_url="https://gateway.example.org/v1", key_base_url=""
    )
    assert texts(nbcodex.map(prompt, ["a", "b"])) == ["a", "b"]
    assert called == ["a", "b"]


def test_rows_without_patience_wait_for_limits(simulated: SimulatedClient) -> None:
    simulated.simulator.script([Fault("requests_per_minute", seconds=0.05)] * 3)
    assert texts(nbcodex.map(ECHO, ["a"])) == ["a"]
    simulated.simulator.script([Fault("requests_per_day", seconds=5_000)])
    replies = nbcodex.map(ECHO, ["b"], patience="1s")
    assert replies[0].status == "parked"
    assert "The request can be sent at" in last().parked[0]


def test_last_stats_cover_the_whole_map(simulated: SimulatedClient) -> None:
    reports: list[Any] = []
    host.current.map_listener = lambda: reports.append
    nbcodex.map("{}", ["[[echo: a]]", "[[echo: a]]", "[[fault=too_large]] x"])
    assert [report.outcome for report in reports].index("done") == len(reports) - 1
    end = reports[-1]
    assert (end.total, end.done, end.reused, end.failed, end.sent) == (3, 2, 1, 1, 0)
    assert end.totals.usage.output_tokens > 0
    assert end.failures[0][0] == "2"


@pytest.mark.slow
def test_abandoned_iterator_exits_without_a_traceback(tmp_path: Path) -> None:
    script = (
        "import nbcodex\nfrom nbcodex import client\nfrom nbcodex.runtime.clock import BootClock\n"
        "from nbcodex.simulator import Knobs, Simulator\n"
        "from tests.simulator_transport import SimulatorTransport as T\n"
        "core = Simulator(Knobs(tpm=None, rpm=None, latency=0.01), clock=BootClock())\n"
        "client._current = client.Client(transport=T(core))\n"
        "replies = nbcodex.map('[[echo: {}]]', iter(range(1000)))\n"
        "print(next(replies).text)\n"
    )
    environ = {"OPENAI_API_KEY": KEY, "NBCODEX_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (ran.stdout, ran.stderr) == ("0\n", "")
