"""The doctor finds what is wrong and advises; the exit status says so; no key is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from nbcodex import cli, doctor
from nbcodex.client import Client
from nbcodex.doctor import Finding
from nbcodex.errors import ConfigurationError
from nbcodex.settings import Settings
from tests.simulated import KEY, Simulated, simulated


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("environ", "wrong", "says"),
    [
        ({}, False, "none set"),
        ({"HTTPS_PROXY": "http://user:secret@proxy.example:3128"}, False, "proxy.example:3128"),
        ({"https_proxy": "proxy.example:3128"}, False, "proxy.example:3128"),
        ({"ALL_PROXY": "ftp://x"}, True, "not a valid address"),
        ({"HTTP_PROXY": "http://x:port"}, True, "not a valid address"),
    ],
)
def test_proxy_is_shown_without_credentials_and_checked(
    environ: dict[str, str], wrong: bool, says: str
) -> None:
    found = only(doctor.check_proxies(environ))
    assert found.is_problem == wrong
    assert says in found.text
    assert "secret" not in str(found)


def test_missing_and_unused_certificate_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    cases: list[tuple[dict[str, str], bool, str]] = [
        ({}, False, "the default ones"),
        ({"SSL_CERT_FILE": "/nowhere.pem"}, True, "does not exist"),
        ({"SSL_CERT_FILE": str(tmp_path / "empty.pem")}, True, "contains no certificates"),
        ({"SSL_CERT_DIR": "/nowhere"}, True, "is not a folder"),
        ({"SSL_CERT_DIR": str(tmp_path)}, False, str(tmp_path)),
        ({"REQUESTS_CA_BUNDLE": "/x.pem"}, False, "is set but not used"),
    ]
    for environ, wrong, says in cases:
        found = only(doctor.check_authorities(environ))
        assert found.is_problem == wrong, environ
        assert says in found.text


def inside_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "home"


def with_damaged_journal(folder: Path) -> Path:
    folder.chmod(0o700)
    (folder / "journal.sqlite3").write_bytes(b"no database at all" * 100)
    return folder


def writable_by_others(folder: Path) -> Path:
    folder.chmod(0o777)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (inside_a_file, "is not a folder"),
        (with_damaged_journal, "cannot be used"),
        (writable_by_others, "chmod 700"),
    ],
)
def test_unusable_folder_is_wrong_and_advises_another(
    tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    found = only(doctor.check_journal(Settings(home=make(tmp_path))))
    assert found.is_problem
    assert says in found.text
    assert "NBCODEX_HOME" in found.advice


def test_missing_folder_is_accepted_and_not_created(tmp_path: Path) -> None:
    assert not only(doctor.check_journal(Settings(home=tmp_path / "a" / "b"))).is_problem
    assert not (tmp_path / "a").exists()


def findings_by_title(server: Simulated | None, **values: Any) -> dict[str, Finding]:
    from nbcodex.settings import Secret

    given: dict[str, Any] = {"api_key": Secret(KEY), "model": "gpt-5.6-sol"}
    if server:
        given["base_url"] = f"{server.url}/v1"
    found = list(doctor.report(Settings(**{**given, **values}), Client()))
    assert KEY not in "".join(map(str, found))
    return {finding.title: finding for finding in found}


def test_valid_settings_have_no_wrong_finding_and_cost_one_request(
    simulator: Simulated, tmp_path: Path
) -> None:
    """Key, server and model are found, and the variable of the key is named."""
    found = findings_by_title(simulator, home=tmp_path / "home")
    assert not any(finding.is_problem for finding in found.values())
    assert "OPENAI_API_KEY" in found["key"].text
    assert found["model"].text == "gpt-5.6-sol"
    assert [seen.path for seen in simulator.core.log] == ["/v1/models"]


def test_what_the_first_request_will_show_is_not_ticked(
    simulator: Simulated, tmp_path: Path
) -> None:
    found = findings_by_title(simulator, home=tmp_path / "home")
    assert str(found["API"]) == "API        · detected with the first request"
    assert str(found["limits"]) == "limits     · unknown until the first request"
    assert str(found["key"]).startswith("key        ✓ ")
    found = findings_by_title(simulator, home=tmp_path / "home", api="chat")
    assert str(found["API"]) == "API        ✓ chat, as set"


@pytest.mark.parametrize(
    ("knobs", "values", "title", "says"),
    [
        ({"keys": ("other",)}, {}, "connection", "does not accept the key"),
        ({}, {"model": "gpt-nowhere"}, "model", "is not in the server's list"),
        ({}, {"model": None}, "model", "Set NBCODEX_MODEL to one of"),
        ({}, {"base_url": "http://127.0.0.1:9/v1"}, "connection", "Check the address"),
        ({}, {"api_key": None}, "server", "No API key"),
        ({}, {"base_url": "nowhere"}, "server", "https://"),
    ],
)
def test_each_problem_is_one_finding_with_advice(
    knobs: Any, values: Any, title: str, says: str
) -> None:
    with simulated(**knobs) as server:
        found = findings_by_title(server, **values)[title]
    assert found.is_problem
    assert says in str(found)


def test_exit_status_is_1_only_if_something_is_wrong(
    simulator: Simulated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in simulator.environ.items():
        monkeypatch.setenv(name, value)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["doctor"]) == 0
    monkeypatch.setenv("NBCODEX_MODEL", "gpt-nowhere")
    assert cli.main(["doctor"]) == 1
    assert KEY not in capsys.readouterr().out


def test_idle_timeout_of_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="break every stream"):
        Settings.read({"idle_timeout": "0s"}, {})


class WrongAddress(BaseHTTPRequestHandler):
    """Answers any path as LM Studio answers one that is not of its API."""

    status, body = 200, b'{"error":"Unexpected endpoint or method. (GET /models)"}'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("path", ["", "/v1"])
def test_wrong_address_is_a_wrong_finding(tmp_path: Path, path: str) -> None:
    with HTTPServer(("127.0.0.1", 0), WrongAddress) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values = {"base_url": f"http://127.0.0.1:{server.server_port}{path}"}
        found = findings_by_title(None, home=tmp_path / "home", **values)["connection"]
        server.shutdown()
    assert found.is_problem
    assert "is not an address of an API: Unexpected endpoint" in found.text
    assert "/v1" in found.advice


class Forbidden(WrongAddress):
    """Refuses any path without a word about the key."""

    status, body = 403, b"{}"


def test_refusal_that_is_not_about_the_key_does_not_blame_it(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values = {"base_url": f"http://127.0.0.1:{server.server_port}/v1"}
        found = findings_by_title(None, home=tmp_path / "home", **values)["connection"]
        server.shutdown()
    assert found.is_problem
    assert "Access is refused" in found.text
    assert "may lack access" in found.advice
