"""`nbcodex.ask` against servers of other projects, each with the same behaviours.

`.ci/foreign` installs them outside the test environment.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import nbcodex
from nbcodex import client
from nbcodex.errors import Stopped, TooLargeError
from nbcodex.events import BackingOff, Delta
from nbcodex.simulator import Fault
from tests.servers.foreign import (
    ANSWER,
    BEHAVIOURS,
    ENGINE_BEHAVIOURS,
    GATEWAYS,
    OBJECT,
    SERVERS,
    Running,
    reason_if_missing,
)
from tests.simulated import KEY, Simulated, simulated

CACHE = os.environ.get("NBCODEX_FOREIGN_SERVERS")

pytestmark = [
    pytest.mark.server,
    pytest.mark.foreign,
    pytest.mark.skipif(
        CACHE is None, reason="foreign servers are not installed: run `.ci/foreign`"
    ),
]

ROWS = [f"{name}-{api}" for name, server in SERVERS.items() for api in server.apis]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FAULTS = {"broken": [Fault("dropped", after=3)]}


class Row:
    """One server with one of its APIs."""

    def __init__(self, name: str, api: str, running: Running, upstream: Simulated | None) -> None:
        self.server, self.name, self.api = SERVERS[name], name, api
        self._running, self._upstream = running, upstream
        self.deltas: list[str] = []

    def prompt(self, behaviour: str) -> str:
        if self._upstream is None:
            return f"{behaviour} please"
        texts = {"schema": OBJECT, "empty": ""}
        return f"[[echo: {texts.get(behaviour, ANSWER)}]]"

    def ask(self, behaviour: str, **options: Any) -> nbcodex.Reply:
        """Prepare the server for a behaviour, and send a request."""
        self._running.prepare(behaviour)
        if self._upstream is not None:
            self._upstream.core.script(FAULTS.get(behaviour, []))
        client.get_client().listeners.append(
            lambda event: self.deltas.append(event.text) if isinstance(event, Delta) else None
        )
        prompt = options.pop("prompt", self.prompt(behaviour))
        return nbcodex.ask(prompt, **{**self._options(behaviour), **options})

    def map(self, behaviour: str, rows: list[str]) -> list[nbcodex.Reply]:
        """Make the server ready for a behaviour, and ask it once for each row."""
        self._running.prepare(behaviour)
        template = f"{self.prompt(behaviour)} {{}}"
        return [*nbcodex.map(template, rows, confirm=True, **self._options(behaviour))]

    def _options(self, behaviour: str) -> dict[str, Any]:
        # A real model on a slow machine says little; an object needs a few more tokens.
        lengths = {"schema": 60, "stop": 2_000}
        max_output = lengths.get(behaviour, 16) if self.server.own_text else 60
        model = self._running.model
        return {"max_output": max_output, "patience": "90s", "model": model, "api": self.api}

    def check(self, reply: nbcodex.Reply) -> None:
        """Check that the answer is complete."""
        assert reply
        if self.server.own_text:
            assert reply.text.strip()
        else:
            assert reply.text == ANSWER


@pytest.fixture(scope="module", params=ROWS)
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Running, Simulated | None]]:
    """Start a server, with the simulator behind it if it is a gateway."""
    name, _, api = request.param.rpartition("-")
    cache = Path(CACHE or ".")
    if reason := reason_if_missing(name, cache):
        pytest.skip(reason)
    with ExitStack() as stack:
        more = {}
        upstream = None
        if name in GATEWAYS:
            limits = {"tpm": 10_000_000, "rpm": 100_000, "latency": 0.01, "speed": 200.0}
            upstream = stack.enter_context(simulated(**limits))
            more["upstream"] = upstream.url
        scratch = tmp_path_factory.mktemp(name)
        running = stack.enter_context(SERVERS[name].start(cache / name, scratch, **more))
        yield name, api, running, upstream


@pytest.fixture
def row(
    started: tuple[str, str, Running, Simulated | None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Row]:
    """Configure nbcodex for the server, without knowledge of other servers."""
    name, api, running, upstream = started
    monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client, "_current", None)
    yield Row(name, api, running, upstream)
    client.get_client().close()


def check_ask(row: Row) -> None:
    row.check(row.ask("ask"))


def check_stream(row: Row) -> None:
    reply = row.ask("stream")
    row.check(reply)
    assert "".join(row.deltas) == reply.text
    assert len(row.deltas) > 1


def check_schema(row: Row) -> None:
    reply = row.ask("schema", schema=SCHEMA)
    assert reply
    assert set(reply.parsed) == {"name", "age"}


def check_conversation(row: Row) -> None:
    replies = [row.ask("conversation", thread="talk") for _ in range(2)]
    for reply in replies:
        row.check(reply)
    if row.server.is_engine or row.name in GATEWAYS:  # they count what is sent
        first, second = (reply.usage.input_tokens or 0 for reply in replies)
        assert second > first


def check_map(row: Row) -> None:
    for reply in row.map("map", ["one", "two", "three"]):
        row.check(reply)


def check_stop(row: Row) -> None:
    client.get_client().listeners.append(
        lambda event: _thread.interrupt_main() if isinstance(event, Delta) else None
    )
    with pytest.raises(Stopped) as caught:
        row.ask("stop", prompt="Tell me a very long story about a bear.")
    reply = caught.value.reply
    assert reply is not None
    assert reply.status == "interrupted"
    assert reply.text
    assert not reply
    client.get_client().listeners.clear()
    row.check(row.ask("ask"))


def check_overflow(row: Row) -> None:
    with pytest.raises(nbcodex.NbcodexError) as caught:
        row.ask("overflow", prompt="word " * 5_000)
    assert isinstance(caught.value, TooLargeError)


def check_limit(row: Row) -> None:
    reply = row.ask("limit")
    row.check(reply)
    assert reply.attempts > 1
    assert reply.waited > 0


def check_broken(row: Row) -> None:
    reply = row.ask("broken")
    row.check(reply)
    assert reply.attempts > 1


def check_empty(row: Row) -> None:
    failures: list[str] = []
    client.get_client().listeners.append(
        lambda event: failures.append(str(event.error)) if isinstance(event, BackingOff) else None
    )
    with pytest.raises(nbcodex.NbcodexError) as caught:
        row.ask("empty", patience="10s")  # a gateway may refuse it at first
    # The last attempt can meet the limit of a gateway instead, so every attempt is looked at.
    assert any("empty" in failure for failure in [*failures, str(caught.value)])


def check_usage(row: Row) -> None:
    reply = row.ask("usage")
    assert reply.usage.input_tokens
    assert reply.usage.output_tokens


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, *ENGINE_BEHAVIOURS])
def test_foreign_server_is_understood(
    request: pytest.FixtureRequest, row: Row, behaviour: str
) -> None:
    if reason := row.server.known.get(f"{row.api}-{behaviour}"):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    needs_engine = behaviour in ENGINE_BEHAVIOURS and not row.server.is_engine
    if needs_engine or behaviour in row.server.lacks:
        pytest.skip(f"{row.name} cannot be made to show it")
    globals()[f"check_{behaviour}"](row)
