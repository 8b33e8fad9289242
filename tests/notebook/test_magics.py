"""The magics as a user types them, in a real shell of this process, against the simulator."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from IPython.core.completer import MATCHES_LIMIT, provisionalcompleter
from IPython.core.error import UsageError

import nbcodex
from nbcodex import host
from nbcodex.client import get_client
from nbcodex.errors import (
    AnswerError,
    BudgetError,
    ConfigurationError,
    EntryError,
    MissingKeyError,
    NbcodexError,
)
from nbcodex.models import Origin, Request
from nbcodex.notebook import cell_options, display
from nbcodex.notebook.display import CellOutput
from nbcodex.notebook.monitor import collector_of
from nbcodex.openai_api.api_client import ApiClient
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings
from tests.simulated import KEY, Simulated


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--modle x", "did you mean --model?"),
        ("-m '{\"temperature\": 0}'", "-p/--params"),
        ("-p '[1]'", "JSON object"),
        ("-p '{'", "not JSON"),
        ("-p '{\"stream\": false}'", "stream"),
        ("--max-output 1e400k", "not a number of tokens"),
        ("--api-base notaurl", "does not begin with https://"),
        ("-o class", "name of a variable"),
        ("-o __builtins__", "name of a variable"),
        ("--patience soon", "is not a duration"),
        ("--patience -5s", "expected one argument"),
        ("--max-output 0", "max-output"),
        ("--max-output many", "max-output"),
        ("-o 1x", "name of a variable"),
        ("-f pdf", "invalid choice"),
        ("--api soap", "invalid choice"),
        ("a b", "there is no option b"),
        (
            "--temperature 0",
            """there is no option --temperature; a parameter of the API goes into \
-p '{"temperature": …}'.""",
        ),
        ("--top-p=0.5", """a parameter of the API goes into -p '{"top_p": …}'."""),
        ("--modle gpt-x", "did you mean --model?"),
        ("a -m b", "two models"),
        ("--system 'unclosed", "No closing quotation"),
    ],
)
def test_an_invalid_option_is_a_one_line_usage_error(line: str, says: str) -> None:
    """An invalid option raises exactly `UsageError`, which IPython shows in one line."""
    with pytest.raises(UsageError) as caught:
        cell_options.parse_options(line)
    assert type(caught.value) is UsageError
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "wants"),
    [
        ("gpt-x", {"model": "gpt-x"}),
        ("-m gpt-x", {"model": "gpt-x"}),
        ("--model=gpt-x", {"model": "gpt-x"}),
        ("--system 'Be brief.'", {"system": "Be brief."}),
        ("--max-output 2k", {"max_output": 2000}),
        ("-p '{\"temperature\": 0}'", {"params": {"temperature": 0}}),
        ("-o answer -f text", {"out": "answer", "format": "text"}),
        ("--patience 1h30m", {"patience": "1h30m"}),
        ("--raw -b --reuse", {"raw": True, "background": True, "reuse": True}),
    ],
)
def test_each_option_is_parsed(line: str, wants: dict[str, Any]) -> None:
    """Each option gives the value that it names."""
    got = vars(cell_options.parse_options(line))
    assert {name: got[name] for name in wants} == wants


def test_an_empty_prompt_is_refused(ip: Any, simulator: Simulated) -> None:
    """A cell without a prompt sends nothing."""
    with pytest.raises(UsageError, match="empty"):
        ip.run_cell_magic("codex", "", " \n")
    assert simulator.prompts == []


def test_fields_are_filled_in_unless_raw(ip: Any, simulator: Simulated) -> None:
    """`{name}` is the variable's value; with `--raw` it stays as it is."""
    ip.user_ns["who"] = "world"
    ip.run_cell_magic("codex", "", "hello {who}")
    ip.run_cell_magic("codex", "--raw", "hello {who}")
    assert simulator.prompts == ["hello world", "hello {who}"]


@pytest.mark.parametrize(
    "text",
    [
        "{exit()}",
        "{quit}",
        '{open("x", "w")}',
        '{get_ipython().system("touch x")}',
        "{In}",
        "{Out}",
    ],
)
def test_names_that_ipython_adds_are_not_variables(
    ip: Any, simulator: Simulated, text: str
) -> None:
    """A prompt that quotes code cannot end the kernel, write files or send the history."""
    ip.run_cell_magic("codex", "", text)
    assert simulator.prompts == [text]


def test_out_entry_is_filled_in(ip: Any, simulator: Simulated) -> None:
    """`{Out[n]}` is the result of that cell."""
    ip.user_ns["Out"][7] = "seven"
    ip.run_cell_magic("codex", "", "explain {Out[7]}")
    assert simulator.prompts == ["explain seven"]


def test_err_entry_is_code_and_traceback(ip: Any, simulator: Simulated) -> None:
    """`{Err[n]}` is the code of that cell and its traceback, without colours."""
    ran = ip.run_cell("def broken():\n    return {}['k']\nbroken()", store_history=True)
    number = ran.execution_count
    ip.run_cell_magic("codex", "", f"explain {{Err[{number}]}}")
    asked = simulator.prompts[0]
    assert asked.startswith("explain def broken():")
    assert asked.endswith("KeyError: 'k'")
    assert "\x1b" not in asked
    assert "interactiveshell" not in asked
    assert f"Cell In[{number}], line 3, in <module>" in asked
    with pytest.raises(ConfigurationError, match=r"no error of cell 99999 is known"):
        ip.run_cell_magic("codex", "", "explain {Err[99999]}")
    assert len(simulator.prompts) == 1


@pytest.mark.parametrize("code", ["1 +", "%nosuchmagic", "raise KeyboardInterrupt", "%%codex\n"])
def test_err_keeps_every_kind_of_error(ip: Any, simulator: Simulated, code: str) -> None:
    """Syntax errors, unknown magics, Stop and nbcodex's own errors are kept, too."""
    ran = ip.run_cell(code, store_history=True)
    ip.run_cell_magic("codex", "", "explain {Err[-1]}")
    assert ran.error_in_exec is None or type(ran.error_in_exec).__name__ in simulator.prompts[0]
    assert code.strip() in simulator.prompts[0]


def test_images_are_sent_from_files_variables_and_fields(
    ip: Any, simulator: Simulated, tmp_path: Path
) -> None:
    """`--image` takes files and variables; `{figure}` is sent, too, and leaves a placeholder."""
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 8
    (tmp_path / "a b.png").write_bytes(png)
    ip.user_ns["figure"] = pytest.importorskip("matplotlib.figure").Figure()
    ip.user_ns["Out"][8] = png
    line = f"--image Out[8] --image '{tmp_path / 'a b.png'}'"
    ip.run_cell_magic("codex", line, "what is {figure}?")
    content = simulator.core.log[-1].body["input"][0]["content"]
    assert content[0]["text"] == "what is [image 1]?"
    urls = [part["image_url"] for part in content[1:]]
    assert [url[:26] for url in urls] == ["data:image/png;base64,iVBO"] * 3
    assert urls[1] == urls[2] != urls[0]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("nobody", "The image nobody cannot be read"),
        ("number", "type int is not an image"),
        ("number.x", "AttributeError"),
        ("'exit()'", "cannot be read"),
        ("/etc/passwd", "not an image that can be sent"),
    ],
)
def test_an_invalid_image_sends_nothing(
    ip: Any, simulator: Simulated, expression: str, says: str
) -> None:
    """An invalid image is a clear error, and no code is run for it."""
    ip.user_ns["number"] = 5
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        ip.run_cell_magic("codex", f"--image {expression}", "look")
    assert simulator.prompts == []


def test_reload_keeps_keys_and_the_demo(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`%reload_ext` neither loses a login nor turns the demo off."""
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr("getpass.getpass", lambda _: KEY)
    ip.run_line_magic("codex", "login")
    ip.run_line_magic("reload_ext", "nbcodex")
    ip.run_cell_magic("codex", "", "[[echo: hello]]")
    assert simulator.core.log[-1].status == 200


def test_demo_calm_switches_to_high_limits_and_back(
    ip: Any, simulator: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """`calm` replaces the low limits by high ones; the message says which are in force."""
    printed = []
    for switch in ("", "calm", "", "off"):
        ip.run_line_magic("codex", f"demo {switch}")
        printed.append(capsys.readouterr().out)
        if switch == "calm":
            ip.run_cell_magic("codex", "--max-output 20k -o large", "[[echo: there is room]]")
    assert ["3,000 tokens" in out for out in printed] == [True, False, True, False]
    assert "no limit is reached" in printed[1]
    assert printed[3].endswith(f"requests go to {simulator.url.removeprefix('http://')}.\n")
    assert ip.user_ns["large"].attempts == 1
    with pytest.raises(UsageError, match="on, calm or off"):
        ip.run_line_magic("codex", "demo loud")


def test_demo_writes_only_a_journal_of_its_own(ip: Any) -> None:
    """Simulated requests come neither into the user's journal nor into the limiter's files."""
    ip.run_line_magic("codex", "demo calm")
    ip.run_cell_magic("codex", "-o r", "[[echo: hello]]")
    ip.run_line_magic("codex", "demo off")
    assert ip.user_ns["r"].text == "hello"
    home = Path(os.environ["NBCODEX_HOME"])
    assert {path.parent for path in home.rglob("*.sqlite*")} == {home / "demo"}


def test_new_demo_empties_the_journal_of_the_last_one_unless_a_request_is_open(
    ip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is parked stays, and the demo names it; the budget of a finished demo goes."""
    ip.run_line_magic("codex", "demo calm")
    ip.run_line_magic("codex", "budget 100/day")
    with pytest.raises(BudgetError):
        ip.run_cell_magic("codex", "--max-output 400", "[[echo: an open request]]")
    ip.run_line_magic("codex", "demo off")
    ip.run_line_magic("codex", "demo calm")
    assert "1 parked or abandoned here" in capsys.readouterr().out
    ip.run_line_magic("codex", "budget off")
    ip.run_line_magic("codex", "resume")
    ip.run_line_magic("codex", "budget 100/day")
    for mode in ("on", "calm"):  # the same demo with other limits
        ip.run_line_magic("codex", f"demo {mode}")
        ip.run_line_magic("codex", "journal")
        assert "an open request" in capsys.readouterr().out
    ip.run_line_magic("codex", "demo off")
    ip.run_line_magic("codex", "demo calm")
    ip.run_line_magic("codex", "journal")
    assert "The journal is empty." in capsys.readouterr().out
    ip.run_cell_magic("codex", "--max-output 400", "[[echo: within no budget]]")
    ip.run_line_magic("codex", "demo off")


def test_demo_keeps_the_journal_in_memory(ip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With `Codex.journal` off it holds the user's own prompts; nothing survives the kernel."""
    ip.run_line_magic("config", "Codex.journal = False")
    ip.run_cell_magic("codex", "--no-history", "[[echo: the user's own]]")
    ip.run_line_magic("codex", "demo calm")
    assert "survives the kernel" not in capsys.readouterr().out
    ip.run_line_magic("codex", "demo off")
    ip.run_line_magic("codex", "journal")
    assert "the user's own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("%%codex -b\n[[tokens=2000]]", "%codex cancel"),
        ("rows = nbcodex.map('[[echo: {}]]', iter('ab'))\nprint(next(rows))", "rows.close()"),
    ],
    ids=["request", "map"],
)
def test_new_demo_keeps_what_has_not_ended_in_this_kernel(
    ip: Any, capsys: pytest.CaptureFixture[str], code: str, end: str
) -> None:
    """Without its row in the journal, an answer that arrives later could not be stored."""
    ip.user_ns["nbcodex"] = nbcodex
    ip.run_line_magic("codex", "demo calm")
    ip.run_cell(code).raise_error()
    ip.run_line_magic("codex", "demo off")
    ip.run_line_magic("codex", "demo calm")
    capsys.readouterr()
    ip.run_line_magic("codex", "journal")
    assert "The journal is empty." not in capsys.readouterr().out
    ip.run_cell(end).raise_error()
    ip.run_line_magic("codex", "demo off")


def test_demo_refuses_other_local_users(ip: Any) -> None:
    """Without the demo's key, no request is answered and no stored prompt can be read."""
    ip.run_line_magic("codex", "demo calm")
    ip.run_cell_magic("codex", "-o r", "[[echo: hello]]")
    (config,) = [c for c in ip.configurables if type(c).__name__ == "Codex"]
    url = config.demo.base_url
    headers = {"authorization": "Bearer no-key-is-needed-here"}
    paths = (f"responses/{ip.user_ns['r'].id}", "models", "batches", "../_simulator/log")
    statuses = [httpx2.get(f"{url}/{path}", headers=headers).status_code for path in paths]
    ip.run_line_magic("codex", "demo off")
    assert statuses == [401, 401, 401, 404]


@pytest.mark.parametrize(
    ("chosen", "asked"), [("gpt-5.6-mini", "gpt-5.6-mini"), ("gpt-4o", "gpt-5.6-sol")]
)
def test_demo_uses_the_configured_model_if_simulated(ip: Any, chosen: str, asked: str) -> None:
    """`Codex.model` applies in the demo, unless the simulator does not have it."""
    ip.run_line_magic("config", f"Codex.model = {chosen!r}")
    ip.run_line_magic("codex", "demo calm")
    ip.run_cell_magic("codex", "-o r", "[[echo: hello]]")
    ip.run_line_magic("codex", "demo off")
    assert ip.user_ns["r"].model == asked


def test_ipython_does_not_expand_prompts(ip: Any, simulator: Simulated) -> None:
    """IPython expands neither `$` nor braces in a prompt."""
    ip.user_ns["x"] = 1
    ip.run_cell_magic("codex", "", "$x and {'foo': 'bar'}")
    assert simulator.prompts == ["$x and {'foo': 'bar'}"]


def test_options_are_in_the_request_body(ip: Any, simulator: Simulated) -> None:
    """System text, output maximum, effort and parameters are in the sent body."""
    ip.run_cell_magic(
        "codex",
        "gpt-5.6-mini --system Brief. --max-output 99 --effort low -p '{\"temperature\": 0}'",
        "hello",
    )
    body = simulator.core.log[-1].body
    assert body["model"] == "gpt-5.6-mini"
    assert body["instructions"] == "Brief."
    assert body["max_output_tokens"] == 99
    assert body["reasoning"]["effort"] == "low"
    assert body["temperature"] == 0
    assert body["store"] is False


def test_a_prompt_that_contains_the_key_is_refused(ip: Any, simulator: Simulated) -> None:
    """The key is refused in a prompt, typed or filled in."""
    ip.user_ns["key"] = KEY
    with pytest.raises(ConfigurationError) as caught:
        ip.run_cell_magic("codex", "", "what is {key}?")
    assert KEY not in str(caught.value)
    assert simulator.prompts == []


def test_out_assigns_the_reply(ip: Any) -> None:
    """`-o` assigns a true `Reply` with text, usage and model."""
    ip.run_cell_magic("codex", "-o answer", "[[echo: hi]]")
    answer = ip.user_ns["answer"]
    assert answer
    assert (answer.text, answer.status, answer.attempts) == ("hi", "done", 1)
    assert answer.usage.output_tokens > 0
    assert answer.simulated


@pytest.mark.parametrize(
    "word", ["usage", "monitor", "limits", "budget", "models", "doctor", "version", "help"]
)
def test_informing_commands_print_no_key(
    ip: Any, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command that only informs prints something, and no key."""
    ip.run_line_magic("codex", word)
    shown = capsys.readouterr().out
    assert shown.strip()
    assert KEY not in shown


def test_dry_run_sends_nothing(
    ip: Any, simulator: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dry-run` prints model, tokens and the unknown cost, and sends nothing."""
    ip.run_cell_magic("codex", "--dry-run --max-output 40 -o dry", "hello")
    printed = capsys.readouterr().out
    assert re.search(r"nothing was sent: \S+ · ~\d+ in, at most 40 out · cost unknown", printed)
    assert simulator.prompts == []
    assert "dry" not in ip.user_ns


@pytest.mark.parametrize("line", ["", "--reuse"])
def test_function_call_is_an_error_that_is_not_reused(
    ip: Any, simulator: Simulated, line: str
) -> None:
    """An answer that only calls a function is false, and is asked for again."""
    tool = '{"type": "function", "name": "weather", "parameters": {}}'
    params = f'{{"tools": [{tool}], "tool_choice": "required"}}'
    for _ in range(2):
        with pytest.raises(AnswerError, match="asked to call weather"):
            ip.run_cell_magic("codex", f"--no-history -o r {line} -p '{params}'", "hello")
        assert not ip.user_ns["r"]
        assert ip.user_ns["r"].status == "failed"
    assert len(simulator.prompts) == 2


def test_resume_at_reset_refuses_maps(
    ip: Any, simulator: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """A named map is refused, as it would wait in this cell; among all, it is skipped."""
    origin = Origin(map_id="m77", row_index=0, row_count=1)
    request = Request(prompt="hello", id="m77-0", origin=origin)
    get_client().journal(Settings.read()).maps.insert_parked([(request, b"m77")])
    with pytest.raises(UsageError, match="--at-reset cannot be used with a map"):
        ip.run_line_magic("codex", "resume m77 --at-reset")
    ip.run_line_magic("codex", "resume --everywhere --at-reset")
    assert "m77 was not resumed" in capsys.readouterr().out
    assert simulator.prompts == []


@pytest.mark.parametrize("line", ["-f json", "--eval", "--thread t", "--new", "--raw", "-b"])
def test_map_refuses_options_without_effect(ip: Any, simulator: Simulated, line: str) -> None:
    """An option that has no effect on a map is refused, and no row is sent."""
    ip.user_ns["words"] = ["one", "two"]
    with pytest.raises(UsageError, match="cannot be used with --map"):
        ip.run_cell_magic("codex", f"--map words {line}", "[[echo: {}]]")
    assert simulator.prompts == []


@pytest.mark.parametrize(
    ("line", "says"), [("--schema Wanted", "json_schema"), ("--image dot", "input_image")]
)
def test_map_sends_schema_and_images_with_every_row(
    ip: Any, simulator: Simulated, line: str, says: str
) -> None:
    """They are options of a row as they are of a single prompt."""
    ip.user_ns["words"] = ["one", "two"]
    ip.user_ns["Wanted"] = {"type": "object", "properties": {"n": {"type": "integer"}}}
    ip.user_ns["dot"] = b"\x89PNG\r\n\x1a\n" + bytes(50)
    ip.run_cell_magic("codex", f"--map words -o back {line}", "{}")
    sent = [str(seen.body) for seen in simulator.core.log if seen.api]
    assert [says in body for body in sent] == [True, True], simulator.core.log


def test_dry_run_shows_the_rest_of_the_budget(
    ip: Any, simulator: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """It also says whether the prompt would exceed the budget."""
    ip.run_line_magic("codex", "budget 10M")
    ip.run_cell_magic("codex", "--dry-run --max-output 40", "hello")
    printed = capsys.readouterr().out
    assert re.search(r"budget: [\d,]+ of 10,000,000 tokens for this session used", printed)
    ip.run_cell_magic("codex", "--dry-run --max-output 10000000", "hello")
    printed = capsys.readouterr().out
    assert re.search(r"more than is left of your budget: [\d,]+ tokens of 10,000,000", printed)


def test_budget_refuses_before_sending(
    ip: Any, simulator: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    """`%codex budget` sets a cap that refuses a prompt, and `off` removes it."""
    ip.run_line_magic("codex", "budget 100")
    assert "of 100 tokens for this session used" in capsys.readouterr().out
    with pytest.raises(BudgetError, match="resume"):
        ip.run_cell_magic("codex", "--max-output 400", "hello")
    assert simulator.prompts == []
    ip.run_line_magic("codex", "budget off")
    ip.run_line_magic("codex", "resume all")
    assert len(simulator.prompts) == 1


def test_resume_shows_a_common_failure_once_and_raises(
    ip: Any,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two requests that lack the same key raise one error, which ends *Run All*."""
    ip.run_line_magic("codex", "budget 100")
    for _ in range(2):
        with pytest.raises(BudgetError):
            ip.run_cell_magic("codex", "--max-output 400", "hello")
    ip.run_line_magic("codex", "budget off")
    monkeypatch.delenv("OPENAI_API_KEY")
    capsys.readouterr()
    with pytest.raises(MissingKeyError):
        ip.run_line_magic("codex", "resume")
    assert "No API key" not in capsys.readouterr().out


GATEWAY = "https://gateway.example/v1"


def parked_id(ip: Any, options: str = "") -> str:
    """Return the id of a prompt that waits for a budget, which has been removed since."""
    ip.run_line_magic("codex", "budget 100")
    with pytest.raises(BudgetError):
        ip.run_cell_magic("codex", f"--no-history --max-output 400 {options}", "hello")
    ip.run_line_magic("codex", "budget off")
    (entry,) = get_client().journal(Settings.read()).recent_entries(1)
    return entry.id


@pytest.mark.parametrize("command", ["resume", "resume ID", "retry ID"])
def test_kept_prompt_goes_to_no_other_server(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It stays parked, and is sent once the base URL is set back."""
    id_ = parked_id(ip)
    with monkeypatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", GATEWAY)
        with pytest.raises(EntryError, match="for localhost, but requests go to gateway"):
            ip.run_line_magic("codex", command.replace("ID", id_))
    assert simulator.prompts == []
    assert get_client().journal(Settings.read()).find_entry(id_).status == "parked"
    ip.run_line_magic("codex", command.replace("ID", id_))
    assert simulator.prompts == ["hello"]


def test_retry_sends_a_kept_prompt_to_no_server_of_an_async_factory(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = parked_id(ip)

    async def factory() -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key="other", base_url=GATEWAY)

    (config,) = [c for c in ip.configurables if type(c).__name__ == "Codex"]
    monkeypatch.setattr(config, "client", factory)
    with pytest.raises(EntryError, match="for localhost, but requests go to gateway"):
        ip.run_line_magic("codex", f"retry {id_}")
    assert simulator.prompts == []


@pytest.mark.parametrize("flags", ["", "--new-server"])
@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [("OPENAI_API_KEY", "", "set OPENAI_API_KEY"), ("OPENAI_BASE_URL", "x", "https://")],
)
def test_request_that_lacks_a_setting_stays_parked(
    ip: Any,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    advice: str,
    flags: str,
) -> None:
    """The error says what to set; then the request is resumed, and assigned to its variable."""
    id_ = parked_id(ip, "-o kept")
    with monkeypatch.context() as patch:
        patch.setenv(variable, value)
        with pytest.raises(ConfigurationError, match="stays in the journal as it was") as caught:
            ip.run_line_magic("codex", f"resume {flags}")
    assert advice in caught.value.advice
    entry = get_client().journal(Settings.read()).find_entry(id_)
    assert (entry.status, ip.user_ns["kept"].status) == ("parked", "parked")
    assert simulator.prompts == []
    ip.run_line_magic("codex", "resume")
    assert simulator.prompts == ["hello"]
    assert ip.user_ns["kept"].status == "done"


@pytest.mark.parametrize("command", ["resume", "retry"])
def test_kept_prompt_goes_to_another_server_if_the_user_says_so(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", GATEWAY)
        id_ = parked_id(ip)
    with pytest.raises(EntryError, match="--new-server"):
        ip.run_line_magic("codex", f"{command} {id_}")
    assert simulator.prompts == []
    ip.run_line_magic("codex", f"{command} {id_} --new-server")
    assert simulator.prompts == ["hello"]


@pytest.mark.parametrize(("words", "changed"), [("100", True), ("off", True), ("", False)])
def test_monitor_updates_when_the_budget_changes(ip: Any, words: str, changed: bool) -> None:
    """A set or removed cap wakes the monitor; showing the cap does not."""
    collector = collector_of(get_client())
    collector.changed.clear()
    ip.run_line_magic("codex", f"budget {words}")
    assert collector.changed.is_set() == changed
    ip.run_line_magic("codex", "budget off")


def test_budget_off_keeps_the_configured_budget(
    ip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`budget off` removes the user's own cap, and says who set the remaining one."""
    (config,) = [c for c in ip.configurables if type(c).__name__ == "Codex"]
    config.budget = "5k"
    ip.run_line_magic("codex", "budget off")
    assert "Codex.budget" in capsys.readouterr().out


def test_budget_reset_counts_from_zero(ip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ip.run_line_magic("codex", "budget reset")  # other tests of this process have used tokens
    ip.run_line_magic("codex", "budget 10k")
    ip.run_cell_magic("codex", "--no-history --max-output 400", "[[tokens=300]]")
    capsys.readouterr()
    printed = []
    for words in ("", "reset"):
        ip.run_line_magic("codex", f"budget {words}")
        printed.append(capsys.readouterr().out)
    ip.run_line_magic("codex", "budget off")
    used = [re.findall(r"([\d,]+) of 10,000 tokens", text) for text in printed]
    assert int(used[0][0].replace(",", "")) >= 300
    assert used[1] == ["0"]


def test_config_budget_without_dollar_sign_is_refused(
    ip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython makes `5` of `$5` there: that is refused, and the earlier value stays."""
    ip.run_line_magic("config", "Codex.budget = '6usd/day'")
    ip.run_line_magic("config", "Codex.budget = '5/day'")
    for _ in range(2):
        ip.run_line_magic("codex", "budget")
        assert "of $6.00 for today" in capsys.readouterr().out
        ip.run_line_magic("reload_ext", "nbcodex")


def test_an_unknown_command_suggests_the_nearest(ip: Any) -> None:
    """A mistyped command is one line with a hint."""
    with pytest.raises(UsageError, match="did you mean usage"):
        ip.run_line_magic("codex", "useage")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("%codex resume --", {"--everywhere", "--at-reset", "--new-server"}),
        ("%codex budget ", {"off", "reset"}),
        ("%codex demo ", {"on", "calm", "off"}),
        ("%codex help priv", {"privacy"}),
        ("%codex dealias ", {"mini"}),
        ("%codex alias new m", {"mini"}),
        ("%%codex --effort ", {"none", "minimal", "low", "medium", "high", "xhigh"}),
    ],
)
def test_tab_completes_the_arguments_that_the_help_names(
    ip: Any, line: str, offered: set[str]
) -> None:
    ip.run_line_magic("codex", "alias mini gpt-5.6-mini")
    with provisionalcompleter():
        completions = list(ip.Completer.completions(line, len(line)))
    assert {completion.text for completion in completions} == offered


def test_tab_offers_a_bounded_number_of_models(ip: Any) -> None:
    (config,) = [c for c in ip.configurables if type(c).__name__ == "Codex"]
    config.listed_models = tuple(f"m-{number}" for number in range(100_000))
    (complete,) = [m for m in ip.Completer.custom_matchers if m.matcher_identifier == "codex"]
    line = "%%codex -m m-"
    context = SimpleNamespace(text_until_cursor=line, cursor_line=0)
    assert len(complete(context)["completions"]) == MATCHES_LIMIT


def test_surplus_arguments_show_the_usage(ip: Any) -> None:
    """A command with unknown arguments shows which ones it takes."""
    with pytest.raises(UsageError, match="usage"):
        ip.run_line_magic("codex", "usage everything")


def test_login_keeps_the_key_in_memory_only(
    ip: Any, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typed key is used for its host, and shown nowhere."""
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(MissingKeyError):
        ip.run_cell_magic("codex", "", "hello")
    monkeypatch.setattr("getpass.getpass", lambda _: f" {KEY}\n")
    ip.run_line_magic("codex", "login")
    ip.run_cell_magic("codex", "", "[[echo: hello]]")
    assert simulator.core.log[-1].status == 200
    (config,) = [c for c in ip.configurables if type(c).__name__ == "Codex"]
    assert config.keys
    assert KEY not in repr(config.keys)


def test_config_lists_settings_without_keys(ip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`%config Codex` shows the settings, and hides the keys."""
    ip.run_line_magic("config", f"Codex.keys = {{'a.example': '{KEY}'}}")
    ip.run_line_magic("config", "Codex")
    shown = capsys.readouterr().out
    assert "patience" in shown
    assert KEY not in shown


def test_an_invalid_duration_warns_and_keeps_the_default(ip: Any) -> None:
    """An invalid duration is not used, causes a warning, and does not break the next load."""
    with pytest.warns(UserWarning, match="is 10m: 'soon' is not a duration"):
        ip.run_line_magic("config", "Codex.patience = 'soon'")
    with pytest.warns(UserWarning, match="is 10m"):
        ip.run_line_magic("reload_ext", "nbcodex")
    ip.run_cell_magic("codex", "", "[[echo: hello]]")


def test_magic_help_lists_the_options(ip: Any) -> None:
    """`%%codex?` shows the options and examples."""
    shown = ip.object_inspect("%%codex")["docstring"]
    for option in ("--out", "--patience", "--max-output", "--background"):
        assert option in shown


def test_first_answer_says_where_prompts_are_kept(
    ip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first answer of a new journal says it; later ones do not."""
    for _ in range(2):
        ip.run_cell_magic("codex", "", "[[echo: hi]]")
    assert capsys.readouterr().out.count("from now on prompts and answers are kept in") == 1


def test_cell_without_output_does_not_use_up_the_notice(
    ip: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said below the first output, if the first cell fails without any."""
    monkeypatch.setattr(display, "OPEN_DELAY_S", 60.0)  # it fails before, also on a busy machine
    with pytest.raises(NbcodexError):
        ip.run_cell_magic("codex", "", "[[fault=invalid]]")
    assert "from now on" not in capsys.readouterr().out
    ip.run_cell_magic("codex", "", "[[echo: hi]]")
    assert "from now on prompts and answers are kept in" in capsys.readouterr().out


def test_stop_at_the_end_keeps_the_notice(
    ip: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final output is made again after Stop, with the notice, and with it only once."""
    final_bundles, calls = CellOutput.final_bundles, []

    def interrupted_once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return final_bundles(*args)

    monkeypatch.setattr(CellOutput, "final_bundles", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        ip.run_cell_magic("codex", "", "[[echo: hi]]")
    assert capsys.readouterr().out.count("from now on prompts and answers are kept in") == 1


def test_where_prompts_are_kept_is_said_below_the_first_that_is_kept(
    ip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not below a prompt of the demo, nor below one that is kept in memory only."""
    ip.run_line_magic("codex", "resume")
    ip.run_line_magic("codex", "demo calm")
    ip.run_cell_magic("codex", "", "[[echo: simulated]]")
    ip.run_line_magic("codex", "demo off")
    ip.run_line_magic("config", "Codex.journal = False")
    ip.run_cell_magic("codex", "", "[[echo: in memory]]")
    assert "from now on" not in capsys.readouterr().out
    ip.run_line_magic("config", "Codex.journal = True")
    ip.run_cell_magic("codex", "", "[[echo: stored]]")
    kept = f"from now on prompts and answers are kept in {os.environ['NBCODEX_HOME']} for"
    assert kept in capsys.readouterr().out


@pytest.mark.parametrize(
    "before", ["", "%config Codex.journal = False", "%codex demo calm", "%codex journal"]
)
def test_forgetting_all_erases_what_is_on_disk_however_the_journal_is_set(
    ip: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """It asks once, and names the number and the file."""
    asked: list[str] = []
    folder = Path(os.environ["NBCODEX_HOME"])
    ip.run_cell_magic("codex", "--no-history", "a rare prompt")
    ip.run_cell(before)
    for answer, is_left in ((False, True), (True, False)):

        def confirm(question: str, answer: bool = answer) -> bool:
            asked.append(question)
            return answer

        # A session that is made by a command registers its own way to ask.
        monkeypatch.setattr("nbcodex.host.confirm", confirm)
        ip.run_line_magic("codex", "forget all")
        files = b"".join(path.read_bytes() for path in folder.glob("journal*"))
        assert (b"a rare prompt" in files) == is_left
    assert len(asked) == 2
    assert all(f"1 request in {folder / 'journal.sqlite3'}" in question for question in asked)
    assert re.search(r"\d erased: .*journal\.sqlite3", capsys.readouterr().out)
    ip.run_line_magic("codex", "demo off")


def test_forgetting_an_ambiguous_id_erases_nothing(ip: Any) -> None:
    """Neither an entry of the demo that is the only one there, nor one of two journals."""
    home = Path(os.environ["NBCODEX_HOME"])
    own = get_client().journal(Settings.read())
    demo = get_client().journal(replace(Settings.read(), home=home / "demo"))
    for journal, id_ in ((own, "aa1"), (own, "aa2"), (own, "bb1"), (demo, "aa3"), (demo, "bb2")):
        event_loop.run(journal.insert(Request(prompt="x", id=id_)))
    for prefix in ("aa", "bb"):
        with pytest.raises(EntryError, match="may be"):
            ip.run_line_magic("codex", f"forget {prefix}")
    assert (own.count_entries(), demo.count_entries()) == (3, 2)
    ip.run_line_magic("codex", "forget aa3")
    assert (own.count_entries(), demo.count_entries()) == (3, 1)


def test_ctrl_d_at_the_question_erases_nothing(
    ip: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_of_input(_question: str) -> str:
        raise EOFError

    ip.run_cell_magic("codex", "--no-history", "a rare prompt")
    monkeypatch.setattr("builtins.input", end_of_input)
    ip.run_line_magic("codex", "forget all")
    assert "Nothing was erased." in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert host._confirm_in_terminal("Erase all?") is False  # a script in a terminal
    assert len(get_client().journal(Settings.read()).recent_entries()) == 1


@pytest.mark.parametrize("which", ["all", "ID"])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_forgetting_erases_durable_answers_and_names_what_is_left(
    ip: Any,
    simulator: Simulated,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    is_elsewhere: bool,
) -> None:
    """An answer at another server than the one that is set now is left there."""
    ip.run_cell_magic("codex", "--no-history --durable", "[[echo: kept]]")
    ip.run_cell_magic("codex", "--no-history", "[[echo: not kept]]")
    ((response_id, _),) = simulator.core._stored.items()
    id_ = get_client().journal(Settings.read()).recent_entries()[1].id
    if is_elsewhere:
        monkeypatch.setenv("OPENAI_BASE_URL", GATEWAY)
    capsys.readouterr()
    ip.run_line_magic("codex", f"forget {which.replace('ID', id_)}")
    printed = capsys.readouterr().out
    assert (response_id in simulator.core._stored) == is_elsewhere
    assert (f"the durable answer {response_id} at localhost" in printed) == is_elsewhere
    assert "Not erased: " in printed
    assert "outputs in notebooks" in printed


@pytest.mark.parametrize(
    ("file", "enabled", "is_named"),
    [("/h/history.sqlite", True, True), (":memory:", True, False), ("/h/x.sqlite", False, False)],
)
def test_forgetting_names_the_history_of_ipython(
    ip: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    enabled: bool,
    is_named: bool,
) -> None:
    ip.run_cell_magic("codex", "--no-history", "[[echo: hi]]")
    monkeypatch.setattr(ip.history_manager, "hist_file", file)
    monkeypatch.setattr(ip.history_manager, "enabled", enabled)
    ip.run_line_magic("codex", "forget all")
    assert (f"IPython's own history in {file}" in capsys.readouterr().out) == is_named


@pytest.mark.parametrize(
    ("line", "count", "note"),
    [("models", 200, "… and 300 more"), ("models M-49", 11, ""), ("models nothing", 0, "no model")],
)
def test_list_of_models_is_bounded_and_can_be_filtered(
    ip: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    count: int,
    note: str,
) -> None:
    async def models(*_: object, **__: object) -> list[str]:
        return [f"m-{number}" for number in range(500)]

    monkeypatch.setattr(ApiClient, "list_models", models)
    ip.run_line_magic("codex", line)
    out = capsys.readouterr().out
    assert len(re.findall(r"^m-\d+$", out, re.MULTILINE)) == count
    assert note in out
