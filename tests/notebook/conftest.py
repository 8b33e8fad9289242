"""A real shell in this process, with the extension loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.testing.globalipapp import start_ipython

from tests.simulated import Simulated


@pytest.fixture
def ip(simulator: Simulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A shell with the extension loaded, whose settings name the simulator."""
    for name, value in simulator.environ.items():
        monkeypatch.setenv(name, value)
    # Only the first call in a process returns the shell.
    shell = start_ipython() or InteractiveShell.instance()  # type: ignore[no-untyped-call]
    shell.run_line_magic("load_ext", "nbcodex")
    yield shell
    shell.run_line_magic("unload_ext", "nbcodex")
    shell.config.pop("Codex", None)
