"""The monitor in a real JupyterLab, while cells block the kernel and requests wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from nbcodex.simulator import Fault
from tests.browser import axe
from tests.browser.lab import MAX_CLICK_S, Notebook
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser

REFUSED = "tokens_per_minute"
MANY = """import asyncio, nbcodex
asked = [asyncio.ensure_future(nbcodex.aask(f"Question {n} [[tokens=40]]")) for n in range(COUNT)]
None"""
# The button that asks for confirmation stops asking after 4 s, and the note about a click is hidden
# after 4 s: on a busy machine, too soon.
WAIT_LONGER = """() => {
  const timeout = window.setTimeout;
  window.setTimeout = (call, ms, ...rest) => timeout(call, ms === 4000 ? 30_000 : ms, ...rest);
}"""
BLOCK = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: time.sleep(0.02)"


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that answers at the pace of a model."""
    with simulated(tpm=1_000_000, rpm=5_000, latency=0.05, speed=60.0) as running:
        yield running


@pytest.fixture
def watched(notebook: Callable[..., Notebook], simulator: Simulated) -> Callable[..., Notebook]:
    """Return a function that opens a notebook with a monitor, and starts its requests."""

    def start(*cells: str) -> Notebook:
        nb = notebook(simulator.setup, "%codex monitor", *cells)
        for index in (0, 1):
            nb.run(index)
            nb.wait()
        expect(monitor(nb)).to_contain_text("no open requests")
        return nb

    return start


def monitor(nb: Notebook) -> Locator:
    """Return the monitor."""
    return nb.page.locator(".nbcodex-monitor").first


def rows(nb: Notebook) -> Locator:
    """Return the open requests in it."""
    return monitor(nb).locator(".nbcodex-row")


def shown(view: Locator) -> dict[str, Any]:
    """Return what a view says, but for what ticks."""
    found: dict[str, Any] = view.evaluate(
        """(e) => ({
          totals: [...e.querySelectorAll('.nbcodex-totals :is(th, td)')].map((n) => n.innerText),
          ids: [...e.querySelectorAll('.nbcodex-row .nbcodex-id')].map((n) => n.innerText),
          phases: [...e.querySelectorAll('.nbcodex-row')].map((n) => n.dataset.phase),
          due: [...e.querySelectorAll('.nbcodex-row .nbcodex-row-time')].map((n) => n.innerText),
          log: e.querySelector('.nbcodex-entries').innerText,
        })"""
    )
    return found


def create_view(nb: Notebook, index: int) -> None:
    """Show the cell's output in a view of its own, beside the notebook."""
    nb.page.evaluate(
        """(index) => {
          const app = window.jupyterapp;
          app.shell.currentWidget.content.activeCellIndex = index;
          return app.commands.execute('notebook:create-output-view');
        }""",
        index,
    )


def test_monitor_is_live_while_a_cell_blocks(
    watched: Callable[..., Notebook], simulator: Simulated
) -> None:
    """Requests of a blocking cell appear, wait, count down, answer a click, and end in the totals.

    Two views of it, one beside the notebook, agree in everything; axe finds nothing to blame.
    """
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = watched("%%codex -o answer\nHello [[tokens=20]]")
    create_view(nb, 1)
    views = nb.page.locator(".nbcodex-monitor")
    expect(views).to_have_count(2)
    nb.page.evaluate(
        """() => window.jupyterapp.shell.activateById(
          [...window.jupyterapp.shell.widgets('main')].find((w) => w.content?.activeCell).id)"""
    )
    nb.run(2)
    for view in views.all():
        row = view.locator(".nbcodex-row")
        expect(row).to_have_attribute("data-phase", "waiting")
        expect(row).to_contain_text("tokens per minute (TPM)")
        expect(row.locator(".nbcodex-row-time")).to_have_text(re.compile(r"^in [345]\d s$"))
        expect(view.locator(".nbcodex-cooldown")).to_contain_text(re.compile("closed for [345]"))
        expect(view.locator(".nbcodex-entry")).to_contain_text("attempt 1 refused, again in 1 min")
    first, second = map(shown, views.all())
    assert first == second or abs(_seconds(first) - _seconds(second)) <= 1
    check_countdown(nb, ".nbcodex-row .nbcodex-row-time")
    assert axe.violations(nb.page, ".nbcodex-monitor") == []
    rows(nb).get_by_role("button", name="Retry now").click()
    nb.wait()
    assert nb.seconds_from_click() < MAX_CLICK_S
    for view in views.all():
        expect(view.locator(".nbcodex-row")).to_have_count(0)
        expect(view.get_by_role("row", name="Last request")).to_contain_text("attempt 2")
        expect(view.get_by_role("img")).to_have_attribute("aria-label", re.compile("reached once"))
    assert axe.violations(nb.page, ".nbcodex-monitor") == []
    first, second = map(shown, views.all())
    assert first == second


def check_countdown(nb: Notebook, selector: str) -> None:
    """Assert that a number of whole seconds falls as the page's clock advances."""
    before, then = nb.countdown(selector)
    nb.page.wait_for_timeout(2000)
    after, now = nb.countdown(selector)
    assert before - after == pytest.approx(now - then, abs=1.5)


def _seconds(view: dict[str, Any]) -> float:
    return float(view["due"][0].split()[1])


@pytest.mark.parametrize("label", ["Cancel", "Park"])
def test_button_ends_only_its_request(
    watched: Callable[..., Notebook], simulator: Simulated, label: str
) -> None:
    """It does so although the kernel is blocked by something else."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)] * 3)
    nb = watched(MANY.replace("COUNT", "3"), BLOCK)
    nb.run(2)
    nb.wait()
    nb.run(3)
    expect(rows(nb)).to_have_count(3)
    second = rows(nb).nth(1)
    name = second.locator(".nbcodex-id").inner_text()
    nb.page.evaluate(WAIT_LONGER)
    second.get_by_role("button", name=label).click()
    expect(rows(nb)).to_have_count(2)
    expect(monitor(nb).locator(".nbcodex-row", has_text=name)).to_have_count(0)
    expect(monitor(nb).get_by_role("status")).to_contain_text(f"{label} {name}")
    nb.interrupt()
    nb.wait()


@pytest.mark.parametrize(("label", "status"), [("Cancel all", "cancelled"), ("Park all", "parked")])
def test_second_click_ends_all_requests(
    watched: Callable[..., Notebook], simulator: Simulated, label: str, status: str
) -> None:
    """With the kernel blocked: the first click asks and ends nothing, the second ends all.

    What it asks follows the number of those that are open, and who presses keys keeps the focus.
    """
    simulator.core.script([Fault(REFUSED, seconds=60.0)] * 3)
    nb = watched(
        MANY.replace("COUNT", "3"),
        BLOCK,
        "await asyncio.wait(asked)\nprint(*(type(a.exception()).__name__ for a in asked))",
    )
    nb.run(2)
    nb.wait()
    nb.run(3)
    expect(rows(nb)).to_have_count(3)
    assert axe.violations(nb.page, ".nbcodex-monitor") == []
    nb.page.evaluate(WAIT_LONGER)
    button = monitor(nb).get_by_role("button", name=label)
    button.press("Enter")
    expect(button).to_have_text(f"{label} 3?")
    rows(nb).first.get_by_role("button", name=label.split()[0]).click()
    expect(rows(nb)).to_have_count(2)
    expect(button).to_have_text(f"{label} 2?")
    nb.page.wait_for_timeout(500)
    button.press("Enter")
    expect(rows(nb)).to_have_count(0)
    expect(button).to_be_focused()
    nb.interrupt()
    nb.wait()
    nb.run(4)
    nb.wait()
    assert " ".join([f"{status.capitalize()}Error"] * 3) in nb.text(4)


def test_double_click_ends_nothing(watched: Callable[..., Notebook], simulator: Simulated) -> None:
    """Nor does a key that is held down, or a second click that comes much later."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)] * 3)
    nb = watched(MANY.replace("COUNT", "3"))
    nb.run(2)
    nb.wait()
    expect(rows(nb)).to_have_count(3)
    button = monitor(nb).get_by_role("button", name="Cancel all")
    button.dblclick()
    expect(button).to_have_text("Cancel all 3?")
    nb.page.wait_for_timeout(4200)
    expect(button).to_have_text("Cancel all")
    for _ in range(3):
        nb.page.keyboard.down("Enter")
        nb.page.wait_for_timeout(300)
    nb.page.keyboard.up("Enter")
    expect(button).to_have_text("Cancel all 3?")
    nb.page.wait_for_timeout(4200)
    button.click()
    expect(button).to_have_text("Cancel all 3?")
    expect(rows(nb)).to_have_count(3)


def test_buttons_for_all_are_disabled_without_requests(watched: Callable[..., Notebook]) -> None:
    """They stay where they are, and a click says why it does nothing."""
    nb = watched()
    for label in ("Cancel all", "Park all"):
        button = monitor(nb).get_by_role("button", name=label)
        expect(button).to_have_attribute("aria-disabled", "true")
        expect(button).to_have_attribute("title", re.compile("not possible now. There are no open"))
        button.click(force=True)
        expect(button).to_have_text(label)
        expect(monitor(nb).get_by_role("status")).to_have_text("There are no open requests.")
    assert axe.violations(nb.page, ".nbcodex-monitor") == []


@pytest.mark.parametrize("width", [1400, 1100, 900])
def test_open_requests_stay_in_place(
    watched: Callable[..., Notebook], page: Page, simulator: Simulated, width: int
) -> None:
    """Changing texts about limits, queues and clicks do not move them."""
    simulator.core.script([None, Fault(REFUSED, seconds=60.0)])
    nb = watched("%%codex\nHello [[tokens=9]]", MANY.replace("COUNT", "9"))
    page.set_viewport_size({"width": width, "height": 1000})
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    nb.run(2)
    nb.wait()
    expect(monitor(nb)).to_contain_text("queue empty")
    calm = places(nb)
    nb.run(3)
    nb.wait()
    expect(monitor(nb).locator(".nbcodex-cooldown")).to_contain_text("closed for")
    expect(monitor(nb).locator(".nbcodex-queue")).to_contain_text("queued for up to")
    assert places(nb) == calm
    rows(nb).last.get_by_role("button", name="Cancel").click()
    expect(monitor(nb).get_by_role("status")).to_contain_text("received")
    assert places(nb) == calm
    rows(nb).first.get_by_role("button", name="Retry now").click()
    expect(monitor(nb)).to_contain_text("no open requests")
    assert places(nb) == calm


def places(nb: Notebook) -> list[float]:
    """Return where the parts of the monitor begin, from its top."""
    found: list[float] = monitor(nb).evaluate(
        """(e) => [...e.querySelectorAll('.nbcodex-part, .nbcodex-scroll')].map(
          (n) => Math.round(n.getBoundingClientRect().top - e.getBoundingClientRect().top))"""
    )
    return found


def test_bound_of_the_queue_counts_down(
    watched: Callable[..., Notebook], simulator: Simulated
) -> None:
    """The queue has no predicted end, but a moment before which it does not end."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = watched(MANY.replace("COUNT", "4"))
    nb.run(2)
    nb.wait()
    line = monitor(nb).locator(".nbcodex-queue")
    expect(line).to_have_text(
        re.compile(r"^[34] queued for up to [\d,]+ tokens · the last for at least [345]\d s$")
    )
    check_countdown(nb, ".nbcodex-monitor .nbcodex-queue")


def test_elapsed_time_differs_from_time_left(
    watched: Callable[..., Notebook], simulator: Simulated
) -> None:
    """An answer shows how long it has been arriving; only countdowns are bold."""
    nb = watched("%%codex\nHello [[tokens=4000]]")  # it takes a minute
    nb.run(2)
    expect(rows(nb)).to_have_attribute("data-phase", "streaming")
    elapsed = rows(nb).locator(".nbcodex-row-time")
    expect(elapsed).to_have_text(re.compile(r"^for \d+ s$"))
    expect(elapsed).to_have_css("font-weight", "400")
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    rows(nb).get_by_role("button", name="Cancel").click()
    nb.wait()
    nb.run(2)
    expect(rows(nb)).to_have_attribute("data-phase", "waiting")
    expect(rows(nb).locator(".nbcodex-row-time")).to_have_css("font-weight", "600")
    rows(nb).get_by_role("button", name="Cancel").click()
    nb.wait()


def test_rows_of_a_map_have_distinct_names(
    watched: Callable[..., Notebook], simulator: Simulated
) -> None:
    """Their ids have equal beginnings, so the names of their buttons have the whole id."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = watched("rows = ['one', 'two', 'three']", "%%codex --map rows\nTell me about {}.")
    nb.run(2)
    nb.wait()
    nb.run(3)
    expect(rows(nb)).to_have_count(3)
    names = (
        rows(nb)
        .get_by_role("button", name="Cancel")
        .evaluate_all("(nodes) => nodes.map((n) => n.getAttribute('aria-label'))")
    )
    assert sorted(name.rpartition("-")[2] for name in names) == ["0", "1", "2"]
    nb.page.evaluate(WAIT_LONGER)
    monitor(nb).get_by_role("button", name="Park all").click()
    nb.page.wait_for_timeout(500)
    monitor(nb).get_by_role("button", name="Park all").click()
    nb.wait()


def test_reloaded_page_shows_the_same_monitor(
    watched: Callable[..., Notebook], page: Page, simulator: Simulated
) -> None:
    """After a reload the monitor is live, and its countdown did not start again."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = watched(MANY.replace("COUNT", "1"))
    nb.run(2)
    nb.wait()
    expect(rows(nb)).to_have_attribute("data-phase", "waiting")
    nb.save()
    page.wait_for_timeout(3000)
    nb.reload()
    nb.wait_until_ready()
    expect(rows(nb)).to_have_attribute("data-phase", "waiting")
    expect(rows(nb).locator(".nbcodex-row-time")).to_have_text(re.compile(r"^in [345]\d s$"))
    rows(nb).get_by_role("button", name="Cancel").click()
    expect(rows(nb)).to_have_count(0)


def test_requests_of_other_kernels_are_shown(
    watched: Callable[..., Notebook], page: Page, simulator: Simulated
) -> None:
    """They disappear when they end."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = watched(
        "import subprocess, sys\nother = subprocess.Popen([sys.executable, '-c', "
        "'import nbcodex; nbcodex.ask(\"Hello\")'])",
        "other.kill()\nother.wait()\nNone",
    )
    nb.run(2)
    nb.wait()
    expect(monitor(nb)).to_contain_text(
        re.compile("other kernels: 1 has 1 open, 1 waiting, the next at "), timeout=20_000
    )
    nb.run(3)
    nb.wait()
    expect(monitor(nb)).to_contain_text("other kernels: no open requests")


def test_text_is_readable_at_every_width(
    watched: Callable[..., Notebook], page: Page, simulator: Simulated
) -> None:
    """Nothing is cut off, nothing overlaps, and rows stand in columns."""
    simulator.core.script([None, Fault("overloaded"), Fault(REFUSED, seconds=60.0)])
    nb = watched("%%codex\nHello [[tokens=9]]", *(MANY.replace("COUNT", n) for n in "18"))
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    nb.run(2)
    nb.wait()
    nb.run(3)
    nb.wait()
    expect(rows(nb).first).to_contain_text("attempt 2")
    expect(rows(nb).first).to_contain_text("tokens per minute (TPM)")
    nb.run(4)
    nb.wait()
    expect(rows(nb).last).to_have_attribute("data-phase", "cooldown")
    for width in (1400, 1100, 900, 600, 420):
        page.set_viewport_size({"width": width, "height": 1000})
        nb.until(lambda: nothing_is_cut(nb))
        assert page.evaluate(_CUT) == [], width
        assert page.evaluate(_OVERLAPS) == [], width
        for part in ("phase", "time", "prompt", "why"):
            boxes = [cell.bounding_box() for cell in rows(nb).locator(f".nbcodex-row-{part}").all()]
            assert len({box["x"] for box in boxes if box}) == 1, (width, part)
        assert axe.violations(page, ".nbcodex-monitor") == [], width


def nothing_is_cut(nb: Notebook) -> bool:
    """Whether each visible part of the monitor is as wide as what it contains."""
    parts = (".nbcodex-monitor", ".nbcodex-scroll", ".nbcodex-model-limits", ".nbcodex-row")
    return all(
        node.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        for part in parts
        for node in monitor(nb).locator(f"{part} >> visible=true").all() or [monitor(nb)]
    )


# Texts that are cut off, and those that overlap, in the rows of open requests.
_CUT = """() => [...document.querySelectorAll('.nbcodex-row span')]
  .filter((e) => !e.hidden && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""
_OVERLAPS = """() => [...document.querySelectorAll('.nbcodex-row')].flatMap((row) => {
  const cells = [...row.querySelectorAll('svg, code, button, span')].filter(
    (e) => !e.hidden && !e.matches('.nbcodex-row-details, .nbcodex-row-buttons'));
  const boxes = cells.map((e) => [e.textContent, e.getBoundingClientRect()]);
  return boxes.flatMap(([a, x], i) => boxes.slice(i + 1).filter(([, y]) =>
    x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 1 && y.top < x.bottom - 1,
  ).map(([b]) => `${a} on ${b}`));
})"""


def test_totals_are_turned_on_a_narrow_page(watched: Callable[..., Notebook], page: Page) -> None:
    """Cost and time waited are visible; it is still a table, with its rows and their names."""
    nb = watched()
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    table = monitor(nb).get_by_role("table")
    for width in (600, 420):
        page.set_viewport_size({"width": width, "height": 900})
        expect(table.get_by_role("columnheader", name="waited")).to_be_in_viewport(ratio=1)
        expect(table.get_by_role("row", name="All time").get_by_role("cell")).to_have_count(7)
        cost, waited = (table.get_by_role("columnheader", name=name) for name in ("cost", "waited"))
        above, below = cost.bounding_box(), waited.bounding_box()
        assert above
        assert below
        assert above["y"] < below["y"]
        assert table.evaluate("e => e.parentNode.scrollWidth <= e.parentNode.clientWidth")


def test_monitor_is_usable_on_a_narrow_page(
    watched: Callable[..., Notebook], page: Page, simulator: Simulated
) -> None:
    """Nothing is cut off, and buttons work by keyboard."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)] * 2)
    nb = watched(MANY.replace("COUNT", "2"))
    page.set_viewport_size({"width": 480, "height": 800})
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    nb.run(2)
    nb.wait()
    expect(rows(nb)).to_have_count(2)
    for part in (".nbcodex-monitor", ".nbcodex-part-open .nbcodex-scroll", ".nbcodex-row >> nth=0"):
        assert page.locator(part).evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    cancel = rows(nb).first.get_by_role("button", name="Cancel")
    cancel.focus()
    page.keyboard.press("Enter")
    expect(rows(nb)).to_have_count(1)
