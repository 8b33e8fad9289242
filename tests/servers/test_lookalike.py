"""Requests and pacing against a second look-alike in another process, in real time.

Its reading of the limits is independent of the simulator's.
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
from nbcodex.events import BackingOff, Delta, Event, Finished, Restarted, Sent
from nbcodex.models import Reply, Request, RequestOptions
from nbcodex.requests.handle import reply_or_raise
from nbcodex.requests.options import build_request
from nbcodex.settings import Secret, Settings
from tests.servers.load_generator import LoadTest, LoadTestResult, warm_up
from tests.servers.lookalike import AGAIN_IN, MODEL
from tests.servers.metering import MINUTE, Policy
from tests.servers.processes import free_port, running
from tests.servers.wording import words_of

pytestmark = pytest.mark.server

APIS = pytest.mark.parametrize("api", ["responses", "chat"])
TPM, BOUND = 30_000, 60


@dataclass(frozen=True)
class Look:
    """A running look-alike, with a key of its own whose limits are unused."""

    url: str
    key: str = field(default_factory=lambda: f"sk-look-{secrets.token_hex(12)}")

    @property
    def settings(self) -> Settings:
        return Settings(
            api_key=Secret(self.key), base_url=f"{self.url}/v1", model=MODEL, journal=False
        )

    def stats(self) -> dict[str, int]:
        """Return its counters."""
        response = httpx2.get(f"{self.url}/stats", trust_env=False).raise_for_status()
        return {name: int(value) for name, value in response.json().items()}

    def use_up_tokens(self, amount: int) -> None:
        """Use up tokens of this minute, like another client of the same key."""
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
class Answered:
    """An answer and its events."""

    reply: Reply
    events: list[Event]

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def ask(look: Look, prompt: str, *, api: str, bound: int = BOUND) -> Answered:
    """Send a request through a client that knows no limit yet."""
    events: list[Event] = []
    own_client = Client()
    try:
        request = build_request(prompt, look.settings, RequestOptions(api=api, max_output=bound))
        handle = own_client.create_handle(request, look.settings, listener=events.append)
        return Answered(reply_or_raise(handle.follow()), events)
    finally:
        own_client.close()


def answer_to(prompt: str, bound: int = BOUND) -> str:
    return " ".join(words_of(prompt, bound))


@APIS
def test_ask_returns_the_answer_and_usage_of_the_server(
    look: Look, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_current", None)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{look.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", look.key)
    prompt = f"Say something, {api}."
    try:
        reply = nbcodex.ask(prompt, api=api, max_output=BOUND)  # the model is asked for, too
    finally:
        client.get_client().close()
    assert (reply.text, reply.model, reply.attempts) == (answer_to(prompt), MODEL, 1)
    assert reply.usage.output_tokens == len(words_of(prompt, BOUND))
    assert reply.usage.input_tokens == len(prompt) // 4 + 8


@APIS
def test_deltas_add_up_to_the_answer(look: Look, api: str) -> None:
    answered = ask(look, "Stream.", api=api)
    deltas = answered.of(Delta)
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == answered.reply.text == answer_to("Stream.")


@APIS
def test_limit_is_waited_for_with_the_figures_of_the_server(look: Look, api: str) -> None:
    look.use_up_tokens(TPM - 100)
    answered = ask(look, "Wait for it.", api=api, bound=400)
    [backing_off] = answered.of(BackingOff)
    limit = backing_off.limit
    assert (limit.name, limit.limit) == ("tokens per minute (TPM)", TPM)
    stated = (limit.used + limit.requested - limit.limit) / TPM * MINUTE
    # Counted from the refusal's arrival, which is before the client has dealt with it.
    first, second = answered.of(Sent)
    assert second.at - first.at >= stated
    # The planned wait: the real one also depends on how busy the machine is.
    assert backing_off.resume_at - backing_off.at < stated + 1.0
    assert (answered.reply.text, answered.reply.attempts) == (answer_to("Wait for it.", 400), 2)


@pytest.mark.parametrize(
    ("api", "how"),
    [("responses", "failed"), ("responses", "nested"), ("responses", "flat"), ("chat", "nested")],
)
def test_limit_in_mid_stream_costs_a_wait_but_no_text(look: Look, api: str, how: str) -> None:
    prompt = f"Break, {api}. <<{how}>>"
    answered = ask(look, prompt, api=api)
    [backing_off] = answered.of(BackingOff)
    assert backing_off.limit.limit == TPM
    before = answered.events[: answered.events.index(backing_off)]
    last_delta = [event for event in before if isinstance(event, Delta)][-1]
    assert answered.of(Sent)[1].at - last_delta.at >= AGAIN_IN
    [restarted] = answered.of(Restarted)
    afterwards = answered.events[answered.events.index(restarted) :]
    text = "".join(event.text for event in afterwards if isinstance(event, Delta))
    assert text == answered.reply.text == answer_to(prompt)
    assert answered.reply.attempts == 2


# Pacing, in real time.


@dataclass(frozen=True)
class Workload:
    """Limits of a server, and requests that take about ten seconds."""

    policy: Policy
    tpm: float
    rpm: float
    number: int = 200  # of requests
    bound: int = 80  # `max_output` of each request
    filled: float = 0.1  # share of the limits that is available at the start


WORKLOADS = {
    "kept": Workload("kept", tpm=80_000, rpm=4_000),
    "refunded": Workload("refunded", tpm=40_000, rpm=4_000),
    "actual": Workload("actual", tpm=60_000, rpm=6_000, number=300),
    "requests": Workload("kept", tpm=800_000, rpm=800),
}


@dataclass(frozen=True)
class Run:
    """A load test, its workload, and the counters of the server."""

    workload: Workload
    result: LoadTestResult
    stats: dict[str, int]

    @property
    def ideal(self) -> float:
        """The shortest possible time in seconds."""
        workload = self.workload
        demands = [(self.stats["charged"], workload.tpm), (workload.number, workload.rpm)]
        return self.result.last + max(
            (demand - limit * workload.filled) / limit * MINUTE for demand, limit in demands
        )

    @property
    def is_in_time(self) -> bool:
        """Whether it took at most 20 % longer than the shortest possible time."""
        return self.result.is_within(1.2 * self.ideal)

    @property
    def has_few_refusals(self) -> bool:
        """Whether at most half a percent of its requests was refused."""
        refused = self.stats["refused_tokens"] + self.stats["refused_requests"]
        return refused <= 0.005 * self.stats["requests"]

    @property
    def is_good(self) -> bool:
        """Whether both hold."""
        return self.is_in_time and self.has_few_refusals

    def __str__(self) -> str:
        seconds, withheld = self.result.seconds, self.result.withheld
        return (
            f"{seconds:.2f} s ({withheld:.2f} s withheld), ideal {self.ideal:.2f} s, {self.stats}"
        )


@pytest.fixture(scope="module")
def runs(process: Look, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All load tests at once, to save time; each has its own server and so its own bucket.

    Up to three times: other work on the processors makes it slow, and its requests arrive late.
    """
    kept: dict[str, Run] = {}
    for _ in range(3):
        for name, run in _measure(process, tmp_path_factory.mktemp("results")).items():
            if name not in kept or not kept[name].is_good:
                kept[name] = run
        if all(run.is_good for run in kept.values()):
            break
    return kept


def _measure(process: Look, folder: Path) -> dict[str, Run]:
    load_client = Client()
    with ExitStack() as stack:
        stack.callback(load_client.close)
        looks = {
            name: stack.enter_context(
                lookalike(
                    folder,
                    policy=workload.policy,
                    tpm=workload.tpm,
                    rpm=workload.rpm,
                    filled=workload.filled,
                )
            )
            for name, workload in WORKLOADS.items()
        }
        warm_up(load_client, _request(0, process.settings, BOUND), process.settings)
        load_tests = {
            name: _start(load_client, look, WORKLOADS[name]) for name, look in looks.items()
        }
        results = {name: load_test.finish() for name, load_test in load_tests.items()}
        return {
            name: Run(WORKLOADS[name], result, looks[name].stats())
            for name, result in results.items()
        }


def _prompt(number: int) -> str:
    return f"Number {number}: what is so special about it?"


def _request(number: int, settings: Settings, bound: int) -> Request:
    return build_request(
        _prompt(number), settings, RequestOptions(api="responses", max_output=bound)
    )


def _start(load_client: Client, look: Look, workload: Workload) -> LoadTest:
    settings = look.settings
    requests = [_request(number, settings, workload.bound) for number in range(workload.number)]
    return LoadTest(load_client, requests, settings)


WORKLOAD_NAMES = pytest.mark.parametrize("name", WORKLOADS)


@WORKLOAD_NAMES
def test_each_request_is_answered_once(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    texts = [e.reply.text if isinstance(e, Finished) else None for e in run.result.endings]
    bound, number = run.workload.bound, run.workload.number
    assert texts == [answer_to(_prompt(each), bound) for each in range(number)]
    assert (run.stats["answered_once"], run.stats["answered_twice"]) == (number, 0)


@WORKLOAD_NAMES
def test_at_most_half_a_percent_of_requests_is_refused(runs: dict[str, Run], name: str) -> None:
    assert runs[name].has_few_refusals, str(runs[name])


@WORKLOAD_NAMES
def test_requests_finish_within_20_percent_of_the_ideal_time(
    runs: dict[str, Run], name: str
) -> None:
    assert runs[name].is_in_time, str(runs[name])
