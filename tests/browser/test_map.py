"""A map in a real JupyterLab: its bar, its figures, Stop, and what stays in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nbcodex.simulator import Fault
from tests.browser.lab import Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that lets twenty rows in, and then none for a minute: others use the key."""
    with simulated(tpm=None, rpm=3_000, latency=0.05, speed=2_000.0, chunk=50) as running:
        running.core.script([None] * 20 + [Fault("requests_per_minute", seconds=60.0)])
        yield running


def test_map_shows_its_progress_and_stops(
    notebook: Callable[..., Notebook], simulator: Simulated, tmp_path: Path
) -> None:
    """The bar shows answered and waiting rows, and the limit; Stop parks the rest."""
    rows = "rows = [f'row {n}' for n in range(60)]\nrows[3] = '[[fault=too_large]]'"
    nb = notebook(
        f"{simulator.setup}\n{rows}",
        "%%codex --map rows -o back\nTell me about {}. [[tokens=60]]",
        "print(sum(map(bool, back)), len(back))",
    )
    nb.run(0)
    nb.wait()
    nb.run(1)
    box = nb.page.locator(".nbcodex-map")
    expect(box).to_have_attribute("data-phase", "cooldown", timeout=30_000)
    # Until what was at the server at the refusal is answered.
    expect(box.locator(".nbcodex-map-key-sent")).to_have_text("")
    shown = box.locator(".nbcodex-map-rows").inner_text()
    answered = int(shown.removesuffix(" of 60 rows answered"))
    assert 19 <= answered < 59
    expect(box.locator(".nbcodex-map-stage")).to_contain_text("requests per minute (RPM) reached")
    expect(box.locator(".nbcodex-map-keys")).to_contain_text("1 failed")
    expect(box.locator(".nbcodex-map-keys")).to_contain_text("waiting")
    expect(box.locator(".nbcodex-map-failures")).to_contain_text("3:")
    box.screenshot(path=tmp_path / "map.png")
    box.get_by_role("button", name="Stop").click()
    nb.wait()
    expect(box).to_have_count(0)
    saved = str(nb.outputs(1))
    assert "codex resume m" in saved
    assert "Stopped" in saved
    assert f"{answered} of 60" in str(nb.save().cells[1].outputs)
    nb.run(2)
    nb.wait()
    assert nb.text(2) == f"{answered} 60\n"
