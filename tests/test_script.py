"""What a plain script sees: short errors, advice without magics, and why it has to wait."""

from __future__ import annotations

import ast
import logging
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import nbcodex
from nbcodex import host
from nbcodex.errors import (
    LONG_CONVERSATION_ADVICE,
    Advice,
    LimitError,
    NbcodexError,
    ServerError,
    advice_for_script,
    join_advice,
)
from nbcodex.events import BackingOff, CoolingDown, Event, Sent
from nbcodex.models import Limit
from nbcodex.simulator import Fault
from tests.simulated import Simulated

pytestmark = pytest.mark.slow

PACKAGE = Path(nbcodex.__file__).parent
TPM = Limit(resource="tokens", window=60.0, limit=30_000, used=22_999, requested=12_528)
REFUSAL = LimitError("Tokens per minute (TPM) reached.", limit=TPM)


def run_script(
    code: str, environ: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(f"import os\nos.environ.update({environ!r})\nimport nbcodex\n{code}\n")
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True)


# Errors.


@pytest.mark.parametrize("call", ["nbcodex.ask({})", "asyncio.run(nbcodex.aask({}))"])
def test_error_shows_one_frame_of_ours_and_no_magics(call: str, tmp_path: Path) -> None:
    ran = run_script(f"import asyncio\n{call.format(repr('x'))}", {}, tmp_path)
    assert ran.stdout == ""
    assert ran.stderr.count("nbcodex/api.py") == 1
    assert "During handling" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last == (
        "nbcodex.errors.MissingKeyError: No API key is set for OpenAI. Set OPENAI_API_KEY. "
        "`nbcodex demo` needs no key."
    )


@pytest.mark.parametrize(
    ("fault", "options", "says"),
    [
        (Fault("tokens_per_minute", seconds=60.0), "patience=1", "Ask again after"),
        (Fault("http", status=500), "patience=0", "Ask again after"),
        (Fault("http", status=401), "", "OPENAI_API_KEY sets another key"),
    ],
)
def test_error_from_the_event_loop_is_as_short(
    fault: Fault, options: str, says: str, simulator: Simulated, tmp_path: Path
) -> None:
    simulator.core.script([fault])
    ran = run_script(f"nbcodex.ask('x', {options})", simulator.environ, tmp_path)
    assert len(ran.stderr.splitlines()) <= 9
    assert ran.stderr.count("nbcodex/") == 1
    assert says in ran.stderr
    assert "%codex" not in ran.stderr


def text_of(node: ast.expr) -> str:
    """Return the text of a string's source, with names in place of an f-string's values."""
    return re.sub(r"^f?['\"]|['\"]$", "", ast.unparse(node))


def test_script_advice_names_no_command_that_needs_a_cell() -> None:
    """Requests are resumed, and keys entered, by magics; a script has neither."""
    calls = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Advice")
    ]
    assert len(calls) > 10
    for call in calls:
        _, *others = *call.args, *(keyword.value for keyword in call.keywords)
        for script in map(text_of, others):
            magics = re.findall(r"%co\w+ [^`]*`( in a notebook)?", script)
            assert all(magics), script
            assert "--" not in script


def test_plain_advice_outside_the_notebook_names_no_magic_alone() -> None:
    """It is shown in scripts as it is, unless only a resume, by a magic, can reach it."""
    only_in_notebooks = ("`%codex journal", "Set the base URL back", "Wait for it", "Write tokens")
    plain = [
        text_of(keyword.value)
        for path in PACKAGE.rglob("*.py")
        if "notebook" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "advice" and isinstance(keyword.value, ast.Constant | ast.JoinedStr)
    ]
    assert len(plain) > 50
    wrong = [text for text in plain if "%co" in text and "nbcodex doctor" not in text]
    assert [text for text in wrong if not text.startswith(only_in_notebooks)] == []


@pytest.mark.parametrize(
    ("advice", "adapted"),
    [
        (
            join_advice("Lower --max-output.", LONG_CONVERSATION_ADVICE),
            "Lower max_output. The conversation so far is sent along: leave out `thread`.",
        ),
        ("Raise --max-output, or lower --effort.", "Raise max_output, or lower effort."),
        (Advice("Retype `-m x`.", script="Put --x into `y`."), "Put --x into `y`."),
    ],
)
def test_advice_for_scripts(advice: str, adapted: str) -> None:
    assert advice_for_script(advice) == adapted


def test_error_from_another_process_keeps_the_advice_for_scripts() -> None:
    error = pickle.loads(pickle.dumps(NbcodexError("x", advice=LONG_CONVERSATION_ADVICE)))
    assert error.advice == LONG_CONVERSATION_ADVICE
    assert advice_for_script(error.advice) == LONG_CONVERSATION_ADVICE.script


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "Use max_output."),
        ("modle", "Did you mean model?"),
        ("background", "aask"),
        ("temperature", "params={'temperature': …}"),
    ],
)
@pytest.mark.parametrize("function", [nbcodex.ask, nbcodex.map])
def test_unknown_option_is_a_type_error_that_names_the_right_one(
    function: Any, name: str, hint: str
) -> None:
    with pytest.raises(TypeError) as caught:
        function("x", **{name: 1})
    assert hint in str(caught.value)
    assert f"keyword argument {name!r}" in str(caught.value)


# Waits.


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lines that are logged; nothing has been logged before."""
    monkeypatch.setattr(host._WaitLog, "_logged_at", {})
    caplog.set_level(logging.WARNING, logger="nbcodex")
    return caplog


def refused(seconds: float) -> Event:
    return BackingOff(
        request_id="3f2a", at=5.0, error=REFUSAL, attempt=1, resume_at=5.0 + seconds, waited=0.0
    )


def queued(seconds: float | None) -> Event:
    due_at = None if seconds is None else 5.0 + seconds
    return CoolingDown(
        request_id="3f2a", at=5.0, limit=TPM, resume_at=due_at, waited=0.0, queued=True
    )


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (refused(34.0), "Rate limit: Tokens per minute (TPM) reached. Due at"),
        (queued(34.0), "Queued for capacity of tokens per minute (TPM) (limit 30,000"),
    ],
)
def test_long_wait_is_logged_once_with_its_limit_and_its_end(
    logged: Any, event: Event, says: str
) -> None:
    wait_log = host._WaitLog()
    for batch in ((event,), (), (event,)):
        wait_log.on_events(batch)
    (line,) = logged.messages
    assert says in line
    assert "(in 34.0 s)" in line


@pytest.mark.parametrize("event", [refused(2.0), queued(2.0), queued(None)])
def test_short_wait_is_not_logged(logged: Any, event: Event) -> None:
    wait_log = host._WaitLog()
    wait_log.on_events((event,))
    wait_log.on_events((Sent(request_id="3f2a", at=7.0, attempt=1, model="m", input_tokens=1),))
    wait_log.on_events(())
    assert logged.messages == []


def test_wait_of_unknown_length_is_logged_when_it_has_become_long(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_log, now = host._WaitLog(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    wait_log.on_events((queued(None),))
    assert logged.messages == []
    now += host.MIN_LOGGED_WAIT_S
    wait_log.on_events(())
    assert len(logged.messages) == 1


def test_wait_whose_end_keeps_moving_is_logged_before_it_ends(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class ThreeAnnouncements:
        """A handle whose request is sent 4.5 s after it was queued."""

        def follow(self, render: Any, *, max_idle: Any) -> str:
            nonlocal now
            end = now + 4.5
            for announced_at in (now, now + 2.5, now + 2.9):
                now = announced_at
                render((queued(1.5),))
            while (now := now + max_idle()) < end:
                render(())
            return "ending"

    host.Host().follow(ThreeAnnouncements())  # type: ignore[arg-type]
    assert len(logged.messages) == 1


def test_wait_that_outlasts_the_interval_of_its_reason_is_logged(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    host._WaitLog().on_events((refused(10.0),))
    wait_log = host._WaitLog()
    wait_log.on_events((refused(100.0),))
    assert len(logged.messages) == 1
    now += host.WAIT_LOG_INTERVAL_S
    wait_log.on_events(())
    assert len(logged.messages) == 2
    assert "(in 40.0 s)" in logged.messages[1]


def test_many_requests_with_one_reason_are_logged_once_a_minute(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for seconds in range(10, 60):
        host._WaitLog().on_events((refused(float(seconds)),))
    assert len(logged.messages) == 1
    host._WaitLog().on_events(
        (
            BackingOff(
                request_id="b",
                at=5.0,
                error=ServerError("HTTP 500."),
                attempt=1,
                resume_at=50.0,
                waited=0.0,
            ),
        )
    )
    assert len(logged.messages) == 2
    now += host.WAIT_LOG_INTERVAL_S
    host._WaitLog().on_events((refused(34.0),))
    assert len(logged.messages) == 3


@pytest.mark.parametrize(("quiet", "lines"), [(False, 1), (True, 0)])
def test_script_prints_a_wait_on_stderr_unless_it_asks_for_quiet(
    quiet: bool, lines: int, simulator: Simulated, tmp_path: Path
) -> None:
    simulator.core.script([Fault("tokens_per_minute", seconds=3.5)])
    silence = "import logging\nlogging.getLogger('nbcodex').setLevel('ERROR')\n" * quiet
    ran = run_script(f"{silence}print(nbcodex.ask('x').status)", simulator.environ, tmp_path)
    assert ran.stdout == "done\n"
    assert ran.stderr.count("Tokens per minute (TPM)") == lines
    assert len(ran.stderr.splitlines()) == lines
