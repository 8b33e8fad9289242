"""Answers as Markdown that runs and fetches nothing in any program that renders it.

Renderers disagree on what is code, so the result is harmless even if all of it were read as text
with raw HTML. The only exceptions are fenced blocks that every renderer recognises.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

MAX_FORMULA_CHARS = 2_000  # bounds the search for the end of a formula
MAX_NESTED_LINES = 2_000  # bounds the search for the end of a block with fences in it

# Tags that may stay, even alone. `_STYLE_TAGS` may stay only if they are closed nearby: they would
# format the rest of the page.
_KEPT_TAGS = "br|del|details|hr|ins|kbd|mark|p|q|samp|sub|summary|sup|var"
_STYLE_TAGS = "b|code|em|i|s|small|strong|u"

# The destination of a link: an address with a safe scheme, a fragment, or a relative path. It may
# not contain `$`, `\` or `@@`, because JupyterLab puts formulas back into the finished HTML, with
# their quotes, even where their placeholder is within an attribute.
_DESTINATION_CHAR = r"""[^\s()<>\[\]"`$\\@]"""
_PATH_CHAR = r"(?:[\w.~+,;=*|{}-]|%20)"
_SAFE_DESTINATION = (
    rf"(?:(?i:https?://|mailto:)|[#?]|\.{{0,2}}/(?![/\\&%])|{_PATH_CHAR}++(?=[/?#)\s]|\Z))"
    rf"(?:{_DESTINATION_CHAR}|@(?!@)|\\_|\({_DESTINATION_CHAR}*\))*+"
)
# A link's title in quotes, what may follow its destination, and an image's `!` with its text.
_TITLE = r"""(?:"[^"$\\@`<\[\]]*"|'[^'"$\\@`<\[\]]*')"""
_LINK_END = rf"(?:\s++{_TITLE})?\s*+\)"
_IMAGE_TEXT = r"""!\[[^\[\]$\\@"<>`]*+(?=\]\[|\]\()"""

# Constructs that could run, load or link. The groups `link` and `tag` are harmless: they match
# first, so that no other group does. `_replace_dangerous` changes what the other groups match. The
# quantifiers are possessive, so that hostile text cannot make matching slow.
_DANGEROUS = re.compile(
    rf"""
    (?P<link>   \]\(\s*+(?:{_SAFE_DESTINATION}(?=[\s)]))?{_LINK_END} )  # a safe link
  | \]\(\s*+<(?P<angle>[^<>\n]*+)>(?P<angle_end>{_LINK_END})  # a destination in angle brackets
  | (?P<broken> \]\( )  # the start of any other link
  # The definition of a link whose destination is not safe.
  | (?P<define> \]:(?!\s*+{_SAFE_DESTINATION}(?=\s|\Z)(?:\s++{_TITLE}|(?!\s*+["'(]))) )
  | (?P<image>  (?<!!){_IMAGE_TEXT} )  # an image and its text
  | (?P<bang>   !(?=\[) )  # the start of any other image
  | (?P<tag>    </?(?i:{_KEPT_TAGS})[ ]?/?>
              | <(?i:(?P<style>{_STYLE_TAGS})>(?=[^\n]{{0,200}}?</(?P=style)>))
              | </(?i:{_STYLE_TAGS})> | <span>&\#36;</span>
              | <pre><code>[^<>`\[\]$\\!~"\n]*+</code></pre> )
  | (?<!<)<(?P<auto>(?:https?://|mailto:)[^\s<>\[\]`"!]++|[\w.+-]++@[\w.-]++)>  # <address>
  | (?P<open>   <(?=[A-Za-z/!?]) )  # the start of any other tag
    """,
    re.VERBOSE,
)
_REPLACEMENTS = {"broken": "]&#40;", "define": "]&#58;", "bang": "&#33;", "open": "&lt;"}
# A fence, and its info string.
_OPENS_FENCE = re.compile(r"(`{3,}|~{3,})([^\n]*)")
# Some renderers turn bare URLs into links by themselves.
_URL = re.compile(r"(?i:https?://|ftp://|www\.)\S*")
# Where a formula has characters that would be a tag or a link, a blank between them is invisible.
_NEEDS_BLANK = re.compile(r"(?<=<)(?=[A-Za-z/!?])|(?<=\])(?=[(:])|(?<=!)(?=\[)")

# A line that opens a block of code: marks of quotes and list items, the fence, and its info string,
# as in ``> 1. ```python``.
_FENCE = re.compile(
    r"(?P<quote>(?: {0,3}> ?)*+)(?P<lead>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)*+)"
    r"(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)")
# The ends of paragraphs, which are those of table rows, too: no formula goes beyond one.
_PARAGRAPH = re.compile(r"(\n[ \t]*\n|\n(?=[ \t]*\|))")
# Likewise for spans of code, which do not go beyond a list item or a heading, either.
_INLINE_BOUNDARY = re.compile(
    r"(\n[ \t]*\n|\n(?=[ \t>]*(?:[-*+]|\d{1,9}[.)]|\#{1,6})[ \t])|\n(?=[ \t]*\|))"
)
# Code that a renderer could take for the end of a fence, or of a formula that began before the
# block, so that it would read the rest of the code as text.
_ENDS_CODE = re.compile(r"^[\s>*+.)\d-]*(?:```|~~~)|\$\$|\\\\\]|\\end\{", re.MULTILINE)
# What can begin a span of code or a formula; an escaped character begins neither.
_OPENS_SPAN = re.compile(r"`+|\$\$?|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}|\\[\s\S]")

# What can begin a formula, or hides a dollar sign: code, a link's destination, a bare URL.
_OPENS_FORMULA = re.compile(
    r"`+|\]\([^()\s]*\)|(?i:https?://|www\.)\S*|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}"
    r"|\\\$|\$\$|\$|\\[\s\S]"
)
# Between two dollar signs, these are signs of a formula; words are one of prose.
_MATH_CHARACTER = re.compile(r"[\\^_={}<>+*|]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# MathJax reads a pair of dollar signs as a formula even if Markdown's `\$` or an entity made them;
# it does not look into an element of its own.
_LITERAL_DOLLAR = "<span>&#36;</span>"

_ESCAPED_PUNCTUATION = {ord(c): f"&#{ord(c)};" for c in string.punctuation if c not in ",-./;?"}
_ESCAPED_CODE = _ESCAPED_PUNCTUATION | {ord("."): "&#46;", ord("\n"): "&#10;"}
_ESCAPED_INFO = {ord(c): f"&#{ord(c)};" for c in '"$\\@'}
# Control characters and the byte order mark are removed, other line ends become "\n".
_CONTROL_CHARACTERS: dict[int, str | None] = {
    **dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFEFF)),
    **dict.fromkeys((0x0D, 0x85, 0x2028, 0x2029), "\n"),
}


def sanitize_markdown(text: str, *, remote_images: bool = False) -> str:
    """Return Markdown that looks like `text`, and runs and fetches nothing in any renderer.

    It keeps a few HTML tags without attributes, and links to ``http``, ``https``, ``mailto``,
    fragments and relative paths; the rest is shown as text. Without `remote_images`, images become
    links, because loading one sends data out.
    """
    sections: list[str] = []
    # All lines between two rewritten blocks are made harmless together, because renderers could see
    # a construct that begins in prose and ends in code.
    kinds_and_texts = _lines_and_blocks(text, remote_images)
    for is_block, group in groupby(kinds_and_texts, lambda each: each[0] == "block"):
        if is_block:
            if sections:
                sections[-1] = sections[-1].rstrip("\n")
            sections += [block for _, block in group]
            continue
        texts = []
        for kind, lines in groupby(group, lambda each: each[0]):
            joined = "\n".join(line for _, line in lines)
            if kind == "prose":
                joined = "".join(map(_normalize_formulas, _PARAGRAPH.split(joined)))
                spans = _INLINE_BOUNDARY.split(joined)
                joined = "".join(_keep_readable(span, remote_images) for span in spans)
            texts.append(joined)
        harmless = _make_harmless("\n".join(texts), remote_images)
        sections.append(harmless.lstrip("\n") if sections else harmless)
    return "\n\n".join(sections)


def _lines_and_blocks(text: str, remote_images: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and text: a line of ``prose`` or harmless ``code``, or a rewritten ``block``."""
    shift = 0  # columns by which lines move to the left
    for block in _split_blocks(_clean(text).split("\n")):
        kind, rewritten = "prose", ""
        if isinstance(block, str):
            lines = [block]
        elif _make_harmless(original := "\n".join(block.lines), remote_images) == original:
            kind, lines = "code", block.lines
        else:
            rewritten, lines = block.rewrite(), [block.lead.rstrip()] if block.lead.strip() else []
        if lines and lines[0].strip():
            shift = min(shift, _indent(lines[0]))
        for line in lines:
            yield kind, _dedent(line, shift)
        if rewritten and isinstance(block, _CodeBlock):
            yield "block", rewritten
            # The rewritten block is at the left margin. What follows in the same list keeps its
            # shape, but moves to the margin, too: with four blanks before it, it would become code.
            shift = block.indent


class FencedCode(NamedTuple):
    """A fenced block of an answer."""

    info: str  # the info string behind its first fence, such as ``python``
    code: str
    is_closed: bool


def fenced_code(
    text: str, is_complete: Callable[[str, str], bool] = lambda _info, _code: True
) -> list[FencedCode]:
    """Return the fenced blocks of an answer.

    Models write fences into fences of equal length, where Markdown reads the first closing fence
    as the end of the outer block. It ends instead at the first one before which its code is
    complete, as `is_complete(info, code)` says; by default, any code is.
    """
    lines, at = _clean(text).split("\n"), 0
    blocks: list[FencedCode] = []
    while at < len(lines):
        if not (opening := _FENCE.fullmatch(lines[at])):
            at += 1
            continue
        end, block = _read_fenced(lines, at, opening)
        is_closed = len(block.lines) == end - at
        info, code = opening["info"].strip(), "\n".join(block.code)
        may_go_on = is_closed and not is_complete(info, code)
        for later in _later_ends(lines, at, end, opening) if may_go_on else ():
            longer = "\n".join(_dedent(line, block.indent) for line in lines[at + 1 : later - 1])
            if is_complete(info, longer):
                end, code = later, longer
                break
        blocks.append(FencedCode(info, code, is_closed))
        at = end
    return blocks


def _later_ends(lines: list[str], start: int, end: int, opening: re.Match[str]) -> list[int]:
    """Return the lines that could come after the block instead of `end`, the likeliest first."""
    fence, depth = opening["fence"], 1
    found: list[int] = []
    likeliest: list[int] = []  # the line, if any, where as many fences are closed as opened
    for at in range(start + 1, min(len(lines), start + MAX_NESTED_LINES)):
        inner = _FENCE.fullmatch(lines[at])
        if not inner or inner["fence"][0] != fence[0] or len(inner["fence"]) < len(fence):
            continue
        depth += 1 if inner["info"].strip() else -1
        if not inner["info"].strip() and at + 1 > end:
            (found if likeliest or depth else likeliest).append(at + 1)
    return likeliest + found


def code_fence(code: str, info: str = "") -> str:
    """Return `code` as a fenced block that no fence within it can end."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{info}\n{code}\n{fence}"


def escape_inline(text: str) -> str:
    """Escape a short plain text, such as a model's name, for use in a line of Markdown."""
    return " ".join(_clean(text).split()).translate(_ESCAPED_PUNCTUATION)


def _clean(text: str) -> str:
    """Return text without control characters and lone surrogates, with newlines as line ends."""
    # Renderers read CR as a line end or as a blank, and browsers drop it from URLs.
    text = text.replace("\r\n", "\n").translate(_CONTROL_CHARACTERS)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _make_harmless(text: str, remote_images: bool) -> str:
    """Return `text` changed so that it is harmless outside of code; unchanged if it already is."""
    text = _OPENS_FENCE.sub(_escape_info, text)
    text = _URL.sub(_escape_url, text)
    return _DANGEROUS.sub(lambda found: _replace_dangerous(found, remote_images), text)


def _escape_info(found: re.Match[str]) -> str:
    # nbconvert runs mermaid on a block, and JupyterLab puts the info string into an attribute.
    fence, info = found.groups()
    if "mermaid" in html.unescape(info).lower():
        info = re.sub(r"(?i)(?<!text-)mermaid", "text-mermaid", info.replace("&#", "&amp;#"))
    return fence + info.translate(_ESCAPED_INFO)


def _escape_url(found: re.Match[str]) -> str:
    url = re.sub(r"\\(?=\\|begin)", "%5C", found[0].replace("$", "%24").replace("@@", "%40%40"))
    return re.sub(r"(?i)\A(ftp):", r"\1&#58;", url)


def _replace_dangerous(found: re.Match[str], remote_images: bool) -> str:
    group = found.lastgroup or ""
    if group == "angle_end":
        target = re.sub(r"\s", "%20", found["angle"].strip())
        target = target.replace("(", "%28").replace(")", "%29")
        safe = not target or re.fullmatch(_SAFE_DESTINATION, target)
        link = f"]({target}{found['angle_end']}"
        return link if safe else found[0].translate(_ESCAPED_PUNCTUATION)
    if group == "image" and not remote_images:
        return found[0][1:]
    return found["auto"] if group == "auto" else _REPLACEMENTS.get(group, found[0])


@dataclass(slots=True)
class _CodeBlock:
    """A block of code in an answer, fenced or indented."""

    lines: list[str]  # as they are in the answer
    code: list[str]  # without quote marks, indentation and fences
    info: str = "text"
    lead: str = ""  # the marks before its fence if there is a list item's among them: ``> 1. ``
    indent: int = 0  # columns before its fence

    def rewrite(self) -> str:
        """Return the block in a form that every renderer recognises as code, or as harmless."""
        body = "\n".join(self.code)
        if _ENDS_CODE.search(body):
            return f"<pre><code>{body.translate(_ESCAPED_CODE)}</code></pre>"
        # A fence with an info string cannot end another one, and `body` has none (`_ENDS_CODE`).
        info = re.match(r"\s*([\w+.#-]*)", self.info, re.ASCII)
        name = info[1] if info else ""
        name = "text" if not name or name.lower().startswith("mermaid") else name
        return code_fence(body, name)


def _indent(line: str) -> int:
    """Return the columns before a line's text."""
    lead = line[: len(line) - len(line.lstrip(" \t"))]
    return len(lead.expandtabs(4))


def _dedent(line: str, columns: int) -> str:
    return " " * max(0, _indent(line) - columns) + line.lstrip(" \t") if columns else line


def _split_blocks(lines: list[str]) -> Iterator[str | _CodeBlock]:
    """Yield single lines of text, and blocks of code, fenced or indented."""
    at, in_list, follows_blank = 0, False, True
    while at < len(lines):
        line = lines[at]
        if opening := _FENCE.fullmatch(line):
            in_list = (in_list and _indent(line) > 0) or bool(opening["lead"].strip())
            at, block = _read_fenced(lines, at, opening)
            follows_blank = True
            yield block
        elif follows_blank and not in_list and _indent(line) >= 4 and line.strip():
            start = at
            while at < len(lines) and (_indent(lines[at]) >= 4 or not lines[at].strip()):
                at += 1
            while not lines[at - 1].strip():
                at -= 1
            yield _CodeBlock(lines[start:at], [_dedent(line, 4) for line in lines[start:at]])
        else:
            if line.strip() and (follows_blank or _LIST_ITEM.match(line)):
                in_list = bool(_LIST_ITEM.match(line)) or (in_list and _indent(line) > 1)
            at, follows_blank = at + 1, not line.strip()
            yield line


def _read_fenced(lines: list[str], start: int, opening: re.Match[str]) -> tuple[int, _CodeBlock]:
    """Return the number of the line after the block that the line `start` opens, and the block."""
    fence, indent = opening["fence"], len(opening["lead"].expandtabs(4))
    quote = re.compile(rf"(?: {{0,3}}> ?){{{opening['quote'].count('>')}}}")
    closing = re.compile(rf"[ \t]*{fence[0]}{{{len(fence)},}}[ \t]*")
    code: list[str] = []
    at, added_fence = start + 1, []
    while at < len(lines):
        if not (prefix := quote.match(lines[at])):
            break  # the quote has ended, and with it the block
        line = lines[at][prefix.end() :]
        at += 1
        if closing.fullmatch(line) and _indent(line) <= indent + 3:
            break
        code.append(_dedent(line, indent))
    else:
        if code and not code[-1]:
            code.pop()
        # A fence that the answer left open is closed, so that what follows is not code.
        added_fence = [f"{opening['quote']}{' ' * indent}{fence}"]
    lead = opening["quote"] + opening["lead"] if opening["lead"].strip() else ""
    return at, _CodeBlock(lines[start:at] + added_fence, code, opening["info"], lead, indent)


def _normalize_formulas(text: str) -> str:
    """Return a paragraph with formulas between dollar signs, and none of these in prices."""
    pieces: list[str] = []
    dollars: list[int] = []  # the indexes of literal dollar signs in `pieces`
    code_ends, missing_closings = _code_ends(text), set[str]()
    position = formulas = 0
    while found := _OPENS_FORMULA.search(text, position):
        opening, start, after = found[0], found.start(), found.end()
        pieces.append(text[position:start])
        position = after
        if opening[0] == "`":
            position = code_ends.get(start, after)
        elif opening in ("\\(", "\\["):
            closing = opening.replace("(", ")").replace("[", "]")
            end = text.find(closing, after, after + MAX_FORMULA_CHARS)
            inner = text[after : max(end, after)]
            # `\[text\](address)` is a link that was escaped.
            if inner.strip() and "$" not in inner and not text.startswith("(", end + 2):
                pieces.append(f"${inner.strip()}$" if opening == "\\(" else f"$${inner}$$")
                formulas, position = formulas + 1, end + 2
                continue
        elif opening in ("$", "$$"):
            end = _dollar_end(text, start, opening)
            if end < 0:
                dollars += range(len(pieces), len(pieces) + len(opening))
                pieces += opening
                continue
            formulas, position = formulas + 1, end
        elif opening == "\\$":
            dollars.append(len(pieces))
        elif (end := _math_end(text, found, missing_closings)) > 0:
            position = end
        pieces.append(text[start:position])
    # A single dollar sign can stay: there is no second one that makes it a formula.
    if len(dollars) > 1 or (dollars and formulas):
        for index in dollars:
            pieces[index] = _LITERAL_DOLLAR
    return "".join((*pieces, text[position:]))


def _dollar_end(text: str, start: int, opening: str) -> int:
    """Return the end of the formula that dollar signs open, or -1 if they mean money."""
    after = start + len(opening)
    end = text.find(opening, after, after + MAX_FORMULA_CHARS)
    while end > 0 and text[end - 1] == "\\":
        end = text.find(opening, end + 1, after + MAX_FORMULA_CHARS)
    inner = text[after : max(end, after)]
    if opening == "$$":
        return end + 2 if inner.strip() else -1
    if not inner or inner[0].isspace() or inner[-1].isspace():
        return -1
    following = text[end + 1 : end + 2]
    if (following.isdigit() or following.isupper()) and "\\" not in inner:
        return -1  # "$5 and US$10"
    if text[start - 1 : start].isdigit() and not (inner[0].isalpha() or inner[0] == "\\"):
        return -1  # "5$/day, 10$"
    if not _MATH_CHARACTER.search(inner):
        words = len(_WORD.findall(inner))
        if words > 1 or (inner[0].isdigit() and (words or " " in inner)):
            return -1  # "$5 or 5$"
    return end + 1


def _code_ends(text: str) -> dict[int, int]:
    """Return the end of each span of code by its start."""
    ends: dict[int, int] = {}
    following: dict[int, int] = {}  # by number of backticks, the end of the next such run
    # From the end on, so that the time is linear for hostile text, too.
    for run in reversed(list(re.finditer("`+", text))):
        # A run may also open a span after its first backtick, which a backslash can escape.
        for start in (run.start(), run.start() + 1):
            if (end := following.get(run.end() - start)) is not None:
                ends[start] = end
        following[len(run[0])] = run.end()
    return ends


def _keep_readable(text: str, remote_images: bool) -> str:
    """Return text with code spans and formulas that look the same after `_make_harmless`."""
    if _make_harmless(text, remote_images) == text:
        return text
    in_table = text.lstrip("\n \t").startswith("|")
    code_ends, missing_closings = _code_ends(text), set[str]()
    pieces: list[str] = []
    copied_end = position = 0
    while found := _OPENS_SPAN.search(text, position):
        is_code, start, position = found[0].startswith("`"), found.start(), found.end()
        end = code_ends.get(start, -1) if is_code else _math_end(text, found, missing_closings)
        if end <= position:
            continue
        pieces.append(text[copied_end:start])
        span = text[start:end]
        if not is_code:
            span = _NEEDS_BLANK.sub(" ", span)
        elif _make_harmless(span, remote_images) != span:
            code = text[position : end - len(found[0])].replace("\n", " ")
            if code.strip() and code[0] == code[-1] == " ":
                code = code[1:-1]
            if in_table:
                code = code.replace("\\|", "|")
            span = f"<code>{code.translate(_ESCAPED_CODE)}</code>"
        pieces.append(span)
        copied_end = position = end
    return "".join((*pieces, text[copied_end:]))


def _math_end(text: str, found: re.Match[str], missing_closings: set[str]) -> int:
    """Return the end of the formula that `found` opens, or -1; remember a missing closing."""
    opening = found[0]
    if found["env"] is not None:
        closing = f"\\end{{{found['env']}}}"
    elif opening[-1] in "$([" and opening != "\\$":
        closing = opening.replace("(", ")").replace("[", "]")
    else:
        return -1
    end = -1 if closing in missing_closings else text.find(closing, found.end())
    if end < 0:
        missing_closings.add(closing)
    return -1 if end < 0 or text[end - 1] == "\\" else end + len(closing)
