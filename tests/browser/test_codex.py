"""`%%codex` in a real JupyterLab, from the click to what stays in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Page, expect

from nbcodex.simulator import Fault
from nbcodex.simulator.generated_answers import plan_answer
from nbcodex.simulator.parsed_request import Route, parse_request
from tests.browser.lab import MAX_CLICK_S, Lab, Notebook
from tests.hostile import HOSTILE
from tests.simulated import Simulated, simulated

pytestmark = pytest.mark.browser
Ask = Callable[[str], Notebook]

REFUSED = "tokens_per_minute"
WORDS = {"Cancel": "Cancelled", "Park": "Parked by you", "Stop": "Stopped"}
# Of a countdown in a busy browser; one that stands still or starts again is wrong by more.
MAX_ERROR_S = 2.0
KEPT = "this is not the whole answer"


@pytest.fixture
def simulator() -> Iterator[Simulated]:
    """A simulator that answers at the pace of a model."""
    with simulated(tpm=30_000, rpm=500, latency=0.05, speed=60.0) as running:
        yield running


@pytest.fixture
def ask(notebook: Callable[..., Notebook], simulator: Simulated) -> Ask:
    """Return a function that opens a notebook, gets it ready, and starts the cell given."""

    def start(cell: str) -> Notebook:
        nb = notebook(simulator.setup, cell, "print(answer.status, len(answer.text))")
        nb.run(0)
        nb.wait()
        nb.run(1)
        return nb

    return start


def in_phase(nb: Notebook, phase: str) -> None:
    """Wait until the panel is in that phase."""
    expect(nb.panel).to_have_attribute("data-phase", phase)


def in_stream(nb: Notebook) -> None:
    """Wait until some of the answer is there to be read."""
    expect(nb.panel.locator(".nbcodex-log")).to_contain_text("simulated answer")


def dues(nb: Notebook) -> list[float]:
    """Return when each reading of the countdown said that it would reach zero."""
    return [at + left for at, left in nb.readings()]


def arrivals(simulator: Simulated) -> list[float]:
    """Return when the simulator was asked for an answer, refusals included."""
    return [seen.at for seen in simulator.core.log if seen.api]


def test_countdown_ends_when_the_request_is_sent(ask: Ask, simulator: Simulated) -> None:
    """After a 429 the limit is named, and the countdown ends with the next request."""
    simulator.core.script([Fault(REFUSED, seconds=6.0)])
    nb = ask("%%codex\nHello [[tokens=20]]")
    in_phase(nb, "waiting")
    expect(nb.panel).to_contain_text("tokens per minute (TPM)")
    for figure in (r"used [\d,]+\d", r"request [\d,]+\d", "limit 30,000"):
        expect(nb.panel).to_contain_text(re.compile(figure))
    nb.wait()
    _refused, sent = arrivals(simulator)
    due = dues(nb)
    assert len(due) >= 5
    assert max(abs(moment - sent) for moment in due) < MAX_ERROR_S
    assert nb.readings()[-1][1] < MAX_ERROR_S


@pytest.mark.parametrize("phase", ["waiting", "streaming"])
@pytest.mark.parametrize("way", ["Cancel", "Park", "Stop"])
def test_cell_can_be_ended(ask: Ask, simulator: Simulated, way: str, phase: str) -> None:
    """Cancel, Park and the notebook's Stop end the cell at once, and keep the text."""
    if phase == "waiting":
        simulator.core.script([Fault("error_event", after=30), Fault(REFUSED, seconds=60.0)])
    nb = ask("%%codex -o answer\nHello [[tokens=2000]]")
    in_stream(nb)
    in_phase(nb, phase)
    nb.interrupt() if way == "Stop" else nb.press(way)
    nb.wait()
    assert nb.seconds_from_click() < MAX_CLICK_S
    *_, shown, error = nb.outputs(1)
    assert KEPT in shown["data"]["text/markdown"]
    assert "simulated answer" in shown["data"]["text/markdown"]
    assert WORDS[way] in "".join(error["traceback"])
    nb.run(2)
    nb.wait()
    assert re.match(r"(cancelled|parked|interrupted) \d\d", nb.text(2))


def test_cell_can_be_stopped_before_the_answer_begins(ask: Ask, simulator: Simulated) -> None:
    simulator.core.change_knobs(latency=30.0)
    nb = ask("%%codex -o answer\nHello")
    in_phase(nb, "sending")
    nb.interrupt()
    nb.wait()
    assert nb.seconds_from_click() < MAX_CLICK_S
    assert "Stopped" in "".join(nb.outputs(1)[-1]["traceback"])


def test_retry_now_sends_at_once(ask: Ask, simulator: Simulated) -> None:
    """A probe that is accepted brings the answer, a minute before the countdown would have."""
    simulator.core.script([Fault(REFUSED, seconds=60.0)])
    nb = ask("%%codex\nHello [[tokens=20]]")
    in_phase(nb, "waiting")
    nb.press("Retry now")
    nb.wait()
    assert nb.seconds_from_click() < MAX_CLICK_S
    assert len(arrivals(simulator)) == 2
    assert "2 attempts" in nb.outputs(1)[-1]["data"]["text/markdown"]


def test_refused_probe_keeps_the_countdown(ask: Ask, simulator: Simulated) -> None:
    """The request is sent at the moment that was shown before."""
    simulator.core.script([Fault(REFUSED, seconds=15.0), Fault(REFUSED, seconds=60.0)])
    nb = ask("%%codex\nHello [[tokens=20]]")
    in_phase(nb, "waiting")
    nb.press("Retry now")
    nb.wait()
    refused, probe, sent = arrivals(simulator)
    assert probe < refused + 12.0
    assert [at for at, _ in nb.readings() if at > probe + 0.5]
    assert max(abs(moment - sent) for moment in dues(nb)) < MAX_ERROR_S


def test_saved_notebook_holds_the_answer(ask: Ask, page: Page, lab: Lab) -> None:
    """Reopened, and as nbconvert's HTML: the answer and one line of figures."""
    nb = ask("%%codex\nHello")
    nb.wait()
    saved = nb.save()
    emptied, _answer = saved.cells[1].outputs
    assert not any(emptied.data.values())
    assert "widget" not in nbformat.writes(saved)
    Notebook(page, lab, nb.name).open()
    area = page.locator(".jp-OutputArea-output.jp-RenderedMarkdown")
    expect(area.locator("h1")).to_contain_text("Hello")
    expect(area.locator("sub")).to_contain_text(re.compile(r"gpt-5\.6-sol · 1 in · \d+ out · "))
    expect(area.locator("sub")).to_have_count(1)
    expect(page.locator(".jp-OutputArea-output", has_text=re.compile(r"\S"))).to_have_count(1)
    page.route("**/*", lambda route: route.abort())
    page.goto("about:blank")
    page.set_content(HTMLExporter().from_notebook_node(saved)[0])
    outputs = page.locator(".jp-OutputArea-output", has_text=re.compile(r"\S"))
    expect(outputs.locator("h1")).to_contain_text("Hello")
    expect(outputs.locator("sub")).to_have_text(re.compile(r"^gpt-5\.6-sol · 1 in · \d+ out · "))
    expect(outputs).to_have_count(1)


END = "the end of it"


# What the page made of the answer that could act: its tags, its handlers, its links. Left out are
# our own button, and the links that Lab itself makes of plain text: to `data:`, no browser follows.
ACTIVE = """() => [...document.querySelectorAll('.jp-OutputArea-output *')].filter((e) =>
  /^(script|iframe|object|embed|video|audio|link|meta|style|form|base)$/i.test(e.localName)
  || [...e.attributes].some((a) => /^on/i.test(a.name))
  || (e.href && !/^(https?:|mailto:)/i.test(e.href.baseVal ?? e.href))
).filter((e) => e.className !== 'nbcodex-copy'
  && !(e.closest('.jp-RenderedText') && String(e.href).startsWith('data:'))
).map((e) => e.outerHTML.slice(0, 200))"""


def test_hostile_answer_is_harmless(
    ask: Ask, page: Page, lab: Lab, simulator: Simulated, requests: list[str]
) -> None:
    """It runs and fetches nothing: while it streams, when finished, and in a trusted notebook."""
    simulator.core.change_knobs(tpm=10_000_000, speed=50_000.0, chunk=20)
    simulator.core.script([Fault("stalled", after=100, seconds=4.0)])
    nb = ask(f"%%codex --raw\n[[echo: {HOSTILE}{END}]]")
    expect(nb.panel.locator(".nbcodex-log")).to_contain_text("<script>window.hacked = 1</script>")
    check_harmless(page, lab, requests)
    in_phase(nb, "streaming")
    nb.wait()
    finished = page.locator(".jp-RenderedMarkdown").last
    expect(finished).to_contain_text(END)
    check_harmless(page, lab, requests)
    nb.save()
    reopened = Notebook(page, lab, nb.name).open()
    assert reopened.trusted
    expect(finished).to_contain_text(END)
    check_harmless(page, lab, requests)


SHAPED = {
    "html": HOSTILE + END,
    "math": f"$${HOSTILE}$$ {END}",
    "json": json.dumps({"a": HOSTILE, "end": END}),
    "text": HOSTILE + END,
    "code": f"````html\n{HOSTILE}{END}\n````",  # the last, for it puts a cell below
}


def test_hostile_answer_is_harmless_in_any_format(
    notebook: Callable[..., Notebook],
    page: Page,
    lab: Lab,
    simulator: Simulated,
    requests: list[str],
) -> None:
    """HTML, a formula, JSON, code and text run and fetch nothing, reopened and trusted too."""
    simulator.core.change_knobs(tpm=10_000_000, speed=50_000.0, chunk=20)
    cells = [f"%%codex --raw -f {form}\n[[echo: {text}]]" for form, text in SHAPED.items()]
    nb = notebook(simulator.setup, *cells)
    for index in range(len(cells) + 1):
        nb.run(index)
        nb.wait()
    check_harmless(page, lab, requests)
    for index, form in enumerate(SHAPED, start=1):
        assert END in json.dumps(nb.outputs(index)), form
    nb.save()
    reopened = Notebook(page, lab, nb.name).open()
    assert reopened.trusted
    expect(page.locator(".jp-RenderedHTMLCommon").last).to_be_attached()
    check_harmless(page, lab, requests)


def test_code_is_inserted_and_can_be_copied(
    notebook: Callable[..., Notebook], page: Page, simulator: Simulated
) -> None:
    """A new cell below holds the code, which has not run; the button copies the same code."""
    code = "if 1 < 2:\n    window = '<b>&amp;</b>'"
    nb = notebook(simulator.setup, f"%%codex --raw -f code\n[[echo: ```python\n{code}\n```]]")
    for index in range(2):
        nb.run(index)
        nb.wait()
    sources = page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.widgets.map("
        "(c) => [c.model.sharedModel.source, c.model.executionCount ?? null])"
    )
    assert sources[2] == [code, None]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == code


@pytest.fixture
def requests(page: Page) -> list[str]:
    """The addresses that the page requests."""
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    return urls


def check_harmless(page: Page, lab: Lab, requests: list[str]) -> None:
    """Assert that nothing ran, was fetched from elsewhere, or would run at a click."""
    assert page.evaluate(ACTIVE) == []
    assert page.evaluate("window.hacked") is None
    assert not [url for url in requests if not url.startswith((lab.url, "data:", "blob:"))]


def test_reload_keeps_the_answer(ask: Ask, simulator: Simulated) -> None:
    """The page is reloaded during the stream: the variable holds the whole answer."""
    nb = ask("%%codex -o answer\nHello [[tokens=200]]")
    in_stream(nb)
    nb.save()
    nb.reload()
    nb.wait_until_ready()
    nb.run(2)
    nb.wait()
    body = simulator.core.log[-1].body
    said = plan_answer(
        parse_request(dict(body), "responses", Route(endpoint="responses")), simulator.core.knobs
    ).text
    assert nb.text(2) == f"done {len(said)}\n"
