"""The key appears in no output, error, log or file, and is sent to its own host only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbcodex.simulator import Fault
from nbcodex.simulator.knobs import FAULT_KINDS
from tests.kernel_client import Kernel, kernel
from tests.simulated import KEY, Simulated, simulated

pytestmark = pytest.mark.kernel

OTHER = "sk-other-9876543210fedcba"


def published(cell: Kernel, code: str) -> str:
    """Run a cell; return all that the kernel publishes meanwhile, widgets' messages included."""
    contents = [message["content"] for message in cell.messages(cell.start(code))]
    return json.dumps(contents, default=str)


def test_the_key_appears_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a session that fails in every way: not in outputs, widgets, errors, logs or files."""
    home = tmp_path / "home"
    log = tmp_path / "kernel.log"
    with (
        simulated(tpm=10**7, rpm=10**5, latency=0.01, speed=3000.0) as server,
        kernel(
            **server.environ,
            NBCODEX_HOME=str(home),
            IPYTHONDIR=str(tmp_path / "ipython"),
            SECOND=OTHER,
            JPY_SESSION_NAME="/somewhere/lesson.ipynb",
        ) as cell,
    ):
        said = published(
            cell,
            "import logging, os\n"
            f"logging.basicConfig(filename={str(log)!r}, level=logging.DEBUG, force=True)\n"
            "%load_ext nbcodex\n"
            "%config Codex.idle_timeout = '200ms'\n"
            "%config Codex.keys = {'a.example': os.environ['SECOND']}",
        )
        for kind in FAULT_KINDS:
            server.core.script([Fault(kind, seconds=0.05, after=1, message=f"bad key {KEY}")])
            said += published(cell, "%%codex --patience 1s -o r\n[[echo: hello]]")
            said += published(cell, "sys_exc = __import__('sys').exc_info()\nr")
            # A cooldown is shared through the folder, so the next fault gets another folder.
            cell.run(f"os.environ['NBCODEX_HOME'] = {str(home / kind)!r}")
        for code in (
            f"%%codex\n[[echo: {KEY}]]",
            "%%codex --api-base http://127.0.0.1:9/v1\nhello",
            "%%codex -p '{\"extra_headers\": {}}'\nhello",
            "%config Codex",
            "%config Codex.keys",
            "%codex doctor",
            "%codex limits",
            "%codex usage",
            "%codex models",
            "get_ipython().configurables",
            "from nbcodex.settings import Settings\nSettings.read()",
            "%xmode Verbose\nimport nbcodex\nnbcodex.ask('hello', api_base='http://127.0.0.1:9/v1')",
        ):
            said += published(cell, code).replace(f"[[echo: {KEY}]]", "")
    assert KEY not in said
    assert OTHER not in said
    for path in (log, *home.rglob("*")):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text


def test_a_redirect_is_not_followed(simulator: Simulated) -> None:
    """Neither the key nor the prompt is sent to where a server redirects."""
    with simulated() as elsewhere, kernel(**simulator.environ) as cell:
        for status in (301, 302, 307, 308):
            simulator.core.script(
                [Fault("redirect", status=status, location=f"{elsewhere.url}/v1/responses")]
            )
            cell.run("%load_ext nbcodex")
            ran = cell.run("%%codex --patience 1s\nhello")
            assert ran.status == "error"
            assert "127.0.0.1" in "".join(ran.shown_error)
        assert elsewhere.core.log == []


def test_another_host_needs_its_own_key(simulator: Simulated) -> None:
    """`--api-base` to a host without an entry in `Codex.keys` sends nothing there."""
    with simulated(keys=(OTHER,)) as elsewhere, kernel(**simulator.environ) as cell:
        cell.run("%load_ext nbcodex")
        ran = cell.run(f"%%codex --api-base {elsewhere.url}/v1\nhello")
        assert ran.status == "error"
        assert "Codex.keys" in "".join(ran.shown_error)
        assert elsewhere.core.log == []
        host = elsewhere.url.removeprefix("http://")
        cell.run(f"%config Codex.keys = {{'{host}': '{OTHER}'}}")
        assert cell.run(f"%%codex --api-base {elsewhere.url}/v1\nhello").status == "ok"


def test_a_missing_key_names_the_ways_out() -> None:
    """Without a key nothing is sent or simulated; the message says what to do."""
    with kernel() as cell:
        cell.run("%load_ext nbcodex")
        ran = cell.run("%%codex\nhello")
    assert ran.status == "error"
    assert ran.error == "MissingKeyError"
    assert len(ran.shown_error) <= 6
    said = " ".join(ran.shown_error)
    assert "%codex login" in said
    assert "OPENAI_API_KEY" in said
    assert "nbcodex demo" in said
    assert ran.outputs == []
