"""A second look-alike, in a process of its own and in real time: a reading of the limits that is
not the simulator's. What answers need, what a limit does to them, and how well the pace is kept.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2
import pytest

import nbcodex
from nbcodex import client
from nbcodex.client import Client
from nbcodex.events import BackingOff, Delta, Event, Finished, Restarted
from nbcodex.models import Reply, Request
from nbcodex.requests.handle import reply_or_raise
from nbcodex.requests.options import RequestOptions, build_request
from nbcodex.settings import Secret, Settings
from tests.servers.lookalike import AGAIN_IN, MODEL
from tests.servers.metering import MINUTE, Policy
from tests.servers.processes import free_port, running
from tests.servers.racing import Race, Racer, warm_up
from tests.servers.wording import words_of

pytestmark = pytest.mark.server

APIS = pytest.mark.parametrize("api", ["responses", "chat"])
TPM, BOUND = 30_000, 60


@dataclass(frozen=True)
class Look:
    """A running look-alike. Each has a key of its own, whose limits nobody else has touched."""

    url: str
    key: str = field(default_factory=lambda: f"sk-look-{secrets.token_hex(12)}")

    @property
    def settings(self) -> Settings:
        return Settings(
            api_key=Secret(self.key), base_url=f"{self.url}/v1", model=MODEL, journal=False
        )

    def stats(self) -> dict[str, int]:
        """What it has served."""
        told = httpx2.get(f"{self.url}/stats", trust_env=False).raise_for_status()
        return {name: int(value) for name, value in told.json().items()}

    def use_up_tokens(self, amount: int) -> None:
        """Spend tokens of this minute, as somebody else on the same key would."""
        body = {"model": MODEL, "input": "", "max_output_tokens": amount, "stream": True}
        headers = {"authorization": f"Bearer {self.key}"}
        with (
            httpx2.Client(trust_env=False) as http,
            http.stream("POST", f"{self.url}/v1/responses", json=body, headers=headers) as answer,
        ):
            answer.raise_for_status()


@contextmanager
def lookalike(folder: Path, **options: float | str) -> Iterator[Look]:
    """Start a look-alike; stop it afterwards."""
    port = free_port()
    flags = chain(*((f"--{name}", str(value)) for name, value in options.items()))
    command = [sys.executable, "-m", "tests.servers.lookalike", "--port", str(port), *flags]
    with running(command, port=port, log=folder / f"lookalike-{port}.log"):
        yield Look(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Look]:
    with lookalike(tmp_path_factory.mktemp("lookalike"), tpm=TPM, speed=400) as running_one:
        yield running_one


@pytest.fixture
def look(process: Look) -> Look:
    """A look-alike with full buckets."""
    return Look(process.url)


@dataclass
class Asked:
    """An answer, and the events on the way to it."""

    reply: Reply
    events: list[Event]

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def asked(look: Look, prompt: str, *, api: str, bound: int = BOUND) -> Asked:
    """Ask through a client that has met no limit yet."""
    events: list[Event] = []
    asking = Client()
    try:
        request = build_request(prompt, look.settings, RequestOptions(api=api, max_output=bound))
        handle = asking.handle(request, look.settings, listener=events.append)
        return Asked(reply_or_raise(handle.follow()), events)
    finally:
        asking.close()


def answer_to(prompt: str, bound: int = BOUND) -> str:
    return " ".join(words_of(prompt, bound))


@APIS
def test_an_answer_is_whole_and_its_usage_the_servers(
    look: Look, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nbcodex.ask` gives the answer and the figures of a server that is nobody's simulator."""
    monkeypatch.setattr(client, "_current", None)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{look.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", look.key)
    prompt = f"Say something, {api}."
    try:
        reply = nbcodex.ask(prompt, api=api, max_output=BOUND)  # the model is asked for, too
    finally:
        client.current().close()
    assert (reply.text, reply.model, reply.attempts) == (answer_to(prompt), MODEL, 1)
    assert reply.usage.output_tokens == len(words_of(prompt, BOUND))
    assert reply.usage.input_tokens == len(prompt) // 4 + 8


@APIS
def test_an_answer_streams(look: Look, api: str) -> None:
    """The text comes piece by piece, and the pieces make up the answer."""
    told = asked(look, "Stream.", api=api)
    deltas = told.of(Delta)
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == told.reply.text == answer_to("Stream.")


@APIS
def test_a_limit_is_waited_out_and_its_figures_told(look: Look, api: str) -> None:
    """Where others have used the minute up, the wait and the figures are the server's own."""
    look.use_up_tokens(TPM - 100)
    told = asked(look, "Wait for it.", api=api, bound=400)
    [backing_off] = told.of(BackingOff)
    limit = backing_off.limit
    assert (limit.name, limit.limit) == ("tokens per minute (TPM)", TPM)
    stated = (limit.used + limit.requested - limit.limit) / TPM * MINUTE
    assert stated <= told.reply.waited < stated + 1.0
    assert (told.reply.text, told.reply.attempts) == (answer_to("Wait for it.", 400), 2)


@pytest.mark.parametrize(
    ("api", "how"),
    [("responses", "failed"), ("responses", "nested"), ("responses", "flat"), ("chat", "nested")],
)
def test_a_limit_amid_a_stream_costs_a_wait_and_no_text(look: Look, api: str, how: str) -> None:
    """A limit that breaks a stream is waited out, and the text stands there whole and once."""
    prompt = f"Break, {api}. <<{how}>>"
    told = asked(look, prompt, api=api)
    [backing_off] = told.of(BackingOff)
    assert backing_off.limit.limit == TPM
    assert told.reply.waited >= AGAIN_IN
    [restarted] = told.of(Restarted)
    afterwards = told.events[told.events.index(restarted) :]
    text = "".join(event.text for event in afterwards if isinstance(event, Delta))
    assert text == told.reply.text == answer_to(prompt)
    assert told.reply.attempts == 2


# The pace, in real time.


@dataclass(frozen=True)
class Course:
    """Limits, and what is asked under them: some ten seconds' worth.

    Parameters
    ----------
    policy : {"kept", "refunded", "actual"}
        What the server charges.
    tpm, rpm : float
        Its limits.
    number, bound : int
        How many requests there are, and the output that each asks for.
    filled : float
        Share of the limits that is there at the start.
    """

    policy: Policy
    tpm: float
    rpm: float
    number: int = 200
    bound: int = 80
    filled: float = 0.1


COURSES = {
    "kept": Course("kept", tpm=80_000, rpm=4_000),
    "refunded": Course("refunded", tpm=40_000, rpm=4_000),
    "actual": Course("actual", tpm=60_000, rpm=6_000, number=300),
    "requests": Course("kept", tpm=800_000, rpm=800),
}


@dataclass(frozen=True)
class Run:
    """A race, its course, and what the server counted."""

    course: Course
    race: Race
    stats: dict[str, int]

    @property
    def ideal(self) -> float:
        """The seconds that nobody could have done it in less."""
        course = self.course
        demands = [(self.stats["charged"], course.tpm), (course.number, course.rpm)]
        return self.race.last + max(
            (demand - limit * course.filled) / limit * MINUTE for demand, limit in demands
        )

    def __str__(self) -> str:
        return f"{self.race.seconds:.2f} s, ideal {self.ideal:.2f} s, {self.stats}"


@pytest.fixture(scope="module")
def runs(process: Look, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All races at once, for the sake of time; each has a server and so a bucket of its own."""
    folder, racing = tmp_path_factory.mktemp("races"), Client()
    with ExitStack() as stack:
        stack.callback(racing.close)
        looks = {
            name: stack.enter_context(
                lookalike(
                    folder,
                    policy=course.policy,
                    tpm=course.tpm,
                    rpm=course.rpm,
                    filled=course.filled,
                )
            )
            for name, course in COURSES.items()
        }
        warm_up(racing, _request(0, process.settings, BOUND), process.settings)
        racers = {name: _start(racing, look, COURSES[name]) for name, look in looks.items()}
        races = {name: racer.finish() for name, racer in racers.items()}
        return {name: Run(COURSES[name], race, looks[name].stats()) for name, race in races.items()}


def _prompt(number: int) -> str:
    return f"Number {number}: what is so special about it?"


def _request(number: int, settings: Settings, bound: int) -> Request:
    return build_request(
        _prompt(number), settings, RequestOptions(api="responses", max_output=bound)
    )


def _start(racing: Client, look: Look, course: Course) -> Racer:
    settings = look.settings
    requests = [_request(number, settings, course.bound) for number in range(course.number)]
    return Racer(racing, requests, settings)


RACES = pytest.mark.parametrize("name", COURSES)


@RACES
def test_all_are_answered_once(runs: dict[str, Run], name: str) -> None:
    """Whoever asks at once gets an answer, the right one, and none is paid for twice."""
    run = runs[name]
    texts = [e.reply.text if isinstance(e, Finished) else None for e in run.race.endings]
    bound, number = run.course.bound, run.course.number
    assert texts == [answer_to(_prompt(each), bound) for each in range(number)]
    assert (run.stats["answered_once"], run.stats["answered_twice"]) == (number, 0)


@RACES
def test_hardly_any_request_is_refused(runs: dict[str, Run], name: str) -> None:
    """A limit that one knows is not run into: one refusal in two hundred requests at the most."""
    stats = runs[name].stats
    refused = stats["refused_tokens"] + stats["refused_requests"]
    assert refused <= 0.005 * stats["requests"], runs[name]


@RACES
def test_the_limit_is_used_fully(runs: dict[str, Run], name: str) -> None:
    """The last answer comes not much later than the limit allows."""
    run = runs[name]
    assert run.race.seconds <= 1.2 * run.ideal, run
