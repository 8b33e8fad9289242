"""What stays below a cell: the size of what is rendered and the time for it are bounded."""

from __future__ import annotations

import sys
import time
from contextvars import Context, ContextVar
from typing import Any

import pytest

from nbcodex.events import CoolingDown, Delta, Finished, Queued, Sent
from nbcodex.models import Reply
from nbcodex.notebook.display import MAX_RENDERED_CHARS, PLAIN_TEXT_CHARS, CellOutput, OutputOptions
from nbcodex.notebook.display.panel import GrowingText, PanelState
from nbcodex.notebook.display.text_views import OutputSlot, RequestView, TerminalView
from nbcodex.runtime.clock import BootClock


def cell_output(view: RequestView, options: OutputOptions | None = None) -> CellOutput:
    """Return the output of a request that has not begun."""
    return CellOutput(view, options or OutputOptions(), PanelState())


HUGE = "word **bold** <i>x</i> [a](b)\n" * 3_500_000


def test_huge_answer_is_rendered_in_part() -> None:
    """Of 100 MB the beginning is rendered, quickly; the line says that the Reply has the rest."""
    reply = Reply(id="3f2a", text=HUGE, status="interrupted")
    began = time.process_time()
    bundle, *_ = cell_output(RequestView()).final_bundles(reply)
    assert time.process_time() - began < 6.0
    rest = f"{len(HUGE) - MAX_RENDERED_CHARS:,} more characters: the Reply's text holds them all"
    for kind in ("text/plain", "text/markdown"):
        assert rest.split(":")[0] in bundle[kind]
        assert len(bundle[kind]) < 2 * MAX_RENDERED_CHARS
    assert rest in bundle["text/plain"]


@pytest.mark.parametrize("size", [MAX_RENDERED_CHARS - 1, MAX_RENDERED_CHARS])
def test_answer_up_to_the_bound_is_rendered_whole(size: int) -> None:
    bundle, *_ = cell_output(RequestView()).final_bundles(Reply(id="3f2a", text="x" * size))
    assert "x" * size in bundle["text/markdown"]
    assert "more characters" not in bundle["text/plain"]


class MarkdownView(RequestView):
    """A view that renders Markdown."""

    renders_markdown = True


def test_plain_text_is_short_beside_rendered_markdown() -> None:
    """The file holds the answer once: the plain text is its beginning, and names the rest."""
    reply = Reply(id="3f2a", text="x" * (PLAIN_TEXT_CHARS + 1), seconds=3.9)
    bundle, *_ = cell_output(MarkdownView()).final_bundles(reply)
    assert reply.text in bundle["text/markdown"]
    more = "… 1 more characters: this output's Markdown has all of them"
    assert bundle["text/plain"] == f"{'x' * PLAIN_TEXT_CHARS}{more}\n\n3.9 s"


@pytest.mark.parametrize(
    ("view", "size"), [(MarkdownView(), PLAIN_TEXT_CHARS), (RequestView(), 10 * PLAIN_TEXT_CHARS)]
)
def test_plain_text_is_whole(view: RequestView, size: int) -> None:
    """A short answer, and one that may be read as plain text only, is not cut."""
    reply = Reply(id="3f2a", text="x" * size, seconds=3.9)
    assert cell_output(view).final_bundles(reply)[0]["text/plain"] == f"{'x' * size}\n\n3.9 s"


def test_figures_are_outside_of_cut_code() -> None:
    """A code block that is cut is closed before the line of figures."""
    text = "```python\n" + "x = 1\n" * MAX_RENDERED_CHARS
    bundle, *_ = cell_output(RequestView()).final_bundles(Reply(id="3f2a", text=text))
    markdown = bundle["text/markdown"]
    assert markdown.rpartition("\n\n<sub>")[0].endswith("\n```")


@pytest.mark.parametrize(
    ("ended", "is_incomplete"),
    [
        ({"status": "interrupted"}, True),
        ({"status": "failed"}, True),
        ({"status": "failed", "notes": ("not what was asked for",)}, False),
        ({"status": "failed", "notes": ("the model refuses",)}, False),
        ({"status": "failed", "cut": "content_filter"}, False),
        ({"status": "done"}, False),
    ],
)
def test_line_of_figures_begins_with_what_is_missing(ended: Any, is_incomplete: bool) -> None:
    bundle, *_ = cell_output(RequestView(), OutputOptions(format="text")).final_bundles(
        Reply(id="3f2a", text="Half of", **ended)
    )
    line = bundle["text/plain"].rpartition("\n")[2]
    assert line.startswith(f"{ended['status']}, this is not the whole answer") == is_incomplete


class RecordingView(RequestView):
    """A view that records whether it was opened."""

    is_open = False

    def open(self, state: PanelState) -> None:
        self.is_open = True


@pytest.mark.parametrize(
    ("seconds", "is_open_at_once", "is_open_later"),
    [(34.0, True, True), (2.0, False, True), (None, False, True)],
)
def test_ask_shows_a_long_wait_in_the_queue(
    seconds: float | None, is_open_at_once: bool, is_open_later: bool
) -> None:
    """`later` is when no event has arrived for some seconds."""
    view = RecordingView()
    output = cell_output(view, OutputOptions(only_if_waiting=True))
    due_at = None if seconds is None else 5.0 + seconds
    queued = CoolingDown(
        request_id="1", at=5.0, limit=None, resume_at=due_at, waited=0.0, queued=True
    )
    output.on_events((Queued(request_id="1", at=4.0, model="m", patience=600.0),))
    output.on_events(())
    assert not view.is_open
    output.on_events((queued,))
    assert view.is_open is is_open_at_once
    output.on_events(())
    assert view.is_open is is_open_later


def test_ask_shows_nothing_after_a_short_wait_in_the_queue() -> None:
    view = RecordingView()
    output = cell_output(view, OutputOptions(only_if_waiting=True))
    queued = CoolingDown(request_id="1", at=5.0, limit=None, resume_at=6.0, waited=0.0, queued=True)
    sent = Sent(request_id="1", at=6.0, attempt=1, model="m", input_tokens=1)
    for batch in ((queued,), (sent,), ()):
        output.on_events(batch)
    assert not view.is_open


def test_answer_whose_view_fails_is_shown_in_the_context_of_its_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes the cell from the context, which is another one in a thread."""

    class View(RequestView):
        def close(self, bundle: Any) -> None:
            raise RuntimeError

    cell: ContextVar[str] = ContextVar("cell", default="another cell")
    shown: list[str] = []
    monkeypatch.setattr(OutputSlot, "show", lambda *_: shown.append(cell.get()))
    cell.set("its cell")
    output = cell_output(View())
    reply = Reply(id="3f2a", text="Hello", status="done")
    output.on_events((Finished(request_id="3f2a", at=1.0, reply=reply),))
    Context().run(output.close)
    assert shown == ["its cell"]


def test_terminal_prints_huge_answer_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Text that was printed as it arrived is not printed again: only the figures follow."""
    long = "word\n" * MAX_RENDERED_CHARS
    view = TerminalView(BootClock())
    view.render(PanelState(phase="streaming", text=GrowingText() + long))
    view.close(
        cell_output(RequestView(), OutputOptions(format="text")).final_bundles(
            Reply(id="3f2a", text=long, seconds=3.9)
        )[0]
    )
    printed = capsys.readouterr().out
    assert printed.startswith(long)
    assert len(printed) < len(long) + 200
    assert printed.endswith("3.9 s\n")


def test_terminal_prints_only_the_answer_in_the_background(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    view = TerminalView(BootClock(), "3f2a")
    output = cell_output(view, OutputOptions(background=True))
    output.show()
    output.on_events((Sent(request_id="1", at=6.0, attempt=1, model="m", input_tokens=1),))
    output.on_events((Delta(request_id="1", at=7.0, text="Hel"),))
    assert capsys.readouterr().out == ""
    view.close({"text/plain": "Hello"})
    assert capsys.readouterr().out == "\nHello\n"
    assert output.max_idle() is None


@pytest.mark.parametrize("is_open", [False, True])
def test_panel_that_was_never_shown_is_released_before_the_answer(*, is_open: bool) -> None:
    calls: list[str] = []

    class View(RequestView):
        def open(self, state: PanelState) -> None:
            calls.append("open")

        def discard(self) -> None:
            calls.append("discard")

        def close(self, bundle: Any) -> None:
            calls.append("close")

    output = cell_output(View())
    output.on_events((Queued(request_id="3f2a", at=0.0, model="gpt-5.6-sol", patience=600.0),))
    if is_open:
        output.show()
    reply = Reply(id="3f2a", text="Hello", status="done")
    output.on_events((Finished(request_id="3f2a", at=1.0, reply=reply),))
    output.close()
    assert calls == ["open" if is_open else "discard", "close"]
