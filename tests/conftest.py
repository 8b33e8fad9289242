"""What every test gets: no key of the user's, no home of the user's, no network beyond loopback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees neither the keys nor the files of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_", "NBCODEX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NBCODEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
