"""llmock, an independent server with scripted faults that reports mistakes of its clients."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2

from tests.servers.processes import free_port, running

KEY = "sk-llmock-0123456789abcdef"
MODEL = "gpt-4o"
ANSWER = " ".join(f"word{number}" for number in range(20))

REQUESTS_PER_MINUTE = 30
TOKENS_PER_MINUTE = 60_000
# Milliseconds between two events of a stream. A stream must last longer than a client takes to
# close it, or llmock reports that the client continued to read after broken JSON.
EVENT_DELAY_MS = 10


@dataclass(frozen=True)
class Mock:
    """A running llmock and its control API."""

    url: str
    http: httpx2.Client

    @property
    def environ(self) -> dict[str, str]:
        """The environment with which a kernel uses this server."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": KEY,
            "NBCODEX_MODEL": MODEL,
        }

    def reset(self) -> None:
        """Clear requests, faults and used limits; give the same answer from now on."""
        self._send("POST", "/_llmock/reset")
        self.script({"type": "reply", "text": ANSWER, "times": None})

    def script(self, *behaviors: Mapping[str, Any]) -> None:
        """Apply these faults to the next requests."""
        self._send("POST", "/_llmock/scenario", {"behaviors": behaviors})

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests and their outcomes."""
        requests: list[dict[str, Any]] = self._send("GET", "/_llmock/requests").json()["requests"]
        return requests

    def findings(self) -> list[str]:
        """Return the mistakes of the client that llmock found, warnings included."""
        verdict = self._send("GET", "/_llmock/verdict").json()
        return [f"{found['code']}: {found['title']}" for found in verdict["findings"]]

    def use_up_requests(self) -> None:
        """Use up the requests of this minute, like another client of the same key."""
        while self._send("GET", "/v1/models").headers["x-ratelimit-remaining-requests"] != "0":
            pass
        self._clear_requests()

    def use_up_tokens(self, *, but: int) -> None:
        """Use up the tokens of this minute except `but`, like another client of the same key."""
        large = {"model": MODEL, "input": "", "max_output_tokens": TOKENS_PER_MINUTE - but}
        self._send("POST", "/v1/responses", large)
        self._clear_requests()

    def _clear_requests(self) -> None:
        self._send("DELETE", "/_llmock/requests")

    def _send(self, method: str, path: str, body: object = None) -> httpx2.Response:
        return self.http.request(method, path, json=body).raise_for_status()


@contextmanager
def mocked(folder: Path, *, rpm: int = REQUESTS_PER_MINUTE) -> Iterator[Mock]:
    """Start an llmock with limits; stop it afterwards."""
    port = free_port()
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--rpm": rpm,
        "--stream-chunk-delay-ms": EVENT_DELAY_MS,
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "llmock.cli", "serve", *map(str, chain(*options.items()))]
    environ = {name: v for name, v in os.environ.items() if not name.startswith("LLMOCK_")}
    environ["LLMOCK_TPM"] = str(TOKENS_PER_MINUTE)
    url, key = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {KEY}"}
    with (
        running(command, port=port, log=folder / "llmock.log", environ=environ),
        httpx2.Client(base_url=url, headers=key, trust_env=False, timeout=60.0) as http,
    ):
        yield Mock(url, http)
