"""The panel in a real JupyterLab, played to by a cell that blocks as a magic does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Page, expect

from tests.browser import axe
from tests.browser.lab import Lab, Notebook

pytestmark = pytest.mark.browser
Open = Callable[..., Notebook]

PLAY = "from tests.browser.play import *\nprint('pressed', play([queued(), sent(), {}]))"
WAIT = PLAY.format("refused(20), sent(2, 20)")
UNREACHABLE = PLAY.format("refused(20), sent(2, 20)").replace(
    "print",
    "import nbcodex.notebook.display.widget_views as w\n"
    "w.CodexWidget.receive_while_blocked = lambda widget: None\nprint",
)


def in_phase(notebook: Notebook, phase: str) -> None:
    """Wait until the panel is in that phase."""
    expect(notebook.panel).to_have_attribute("data-phase", phase)


def test_countdown_falls_while_the_kernel_is_blocked(notebook: Open, page: Page) -> None:
    """The countdown runs in the browser, and the limit is shown with its figures."""
    nb = notebook(PLAY.format("refused(8), sent(2, 8), delta('ok', 20)"))
    nb.run(0)
    in_phase(nb, "waiting")
    expect(nb.panel).to_contain_text("tokens per minute (TPM)")
    expect(nb.panel).to_contain_text("used 22,999")
    before, then = nb.countdown()
    page.wait_for_timeout(3000)
    after, now = nb.countdown()
    assert before - after == pytest.approx(now - then, abs=1.5)
    in_phase(nb, "sending")
    expect(nb.panel).to_contain_text("attempt 2")
    nb.press("Cancel")


def test_countdown_ignores_a_wrong_clock(notebook: Open, page: Page) -> None:
    """A browser whose clock is an hour ahead counts the same seconds."""
    page.add_init_script("const now = Date.now; Date.now = () => now() + 3_600_000;")
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    assert 0 < nb.countdown()[0] <= 20
    nb.press("Cancel")


SKEW = "window.skew = 0; const now = Date.now; Date.now = () => now() + window.skew;"


def test_countdown_ignores_a_clock_that_is_set(notebook: Open, page: Page) -> None:
    """The wall clock is set an hour forwards and back during the wait."""
    page.add_init_script(SKEW)
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    due = []
    for skew in (0, 3_600_000, 3_600_000, 0, 0):
        page.evaluate("(skew) => { window.skew = skew; }", skew)
        page.wait_for_timeout(400)
        due.append(sum(nb.countdown()))
    assert max(due) - min(due) < 10  # one that follows the wall clock is wrong by an hour
    nb.press("Cancel")


def test_countdown_is_synchronized_after_a_sleep(notebook: Open, page: Page) -> None:
    """The page's clock stood still while the machine slept; the kernel knows what is left."""
    page.add_init_script(
        "window.slept = 0; window.ticks = performance.now.bind(performance);"
        "performance.now = () => window.ticks() - window.slept;"
    )
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    page.wait_for_timeout(2000)  # until clicks, and questions, reach the kernel
    before, then = nb.countdown()
    page.evaluate("window.slept = 5000")

    def is_synchronized() -> bool:
        after, now = nb.countdown()
        return abs(before - after - (now + 5.0 - then)) < 1.5

    nb.until(is_synchronized)
    nb.press("Cancel")


def test_clicks_reach_python_while_a_cell_runs(notebook: Open) -> None:
    labels = ["Cancel", "Retry now", "Park"]
    nb = notebook(*[WAIT.replace("20), sent(2, 20)", "5), sent(2, 5)")] * len(labels))
    for index, label in enumerate(labels):
        nb.run(index)
        in_phase(nb, "waiting")
        nb.press(label)
        nb.wait()
        assert nb.text(index) == f"pressed ['{label.split()[0].lower()}']\n"


def test_cancel_interrupts_a_kernel_that_receives_nothing(notebook: Open, page: Page) -> None:
    """Without messages, Cancel interrupts the kernel through the page's own server."""
    nb = notebook(UNREACHABLE)
    nb.run(0)
    in_phase(nb, "waiting")
    with page.expect_response(re.compile(r"/api/kernels/[0-9a-f-]{36}/interrupt$")) as answer:
        nb.press("Cancel")
    assert answer.value.status == 204
    nb.wait()
    assert nb.outputs(0)[-1]["ename"] == "KeyboardInterrupt"


def test_retry_is_disabled_if_the_kernel_receives_nothing(notebook: Open, page: Page) -> None:
    """The button says why, and nothing is sent."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    nb = notebook(UNREACHABLE)
    nb.run(0)
    in_phase(nb, "waiting")
    nb.press("Retry now")
    expect(nb.panel.get_by_role("status")).to_contain_text("cannot process buttons")
    retry = nb.panel.get_by_role("button", name="Retry now")
    expect(retry).to_have_attribute("title", re.compile("cannot process buttons"))
    retry.click(force=True)
    expect(nb.panel.get_by_role("status")).to_contain_text("cannot process buttons")
    page.wait_for_timeout(500)
    assert not [url for url in requests if url.endswith("/interrupt")]
    nb.press("Cancel")


def test_buttons_work_by_keyboard(notebook: Open, page: Page) -> None:
    """A button takes the focus and Enter presses it; the notebook's own keys do nothing there."""
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    cells = page.locator(".jp-Notebook .jp-CodeCell").count()
    nb.panel.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    nb.wait()
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == cells
    assert nb.text(0) == "pressed ['cancel']\n"


def test_saved_notebook_shows_the_answer(notebook: Open, lab: Lab, page: Page) -> None:
    """Saved and opened again, the answer is there, and no broken widget."""
    nb = notebook(PLAY.format("delta('The **answer**.', 0.3)"))
    nb.run(0)
    nb.wait()
    saved = nb.save()
    emptied, output, _printed = saved.cells[0].outputs
    assert not any(emptied.data.values())
    assert set(output.data) == {"text/markdown", "text/plain"}
    assert "widget-view" not in nbformat.writes(saved)
    Notebook(page, lab, nb.name).open()
    expect(page.locator(".jp-OutputArea-output strong")).to_have_text("answer")
    expect(page.locator(".jp-OutputArea")).not_to_contain_text("model not found")


HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "</div><svg onload=window.hacked=1>",
    "[a](javascript:window.hacked=1)",
]


def test_hostile_text_is_shown_as_text(notebook: Open, page: Page) -> None:
    said = f"delta({HOSTILE[0]!r} + {''.join(HOSTILE[1:])!r}, 0.3), delta('.', 20)"
    nb = notebook(PLAY.format(f"delta({HOSTILE[1]!r}, 0.1, reasoning=True), {said}"))
    nb.run(0)
    in_phase(nb, "streaming")
    assert nb.panel.locator(".nbcodex-log").inner_text() == "".join(HOSTILE)
    assert nb.panel.locator("img, script, a").count() == 0
    assert page.evaluate("window.hacked") is None


LOSSY = """
from tests.browser.play import *
import nbcodex.notebook.display.widget_views as w
send, send_state, lost = w.CodexWidget.send, w.CodexWidget.send_state, []
def lose_text(panel, content, buffers=None):
    if content.get("text") == "TEXT " and not lost:
        lost.append("text")
    else:
        send(panel, content, buffers)
def lose_view(panel, key=None):
    if VIEW and key == "data" and lost == ["text"]:
        lost.append("view")
    else:
        send_state(panel, key)
w.CodexWidget.send, w.CodexWidget.send_state = lose_text, lose_view
play([queued(), sent(), *(delta(f"{n} ", 0.3) for n in range(4)), delta("end", 20)])
"""


@pytest.mark.parametrize(("text", "view"), [(2, True), (2, False), (3, False)])
def test_lost_text_is_requested_again(notebook: Open, text: int, view: bool) -> None:
    """A dropped message leaves no gap, even with its view or at the end."""
    nb = notebook(LOSSY.replace("TEXT", str(text)).replace("VIEW", str(view)))
    nb.run(0)
    expect(nb.panel.locator(".nbcodex-log")).to_have_text("0 1 2 3")
    nb.press("Cancel")


FLOOD = """
from tests.browser.play import *
import nbcodex.notebook.display.widget_views as w
send = w.CodexWidget.send
def flood(panel, content, buffers=None):
    noise = 1500 if content.get("text") in ("3 ", "4 ") else 0
    for n in range(noise):
        send(panel, {"type": "noise", "n": n})
    send(panel, content, buffers)
w.CodexWidget.send = flood
play([queued(), sent(), *(delta(f"{n} ", 0.3) for n in range(30)), delta("end", 20)])
"""


def test_flood_of_messages_loses_no_text(notebook: Open, page: Page) -> None:
    """The server drops messages in a flood; afterwards all of the text is there."""
    came: list[bool] = []
    page.on("websocket", lambda s: s.on("framereceived", lambda f: came.append("noise" in str(f))))
    nb = notebook(FLOOD)
    nb.run(0)
    whole = " ".join(str(n) for n in range(30))
    expect(nb.panel.locator(".nbcodex-log")).to_have_text(whole, timeout=40_000)
    assert 0 < sum(came) < 3_000
    nb.press("Cancel")


def test_second_view_shows_the_same_state(notebook: Open, page: Page) -> None:
    """It shows the whole text, and its countdown does not start again."""
    nb = notebook(PLAY.format("delta('Half an answer', 0.1), refused(20, 0.2), sent(2, 20)"))
    nb.run(0)
    in_phase(nb, "waiting")
    page.wait_for_timeout(3000)
    page.evaluate(
        """() => {
          const app = window.jupyterapp;
          app.shell.currentWidget.content.activeCellIndex = 0;
          return app.commands.execute('notebook:create-output-view');
        }"""
    )
    expect(nb.panel).to_have_count(2)
    first, second = nb.panel.all()
    for view in (first, second):
        expect(view.locator(".nbcodex-log")).to_have_text("Half an answer")
    numbers = page.locator(".nbcodex-number")
    readings = numbers.evaluate_all("(nodes) => nodes.map((n) => Number(n.textContent))")
    assert readings[0] == pytest.approx(readings[1], abs=1.5)


def test_log_follows_its_end_unless_scrolled(notebook: Open, page: Page) -> None:
    """New text scrolls into view, unless the reader has scrolled up."""
    lines = "*(delta(f'line {n}\\n', 0.03) for n in range(80)), delta('', 20)"
    nb = notebook(PLAY.format(lines))
    nb.run(0)
    log = nb.panel.locator(".nbcodex-log")
    expect(log).to_contain_text("line 40")
    assert log.evaluate("e => e.scrollHeight - e.clientHeight - e.scrollTop") < 30
    log.evaluate("e => { e.scrollTop = 0; }")
    expect(log).to_contain_text("line 70")
    assert log.evaluate("e => e.scrollTop") == 0
    nb.press("Cancel")


def test_only_phases_are_announced(notebook: Open, page: Page) -> None:
    """A screen reader announces each new phase, and not each tick."""
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    live: Any = nb.panel.locator("[aria-live=polite]")
    spoken = live.text_content()
    assert spoken.startswith("waiting ")
    page.wait_for_timeout(500)
    assert live.text_content() == spoken
    expect(nb.panel.get_by_role("timer")).to_have_attribute("aria-live", "off")
    nb.press("Cancel")


STATES = {
    "queued": "queued(), delta('', 20)",
    "cooldown": "cooldown(20), delta('', 20)",
    "sending": "sent(2), delta('', 20)",
    "thinking": "delta('Hm, ', 0.1, reasoning=True), delta('', 20, reasoning=True)",
    "streaming": "delta('Half an answer', 0.1), delta('.', 20)",
    "waiting": "delta('Half an answer', 0.1), refused(20), sent(2, 20)",
}


def test_axe_finds_no_violation(notebook: Open) -> None:
    """In each state and both themes."""
    nb = notebook(*(PLAY.format(steps) for steps in STATES.values()))
    for theme in ("Dark", "Light"):
        nb.use_theme(f"JupyterLab {theme}")
        for index, phase in enumerate(STATES):
            nb.run(index)
            in_phase(nb, phase)
            assert axe.violations(nb.page, ".nbcodex-panel") == [], (theme, phase)
            nb.press("Cancel")
            nb.wait()


def test_buttons_state_their_effect(notebook: Open) -> None:
    """A hint and a title say what each keeps and costs, and how to continue."""
    nb = notebook(WAIT)
    nb.run(0)
    in_phase(nb, "waiting")
    for label, words, title in [
        ("Cancel", "keeps any text", "text so far stays below the cell"),
        ("Retry now", "1 request, no tokens", "the countdown goes on as it was"),
        ("Park", "%codex resume 3f2a", "until you run %codex resume 3f2a"),
    ]:
        button = nb.panel.get_by_role("button", name=label)
        expect(button).to_contain_text(words)
        expect(button).to_have_attribute("title", re.compile(re.escape(title)))
    nb.press("Cancel")


def test_total_time_is_hidden_while_it_equals_the_wait(notebook: Open) -> None:
    """What does not fit the limit is shown as well."""
    nb = notebook(PLAY.format("refused(20, 0.1), sent(2, 20)"))
    nb.run(0)
    in_phase(nb, "waiting")
    expect(nb.panel).to_contain_text(re.compile("would exceed the limit: "))
    expect(nb.panel).to_contain_text("too many when it was sent")
    expect(nb.panel).to_contain_text("request 12,528 (prompt + the output it may use)")
    expect(nb.panel.locator(".nbcodex-foot")).to_contain_text("of 10 min patience")
    expect(nb.panel.locator(".nbcodex-foot")).not_to_contain_text("in all")
    nb.press("Cancel")


def test_panel_keeps_its_height(notebook: Open, page: Page) -> None:
    """It does while a request waits, is sent and streams."""
    nb = notebook(PLAY.format("refused(1.0), sent(2, 1.0), delta('Hello', 0.4), delta('.', 20)"))
    nb.run(0)
    in_phase(nb, "waiting")
    heights = {nb.panel.bounding_box()["height"]}
    while nb.panel.get_attribute("data-phase") != "streaming":
        heights.add(nb.panel.bounding_box()["height"])
        page.wait_for_timeout(50)
    heights.add(nb.panel.bounding_box()["height"])
    assert max(heights) - min(heights) <= 1
    nb.press("Cancel")


def test_reduced_motion_is_respected(notebook: Open, page: Page) -> None:
    """With reduced motion, whole seconds are shown, and nothing is animated."""
    page.emulate_media(reduced_motion="reduce")
    nb = notebook(PLAY.format("refused(8), sent(2, 8)"))
    nb.run(0)
    in_phase(nb, "waiting")
    expect(nb.panel.locator(".nbcodex-number")).to_have_text(re.compile(r"^[1-8]$"))
    assert nb.panel.evaluate("(e) => e.getAnimations({ subtree: true }).length") == 0
    nb.press("Cancel")
