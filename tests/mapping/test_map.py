"""`nbcodex.map` through the engine, the wire and the journal, against the simulator."""

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
from nbcodex.mapping.rows import row_requests
from nbcodex.models import Origin, Request
from nbcodex.notebook import map_cells
from nbcodex.runtime import event_loop
from nbcodex.settings import Secret, Settings
from nbcodex.simulator import Fault
from nbcodex.simulator.transport import SimulatorTransport
from tests.simulated import KEY

from .conftest import Room, texts

ECHO = "[[echo: {}]]"
ROOT = Path(__file__).parents[2]


def last() -> Any:
    return nbcodex.map.last  # type: ignore[attr-defined]


def test_a_list_comes_back_as_replies_in_order(room: Room) -> None:
    """However the answers arrive, the first is that of the first row."""
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
def test_the_same_kind_of_object_comes_back(room: Room, data: Any, expected: Any) -> None:
    """A tuple is answered with a tuple, a dict with a dict of the same keys."""
    back = nbcodex.map(ECHO, data)
    plain = {k: r.text for k, r in back.items()} if isinstance(back, dict) else None
    assert (plain if plain is not None else type(back)(r.text for r in back)) == expected


def test_a_pandas_frame_gets_columns(room: Room) -> None:
    """A copy comes back with the same index; names of the user's are left alone."""
    frame = pandas.DataFrame({"text": ["a", None, "c"], "answer": [1, 2, 3]}, index=[7, 8, 9])
    back = nbcodex.map("[[echo: {text}]]", frame)
    assert list(frame.columns) == ["text", "answer"]
    assert list(back.index) == [7, 8, 9]
    assert list(back["answer"]) == [1, 2, 3]
    assert list(back["answer_2"].fillna("")) == ["a", "", "c"]
    assert "no value in its column 'text'" in back["error_2"][8]
    assert back["input_tokens_2"].sum() > 0
    assert last().failed.keys() == {"8"}


def test_a_polars_frame_gets_columns(room: Room) -> None:
    """The same, and the types are those of polars."""
    frame = polars.DataFrame({"text": ["a", None], "lang": ["de", "fr"]})
    back = nbcodex.map("[[echo: {text} {lang}]]", frame)
    assert back["answer"].to_list() == ["a de", None]
    assert back.schema["output_tokens"] == polars.Int64


def test_a_series_is_a_frame_of_one_column(room: Room) -> None:
    """`{}` is its value."""
    back = nbcodex.map(ECHO, pandas.Series(["a", "b"], name="text"))
    assert list(back["answer"]) == ["a", "b"]
    assert nbcodex.map(ECHO, polars.Series("text", ["a"]))["answer"].to_list() == ["a"]


def test_an_iterator_is_read_lazily_and_answered_in_order(room: Room) -> None:
    """Of an endless one only a window is read; leaving it parks what is under way."""
    read = itertools.count()
    replies = nbcodex.map(ECHO, (f"n{n}" for n in read))
    assert texts(itertools.islice(replies, 40)) == [f"n{n}" for n in range(40)]
    replies.close()
    assert next(read) < 40 + 1024 + 512
    assert len(last()) == 0


def test_amap_does_the_same_on_the_callers_loop(room: Room) -> None:
    """A list comes back as a list, an iterator as an async iterator."""

    async def main() -> tuple[list[str], list[str]]:
        listed = await nbcodex.amap(ECHO, ["a", "b"])
        lazily = [reply async for reply in await nbcodex.amap(ECHO, iter("cd"))]
        return texts(listed), texts(lazily)

    assert asyncio.run(main()) == (["a", "b"], ["c", "d"])


def test_a_function_runs_in_the_callers_thread(room: Room) -> None:
    """It may use what is not safe elsewhere, and may set options row by row."""
    threads = set()

    def prompt(row: dict[str, Any]) -> Any:
        threads.add(threading.current_thread())
        return {"prompt": f"[[echo: {row['text']}]]", "max_output": 100}

    assert texts(nbcodex.map(prompt, [{"text": "a"}, {"text": "b"}])) == ["a", "b"]
    assert threads == {threading.current_thread()}


def test_a_rows_own_options_leave_those_of_all_rows(room: Room) -> None:
    """A dict of its own says what differs in it; the rest is as the map says."""

    def prompt(item: str) -> Any:
        return {"prompt": ECHO.format(item), "max_output": 100}

    for _ in range(2):
        nbcodex.map(prompt, ["a", "b"], reuse=False)
    assert len(room.prompts) == 4
    shape = read_input(["a"])
    made = row_requests(
        prompt, shape, {"patience": 1.0}, row_key=None, settings=Settings(), origin=Origin()
    )
    assert made.request(next(shape.rows())).patience == 1.0


def test_equal_rows_are_asked_once_unless_their_keys_differ(room: Room) -> None:
    """Duplicates share an answer; a row key tells them apart."""
    assert texts(nbcodex.map(ECHO, ["a", "a", "a"])) == ["a", "a", "a"]
    assert len(room.prompts) == 1
    number = itertools.count()
    nbcodex.map(ECHO, ["a", "a", "a"], row_key=lambda _: next(number))
    assert len(room.prompts) == 4


def test_a_rerun_pays_only_for_what_is_missing(room: Room) -> None:
    """Another process with the same journal asks what was not answered, in whatever order."""
    nbcodex.map(ECHO, ["a", "b"])
    room.again()
    replies = nbcodex.map(ECHO, ["c", "b", "a"])
    assert texts(replies) == ["c", "b", "a"]
    assert [reply.reused for reply in replies] == [False, True, True]
    assert len(room.prompts) == 3
    assert not any(reply.reused for reply in nbcodex.map(ECHO, ["a"], reuse=False))


def test_failed_rows_stop_nobody(room: Room) -> None:
    """They are false replies that say why, and are listed by their keys."""
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


def test_a_failed_row_is_listed_whatever_others_are_called(room: Room) -> None:
    """Neither an answer nor a failure of the same name takes its place."""
    rows = ["[[fault=too_large]] x", "[[echo: ok]]", "[[fault=too_large]] y"]
    nbcodex.map("{}", pandas.Series(rows, index=[0, 0, 0]))
    assert last().failed.keys() == {"0", "0 (row 2)"}


@pytest.mark.parametrize("option", ["thread", "turns"])
def test_rows_are_no_conversation(room: Room, option: str) -> None:
    """They would not see it, and each would become a turn of it."""
    with pytest.raises(ConfigurationError, match="except thread"):
        nbcodex.map(lambda item: {"prompt": item, option: "t"}, ["a"])
    assert option not in inspect.signature(nbcodex.map).parameters


def test_pictures_of_a_generator_reach_every_row(room: Room) -> None:
    """It can be read but once."""
    dot = b"\x89PNG\r\n\x1a\n" + bytes(50)
    nbcodex.map(ECHO, ["a", "b"], images=(each for each in [dot]))
    sent = [str(seen.body).count("input_image") for seen in room.simulator.log if seen.api]
    assert sent == [1, 1]


def test_a_key_with_a_space_is_a_column(room: Room) -> None:
    """Of a dict as of a frame, whatever is known to be there may stand in braces."""
    rows = [{"first name": "Ann"}, {"first name": "Bob"}]
    assert texts(nbcodex.map("[[echo: {first name}]]", rows)) == ["Ann", "Bob"]


def test_on_error_raise_ends_at_the_first_failure(room: Room) -> None:
    """The rest is parked, and the error says how to go on."""
    with pytest.raises(NbcodexError) as caught:
        nbcodex.map(
            "{}", ["[[fault=too_large]] x", *(f"[[echo: {n}]]" for n in range(9))], on_error="raise"
        )
    assert f"%codex resume {last().id}" in caught.value.advice


def test_what_would_meet_every_row_ends_the_map(room: Room) -> None:
    """A refused key is not tried out a thousand times."""
    room.simulator.change_knobs(keys=("another",))
    with pytest.raises(CredentialsError):
        nbcodex.map(ECHO, list(range(2_000)))
    assert len(room.prompts) < 700


@pytest.mark.parametrize(
    ("template", "data", "options", "says"),
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
        (lambda item: {"prompt": item, "modle": "x"}, ["a"], {}, "did you mean 'model'"),
        ("{}", ["a"], {"max_output": 0}, "max_output"),
        ("{}", ["a"], {"row_key": "id"}, "not a column of row 0"),
        ("{}", ["a"], {"row_key": 3}, "row_key"),
        (lambda item: item.nothing, ["a", "b"], {}, "AttributeError"),
        (lambda item: 3, ["a", "b"], {}, "returned int"),
        ("{x.y}", [{"x": 1}], {"on_error": "raise"}, "AttributeError"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    room: Room, template: Any, data: Any, options: Any, says: str
) -> None:
    """The message says what is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        nbcodex.map(template, data, **options)
    assert says in str(caught.value)
    assert room.prompts == []


def test_limit_tries_a_few(room: Room) -> None:
    """Of a frame, too, only the first rows come back."""
    assert texts(nbcodex.map(ECHO, ["a", "b", "c"], limit=2)) == ["a", "b"]
    assert len(nbcodex.map("[[echo: {t}]]", pandas.DataFrame({"t": list("abc")}), limit=2)) == 2
    assert texts(nbcodex.map(ECHO, iter("abc"), limit=1)) == ["a"]


def test_a_dry_run_sends_nothing(room: Room) -> None:
    """It tells rows, tokens, and what was answered before."""
    nbcodex.map(ECHO, ["a"])
    told = nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True, max_output=100)
    assert isinstance(told, Estimate)
    assert (told.rows, told.answered) == (3, 0)
    told = nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True)
    assert (told.rows, told.answered, told.output_tokens) == (3, 1, 1_000)
    assert "1 answered before" in str(told)
    assert len(room.prompts) == 1


@pytest.mark.parametrize("words", [ECHO, ECHO.format])
def test_equal_rows_are_reckoned_with_once(
    room: Room, monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    """As they are asked: in a dry run, and in the question about a dear map, told by a sample."""
    monkeypatch.setattr("nbcodex.openai_api.pricing.cost", lambda *_: 0.5)
    rows = [f"city {n % 5}" for n in range(1_000)]
    told = nbcodex.map(words, rows, dry_run=True, max_output=16)
    assert (told.rows, told.equal, told.output_tokens, told.cost) == (1_000, 995, 80, 2.5)
    assert "1,000 rows · 995 equal to others · " in str(told)
    apart = nbcodex.map(words, rows, dry_run=True, max_output=16, reuse=False)
    assert (apart.equal, apart.cost) == (0, 500.0)
    questions: list[str] = []
    host.current.confirm = lambda question: bool(questions.append(question)) or True
    nbcodex.map(words, rows)
    assert len(room.prompts) == 5
    # What only a function can tell is told by the rows that it was called for.
    assert ("$2.50" if words is ECHO else "$10.00") in questions[0]


def test_a_large_map_is_estimated_by_some_of_its_rows(room: Room) -> None:
    """They are taken evenly of those that differ, so that the estimate fits all."""
    called = []

    def prompt(item: int) -> str:
        called.append(item)
        return "x" * item

    rows = list(range(1, 5_001))
    made = row_requests(
        prompt, read_input(rows), {}, row_key=None, settings=Settings(), origin=Origin()
    )
    settings = Settings.read()
    told = estimate(read_input(rows), made, room.client, settings, from_sample=True)
    assert len(called) < 500
    whole = estimate(read_input(rows), made, room.client, settings)
    assert told.rows == whole.rows == 5_000
    assert told.input_tokens == pytest.approx(whole.input_tokens, rel=0.02)
    assert told.output_tokens == pytest.approx(whole.output_tokens, rel=0.02)


def test_a_dry_run_tells_what_is_left_of_a_budget(room: Room) -> None:
    """A map that would pass it says so before any row is sent."""
    host.current.settings = lambda: replace(Settings.read(), budgets=("1000 tokens",))
    told = str(nbcodex.map(ECHO, ["a", "b", "c"], dry_run=True, max_output=1_000))
    assert "more than is left of your budget: 1,000 tokens of 1,000 tokens" in told


def test_a_dear_map_asks_first(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """No is an error, nobody there is an error that says what to do, yes and `confirm` go on."""
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
    assert room.prompts == []
    assert texts(nbcodex.map(ECHO, ["a", "b", "c"])) == ["a", "b", "c"]
    assert "$1.50" in questions[0]
    assert texts(nbcodex.map(ECHO, ["d", "e", "f"], confirm=True)) == ["d", "e", "f"]
    assert len(questions) == 3


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Press Stop while the map waits, once `after` rows are answered."""
    from nbcodex.mapping.backends import LiveBackend

    real = LiveBackend.endings

    def endings(self: LiveBackend, *, timeout: float) -> Any:
        if self.counter.stats.done >= after and timeout:
            monkeypatch.setattr(LiveBackend, "endings", real)
            raise KeyboardInterrupt
        return real(self, timeout=min(timeout, 0.01))

    monkeypatch.setattr(LiveBackend, "endings", endings)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_stop_parks_the_rest_and_resume_goes_on(
    room: Room, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """What was finished is kept; going on, here or in another process, asks only the others."""
    rows = [f"row {n}" for n in range(900)]
    interrupted(monkeypatch, after=20)
    with pytest.raises(Stopped) as caught:
        nbcodex.map(ECHO, rows)
    stopped = last()
    done = {n for n, reply in enumerate(stopped) if reply}
    assert 20 <= len(done) < 900
    assert f"%codex resume {stopped.id}" in caught.value.advice
    assert stopped.failed == {}
    asked = room.prompts.count
    if elsewhere:
        room.again()
    run = resume_map(stopped.id[:6])
    assert run is not None
    back = map_runner.run_map(run)
    assert last().failed == {}
    assert [r for r in back if not r.text] == []
    assert texts(back) == rows
    assert len(last()) == 900
    assert all(asked(f"[[echo: row {n}]]") == 1 for n in done)
    with pytest.raises(NbcodexError, match="Nothing"):
        resume_map(stopped.id)
    assert resume_map("nothing-like-it") is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_equal_rows_are_asked_once_when_a_map_goes_on(
    room: Room, monkeypatch: pytest.MonkeyPatch, *, elsewhere: bool
) -> None:
    """Stop parked each of them; the first answer does for those that ask the same."""
    rows = [f"row {n % 3}" for n in range(300)]
    interrupted(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows)
    before = {row: room.prompts.count(ECHO.format(row)) for row in set(rows)}
    if elsewhere:
        room.again()
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert all(room.prompts.count(ECHO.format(row)) <= n + 1 for row, n in before.items())


def test_what_was_answered_elsewhere_is_not_asked_again(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel went on with the map; here, going on takes its answers, and pays nothing."""
    rows = [f"row {n}" for n in range(100)]
    interrupted(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows, reuse=False)
    here, other = last(), Client(transport=SimulatorTransport(room.simulator))
    journal = room.client.journal(host.current.settings())
    assert journal.maps.summary(here.id).rows == 100  # which waits until they are written
    with monkeypatch.context() as away:
        away.setattr("nbcodex.client._current", other)
        away.setattr(map_api, "_kept_runs", {})
        elsewhere = resume_map(here.id)
        assert elsewhere is not None
        map_runner.run_map(elsewhere)
        other.close()
    asked = len(room.prompts)
    run = resume_map(here.id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows
    assert len(room.prompts) == asked


class Struck(dict[str, str]):
    """A row that is interrupted where the test says so, once."""

    at = ""

    def strike(self, at: str) -> None:
        if self.at == at:
            self.at = ""
            raise KeyboardInterrupt

    def items(self) -> Any:
        self.strike("row")
        return super().items()


@pytest.mark.parametrize("at", ["row", "prompt", "key"])
def test_stop_loses_no_row_wherever_it_strikes(room: Room, at: str) -> None:
    """That whose row, prompt or key was being made is parked like those behind it."""
    rows = [Struck(n=str(n)) for n in range(300)]
    rows[7].at = at

    def prompt(row: Struck) -> str:
        row.strike("prompt")
        return ECHO.format(row["n"])

    def key(row: Struck) -> str:
        row.strike("key")
        return row["n"]

    with pytest.raises(Stopped):
        nbcodex.map(prompt, rows, row_key=key, confirm=True)
    journal = room.client.journal(host.current.settings())
    assert journal.maps.summary(last().id).rows == 300
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == [row["n"] for row in rows]


def test_going_on_obeys_the_settings_in_force_now(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that was raised since, or a key that was changed, counts for all that is left."""
    settings = replace(Settings.read(), budgets=("1 token",))
    host.current.settings = lambda: settings
    rows = [str(n) for n in range(900)]
    interrupted(monkeypatch, after=0)
    with pytest.raises(Stopped):
        nbcodex.map(ECHO, rows)
    settings = replace(settings, budgets=(), api_key=Secret("sk-another-key-0123456789"))
    room.simulator.change_knobs(keys=("sk-another-key-0123456789",))
    run = resume_map(last().id)
    assert run is not None
    assert texts(map_runner.run_map(run)) == rows


def test_a_map_that_another_kernel_is_at_is_left_to_it(room: Room) -> None:
    """Going on with it would ask its rows twice."""
    origin = Origin(map_id="m77", row_index=0, row_count=1)
    request = Request(prompt="[[echo: x]]", id="m77-0", origin=origin)
    journal = room.client.journal(host.current.settings())
    event_loop.shared().submit(journal.insert(request)).result()
    with pytest.raises(NbcodexError, match="another kernel"):
        resume_map("m77")
    assert room.prompts == []


def session_of(journal: Any) -> Any:
    """Return as much of a notebook's session as a map needs that goes on."""
    return SimpleNamespace(
        map_listener=lambda **_: lambda _: None, bind=lambda *_: None, journal=journal
    )


def shelved(journal: Any, batch: str) -> Request:
    """Return a row in the journal that is all of a map, and was never begun."""
    origin = Origin(map_id=batch, row_index=0, row_count=1)
    request = Request(prompt=f"[[echo: {batch}]]", id=f"{batch}-0", origin=origin)
    journal.maps.insert_parked([(request, batch.encode())])
    return request


def test_a_map_that_cannot_go_on_keeps_no_other_from_it(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all are to go on, what keeps one of them is told, and the next goes on."""
    journal = room.client.journal(host.current.settings())
    held = shelved(journal, "m77")
    held = replace(held, id="m77-1", origin=replace(held.origin, row_index=1))
    event_loop.shared().submit(journal.insert(held)).result()  # which another kernel is at
    shelved(journal, "m78")
    assert map_cells.all_resumed(session_of(journal), None, alone=True) == 2
    assert room.prompts == ["[[echo: m78]]"]
    assert "The map m77 is running in another kernel" in capsys.readouterr().out


def test_a_map_that_is_under_way_here_is_nothing_to_go_on_with(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has parked rows while others are on their way; nobody is bothered with that."""
    journal = room.client.journal(host.current.settings())
    shelved(journal, "m77")
    runner = SimpleNamespace(run=SimpleNamespace(id="m77"))
    monkeypatch.setattr(map_cells, "active_runners", lambda: [runner])
    assert map_cells.all_resumed(session_of(journal), None) == 0


def test_rows_that_never_reached_the_journal_are_told(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed kernel had not begun them: a resume cannot, and says what can."""
    journal = room.client.journal(host.current.settings())
    for item in (0, 3):
        origin = Origin(map_id="m77", row_index=item, row_count=1_500)
        request = Request(prompt=f"[[echo: {item}]]", id=f"m77-{item}", origin=origin)
        journal.maps.insert_parked([(request, b"%d" % item)])
    session = session_of(journal)
    assert map_cells.resumed(session, "m77")
    assert [reply.text for reply in last() if reply] == ["0", "3"]
    said = "1,498 of its 1,500 rows never reached the journal: run the map again"
    assert f"m77: {said}" in capsys.readouterr().out
    room.again()
    with pytest.raises(NbcodexError, match="Nothing of the map m77 is left") as caught:
        resume_map("m77")
    assert caught.value.advice.startswith(said)
    journal = session.journal = room.client.journal(host.current.settings())
    (entry,) = journal.recent_entries()
    assert "m77 map: 2 done of 1,500 rows" in map_cells.line(session, "m77", entry, 0.0)


def test_a_missing_key_is_told_before_anything(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a thousand failed rows."""
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(MissingKeyError):
        nbcodex.map(ECHO, list(range(1_000)))
    with pytest.raises(MissingKeyError):
        list(nbcodex.map(ECHO, iter(range(1_000))))


def test_a_function_is_called_once_where_no_price_is_known(room: Room) -> None:
    """Of a compatible server nobody can tell the cost, so no row is made for it."""
    called = []

    def prompt(item: str) -> str:
        called.append(item)
        return f"[[echo: {item}]]"

    host.current.settings = lambda: replace(
        Settings.read(), base_url="https://gateway.example.org/v1"
    )
    assert texts(nbcodex.map(prompt, ["a", "b"])) == ["a", "b"]
    assert called == ["a", "b"]


def test_rows_wait_as_long_as_it_takes(room: Room) -> None:
    """A limit parks no row, unless there is a patience: then it is parked, and told."""
    room.simulator.script([Fault("requests_per_minute", seconds=0.05)] * 3)
    assert texts(nbcodex.map(ECHO, ["a"])) == ["a"]
    room.simulator.script([Fault("requests_per_day", seconds=5_000)])
    replies = nbcodex.map(ECHO, ["b"], patience="1s")
    assert replies[0].status == "parked"
    assert "It can go at" in last().failed["0"]


def test_the_watcher_hears_how_far_it_has_come(room: Room) -> None:
    """The last report is the whole; figures only grow."""
    heard: list[Any] = []
    host.current.watch = lambda: heard.append
    nbcodex.map("{}", ["[[echo: a]]", "[[echo: a]]", "[[fault=too_large]] x"])
    assert [report.outcome for report in heard].index("done") == len(heard) - 1
    end = heard[-1]
    assert (end.total, end.done, end.reused, end.failed, end.sent) == (3, 2, 1, 1, 0)
    assert end.totals.usage.output_tokens > 0
    assert end.failures[0][0] == "2"


@pytest.mark.slow
def test_a_loop_that_was_left_says_nothing_at_exit(tmp_path: Path) -> None:
    """An iterator that nobody finished ends with its process, without a traceback."""
    script = (
        "import nbcodex\nfrom nbcodex import client\nfrom nbcodex.runtime.clock import BootClock\n"
        "from nbcodex.simulator import Knobs, Simulator\n"
        "from nbcodex.simulator.transport import SimulatorTransport as T\n"
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
        timeout=60,
    )
    assert (ran.stdout, ran.stderr) == ("0\n", "")
