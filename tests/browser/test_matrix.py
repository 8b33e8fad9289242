"""The panel's buttons in each kernel and front end: they work, or say why they cannot."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from nbcodex.simulator import Fault
from tests.browser.lab import MAX_CLICK_S, Lab, Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser

FACES = {"lab": "lab/tree", "notebook": "notebooks"}
# The versions of ipykernel, and whether a click arrives while a cell runs.
RECEIVES_CLICKS = {"6.31.0": False, "7.3.0": True, "installed": True}
# Versions whose kernel may leave a request unread (`Lab.kept_awake`).
MAY_HANG = {"7.3.0"}


@pytest.fixture(scope="module")
def kernels(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kernelspecs by version of ipykernel; a version that cannot be had is missing."""
    found = {"installed": "python3"}
    for version in RECEIVES_CLICKS.keys() - found.keys():
        target = tmp_path_factory.mktemp("ipykernel")
        asked = [f"--target={target}", f"ipykernel=={version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *asked]
        if subprocess.run(pip, capture_output=True, timeout=120, check=False).returncode == 0:
            found[version] = lab.add_kernel(f"ipykernel-{version}", target)
    return found


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulated]:
    """A simulator whose answers take longer than a test."""
    with simulated(latency=0.05, speed=30.0) as running:
        yield running


Wait = Callable[[str, str], Notebook]


@pytest.fixture
def waiting(page: Page, lab: Lab, kernels: dict[str, str], simulator: Simulated) -> Iterator[Wait]:
    """Return a function that has a cell wait for a limit, in that kernel and front end."""
    stack = contextlib.ExitStack()

    def start(version: str, face: str) -> Notebook:
        if version not in kernels:
            give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            give_up(f"pip could not install ipykernel {version}")
        if version in MAY_HANG:
            stack.enter_context(lab.kept_awake())
        name = f"{os.urandom(3).hex()}.ipynb"
        show = "import ipykernel\nprint(ipykernel.__version__)"
        setup = f"{simulator.setup}\n%config Codex.display = 'widget'\n{show}"
        lab.write(name, setup, "%%codex\nHello [[tokens=20]]", kernel=kernels[version])
        nb = Notebook(page, lab, name).open(FACES[face])
        simulator.core.script([Fault("tokens_per_minute", seconds=60.0)])
        nb.run(0)
        nb.wait()
        assert version in (nb.text(0).strip(), "installed")
        nb.run(1)
        expect(nb.panel).to_have_attribute("data-phase", "waiting")
        return nb

    with stack:
        yield start


MATRIX = [(version, face) for version in RECEIVES_CLICKS for face in FACES]


@pytest.mark.parametrize(("version", "face"), MATRIX)
def test_buttons_work_in_each_kernel_and_front_end(
    waiting: Wait, page: Page, simulator: Simulated, version: str, face: str
) -> None:
    """Retry now sends at once or says why it cannot; Cancel ends the cell at once."""
    nb = waiting(version, face)
    retry = nb.panel.get_by_role("button", name="Retry now")
    if RECEIVES_CLICKS[version]:
        simulator.core.script([Fault("tokens_per_minute", seconds=60.0)])
        asked = len(simulator.prompts)
        nb.press("Retry now")
        nb.until(lambda: len(simulator.prompts) == asked + 1)
    else:
        expect(retry).to_have_attribute("aria-disabled", "true")
        expect(retry).to_have_attribute("title", re.compile("cannot process buttons"))
        expect(retry).to_contain_text("not while a cell runs")
    nb.press("Cancel")
    nb.wait()
    assert nb.seconds_from_click() < MAX_CLICK_S
    assert nb.outputs(1)[-1]["output_type"] == "error"
