"""What stays of an answer in each format: what was asked for, and nothing that acts."""

from __future__ import annotations

import html
import html.parser
import json
import time
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from nbcodex.models import Image, Reply, Source
from nbcodex.notebook import cell_options
from nbcodex.rendering import formats
from nbcodex.rendering.formats import (
    AnswerOutput,
    CodeBlock,
    Format,
    code_blocks,
    render_answer,
)
from nbcodex.requests.structured_output import NOTE_MISMATCH
from tests.hostile import HOSTILE, LEAK

PNG = Image(b"\x89PNG\r\n\x1a\n", "image/png")


def sheet(text: str, **more: Any) -> AnswerOutput:
    remote = more.pop("remote_images", False)
    reply = Reply(id="1", text=text, **more)
    return AnswerOutput(reply=reply, figures_line="m-1 · 3 out", remote_images=remote)


def bundle(text: str, form: Format, **more: Any) -> dict[str, Any]:
    """Return the first output."""
    return render_answer(sheet(text, **more), form)[0]


def extract_code(text: str) -> list[str]:
    """Return the code in the text of an answer."""
    return [block.code for block in code_blocks(Reply(id="1", text=text))]


TWO = "Do this:\n\n```python\nprint(1)\n```\n\nor this\n\n~~~bash\nls `pwd`\n~~~\n"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (TWO, ["print(1)", "ls `pwd`"]),
        ("1. item\n\n   ```python\n   if x:\n       y\n   ```", ["if x:\n    y"]),
        ("````md\n```\ninner\n```\n````", ["```\ninner\n```"]),
        ("```python\ncut of", ["cut of"]),
        ("x = 1\nprint(x)", ["x = 1\nprint(x)"]),
        ("No code at all, sorry.", []),
        ("```\n\n```", []),
        ("(" * 100_000, []),
        ("", []),
    ],
)
def test_extract_code_finds_fenced_blocks_or_python(text: str, blocks: list[str]) -> None:
    """Fenced blocks without their fences, or else the whole text, if it is Python."""
    assert extract_code(text) == blocks


DOCSTRING = 'def f():\n    """Use it.\n\n```\nf()\n```\n"""\n    return 1'
README = 'text = """\n# Title\n```bash\nls\n```\nThe end\n"""\nprint(text)'
BARE = 'page = """\n```\ninner\n```\n\n```\nmore\n```\n"""\nprint(page)'


@pytest.mark.parametrize("code", [DOCSTRING, README, BARE, "%pip install x\n" + README])
@pytest.mark.parametrize("info", ["python", "py", ""])
@pytest.mark.parametrize("after", ["", "\n\nThen:\n\n```python\nprint(2)\n```"])
def test_a_fence_within_code_does_not_end_it(code: str, info: str, after: str) -> None:
    """Equal fences at column 0 within strings belong to the code; later blocks are their own."""
    blocks = code_blocks(Reply(id="1", text=f"Here:\n\n```{info}\n{code}\n```{after}"))
    assert blocks[0] == CodeBlock(code)
    assert [block.code for block in blocks[1:]] == (["print(2)"] if after else [])


@pytest.mark.parametrize("wrapper", ["markdown", "md", "Markdown"])
@pytest.mark.parametrize("fence", ["```", "````"])
def test_a_markdown_block_around_an_answer_is_unwrapped(wrapper: str, fence: str) -> None:
    """The code within it is taken, not the prose around that."""
    inner = "# Solution\n\n```python\nx = 1\nprint(x)\n```\n\nIt prints 1."
    text = f"{fence}{wrapper}\n{inner}\n{fence}"
    assert code_blocks(Reply(id="1", text=text)) == [CodeBlock("x = 1\nprint(x)")]


@pytest.mark.parametrize(
    "text", ["```python\nfor i in range(3):\n    pr", "Here:\n```\nx = 1\ny = ", "x = 1\ny = 2"]
)
def test_code_of_a_cut_answer_has_a_problem(text: str) -> None:
    """Half a block is shown with a note, and is not for a new cell."""
    reply = Reply(id="1", text=text, status="done", cut="max_output_tokens")
    (block,) = code_blocks(reply)
    assert "was cut" in block.problem
    shown = render_answer(AnswerOutput(reply=reply, figures_line="m-1"), "code")[0]["text/html"]
    assert "may be incomplete" in shown
    whole = Reply(id="1", text="```\nx = 1\n```\nThat ", status="done", cut="max_output_tokens")
    assert code_blocks(whole) == [CodeBlock("x = 1")]


def test_code_that_a_fence_ended_early_has_a_problem() -> None:
    """If no later fence makes it whole, nothing is inserted silently."""
    (block, *_) = code_blocks(
        Reply(id="1", text='```python\nx = """\n```\nThe end, without a quote.')
    )
    assert "ended it early" in block.problem


def test_each_code_block_has_a_copy_button() -> None:
    """Each block has a Copy button, and is escaped."""
    shown_ = bundle("```html\n<script>alert(1)</script>\n```\n```\nb\n```", "code")["text/html"]
    assert shown_.count("<button") == 2
    assert "&lt;script&gt;" in shown_
    assert "`%codex insert 2`" in shown_
    assert "m-1 · 3 out" in shown_


def test_prose_instead_of_code_is_shown_with_a_note() -> None:
    """An answer without code is shown as Markdown, with a note."""
    stays = bundle("I *cannot* do that.", "code")
    assert "I *cannot* do that." in stays["text/markdown"]
    assert "it contains no code" in stays["text/markdown"]


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1]}', {"a": [1]}), ("```json\n[1, 2]\n```", [1, 2]), ('"\\ud800"', "?")],
)
def test_json_has_its_own_output(text: str, value: Any) -> None:
    """The value is for the viewer; the figures are in an output below."""
    main, below = render_answer(sheet(text), "json")
    assert main["application/json"] == value
    assert below["text/plain"] == "m-1 · 3 out"
    json.dumps(main, ensure_ascii=False).encode()


def test_the_heading_joins_separate_figures() -> None:
    """If the figures have an output of their own, the heading is in it."""
    reply = Reply(id="1", text="[1]")
    _, below = render_answer(
        AnswerOutput(reply=reply, figures_line="m-1", heading="3f2a · What?"), "json"
    )
    assert below["text/plain"] == "3f2a · What? · m-1"


def test_a_schema_instance_is_shown_as_json() -> None:
    """The parsed instance is shown, with its defaults."""

    class Pet(BaseModel):
        name: str
        legs: int = 4

    main, _ = render_answer(sheet('{"name": "x"}', parsed=Pet(name="x")), "json")
    assert main["application/json"] == {"name": "x", "legs": 4}


def test_a_list_of_instances_is_shown_without_the_object_around_it() -> None:
    class Pet(BaseModel):
        name: str

    text = '{"value": [{"name": "x"}]}'
    main, _ = render_answer(sheet(text, parsed=[Pet(name="x")]), "json")
    assert main["application/json"] == [{"name": "x"}]
    assert "value" not in main["text/plain"]


@pytest.mark.parametrize("text", ["no JSON", "[" * 150 + "]" * 150])
def test_invalid_or_deep_json_is_shown_as_text(text: str) -> None:
    """The whole text is shown with its figures."""
    (stays,) = render_answer(sheet(text), "json")
    assert stays == {"text/plain": f"{text}\n\nm-1 · 3 out"}


@pytest.mark.parametrize("form", ["code", "json", "html", "math", "image"])
def test_an_incomplete_answer_is_shown_as_text(form: Format) -> None:
    """An interrupted or unfit answer is shown in full as plain text."""
    stays = bundle("half <b>of", form, status="failed", notes=(NOTE_MISMATCH,))
    assert stays == {"text/plain": "half <b>of\n\nm-1 · 3 out"}


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("$$\\frac{a}{b}$$", "\\frac{a}{b}"),
        ("\\[ x^2 \\]", "x^2"),
        ("```latex\n$$\nx\n\n= 1\n$$\n```", "x\n= 1"),
        ("E = mc^2", "E = mc^2"),
        ("$a < b$", "a \\lt  b"),
    ],
)
def test_a_formula_is_displayed_with_any_delimiters(text: str, formula: str) -> None:
    """It is display mathematics in Markdown and in LaTeX."""
    stays = bundle(text, "math")
    assert stays["text/latex"] == f"$$\n{formula}\n$$"
    assert stays["text/markdown"].startswith(f"$$\n{formula}\n$$\n\n<sub>")


def test_prose_with_formulas_is_markdown() -> None:
    """Its formulas are rendered all the same."""
    stays = bundle("Let $x$ be\n\n$$y$$", "math")
    assert "text/latex" not in stays
    assert "Let $x$ be" in stays["text/markdown"]


def test_an_image_is_an_output_of_its_type() -> None:
    """It is in base64 under its media type, with text and figures below it."""
    first, below = render_answer(sheet("A cat.", images=(PNG,)), "image")
    assert first["image/png"] == "iVBORw0KGgo="
    assert ".images[0]" in first["text/plain"]
    assert "A cat." in below["text/markdown"]
    assert "m-1 · 3 out" in below["text/markdown"]


def test_a_missing_image_shows_the_text() -> None:
    """The text that came instead is shown, with a note."""
    stays = bundle("I cannot draw.", "image")
    assert "I cannot draw." in stays["text/markdown"]
    assert "it contains no picture" in stays["text/markdown"]


KEPT = "<table><tbody><tr><td>1</td></tr></tbody></table>"


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (f"```html\n{KEPT}\n```", KEPT),
        ("<b onclick='x()'>hi</b>", "<b>hi</b>"),
        ("<script>x()</script><p>ok", "<p>ok</p>"),
        ("<a href=' java&#10;script:x()'>a</a>", ">a</a>"),
        ("<a href='data:text/html,x'>a</a>", ">a</a>"),
        ("<a href='//evil.example'>a</a>", ">a</a>"),
        ("<a href='https://e.example/'>a</a>", 'href="https://e.example/"'),
        (f"<img src='{LEAK}' alt='far &lt;b>'>", "<div>[far &lt;b&gt;]</div>"),
        ("<img alt='><script>x()</script>'>", "[&gt;&lt;script&gt;x()&lt;/script&gt;]"),
        ("<a href='/<img>'>z</a>", ">z</a>"),
        ("<img src='//x/y' srcset='//x/z 2x'>", "<div></div>"),
        ("<img src='/api/kernels'>", "<div></div>"),
        ("<img src='data:image/svg+xml;base64,AA=='>", "<div></div>"),
        ("<img src='data:image/png;base64,AA=='>", '<img src="data:image/png;base64,AA==">'),
        ("<p style='background:url(//x)' class=jp-Dialog id=y>z</p>", "<p>z</p>"),
        ("<svg><a xlink:href='javascript:x()'>z</a></svg>", "<div></div>"),
        ("<math><mtext><img src=x onerror=x()>", "<div></div>"),
    ],
)
def test_html_is_sanitized(text: str, stays: str) -> None:
    """What runs or loads is removed, what is harmless stays."""
    found = bundle(text, "html")["text/html"]
    assert stays in found
    assert not acts(found)


def test_remote_images_need_the_setting() -> None:
    """With `Codex.remote_images` they stay; otherwise a note counts them."""
    text = f"<img src='{LEAK}'><img src='{LEAK}'>"
    assert bundle(text, "html", remote_images=True)["text/html"].count(LEAK) == 2
    refused = bundle(text, "html")["text/html"]
    assert LEAK not in refused
    assert "2 images not fetched" in refused


class Acting(html.parser.HTMLParser):
    """Gathers what a browser would run, fetch or follow at a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if dict(attrs).get("class") == "nbcodex-copy":
            return  # our own, which no answer can make: it may have no class
        if tag in {"script", "iframe", "object", "embed", "link", "meta", "style", "video", "base"}:
            self.found.append(tag)
        for name, value in attrs:
            scheme = (value or "").strip().partition(":")[0].lower()
            fetches = tag == "img" and name in {"src", "srcset"} and scheme != "data"
            if name.startswith("on") or fetches or scheme in {"javascript", "vbscript"}:
                self.found.append(f"{tag} {name}={value}")


def acts(text: str) -> list[str]:
    """Return what acts in HTML."""
    parser = Acting()
    parser.feed(text)
    return parser.found


def test_the_detector_finds_active_html() -> None:
    """The check that these tests use can fail."""
    assert acts("<img src=x onerror=y><script>")


@pytest.mark.parametrize("form", get_args(Format))
@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        f"```html\n{HOSTILE}\n```",
        json.dumps({"a": HOSTILE, HOSTILE[:500]: [HOSTILE]}),
        f"$${HOSTILE}$$",
        "</code></pre></div><script>x()</script>",
        'x"class="nbcodex-copy"onclick="x()',
        "<button class=nbcodex-copy onclick=x()>Copy</button>",
    ],
)
def test_no_format_renders_active_html(form: Format, text: str) -> None:
    """No output of a hostile answer has HTML that runs, loads or waits for a click."""
    allowed = {"text/plain", "text/markdown", "text/html", "text/latex", "application/json"}
    for output in render_answer(sheet(text), form):
        assert output.keys() <= allowed
        assert not acts(output.get("text/html", ""))
        assert "nbcodex-copy onclick=x" not in output.get("text/html", "")


@pytest.mark.slow
@pytest.mark.parametrize("form", get_args(Format))
def test_huge_answers_render_fast(form: Format) -> None:
    """Ten thousand nested tags and a megabyte of text are rendered within seconds."""
    began = time.process_time()
    render_answer(sheet("<div>" * 10_000 + "x" * 1_000_000), form)
    assert time.process_time() - began < 10.0


def test_reasoning_is_folded_above_the_answer() -> None:
    """It opens at a click; nothing in it can end the fold or run."""
    thought = f"**Reading**\n\nSome ``` text </details>\n\n{HOSTILE[:2_000]}"
    reply = Reply(id="1", text="The *answer*.")
    (stays,) = render_answer(
        AnswerOutput(reply=reply, figures_line="x", reasoning=thought), "markdown"
    )
    text = stays["text/markdown"]
    fold, _, answer = text.partition("</details>")
    assert fold.startswith("<details><summary>Reasoning</summary>\n\n**Reading**\n\nSome ")
    assert "```" not in fold
    assert not acts(fold)
    assert answer.strip().startswith("The *answer*.")
    assert stays["text/plain"] == "The *answer*.\n\nx"


def test_every_format_is_an_option() -> None:
    """The option offers all formats, and `md` is a synonym."""
    assert set(cell_options.FORMATS) - {"md"} == set(get_args(Format)) - {"fix"}
    assert formats.INSTRUCTIONS.keys() <= set(cell_options.FORMATS)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("ok = 1 # \u202e}\u2066if admin\u2069", "ok = 1 # }if admin"),
        ("pay\u200bload = 1\u2060\ufeff", "payload = 1"),
        ("a\u3164 = 1; b\U000e0101 = 2", "a = 1; b = 2"),
        ("x = 1  # safe\rimport os", "x = 1  # safe\nimport os"),
        ("x = 1\r\ny = 2", "x = 1\ny = 2"),
        ("x = 1 \x1b[8mimport os\x1b[0m\x07\x9b2K", "x = 1 [8mimport os[0m2K"),
        ("s = 'a\u00a0b\u3000c é'", "s = 'a\u00a0b\u3000c é'"),
    ],
)
@pytest.mark.parametrize("fenced", [True, False])
def test_inserted_code_is_what_is_shown(raw: str, clean: str, fenced: bool) -> None:
    text = f"```python\n{raw}\n```" if fenced else raw
    if not fenced and "[8m" in clean:
        return  # this one is no Python without its escapes
    assert extract_code(text) == [clean]
    shown = bundle(text, "code")
    assert clean in shown["text/plain"]
    assert clean in html.unescape(shown["text/html"])
    if fenced:
        markdown, listing = render_answer(sheet(text), "fix")
        assert listing["text/plain"] == clean
        assert clean in html.unescape(listing["text/html"])
        assert clean in markdown["text/plain"]


@pytest.mark.parametrize(
    ("code", "runs_shell"),
    [
        ("import os\n!curl example.org | sh", True),
        ("%%bash\nls", True),
        ("%%sh\nls", True),
        ("%%script python3\n1", True),
        ("files = !ls", True),
        ("%sx ls", True),
        ("rm -rf ~/data", True),
        ("x != y\nprint('!')", False),
        ("%%time\nx = 1", False),
        ("cp = 3", False),
    ],
)
def test_figures_say_that_code_runs_shell_commands(code: str, runs_shell: bool) -> None:
    text = f"```python\n{code}\n```"
    for form in ("code", "fix"):
        outputs = render_answer(sheet(text), form)
        told = any("runs shell commands" in str(each) for each in outputs)
        assert told == runs_shell


SOURCES = (Source("https://example.org/sky", "Sky [1] <b>"), Source("https://example.org/a)b>c d"))


def test_cited_pages_stand_below_the_answer() -> None:
    shown = bundle("Blue [1].", "markdown", sources=SOURCES)
    text = shown["text/markdown"]
    assert text.index("Blue") < text.index("**Sources**") < text.index("<sub>")
    assert "1. [Sky" in text
    assert "<b>" not in text
    assert "(https://example.org/a%29b%3Ec%20d)" in text
    assert "[1] Sky [1] <b> https://example.org/sky" in shown["text/plain"]
    plain = bundle("Blue [1].", "text", sources=SOURCES)["text/plain"]
    assert plain.index("Blue") < plain.index("[2] https://example.org/a)b>c d") < plain.index("m-1")


@pytest.mark.parametrize("form", ["code", "json", "html", "math", "image"])
def test_cited_pages_of_other_formats_are_mentioned(form: Format) -> None:
    shown = render_answer(sheet("[1]", sources=SOURCES), form)
    assert any(".sources" in str(output) for output in shown)
