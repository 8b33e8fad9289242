"""What stays in a notebook that was run by nbclient or papermill: the answer, and nothing alive."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from nbcodex.simulator import Fault
from tests.simulated import Simulated

pytestmark = pytest.mark.kernel

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)> "
    "![pixel](https://elsewhere.example/p.png) [click](javascript:alert(1)) "
    "<svg onload=alert(1)></svg> <iframe src=https://elsewhere.example></iframe>"
)


@pytest.fixture
def environment(simulator: Simulated, monkeypatch: pytest.MonkeyPatch) -> Simulated:
    """The environment that leads kernels of this process to the simulator."""
    for name, value in simulator.environ.items():
        monkeypatch.setenv(name, value)
    return simulator


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in ("%load_ext nbcodex", *sources)]
    return nbformat.v4.new_notebook(cells=cells)


def executed(*sources: str) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    made = notebook(*sources)
    NotebookClient(made, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return made


def shown(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the outputs that show something; that of a view is empty in the end."""
    return [output for output in cell.outputs if any(output.get("data", {"text": "?"}).values())]


def test_nbclient_keeps_one_output_with_the_answer(environment: Simulated) -> None:
    """After a limit, the executed notebook shows one output: the answer with its figures."""
    environment.core.script([Fault("tokens_per_minute", seconds=0.5)])
    made = executed("%%codex\n[[echo: the answer]]")
    (output,) = shown(made.cells[1])
    assert output.data["text/markdown"].startswith("the answer")
    assert "2 attempts, waited" in output.data["text/plain"]
    nbformat.validate(made)


@pytest.mark.parametrize("display", ["widget", "text"])
def test_saved_output_needs_no_widget(environment: Simulated, display: str) -> None:
    """With any display, the saved output needs no widget."""
    made = executed(f"%config Codex.display = {display!r}", "%%codex\n[[echo: the answer]]")
    (output,) = shown(made.cells[2])
    assert set(output.data) == {"text/markdown", "text/plain"}


def test_run_all_stops_at_an_error(environment: Simulated) -> None:
    """A request that cannot be answered is an error, never an answer."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    environment.core.script([Fault("quota")])
    made = notebook("%%codex\nhello", "print('not reached')")
    with pytest.raises(CellExecutionError, match="Quota exhausted"):
        NotebookClient(made, timeout=120, kernel_name="python3").execute()
    assert made.cells[2].outputs == []


def test_papermill_copy_contains_the_answers(environment: Simulated, tmp_path: Path) -> None:
    """A notebook with `%%codex` cells that papermill runs has the answers in its copy."""
    papermill = pytest.importorskip("papermill")
    nbformat.write(
        notebook("%%codex -o r\n[[echo: by papermill]]", "print(r.status)"), tmp_path / "in.ipynb"
    )
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False
    )
    assert "by papermill" in shown(done.cells[1])[0].data["text/markdown"]
    assert done.cells[2].outputs[0].text == "done\n"


def test_nbclient_cells_share_a_conversation(environment: Simulated) -> None:
    """Without cell ids, cells see earlier turns; run again with reuse, nothing is sent."""
    sources = ("%config Codex.reuse = True", "%%codex\nmy name is Ada", "%%codex\nwho am I?")
    made = executed(*sources)
    assert "1 earlier turn" in shown(made.cells[3])[0].data["text/plain"]
    assert len(environment.core.log[-1].body["input"]) == 3
    sent = len(environment.prompts)
    again = executed(*sources)
    assert "reused, 0 tokens" in shown(again.cells[3])[0].data["text/plain"]
    assert len(environment.prompts) == sent


class _Dangers(HTMLParser):
    """Collects what could run or fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "svg", "iframe"} or (tag == "img" and dict(attrs).get("src")):
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.found.append(f"{tag} {name}")


FORMATS = ("markdown", "text", "html", "math", "json", "code")
"""All that the model's words can be shown as."""


def asked_as(form: str, text: str) -> str:
    """Return a cell whose answer is `text`, put as an answer in that format may put it."""
    text = {"json": json.dumps({"a": text}), "code": f"```html\n{text}\n```"}.get(form, text)
    return f"%%codex --raw -f {form}\n[[echo: {text}]]"


def test_an_answer_runs_nothing_in_nbconvert_html(environment: Simulated) -> None:
    """Scripts, handlers, `javascript:` links and remote images are inert, in every format."""
    from nbconvert import HTMLExporter

    found = []
    for text in (HOSTILE, "harmless"):
        made = executed(*(asked_as(form, text) for form in FORMATS))
        assert all(cell.outputs for cell in made.cells[1:])
        page, _ = HTMLExporter().from_notebook_node(made)
        seen = _Dangers()
        seen.feed(page)
        found.append(sorted(seen.found))
    assert found[0] == found[1]
    assert os.environ["OPENAI_API_KEY"] not in page


def test_papermill_copy_contains_all_formats(environment: Simulated, tmp_path: Path) -> None:
    """Its copy has code to copy, JSON and a picture; the answer's code was not run."""
    papermill = pytest.importorskip("papermill")
    cells = (asked_as("code", "x = 1"), asked_as("json", "x"), "%%codex -f image\na cat")
    nbformat.write(notebook(*cells), tmp_path / "in.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False
    )
    kinds = [shown(cell)[0].data.keys() for cell in done.cells[1:]]
    for kind, wanted in zip(kinds, ("text/html", "application/json", "image/png"), strict=True):
        assert wanted in kind
    assert len(done.cells) == 4
