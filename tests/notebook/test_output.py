"""What stays below a cell: bounded in what is rendered, and in the time that takes."""

from __future__ import annotations

import time

import pytest

from nbcodex.models import Reply
from nbcodex.notebook.display.cell_output import RENDERED, TWIN, Screen
from nbcodex.notebook.display.growing_text import Text
from nbcodex.notebook.display.panel import PanelState
from nbcodex.notebook.display.text import Display, TerminalDisplay
from nbcodex.runtime.clock import BootClock

HUGE = "word **bold** <i>x</i> [a](b)\n" * 3_500_000


def test_huge_answer_is_rendered_in_part() -> None:
    """Of 100 MB the beginning is shown, the rest is said to be in the Reply, and Stop is quick."""
    reply = Reply(id="3f2a", text=HUGE, status="interrupted")
    began = time.process_time()
    bundle, *_ = Screen(Display()).bundles(reply)
    assert time.process_time() - began < 0.6
    rest = f"{len(HUGE) - RENDERED:,} more characters: the Reply's text holds them all"
    for kind in ("text/plain", "text/markdown"):
        assert rest.split(":")[0] in bundle[kind]
        assert len(bundle[kind]) < 2 * RENDERED
    assert rest in bundle["text/plain"]


@pytest.mark.parametrize("size", [RENDERED - 1, RENDERED])
def test_long_answer_is_rendered_whole(size: int) -> None:
    """Up to the bound nothing is left out."""
    bundle, *_ = Screen(Display()).bundles(Reply(id="3f2a", text="x" * size))
    assert "x" * size in bundle["text/markdown"]
    assert "more characters" not in bundle["text/plain"]


class Rendering(Display):
    """A place that surely shows Markdown."""

    renders = True


def test_text_twin_is_brief_where_markdown_is_shown() -> None:
    """The answer goes into the file once: its twin is the beginning, and says where the rest is."""
    reply = Reply(id="3f2a", text="x" * (TWIN + 1), seconds=3.9)
    bundle, *_ = Screen(Rendering()).bundles(reply)
    assert reply.text in bundle["text/markdown"]
    more = "… 1 more characters: this output's Markdown holds them all"
    assert bundle["text/plain"] == f"{'x' * TWIN}{more}\n\n3.9 s"


@pytest.mark.parametrize(("place", "size"), [(Rendering(), TWIN), (Display(), 10 * TWIN)])
def test_text_twin_is_whole(place: Display, size: int) -> None:
    """A short answer, and one that may be read as text alone, is text from its start to its end."""
    reply = Reply(id="3f2a", text="x" * size, seconds=3.9)
    assert Screen(place).bundles(reply)[0]["text/plain"] == f"{'x' * size}\n\n3.9 s"


def test_figures_stand_outside_of_code_that_was_cut() -> None:
    """Where the bound falls into a code block, the line of figures is none of its code."""
    text = "```python\n" + "x = 1\n" * RENDERED
    markdown = Screen(Display()).bundles(Reply(id="3f2a", text=text))[0]["text/markdown"]
    assert markdown.rpartition("\n\n<sub>")[0].endswith("\n```")


def test_terminal_prints_a_huge_answer_once(capsys: pytest.CaptureFixture[str]) -> None:
    """What was printed as it came is not printed again: only the figures follow."""
    long = "word\n" * RENDERED
    screen = TerminalDisplay(BootClock())
    screen.paint(PanelState(phase="streaming", text=Text() + long))
    screen.close(
        Screen(Display(), form="text").bundles(Reply(id="3f2a", text=long, seconds=3.9))[0]
    )
    printed = capsys.readouterr().out
    assert printed.startswith(long)
    assert len(printed) < len(long) + 200
    assert printed.endswith("3.9 s\n")
