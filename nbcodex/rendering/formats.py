"""What stays of an answer in the notebook, by the format that was asked for. Pure.

Owns that an answer runs nothing and fetches nothing, whatever it holds and whoever renders it.
"""

from __future__ import annotations

import ast
import html
import json
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nbcodex.models import Image, Reply
from nbcodex.rendering.html import code_listing, printable, sanitize_html
from nbcodex.rendering.markdown import code_blocks, escape_inline, sanitize_markdown

MimeBundle = dict[str, Any]
Format = Literal["markdown", "text", "code", "json", "html", "math", "image", "fix"]
INSTRUCTIONS: Mapping[str, str] = {
    "code": "Answer with code alone, in a fenced block.",
    "json": "Answer with JSON alone, nothing before or after it.",
    "html": "Answer with HTML alone: a fragment without scripts and styles.",
    "math": "Answer with one formula in LaTeX alone, between $$ and $$.",
}
"""What a format adds to the system text."""

_DEEPEST = 100
"""Levels of JSON beyond which it stays text: viewers, and messages to them, have bounds too."""

_THOUGHT = 20_000
"""Characters of a thought that stay, its end."""

_MATH = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_DELIMITER = re.compile(r"(?<!\\)\$|\\[\[\]()](?!\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOutput:
    """An answer, and what is said around it.

    Parameters
    ----------
    reply : Reply
        The answer.
    line : str
        The figures, as plain text.
    heading : str
        What stands above it, as plain text.
    remote_images : bool
        Whether images in it may be fetched.
    thought : str
        The summary of its reasoning, where the server told one.
    twin : int or None
        Characters of the answer in the text twin of what is rendered; None: all of it.
    """

    reply: Reply
    line: str
    heading: str = ""
    remote_images: bool = False
    thought: str = ""
    twin: int | None = None

    @property
    def plain(self) -> str:
        """All of it as text, without what could take over a terminal."""
        return self._plain(self.reply.text)

    @property
    def brief(self) -> str:
        """What stands beside the rendered answer, for those who can show text alone."""
        text = self.reply.text
        if self.twin is None or len(text) <= self.twin:
            return self.plain
        more = f"… {len(text) - self.twin:,} more characters: this output's Markdown holds them all"
        return self._plain(f"{text[: self.twin]}{more}")

    def _plain(self, text: str) -> str:
        gap = "\n\n" if self.heading else ""
        return f"{self.heading}{gap}{printable(text)}\n\n{self.line}".lstrip()

    def markdown(self, text: str, *notes: str) -> MimeBundle:
        """Return Markdown with the heading above and the figures below."""
        head = f"{escape_inline(self.heading)}\n\n" if self.heading else ""
        line = escape_inline(" · ".join([self.line, *notes]))
        return {
            "text/markdown": f"{head}{text}\n\n<sub>{line}</sub>".lstrip(),
            "text/plain": self.brief,
        }

    def hypertext(self, text: str, *notes: str) -> MimeBundle:
        """Return HTML with the heading above and the figures below; `text` is harmless."""
        head = f"<p>{html.escape(self.heading)}</p>" if self.heading else ""
        line = html.escape(" · ".join([self.line, *notes]))
        return {
            "text/html": f"<div>{head}{text}</div><sub>{line}</sub>",
            "text/plain": self.plain,
        }

    def figures(self, text: str = "", *notes: str) -> MimeBundle:
        """Return the figures by themselves, below what stands apart."""
        line = f"{self.heading} · {self.line}" if self.heading else self.line
        bundle = replace(self, heading="", line=line).markdown(text, *notes)
        return bundle | {"text/plain": f"{printable(text)}\n\n{line}".lstrip()}


def render_answer(sheet: AnswerOutput, form: Format) -> tuple[MimeBundle, ...]:
    """Return the outputs that stay of an answer, the first in its place and the rest below it."""
    if not sheet.reply and form not in {"markdown", "fix"}:
        form = "text"  # half a table, formula or document is not what it was to become
    return _FORMS[form](sheet)


def extract_code(text: str) -> list[str]:
    """Return the code in an answer: its fenced blocks, or all of it where it is code by itself."""
    fenced = [code for _, code in code_blocks(text) if code.strip()]
    return fenced or ([text.strip("\n")] if _is_python(text) else [])


def _markdown(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    text = sanitize_markdown(sheet.reply.text, remote_images=sheet.remote_images)
    return (sheet.markdown(_folded(sheet.thought) + text), *_pictures(sheet.reply))


def _folded(thought: str) -> str:
    """Return a thought as Markdown that opens at a click; nothing in it can end the fold."""
    if not thought.strip():
        return ""
    cut = "…\n\n" if len(thought) > _THOUGHT else ""
    parts = [part for part in re.split(r"\n\s*\n", cut + thought[-_THOUGHT:]) if part.strip()]
    told = "\n\n".join(map(_paragraph, parts))
    return f"<details><summary>Reasoning</summary>\n\n{told}\n\n</details>\n\n"


def _paragraph(text: str) -> str:
    title = re.fullmatch(r"\s*\*\*([^*]+)\*\*\s*", text)
    return f"**{escape_inline(title[1])}**" if title else escape_inline(text)


def _text(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    return ({"text/plain": sheet.plain},)


def _code(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    blocks = extract_code(sheet.reply.text)
    if not blocks:
        text = sanitize_markdown(sheet.reply.text, remote_images=sheet.remote_images)
        return (sheet.markdown(text, "no code in it"),)
    more = f"{len(blocks)} blocks: `%codex insert 2` takes the second" if len(blocks) > 1 else ""
    return (sheet.hypertext(code_listing(blocks), *filter(None, [more])),)


def _fix(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    blocks = extract_code(sheet.reply.text)[:1] if code_blocks(sheet.reply.text) else []
    copies = {"text/html": code_listing(blocks), "text/plain": "\n".join(blocks)}
    return (*_markdown(sheet), *([copies] if blocks and sheet.reply else []))


def _json(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    value = sheet.reply.parsed
    if hasattr(value, "model_dump_json"):
        value = json.loads(value.model_dump_json())
    elif value is None:  # null, or an answer that nobody has read yet
        try:
            value = json.loads(_unfenced(sheet.reply.text))
        except (ValueError, RecursionError):
            return _text(sheet)
    if _depth(value) > _DEEPEST:
        return _text(sheet)
    try:
        # A notebook file is strict JSON, and cannot hold NaN.
        told = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError:
        return _text(sheet)
    told = told.encode("utf-8", "replace").decode()
    main = {"application/json": json.loads(told), "text/plain": printable(told)}
    return (main, sheet.figures())


def _html(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    dropped: list[str] = []
    text = sanitize_html(
        _unfenced(sheet.reply.text), remote_images=sheet.remote_images, drop=dropped.append
    )
    images = f"{len(dropped)} image{'s' * (len(dropped) > 1)} not fetched" if dropped else ""
    return (sheet.hypertext(text, *filter(None, [images])),)


def _math(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    formula = _formula(_unfenced(sheet.reply.text))
    if formula is None:  # prose with formulas in it
        return _markdown(sheet)
    bundle = sheet.markdown(sanitize_markdown(f"$$\n{formula}\n$$"))
    return ({**bundle, "text/latex": f"$$\n{formula}\n$$"},)


def _image(sheet: AnswerOutput) -> tuple[MimeBundle, ...]:
    text = sanitize_markdown(sheet.reply.text, remote_images=sheet.remote_images)
    first, *more = [*_pictures(sheet.reply), None]
    if first is None:
        return (sheet.markdown(text, "no picture came"),)
    return (first, sheet.figures(text), *filter(None, more))


_FORMS: Mapping[Format, Callable[[AnswerOutput], tuple[MimeBundle, ...]]] = {
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
    """Return where the pictures are that a terminal cannot show."""
    return [
        f"no pictures in a terminal: .images[{number}].data is {_described(image)}"
        for number, image in enumerate(reply.images)
    ]


def _described(image: Image) -> str:
    return f"{image.media_type}, {len(image.data):,} bytes"


def _pictures(reply: Reply) -> list[MimeBundle]:
    return [
        {
            image.media_type: b64encode(image.data).decode("ascii"),
            "text/plain": f"[{_described(image)}: .images[{number}]]",
        }
        for number, image in enumerate(reply.images)
    ]


def _unfenced(text: str) -> str:
    """Return what stands in the one fence that is all of an answer, else the answer."""
    blocks = code_blocks(text)
    alone = len(blocks) == 1 and text.strip()[:3] in {"```", "~~~"}
    return blocks[0][1] if alone and text.strip()[-3:] in {"```", "~~~"} else text


def _formula(text: str) -> str | None:
    """Return the formula that an answer is, without its delimiters; None if it is more."""
    text = "\n".join(line for line in text.strip().splitlines() if line.strip())
    for begin, end in _MATH:
        if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end):
            text = text[len(begin) : -len(end)].strip()
            break
    if not text or _DELIMITER.search(text):
        return None
    # As commands, they can be taken for tags by nobody.
    return text.replace("<", "\\lt ").replace(">", "\\gt ")


def _depth(value: Any) -> int:
    """Return how many levels deep a value is, as far as that matters."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        depth += 1
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [child for children in inner for child in children]
    return depth


def _is_python(text: str) -> bool:
    """Whether a text without fences is code all the same; it is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
