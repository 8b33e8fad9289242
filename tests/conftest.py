"""Fixtures and markers of all tests: no keys, no home directory, no network beyond loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.kernel_client import Kernel, kernel
from tests.simulated import Simulated, simulated

# A generated example may take any time on a busy machine.
hypothesis.settings.register_profile(
    "untimed",
    parent=hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")

NOT_QUICK = ("kernel", "browser", "server", "long", "slow")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Start one worker more than there are cores: kernels, browsers and waits leave them idle."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark quick tests, and keep tests that share a browser, a kernel or a server on one worker.

    Tests that repeat others for minutes are left out, unless ``-m long`` or their name asks for
    them: ``tests/journal/test_processes.py::test_name``.
    """
    if "long" not in config.option.markexpr:
        named = {argument.partition("[")[0].rpartition("::")[2] for argument in config.args}
        long = [item for item in items if item.get_closest_marker("long")]
        long = [item for item in long if item.name.partition("[")[0] not in named]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for item in items:
        if item.get_closest_marker("browser"):
            # Two browsers at once on two cores make each other miss their deadlines.
            item.add_marker(pytest.mark.xdist_group("browser"))
        elif item.get_closest_marker("kernel") or item.get_closest_marker("server"):
            # A module starts its kernel or server once on one worker, instead of once on each.
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if not any(item.get_closest_marker(name) for name in NOT_QUICK):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees neither the keys nor the files of the user who runs it."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_", "NBCODEX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NBCODEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator on a real socket, with limits too high to be reached."""
    with simulated(tpm=10_000_000, rpm=100_000, latency=0.01, speed=2_000.0) as running:
        yield running


@pytest.fixture(scope="session")
def shared_kernel() -> Iterator[Kernel]:
    """A kernel for tests that leave no trace in it; it needs `%reset -f` between them."""
    with kernel() as started:
        yield started
