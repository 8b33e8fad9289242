"""The features of Jupyter AI's `%%ai`, and those that users of such tools have asked for.

One kernel serves all rows of the first table. Each has a wrong use of the feature, too, which is
one short error and sends nothing. The second table names public issues, and the test of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel_client import CellResult, Kernel, kernel
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A simulator with limits too high to be reached."""
    with simulated(tpm=10**8, rpm=10**6, latency=0.001, speed=10_000.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(server: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel in which a few cells ran, as numbered in `EARLIER`."""
    home = str(tmp_path_factory.mktemp("home"))
    with kernel(**server.environ, NBCODEX_HOME=home) as started:
        for number, code in EARLIER.items():
            started.run(code)
            assert started.run("len(In) - 1").plain == str(2 * number)
        yield started


# Cells of the kernel. Cell n is `In[2n - 1]`, because each is followed by one that counts them.
EARLIER = {
    1: "%load_ext nbcodex",
    2: "x = 41; import sys; loaded = set(sys.modules)",
    3: "x + 1",
    4: "1 / 0",
}


def shown_text(ran: CellResult) -> str:
    """Return all that a reader sees of a cell, on one line."""
    return " ".join((ran.stream + ran.plain + "\n" + "\n".join(ran.shown_error)).split())


# A row: its name in `%%ai`, a cell that uses it, what is seen; a wrong use, what is said.
ROWS = {
    "%%ai MODEL": (
        "%%codex gpt-5.6-mini\nhello",
        "gpt-5.6-mini · ",
        "%%codex openai-chat:gpt-5.6-mini\nhello",
        "write gpt-5.6-mini without openai-chat:",
    ),
    "-f code": ("%%codex -f code\nA loop", "def wait(", "%%codex -f cod\nA loop", "invalid choice"),
    "-f html": (
        "%%codex -f html\n[[echo: <b>bold</b>]]",
        "<b>bold</b>",
        "%%codex -f htm\nhello",
        "invalid choice: 'htm'",
    ),
    "-f image": (
        "%%codex -f image\nA cat",
        "[image/png",
        "%%codex -f image --api chat\nA cat",
        "Responses API",
    ),
    "-f json": (
        '%%codex -f json\n[[echo: {"a": 1}]]',
        '"a": 1',
        "%%codex -f json --schema x\nhello",
        "pydantic class or a JSON schema",
    ),
    "-f markdown": (
        "%%codex -f markdown\n[[echo: *hi*]]",
        "*hi*",
        "%%codex -f\nhello",
        "expected one argument",
    ),
    "-f md": ("%%codex -f md\n[[echo: *hi*]]", "*hi*", "%%codex -f mdx\nhello", "'mdx'"),
    "-f math": (
        "%%codex -f math --raw\n[[echo: $$x^2$$]]",
        "x^2",
        "%%codex -f latex\nhello",
        "'latex'",
    ),
    "-f text": (
        "%%codex --format text\n[[echo: plain]]",
        "plain",
        "%%codex --format=plain\nhello",
        "'markdown', 'md'",
    ),
    "-m, --model-parameters": (
        '%%codex --model-parameters {"temperature": 0.25}\n[[echo: cool]]',
        "cool",
        '%%codex -m {"temperature": 0.25}\nhello',
        "API parameters go to -p/--params",
    ),
    "--model-parameters, wrong JSON": (
        "%%codex -p '{\"top_p\": 1}'\n[[echo: all]]",
        "all",
        '%%codex --model-parameters {"temperature": }\nhello',
        "is not JSON",
    ),
    "--eval": (
        "%%codex --eval\nprint(f'[[echo: {x + 1} apples]]')",
        "42 apples",
        "%%codex --eval\npass",
        "printed nothing",
    ),
    "%ai help": ("%codex help", "%codex resume [ID|all]", "%codex help me", "there is no topic"),
    "%ai version": ("%codex version", "nbcodex 0.", "%codex version 2", "Show the versions"),
    "%ai list": ("%codex list", "gpt-5.6-sol", "%codex list openai", "no model with 'openai'"),
    "%ai alias": (
        "%codex alias other gpt-5.6-mini",
        "other → gpt-5.6-mini",
        "%codex alias other openai:gpt-5.6-mini",
        "without openai:",
    ),
    "an alias in use": (
        "%%codex other\nhello",
        "gpt-5.6-mini · ",
        "%codex alias other",
        "alias NAME TARGET",
    ),
    "%ai dealias": (
        "%codex dealias other",
        "is removed",
        "%codex dealias other",
        "there is no alias other (known: none)",
    ),
    "%ai fix": (
        "%codex fix",
        "ZeroDivisionError",
        "%codex fix 2",
        "only the last error can be explained",
    ),
    "%ai error": (
        "%codex error",
        "ZeroDivisionError",
        "%codex errors",
        "there is no command errors. A prompt goes below a line %%codex",
    ),
    "%ai reset": (
        "%codex reset",
        "starts afresh",
        "%codex reset main now",
        "as `reset` does: new [THREAD]",
    ),
    "{var}": ("%%codex\n[[echo: {x}!]]", "41! ", "%%codex\n{x.nothing}", "has no attribute"),
    "{In[3]}": ("%%codex\n[[echo: {In[3]}]]", "x = 41", "%%codex\n{In[999]}", "In[999]"),
    "{Out[5]}": (
        "%%codex\n[[echo: {Out[5]}]]",
        "42 ",
        "%%codex\n{Out[3]}",
        "cell 3 showed no result",
    ),
    "{Err[7]}": (
        "%%codex\n[[echo: {Err[7]}]]",
        "ZeroDivisionError: division by zero",
        "%%codex\n{Err[3]}",
        "no error of cell 3 is known",
    ),
    "{'foo': 'bar'}": (
        "%%codex\n[[echo: {'foo': 'bar'} and {{x}}]]",
        "{'foo': 'bar'} and {x}",
        "%%codex\n ",
        "prompt is empty",
    ),
    "%config": (
        "%config Codex.model = 'gpt-5.6-mini'\n%config Codex.model",
        "'gpt-5.6-mini'",
        "%config Codex.max_history = -2",
        "max_history",
    ),
    "%config, back": (
        "%config Codex.model = ''\n%config Codex.model",
        "''",
        "%config Codex.display = 'loud'",
        "display",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_ai_table(cell: Kernel, server: Simulated, name: str) -> None:
    """Each feature of `%%ai` works here; a wrong use is a short message and sends nothing."""
    right, shown, wrong, says = ROWS[name]
    ran = cell.run(right)
    seen = shown_text(ran) + " ".join(
        " ".join(map(str, o.get("data", {}).values())) for o in ran.outputs
    )
    assert ran.status == "ok", shown_text(ran)
    assert shown in seen
    sent = len(server.prompts)
    ran = cell.run(wrong)
    assert says in shown_text(ran)
    assert len((ran.stream + "\n".join(ran.shown_error)).splitlines()) <= 6 or "%config" in wrong
    assert len(server.prompts) == sent


def test_parameters_reach_the_server(cell: Kernel, server: Simulated) -> None:
    """`--model-parameters` takes JSON without quotes, as `%%ai` does."""
    cell.run('%%codex --model-parameters {"temperature": 0.25, "metadata": {"a": "b c"}}\nhello')
    assert server.core.log[-1].body["temperature"] == 0.25
    assert server.core.log[-1].body["metadata"] == {"a": "b c"}


def test_api_base_is_used_or_refused(cell: Kernel, server: Simulated) -> None:
    """`--api-base` is used; an invalid URL is refused."""
    assert "there" in shown_text(
        cell.run(f"%%codex --api-base {server.url}/openai/v1\n[[echo: there]]")
    )
    assert server.core.log[-1].path.startswith("/openai/v1")
    sent = len(server.prompts)
    assert "https://" in shown_text(cell.run("%%codex --api-base nowhere\nhello"))
    assert len(server.prompts) == sent


def test_code_goes_into_a_new_cell(cell: Kernel) -> None:
    """`-f code` puts the code below, and runs nothing."""
    ran = cell.run("%%codex -f code\n[[echo: ```python\nran = 1\n```]]")
    assert ran.new_cells == ["ran = 1"]
    assert cell.run("'ran' in globals()").plain == "False"


@pytest.mark.parametrize(("most", "seen"), [("None", 3), ("2", 2), ("1", 1), ("0", 0)])
def test_max_history_limits_the_turns(
    cell: Kernel, server: Simulated, most: str, seen: int
) -> None:
    """`Codex.max_history` is the number of earlier turns a cell sends; without it, all."""
    cell.run(f"%codex new\n%config Codex.max_history = {most}")
    for prompt in ("one", "two", "three"):
        cell.run(f"%%codex\n{prompt}")
    cell.run("%%codex -f image\nA picture, which says nothing, is no exchange")
    assert f"{seen} turn" in (listed := cell.run("%codex history").stream) or not seen
    assert "two" not in listed or seen > 1
    cell.run("%%codex\nfour")
    cell.run("%config Codex.max_history = None")
    asked = server.core.log[-1].body["input"]
    said = [item["content"] for item in asked if item["role"] == "user"] if seen else [asked]
    assert said == [*["one", "two", "three"][3 - seen :], "four"]


def test_load_ext_imports_neither_sdk_nor_widgets(cell: Kernel) -> None:
    """They are imported when they are needed."""
    heavy = "{'openai', 'httpx2', 'anywidget', 'ipywidgets', 'pydantic'}"
    assert cell.run(f"loaded & {heavy}").plain == "set()"


# What users of such tools asked for, and the test that shows it.
ASKS = {
    "stream in the cell (jupyter-ai#960)": "test_terminal_marks_an_answer_that_starts_again",
    "tokens and bill of each request (jupyter-ai#356)": "test_figures_line",
    "ask before a dear one (llm#625)": "test_an_expensive_map_asks_first",
    "history across cells (jupyter-ai#392)": "test_cells_share_a_conversation",
    "one notebook, one conversation (jupyter-ai#972)": "test_threads_and_notebooks_are_separate",
    "the answer in a variable (jupyter-ai#603)": "test_out_assigns_the_reply",
    "many inputs in one magic (jupyter-ai#774)": "test_map_cell_assigns_a_frame_with_answers",
    "braces in prompts (jupyter-ai#27)": "test_other_braces_arrive_unchanged",
    "model parameters (jupyter-ai#121, #1452)": "test_parameters_reach_the_server",
    "errors that name the cause (jupyter-ai#315, #469)": ("test_a_final_failure_is_a_short_error"),
    "fast load (jupyter-ai#1115)": "test_load_ext_imports_neither_sdk_nor_widgets",
    "a plain console (jupyter-ai#1560)": "test_terminal_shows_answer_and_figures",
    "code in VS Code and Colab (jupyter-ai#1244)": "test_insert_takes_a_numbered_block",
    "cancel (jupyter-ai#965)": "test_cell_can_be_ended",
    "usage of an aborted stream (tiktoken#418)": "test_usage_of_stopped_answer_is_estimated",
    "background cells with cancel (beakerx#6907)": "test_ten_answers_land_in_their_own_cells",
    "resumable batches (polar_llama#75)": "test_a_killed_kernels_map_pays_only_for_missing_rows",
    "each retry visible (openai-ruby#242, crush#3024)": "test_monitor_is_live_while_a_cell_blocks",
    "go on after a 429 (magenta.nvim#59)": "test_the_demo_shows_a_limit_and_its_recovery",
    "a countdown that is true (vscode-copilot-release#4571, #10327)": (
        "test_request_is_sent_again_when_announced"
    ),
    "no wait of -9223372036 s (vscode-copilot-release#13693)": (
        "test_any_status_and_body_become_an_error_with_a_valid_wait"
    ),
    "quota is not a rate limit (coder#26200)": (
        "test_exhausted_quota_is_permanent_despite_status_429"
    ),
    "a spend cap (github/app#2591, instructor#2296)": (
        "test_request_that_would_pass_the_cap_is_parked_unsent"
    ),
    "bounded auto-resume (codex#34188)": "test_wait_longer_than_patience_parks_at_once",
    "resume at the reset (codex#34188)": "test_resume_at_reset_sends_at_the_reset",
    "which limit was hit (codex#10055)": "test_terminal_counts_down_on_one_line",
    "a log of retries (codex#10094)": "test_retries_and_failures_are_logged",
    "retry now (codex#41438)": "test_retry_now_sends_at_once",
    "a limiter that concurrent runs share (codex#42685)": "test_two_kernels_share_a_limit",
    "what can never fit, said at once (codex#34465)": (
        "test_request_larger_than_known_limit_fails_without_sending"
    ),
}


@pytest.mark.parametrize("ask", ASKS)
def test_each_request_of_users_has_an_existing_test(ask: str) -> None:
    """Each row of this table names a test that exists."""
    files = (ROOT / "tests").rglob("test_*.py")
    assert any(f"def {ASKS[ask]}(" in file.read_text(encoding="utf-8") for file in files)
