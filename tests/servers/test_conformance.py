"""The simulator against a client of another project that checks servers of OpenAI's API.

`.ci/foreign` installs the client outside the test environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.servers.foreign import reason_if_missing
from tests.simulated import KEY, simulated

CACHE = os.environ.get("NBCODEX_FOREIGN_SERVERS")
CLIENT = "llm-comply"

pytestmark = [
    pytest.mark.server,
    pytest.mark.foreign,
    pytest.mark.skipif(CACHE is None, reason="the client is not installed: run `.ci/foreign`"),
]


@pytest.mark.parametrize(
    ("api", "unsupported"),
    [
        ("open-responses", set()),
        # The simulator calls functions in the Responses API only. The other check sends a parameter
        # that Chat Completions does not have.
        ("openai-chat", {"chat-tool-calling", "chat-reasoning-summary"}),
    ],
)
def test_simulator_passes_the_checks_of_an_independent_client(
    api: str, unsupported: set[str]
) -> None:
    cache = Path(CACHE or ".")
    if reason := reason_if_missing(CLIENT, cache):
        pytest.skip(reason)
    with simulated(tpm=10**7, rpm=10**5, latency=0.01, speed=2_000.0) as server:
        command = [f"{cache}/{CLIENT}/bin/llm-comply", "--format", api, "--json"]
        options = ["--base-url", f"{server.url}/v1", "--api-key", KEY, "--model", "gpt-5.6-sol"]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    results = json.loads(ran.stdout)["results"]
    failed = {each["id"]: each["errors"] for each in results if each["status"] == "failed"}
    assert results
    assert set(failed) == unsupported, failed
