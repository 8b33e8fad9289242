"""The outputs that an answer leaves in the notebook, by the format that was asked for.

No answer runs or fetches anything in any program that renders it. All functions are pure.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any, Literal
from urllib.parse import quote

from nbcodex.models import Image, Reply
from nbcodex.rendering.html import code_listing, printable, sanitize_html, visible_code
from nbcodex.rendering.markdown import escape_inline, fenced_code, sanitize_markdown

MimeBundle = dict[str, Any]  # one output: the same content by media type
# ``fix`` is that of `%codex fix`, which corrects a cell; the others are those of ``--format``.
Format = Literal["markdown", "text", "code", "json", "html", "math", "image", "fix"]

# Added to the system text of a request in this format.
INSTRUCTIONS: Mapping[str, str] = {
    "code": "Answer with code alone, in a fenced block.",
    "json": "Answer with JSON alone, nothing before or after it.",
    "html": "Answer with HTML alone: a fragment without scripts and styles.",
    "math": "Answer with one formula in LaTeX alone, between $$ and $$.",
}

MAX_JSON_DEPTH = 100  # deeper JSON is shown as text, because viewers and encoders recurse
MAX_REASONING_CHARS = 20_000  # of longer reasoning, the end is shown
_URL_CHARS = ":/?#[]@!$&'()*+,;=%"  # characters that have a meaning in a URL (RFC 3986)

# A text that is one formula between delimiters.
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\\\[(.+)\\\]|\\\((.+)\\\)|\$(.+)\$", re.DOTALL)
# Lines that IPython hands to a shell: ``!ls``, ``files = %sx ls``, ``%%bash``, ``rm -r x``.
_SHELL_LINE = re.compile(
    r"^\s*(?:[\w.,\[\] ]+=\s*)?(?:!(?!=)|%(?:sx|system|sc)\b)"
    r"|^\s*%%(?:!|(?:bash|sh|zsh|script|cmd|powershell|system|sx)\b)"
    # Aliases of IPython, which work without a percent sign.
    r"|^\s*%?(?:rm|rmdir|mv|cp|ln|mkdir) +(?!(?:in|is|and|or|if|not) )[-~./\w\"'$*]"
    r"|\bget_ipython\(\)\.(?:system|getoutput)\(",
    re.MULTILINE,
)
# A delimiter of another formula within a formula.
_DELIMITER = re.compile(r"(?<!\\)\$|\\[\[\]()](?!\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOutput:
    """An answer, with the heading above it and the line of figures below it."""

    reply: Reply  # true if its status is ``done``
    figures_line: str
    heading: str = ""
    remote_images: bool = False  # whether images in the answer may be loaded
    reasoning: str = ""  # the summary of the model's reasoning, if the server sent one
    # Characters of the plain text that accompanies the Markdown; None: all of it.
    max_plain_chars: int | None = None

    def plain_text(self, max_chars: int | None = None) -> str:
        """Return the output as text, without characters that could control a terminal."""
        text, heading = self.reply.text, f"{self.heading}\n\n" if self.heading else ""
        if max_chars is not None and (excess := len(text) - max_chars) > 0:
            more = f"… {excess:,} more characters: this output's Markdown has all of them"
            text = f"{text[:max_chars]}{more}"
        pages = enumerate(self.reply.sources, start=1)
        sources = [f"\n[{number}] {f'{page.title} {page.url}'.lstrip()}" for number, page in pages]
        text = printable("\n".join([text, "".join(sources)]) if sources else text)
        return f"{heading}{text}\n\n{self.figures_line}".lstrip()

    def markdown_output(self, text: str, *notes: str) -> MimeBundle:
        """Return Markdown: `text`, then figures and `notes`; also as text, for other front ends."""
        heading = f"{escape_inline(self.heading)}\n\n" if self.heading else ""
        line = escape_inline(" · ".join([self.figures_line, *notes]))
        return {
            "text/markdown": f"{heading}{text}\n\n<sub>{line}</sub>".lstrip(),
            "text/plain": self.plain_text(self.max_plain_chars),
        }

    def html_output(self, text: str, *notes: str) -> MimeBundle:
        """Return HTML: the sanitized `text`, then figures and `notes`; also as text."""
        heading = f"<p>{escape(self.heading)}</p>" if self.heading else ""
        line = escape(" · ".join([self.figures_line, *notes]))
        return {
            "text/html": f"<div>{heading}{text}</div><sub>{line}</sub>",
            "text/plain": self.plain_text(),
        }

    def figures_output(self, text: str = "") -> MimeBundle:
        """Return heading, `text` and figures as an output of their own, below the answer's."""
        line = f"{self.heading} · {self.figures_line}" if self.heading else self.figures_line
        bundle = replace(self, heading="", figures_line=line).markdown_output(text)
        return bundle | {"text/plain": f"{printable(text)}\n\n{line}".lstrip()}

    def sanitized_markdown(self) -> str:
        """Return the answer's text as Markdown that can be shown."""
        return sanitize_markdown(self.reply.text, remote_images=self.remote_images)


def render_answer(answer: AnswerOutput, format_: Format) -> tuple[MimeBundle, ...]:
    """Return an answer's outputs: the first takes the place of the live display."""
    if not answer.reply and format_ not in {"markdown", "fix"}:
        format_ = "text"  # a part of a JSON value, a formula or a document cannot be rendered
    if answer.reply.sources and format_ not in {"markdown", "text"}:
        line = f"{answer.figures_line} · it cites web pages: .sources"
        answer = replace(answer, figures_line=line)
    return _RENDERERS[format_](answer)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A block of code in an answer."""

    code: str
    problem: str = ""  # why the code may be incomplete: then it is not put into a cell

    @property
    def warning(self) -> str:
        """What to know before running the code; empty if it runs no shell commands."""
        return "it runs shell commands" if _SHELL_LINE.search(self.code) else ""


def code_blocks(reply: Reply) -> list[CodeBlock]:
    """Return the code in an answer: its fenced blocks, or the whole text if it is Python."""
    # Cleaned here, so that what is inserted is what is shown.
    text = visible_code(reply.text)
    blocks = fenced_code(text, is_complete=_is_complete)
    if len(blocks) == 1 and _language(blocks[0].info) in {"md", "markdown"}:
        # Some models put all of their answer, the prose included, into a block of Markdown.
        inner = blocks[0].code
        if re.search(r"^(?:```+|~~~+)[ \t]*\w", inner, re.MULTILINE):
            text, blocks = inner, fenced_code(inner, is_complete=_is_complete)
    was_cut = "the answer was cut, raise --max-output"
    found = []
    for info, code, is_closed in blocks:
        problem = was_cut if reply.cut and not is_closed else ""
        if is_closed and _language(info) == "python" and _is_open_ended(code):
            problem = "a fence within it may have ended it early"
        if code.strip():
            found.append(CodeBlock(code, problem))
    if not found and not _python_problem(text):
        return [CodeBlock(text.strip("\n"), was_cut if reply.cut else "")]
    return found


def _language(info: str) -> str:
    """Return the language in a fence's info string, such as ``python`` in ``Python title=x``."""
    words = re.findall(r"[\w+#.-]+", info.lower())
    name = words[0] if words else ""
    return "python" if name in {"py", "python", "python3", "ipython", "ipython3"} else name


def _is_complete(info: str, code: str) -> bool:
    """Whether the code before a block's first closing fence seems to be all of its code."""
    is_python = _language(info) in {"python", ""}
    if is_python and not _python_problem(_without_magics(code)):
        return True
    # Fences in complete code come in pairs: one with an info string opens, one without closes.
    depth = 0
    for inner in re.findall(r"^\s*(?:```+|~~~+)[ \t]*(.*)$", code, re.MULTILINE):
        depth += 1 if inner.strip() else -1
        if depth < 0:
            return False
    return depth == 0 and not (is_python and _is_open_ended(code))


def _without_magics(code: str) -> str:
    """Return code with `pass` instead of IPython's commands, which are not Python."""
    return re.sub(r"^([ \t]*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)


def _is_open_ended(code: str) -> bool:
    """Whether Python code ends within a string or a bracket."""
    if code.lstrip().startswith("%%"):
        return False  # another language
    problem = _python_problem(_without_magics(code))
    return "unterminated triple-quoted" in problem or "was never closed" in problem


def _python_problem(code: str) -> str:
    """Return why code is not a Python program; an empty text if it is. The code is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "" if ast.parse(code).body else "it has no statements"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


def _markdown(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    folded, reasoning, sources = "", answer.reasoning, ""
    if reasoning.strip():
        ellipsis = "…\n\n" if len(reasoning) > MAX_REASONING_CHARS else ""
        paragraphs = []
        # Each paragraph is escaped, so that no tag in it can close `<details>`.
        for paragraph in re.split(r"\n\s*\n", ellipsis + reasoning[-MAX_REASONING_CHARS:]):
            title = re.fullmatch(r"\s*\*\*([^*]+)\*\*\s*", paragraph)
            escaped = escape_inline(title[1] if title else paragraph)
            paragraphs.append(f"**{escaped}**" if title else escaped)
        text = "\n\n".join(filter(None, paragraphs))
        folded = f"<details><summary>Reasoning</summary>\n\n{text}\n\n</details>\n\n"
    if answer.reply.sources:
        sources = "\n\n**Sources**\n"
    for number, page in enumerate(answer.reply.sources, start=1):
        # Quoted, because an address may have characters that would end the link.
        url = quote(page.url, safe=_URL_CHARS)
        sources += f"\n{number}. [{escape_inline(page.title or page.url)}](<{url}>)"
    text = folded + answer.sanitized_markdown() + sanitize_markdown(sources)
    return (answer.markdown_output(text), *_picture_outputs(answer.reply))


def _text(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    return ({"text/plain": answer.plain_text()},)


def _code(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    answer = _with_visible_code(answer)
    blocks = code_blocks(answer.reply)
    if not blocks:
        return (answer.markdown_output(answer.sanitized_markdown(), "it contains no code"),)
    notes = []
    if blocks[0].problem:
        notes.append(f"the code may be incomplete and was not put into a cell: {blocks[0].problem}")
    notes += dict.fromkeys(block.warning for block in blocks if block.warning)
    if len(blocks) > 1:
        notes.append(f"{len(blocks)} blocks: `%codex insert 2` takes the second")
    return (answer.html_output(code_listing([block.code for block in blocks]), *notes),)


def _with_visible_code(answer: AnswerOutput) -> AnswerOutput:
    return replace(answer, reply=replace(answer.reply, text=visible_code(answer.reply.text)))


def _fix(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    # Without a fence, an answer that happens to be Python is not the corrected cell.
    blocks = code_blocks(answer.reply) if fenced_code(answer.reply.text) else []
    if not blocks or not answer.reply:
        return _markdown(answer)
    answer, block = _with_visible_code(answer), blocks[0]
    if block.warning:
        answer = replace(answer, figures_line=f"{answer.figures_line} · {block.warning}")
    listing = code_listing([block.code])
    if block.problem:
        note = f"the corrected cell may be incomplete and was not inserted: {block.problem}"
        listing += f"<sub>{escape(note)}</sub>"
    return (*_markdown(answer), {"text/html": listing, "text/plain": block.code})


def _json(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    from pydantic import TypeAdapter  # slow to import

    # Called for validated objects, which may be elements of a list.
    as_json = partial(TypeAdapter(Any).dump_python, mode="json")
    value = answer.reply.parsed
    try:
        if value is None:  # the JSON value null, or an answer of the journal, which is not parsed
            value = json.loads(_unfenced(answer.reply.text))
        # NaN is an error, because a notebook file is strict JSON.
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False, default=as_json)
        text = text.encode("utf-8", "replace").decode()  # without lone surrogates
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _text(answer)
    # Two blanks indent a level.
    if re.search(rf"^ {{{2 * MAX_JSON_DEPTH}}}", text, re.MULTILINE):
        return _text(answer)
    return ({"application/json": value, "text/plain": printable(text)}, answer.figures_output())


def _html(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    text, count = sanitize_html(_unfenced(answer.reply.text), remote_images=answer.remote_images)
    # A reader would otherwise not know that the page is incomplete.
    notes = [f"{count} image{'s' * (count > 1)} not fetched"] if count else []
    return (answer.html_output(text, *notes),)


def _math(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    formula = "\n".join(filter(str.strip, _unfenced(answer.reply.text).strip().splitlines()))
    if delimited := _DELIMITED.fullmatch(formula):
        formula = next(filter(None, delimited.groups())).strip()
    if not formula or _DELIMITER.search(formula):
        return _markdown(answer)  # prose with formulas in it
    # Written as commands, no renderer can mistake them for tags.
    formula = formula.replace("<", "\\lt ").replace(">", "\\gt ")
    latex = f"$$\n{formula}\n$$"
    return (answer.markdown_output(sanitize_markdown(latex)) | {"text/latex": latex},)


def _image(answer: AnswerOutput) -> tuple[MimeBundle, ...]:
    text = answer.sanitized_markdown()
    pictures = _picture_outputs(answer.reply)
    if not pictures:
        return (answer.markdown_output(text, "it contains no picture"),)
    # The picture itself is the main output, so that it can be saved with a right click.
    return (pictures[0], answer.figures_output(text), *pictures[1:])


_RENDERERS: Mapping[Format, Callable[[AnswerOutput], tuple[MimeBundle, ...]]] = {
    "markdown": _markdown,
    "text": _text,
    "code": _code,
    "json": _json,
    "html": _html,
    "math": _math,
    "image": _image,
    "fix": _fix,
}


def image_hints(reply: Reply) -> list[str]:
    """Return hints at the pictures of an answer, which a terminal cannot show."""
    return [
        f"no pictures in a terminal: .images[{number}].data is {_describe_image(image)}"
        for number, image in enumerate(reply.images)
    ]


def _describe_image(image: Image) -> str:
    return f"{image.media_type}, {len(image.data):,} bytes"


def _picture_outputs(reply: Reply) -> list[MimeBundle]:
    return [
        {
            image.media_type: b64encode(image.data).decode("ascii"),
            "text/plain": f"[{_describe_image(image)}: .images[{number}]]",
        }
        for number, image in enumerate(reply.images)
    ]


def _unfenced(text: str) -> str:
    """Return the content of a fence around the whole answer, or else the answer."""
    blocks, fences = fenced_code(text), {"```", "~~~"}
    is_alone = len(blocks) == 1 and text.strip()[:3] in fences and text.strip()[-3:] in fences
    return blocks[0].code if is_alone else text
