"""Prompts with variables, histories and earlier turns, in real kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbcodex.simulator import Fault
from tests.kernel_client import CellResult, Kernel, kernel
from tests.simulated import KEY, Simulated, simulated

pytestmark = pytest.mark.kernel

REASONS = '--effort low -p \'{"include": ["reasoning.encrypted_content"]}\''


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A simulator for all tests of this module."""
    with simulated(tpm=10**8, rpm=10**6, latency=0.001, speed=10_000.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(server: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel for the tests that leave it as they found it."""
    home = str(tmp_path_factory.mktemp("home"))
    with kernel(**server.environ, NBCODEX_HOME=home) as started:
        assert started.run("%load_ext nbcodex").status == "ok"
        yield started


@pytest.fixture(autouse=True)
def new_conversation(request: pytest.FixtureRequest) -> None:
    """Start a new conversation for each test."""
    if "cell" in request.fixturenames:
        request.getfixturevalue("cell").run("%codex new")


def last_messages(server: Simulated) -> list[Any]:
    """Return the messages of the last request."""
    asked = server.core.log[-1].body["input"]
    return asked if isinstance(asked, list) else [{"role": "user", "content": asked}]


def last_prompts(server: Simulated) -> list[str]:
    """Return the prompts of the last request, earlier turns first."""
    return [item["content"] for item in last_messages(server) if item.get("role") == "user"]


def figures_line(ran: CellResult) -> str:
    assert ran.status == "ok", ran.shown_error
    return ran.plain.splitlines()[-1]


def test_fields_and_histories_are_filled_in(cell: Kernel, server: Simulated) -> None:
    """`{name}`, `{In[n]}`, `{Out[n]}` and `{Err[n]}` are filled in, and the figures say so."""
    number = int(cell.run("x = 6\nlen(In) - 1").plain)
    cell.run("x * 7")
    assert cell.run("{}['lost']").error == "KeyError"
    ran = cell.run(
        f"%%codex --no-history\n{{x}}|{{In[{number + 1}]}}|{{Out[{number + 1}]}}|"
        f"{{Err[{number + 2}]}}|{{nobody}}"
    )
    assert "filled in" in figures_line(ran)
    assert "{nobody} not found" in figures_line(ran)
    (prompt,) = last_prompts(server)
    assert prompt.startswith("6|x * 7|42|{}['lost']\n\nTraceback")
    assert prompt.endswith("KeyError: 'lost'|{nobody}")


def test_an_answer_is_the_cells_out(cell: Kernel, server: Simulated) -> None:
    """`{Out[n]}` of a `%%codex` cell is its answer."""
    number = int(cell.run("len(In) - 1").plain) + 1
    cell.run("%%codex --no-history\n[[echo: forty-two]]")
    cell.run(f"%%codex --no-history\nwhy {{Out[{number}]}}?")
    assert last_prompts(server) == ["why forty-two?"]


@pytest.mark.parametrize("wrong", ["{x.nothing}", "{Out[99999]}", "{Err[99999]}", "{In[99999]}"])
def test_a_failing_field_sends_nothing(cell: Kernel, server: Simulated, wrong: str) -> None:
    """A failing expression is a short error, and nothing is sent."""
    cell.run("x = 6")
    before = len(server.prompts)
    ran = cell.run(f"%%codex\nexplain {wrong}")
    assert ran.error == "ConfigurationError"
    assert wrong in "".join(ran.shown_error)
    assert len(ran.shown_error) <= 6
    assert len(server.prompts) == before


@pytest.mark.parametrize(
    "text",
    [
        "{'foo': 'bar'}",
        '{"a": {"x": [1, {}]}}',
        r"\frac{x}{2} ${x} {{missing}}",
        "{ x } {x; y} type T = {x: string}",
        "[a-z]{2,3} {x:{x}} 🦉{}",
    ],
)
def test_other_braces_arrive_unchanged(cell: Kernel, server: Simulated, text: str) -> None:
    """JSON, LaTeX, TypeScript and regular expressions reach the server unchanged."""
    cell.run("x = 6")
    assert cell.run(f"%%codex --no-history\n{text}").status == "ok"
    assert last_prompts(server) == [text]


def test_cells_share_a_conversation(cell: Kernel, server: Simulated) -> None:
    """Cells join one conversation; `--no-history` neither uses nor joins it; the figures say so."""
    assert "earlier" not in figures_line(cell.run("%%codex\nmy name is Ada"))
    assert "1 earlier turn" in figures_line(cell.run("%%codex\nwho am I?"))
    assert last_prompts(server) == ["my name is Ada", "who am I?"]
    cell.run("%%codex --no-history\nalone")
    assert last_prompts(server) == ["alone"]
    cell.run("%%codex --thread other\nelsewhere")
    assert last_prompts(server) == ["elsewhere"]
    printed = cell.run("%codex history").stream
    assert "my name is Ada" in printed
    assert "alone" not in printed
    assert "2 turns, about" in printed
    assert "elsewhere" in cell.run("%codex history other").stream


@pytest.mark.parametrize("word", ["new", "reset"])
def test_new_and_reset_start_the_conversation_afresh(
    cell: Kernel, server: Simulated, word: str
) -> None:
    """`%codex new` or `reset`, and `--new`, leave the earlier turns behind."""
    cell.run("%%codex\na")
    assert "starts afresh" in cell.run(f"%codex {word}").stream
    assert "There are no turns" in cell.run("%codex history").stream
    cell.run("%%codex\nb")
    assert last_prompts(server) == ["b"]
    cell.run("%%codex --new\nc")
    cell.run("%%codex\nd")
    assert last_prompts(server) == ["c", "d"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("%%codex --no-history --new\nhi", "--no-history cannot be combined"),
        ("%%codex --thread ''\nhi", "thread's name has 1 to 100"),
        ("%codex history a b", "history [THREAD]"),
        ("%codex reset a b", "new [THREAD]"),
        ("%codex histroy", "did you mean history"),
    ],
)
def test_invalid_conversation_options_are_one_line(cell: Kernel, code: str, says: str) -> None:
    """An invalid combination is one line that says what is possible."""
    ran = cell.run(code)
    assert ran.status == "error"
    assert says in ran.stream
    assert ran.stream.count("\n") == 1


def test_rerunning_a_cell_replaces_its_turn(cell: Kernel, server: Simulated) -> None:
    """Cells with ids keep their places; after a failure the old turn stays."""
    for name in ("a", "b", "c"):
        cell.run(f"%%codex\n{name}", cell=name)
    cell.run("%%codex\nagain", cell="b")
    assert last_prompts(server) == ["a", "again"]
    assert cell.run("%%codex --api-base http://x.example\nlost", cell="a").error
    cell.run("%%codex\nd", cell="d")
    assert last_prompts(server) == ["a", "again", "c", "d"]


def test_a_background_cell_joins_when_answered(cell: Kernel, server: Simulated) -> None:
    """It sees the turns before its start; prompts sent meanwhile do not see it."""
    cell.run("%%codex\na", cell="a")
    with server.held("slow"):
        cell.run("%%codex -b -o later\nslow", cell="b")
        cell.run("%%codex\nc", cell="c")
        assert last_prompts(server) == ["a", "c"]
    cell.run("later.text")
    cell.run("%%codex\nd", cell="d")
    assert last_prompts(server) == ["a", "slow", "c", "d"]


def test_ask_joins_only_a_named_thread(cell: Kernel, server: Simulated) -> None:
    """`nbcodex.ask` sees no history; with `thread=` it shares the cells' thread of that name."""
    cell.run("%%codex --thread shared\na")
    cell.run("import nbcodex\nnbcodex.ask('b')")
    assert last_prompts(server) == ["b"]
    cell.run("nbcodex.ask('c', thread='shared')\nnbcodex.ask('d', thread='shared')")
    assert last_prompts(server) == ["a", "c", "d"]
    assert cell.run("nbcodex.ask('e', thread='')").error == "ConfigurationError"


def test_ask_can_begin_the_conversation(server: Simulated, tmp_path: Path) -> None:
    """`ask` before any cell knows the notebook, its settings and its conversation."""
    with kernel(**server.environ, NBCODEX_HOME=str(tmp_path)) as cell:
        cell.run("%load_ext nbcodex\n%config Codex.model = 'gpt-5.6-mini'\nimport nbcodex")
        assert cell.run("nbcodex.ask('a', thread='main').model").plain == "'gpt-5.6-mini'"
        cell.run("%%codex\nb")
        assert last_prompts(server) == ["a", "b"]


def test_retry_replaces_the_turn_of_its_cell(cell: Kernel, server: Simulated) -> None:
    """A retried request sees and takes the place that it had."""
    cell.run("%%codex\na", cell="a")
    cell.run("%%codex -o b\nb", cell="b")
    cell.run("%%codex\nc", cell="c")
    assert cell.run("get_ipython().run_line_magic('codex', f'retry {b.id}')").status == "ok"
    assert last_prompts(server) == ["a", "b"]
    cell.run("%%codex\nd", cell="d")
    assert last_prompts(server) == ["a", "b", "c", "d"]


def test_reasoning_is_sent_back_to_its_own_model_only(cell: Kernel, server: Simulated) -> None:
    """Encrypted reasoning is sent before its answer, and to no other model."""
    cell.run(f"%%codex {REASONS}\na")
    cell.run("%%codex\nb")
    kinds = [item.get("role", item.get("type")) for item in last_messages(server)]
    assert kinds == ["user", "reasoning", "assistant", "user"]
    assert set(last_messages(server)[1]) == {"id", "type", "summary", "encrypted_content"}
    cell.run("%%codex -m gpt-5.6-mini\nc")
    assert "reasoning" not in [item.get("type") for item in last_messages(server)]


def test_a_too_long_conversation_names_the_ways_out(tmp_path: Path) -> None:
    """If the server finds it too long, the error names options, and they work."""
    with simulated(tpm=10**8, rpm=10**6, latency=0.001, speed=10_000.0, context=3000) as small:
        environ = {**small.environ, "NBCODEX_HOME": str(tmp_path)}
        with kernel(**environ) as cell:
            cell.run("%load_ext nbcodex")
            cell.run("%%codex\n" + "word " * 1500)
            ran = cell.run("%%codex\n" + "more " * 1000)
            assert ran.error == "TooLargeError"
            assert "`%codex new`" in " ".join(ran.shown_error)
            assert cell.run("%%codex --new\n" + "more " * 1000).status == "ok"


def notebook(server: Simulated, home: Path) -> Any:
    environ = {**server.environ, "NBCODEX_HOME": str(home), "JPY_SESSION_NAME": "/ten.ipynb"}
    return kernel(**environ)


@pytest.mark.parametrize("named", [True, False], ids=["cell ids", "no cell ids"])
def test_run_all_after_restart_sends_nothing_with_reuse(
    server: Simulated, tmp_path: Path, named: bool
) -> None:
    """With reuse, ten prompts of one conversation cost nothing after a restart."""
    prompts = [f"%%codex -o r{n} {REASONS}\nquestion {n} after {{x}}" for n in range(10)]
    counts = []
    for _ in range(3):
        before = len(server.prompts)
        with notebook(server, tmp_path) as cell:
            cell.run("%load_ext nbcodex\n%config Codex.display = 'text'")
            cell.run("%config Codex.reuse = True\nx = 5")
            for number, code in enumerate(prompts):
                ran = cell.run(code, cell=f"c{number}" if named else None)
                assert ran.status == "ok", ran.shown_error
            assert cell.run("r9.text != r8.text").plain == "True"
        counts.append(len(server.prompts) - before)
    assert counts == [10, 0, 0]


def test_a_resumed_answer_joins_at_the_place_of_its_cell(server: Simulated, tmp_path: Path) -> None:
    """A parked request is not a turn; answered after a restart, it has its cell's place."""
    with notebook(server, tmp_path) as cell:
        cell.run("%load_ext nbcodex\n%config Codex.display = 'text'")
        cell.run("%%codex\na", cell="a")
        server.core.script([Fault("requests_per_day", seconds=5000)])
        assert cell.run("%%codex -m gpt-5.6-mini -o p\nparked", cell="b").error == "ParkedError"
        cell.run("%%codex\nc", cell="c")
        assert last_prompts(server) == ["a", "c"]
    with notebook(server, tmp_path) as cell:
        cell.run("%load_ext nbcodex\n%config Codex.display = 'text'")
        assert cell.run("%codex resume").status == "ok"
        assert last_prompts(server) == ["a", "parked"]
        cell.run("%%codex\nd", cell="d")
        assert last_prompts(server) == ["a", "parked", "c", "d"]


def test_reuse_needs_an_equal_request(cell: Kernel, server: Simulated) -> None:
    """Under `--reuse` a changed image, thread, parameter or base URL is another request."""
    png = "b'\\x89PNG\\r\\n\\x1a\\n' + b'{}' * 9"
    cell.run(f"one = {png.format(1)}; two = {png.format(2)}")

    def asks(line: str) -> int:
        before = len(server.core.log)
        ran = cell.run(f"%%codex --reuse --no-history {line}\nsame")
        assert ran.status == "ok", ran.shown_error
        return len(server.core.log) - before

    lines = [
        "",
        "--image one",
        "--image two",
        "--image one --image two",
        "--max-output 999",
        "-p '{\"temperature\": 0.5}'",
        "--system Brief.",
        "-m gpt-5.6-mini",
    ]
    assert [asks(line) for line in lines] == [1] * len(lines)
    assert [asks(line) for line in lines] == [0] * len(lines)
    with simulated(tpm=10**8, rpm=10**6, latency=0.001, speed=10_000.0) as other:
        host = other.url.removeprefix("http://")
        cell.run(f"%config Codex.keys = {{'{host}': '{KEY}x'}}")
        ran = cell.run(f"%%codex --reuse --no-history --api-base {other.url}/v1\nsame")
        assert ran.status == "ok", ran.shown_error
        assert len(other.prompts) == 1


def test_reuse_needs_equal_turns(cell: Kernel, server: Simulated) -> None:
    """The same prompt after other turns, or in another thread, is another request."""
    cell.run("%%codex --reuse\nsame", cell="s")
    before = len(server.prompts)
    cell.run("%%codex --reuse\nsame", cell="s")
    assert len(server.prompts) == before
    cell.run("%%codex --reuse\nsame", cell="t")
    cell.run("%%codex --reuse --thread another\nsame", cell="t")
    assert len(server.prompts) == before + 2


def test_a_figure_is_sent_as_png(cell: Kernel, server: Simulated) -> None:
    """A matplotlib figure is sent as a PNG, from a prompt or from `--image`."""
    pytest.importorskip("matplotlib")
    cell.run(
        "from matplotlib.figure import Figure\n"
        "fig = Figure(figsize=(2, 2)); fig.subplots().plot([1, 2])"
    )
    ran = cell.run("%%codex --no-history --image fig\nand {fig}?")
    assert ran.status == "ok", ran.shown_error
    content = last_messages(server)[0]["content"]
    assert [part["type"] for part in content] == ["input_text", "input_image", "input_image"]
    assert content[0]["text"] == "and [image 1]?"
    assert cell.run("%%codex --image nobody\nlook").error == "ConfigurationError"
