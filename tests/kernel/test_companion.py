"""The features of Jupyter AI's `%%ai` in a real kernel, and a wrong use of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernel_client import MESSAGE_TIMEOUT_S, Kernel, kernel
from tests.simulated import KEY, Simulated, simulated

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def server() -> Iterator[Simulated]:
    """A simulator for all tests of this module."""
    with simulated(tpm=10_000_000, rpm=100_000, latency=0.01, speed=5_000.0) as running:
        yield running


@pytest.fixture(scope="module")
def cell(server: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded, and a class to ask for."""
    home = str(tmp_path_factory.mktemp("home"))
    with kernel(**server.environ, NBCODEX_HOME=home) as started:
        assert started.run("%load_ext nbcodex").status == "ok"
        pet = "from pydantic import BaseModel\nclass Pet(BaseModel):\n    name: str\n    legs: int"
        assert started.run(pet).status == "ok"
        yield started


FENCED = "[[echo: Here:\n```python\nran = 1\n```\nor\n```bash\nls\n```]]"


@pytest.mark.parametrize(
    ("line", "prompt", "mime", "shows"),
    [
        ("-f markdown", "[[echo: *hi*]]", "text/markdown", "*hi*"),
        ("-f md", "[[echo: *hi*]]", "text/markdown", "*hi*"),
        ("-f text", "[[echo: *hi*]]", "text/plain", "*hi*"),
        ("--format json", '[[echo: {"a": 1}]]', "application/json", "{'a': 1}"),
        ("-f html", "[[echo: <b>hi</b>]]", "text/html", "<b>hi</b>"),
        ("-f math --raw", "[[echo: $$\\frac{1}{2}$$]]", "text/latex", "\\frac{1}{2}"),
        ("-f image", "a cat", "image/png", "iVBORw0KGgo"),
        ("-f code", FENCED, "text/html", "ran = 1"),
        ("--model-parameters '{\"temperature\": 0}'", "[[echo: ok]]", "text/markdown", "ok"),
        ("--eval", "print('[[echo: from print]]')", "text/markdown", "from print"),
        ("--eval", "'[[echo: the value]]'", "text/markdown", "the value"),
        ("--schema Pet", "Which?", "application/json", "'name': 'simulated'"),
    ],
)
def test_each_option_of_ai_works(
    cell: Kernel, line: str, prompt: str, mime: str, shows: str
) -> None:
    """Each of `%%ai`'s formats and options works here."""
    ran = cell.run(f"%%codex {line}\n{prompt}")
    assert ran.status == "ok", ran.shown_error
    found = [str(o["data"][mime]) for o in ran.outputs if mime in o.get("data", {})]
    assert shows in "".join(found)


def test_api_base_selects_the_server(cell: Kernel, server: Simulated) -> None:
    """`--api-base` uses the given server, in another path of the same host."""
    ran = cell.run(f"%%codex --api-base {server.url}/openai/v1\n[[echo: there]]")
    assert "there" in ran.markdown
    assert server.core.log[-1].path.startswith("/openai/v1")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-f pdf", "invalid choice"),
        ("-m '{\"temperature\": 0}'", "-p/--params"),
        ("--model-parameters '[1]'", "JSON object"),
        ("-p '{\"store\": true}'", "--durable"),
        ("-p '{\"background\": true}'", "--durable"),
        ("-f image --api chat", "Responses API"),
        ("-f code --schema Pet", "drop one of them"),
        ("--schema Nowhere", "no such variable"),
        ("--schema KEY", "pydantic class or a JSON schema"),
        ("openai-chat:gpt-4o", "write gpt-4o without openai-chat:"),
        ("anthropic-chat:claude", "--api-base URL -m claude"),
        ("--api-base nowhere", "https://"),
    ],
)
def test_an_invalid_option_sends_nothing(
    cell: Kernel, server: Simulated, line: str, says: str
) -> None:
    """An invalid option is a short error with advice, and sends nothing."""
    cell.run(f"KEY = {KEY!r}")
    before = len(server.prompts)
    ran = cell.run(f"%%codex {line}\nhello")
    shown = ran.stream + "".join(ran.shown_error)
    assert says in shown.replace("\n     ", " ")
    assert len(shown.splitlines()) <= 6
    assert len(server.prompts) == before


def test_code_goes_into_a_new_cell(cell: Kernel) -> None:
    """`-f code` inserts the first block without its fence, and runs nothing."""
    ran = cell.run(f"%%codex -f code\n{FENCED}")
    assert ran.new_cells == ["ran = 1"]
    assert "Copy</button>" in ran.data("text/html")
    assert cell.run("'ran' in globals()").plain == "False"


def test_insert_takes_a_numbered_block(cell: Kernel) -> None:
    """`%codex insert N` puts block N into a cell, and shows it for copying."""
    cell.run(f"%%codex\n{FENCED}")
    ran = cell.run("%codex insert 2")
    assert ran.new_cells == ["ls"]
    assert "Copy</button>" in ran.data("text/html")
    ran = cell.run("%codex insert 3")
    assert ran.new_cells == []
    assert "a number from 1 to 2" in ran.stream


def test_insert_takes_a_background_answer(cell: Kernel) -> None:
    """A background answer inserts nothing by itself, but `insert` finds it."""
    assert cell.run(f"%%codex -f code -b -o late\n{FENCED}").new_cells == []
    cell.run("late.text")
    assert cell.run("%codex insert").new_cells == ["ran = 1"]


def test_insert_refuses_an_answer_without_code(cell: Kernel) -> None:
    """An answer without code is an error."""
    cell.run("%%codex\n[[echo: no code here, sorry]]")
    assert "contains no code" in "".join(cell.run("%codex insert").shown_error)


def test_invalid_json_is_shown_before_the_error(cell: Kernel) -> None:
    """The paid text is shown in full and kept, then the cell fails."""
    ran = cell.run('%%codex -f json -o bad\n[[echo: {"a": nope}]]')
    assert ran.error == "AnswerError"
    assert ran.plain.startswith('{"a": nope}\n\n')
    kept = cell.run("(bad.text, bool(bad), bad.parsed)").plain
    assert kept == "('{\"a\": nope}', False, None)"


def test_schema_gives_a_validated_instance(cell: Kernel) -> None:
    """`--schema` assigns the validated object; the figures mention a repair."""
    ran = cell.run("%%codex --schema Pet -o pet\n[[echo: not even JSON]]", cell="pet")
    assert "asked again" in ran.markdown
    assert cell.run("pet.parsed").plain == "Pet(name='simulated', legs=1)"
    again = cell.run("%%codex --schema Pet -o pet --reuse\n[[echo: not even JSON]]", cell="pet")
    assert "reused" in again.markdown
    assert cell.run("pet.parsed").plain == "Pet(name='simulated', legs=1)"


def test_image_is_in_the_reply(cell: Kernel) -> None:
    """The image file is in `Reply.images`."""
    cell.run("%%codex -f image -o cat\na cat")
    assert cell.run("cat.images[0].data[:4]").plain == r"b'\x89PNG'"


@pytest.mark.parametrize(
    ("body", "error"), [("1/0", "ZeroDivisionError"), ("import sys; print(1, file=sys.stderr)", "")]
)
def test_eval_without_output_sends_nothing(
    cell: Kernel, server: Simulated, body: str, error: str
) -> None:
    """An error in the cell is shown as the cell's own; stderr is not part of the prompt."""
    before = len(server.prompts)
    ran = cell.run(f"%%codex --eval\n{body}")
    assert ran.error == error
    assert error or "printed nothing" in ran.stream
    assert len(server.prompts) == before


def test_fix_explains_the_last_error(cell: Kernel, server: Simulated) -> None:
    """`%codex fix` sends the cell and the plain traceback, and inserts the corrected cell."""
    cell.run("def f():\n    return undefined_name\nf()")
    ran = cell.run("%codex fix")
    asked = server.prompts[-1]
    assert "def f():\n    return undefined_name\nf()" in asked
    assert "NameError: name 'undefined_name' is not defined" in asked
    assert "\x1b" not in asked
    assert "IPython/core" not in asked
    (new_cell,) = ran.new_cells
    assert new_cell.startswith("def wait(")
    assert "Copy</button>" in ran.data("text/html")
    assert ran.markdown


def test_fix_can_be_repeated_after_it_failed(cell: Kernel, server: Simulated) -> None:
    """After a failed fix, the user's error is still the last one."""
    cell.run("1/0")
    cell.run("import os; saved = os.environ.pop('OPENAI_API_KEY')")
    assert cell.run("%codex fix").error == "MissingKeyError"
    cell.run("os.environ['OPENAI_API_KEY'] = saved")
    assert cell.run("%codex fix").status == "ok"
    assert "ZeroDivisionError" in server.prompts[-1]


def test_fix_ignores_errors_of_nbcodex(cell: Kernel, server: Simulated) -> None:
    """Mistyped magics and failed requests do not hide the user's error."""
    cell.run("undefined_here")
    for mistake in (
        "%codex fxi",
        "%%codex --frmat code\nx",
        "%%codex -m nobody\nhello",
        "%%codex\n",
    ):
        assert cell.run(mistake).status == "error"
    assert cell.run("%codex fix").status == "ok"
    assert "name 'undefined_here' is not defined" in server.prompts[-1]


def test_fix_of_another_cell_is_refused(cell: Kernel) -> None:
    """Only the last error can be explained; the message names its cell."""
    cell.run("1/0")
    assert "only the last error can be explained" in cell.run("%codex fix 1").stream


@pytest.mark.parametrize("word", ["list", "models"])
def test_list_is_a_synonym_of_models(cell: Kernel, word: str) -> None:
    """`%codex list` is `%codex models`."""
    assert "gpt-5.6-mini" in cell.run(f"%codex {word}").stream


def test_alias_and_dealias(cell: Kernel, server: Simulated) -> None:
    """`alias` defines a short name, `dealias` removes it; both refuse invalid uses."""
    assert "→ gpt-5.6-mini" in cell.run("%codex alias mini gpt-5.6-mini").stream
    cell.run("%%codex mini\nhello")
    assert server.core.log[-1].model == "gpt-5.6-mini"
    assert "an alias itself" in cell.run("%codex alias tiny mini").stream
    assert "is removed" in cell.run("%codex dealias mini").stream
    assert "there is no alias mini" in cell.run("%codex dealias mini").stream
    assert "Model not found" in "".join(cell.run("%%codex mini\nhello").shown_error)


@pytest.mark.parametrize("word", ["help", "version"])
def test_help_and_version_refuse_unknown_arguments(cell: Kernel, word: str) -> None:
    """`help` and `version` answer, and refuse unknown arguments."""
    assert cell.run(f"%codex {word}").stream
    assert cell.run(f"%codex {word} me").stream.startswith("UsageError")


def test_magic_help_shows_options_and_examples(cell: Kernel) -> None:
    """`%%codex?` shows every option, and examples."""
    (page,) = cell.run("%%codex?").payload
    for part in ("--schema", "--eval", "-f", "Examples:", "%codex help"):
        assert part in page["data"]["text/plain"]


@pytest.mark.parametrize(
    ("code", "offered"),
    [
        ("%%codex --pat", {"--patience"}),
        ("%%codex -f j", {"json"}),
        ("%%codex -m gpt-5.6-s", {"gpt-5.6-sol"}),
        ("%%codex --api res", {"responses"}),
        ("%codex dea", {"dealias"}),
        ("%codex demo o", {"on", "off"}),
    ],
)
def test_tab_completes_options_values_and_commands(
    cell: Kernel, code: str, offered: set[str]
) -> None:
    """Options, values, models and commands, without other candidates."""
    assert set(completions(cell, code)) == offered


def test_tab_completes_journal_ids(cell: Kernel) -> None:
    """Ids of the journal, but nothing in the cell's body."""
    cell.run("%%codex -o one\n[[echo: hi]]")
    code = f"%codex journal {cell.run('one.id').plain[1:4]}"
    ids = completions(cell, code)
    assert ids
    assert all(code.endswith(id_[:3]) for id_ in ids)
    assert "--patience" not in completions(cell, "%%codex\n--pat")


def completions(cell: Kernel, code: str) -> list[str]:
    """Return what Tab offers at the end of `code`."""
    reply: Any = cell.client.complete(code, len(code), reply=True, timeout=MESSAGE_TIMEOUT_S)
    matches: list[str] = reply["content"]["matches"]
    return matches
