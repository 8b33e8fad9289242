"""Answers as Markdown that runs and fetches nothing in any program that renders it.

Owns what a stored answer may contain. No two renderers agree on what is code, so the result is
harmless even if all of it were read as ordinary text with raw HTML. The one exception are fenced
blocks that every renderer recognises.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

MAX_FORMULA_CHARS = 2_000  # bounds the search for the end of a formula
MAX_NESTED_LINES = 2_000  # how far the end of a block with fences in it is looked for

_TAGS = "br|del|details|hr|ins|kbd|mark|p|q|samp|sub|summary|sup|var"
_STYLES = "b|code|em|i|s|small|strong|u"  # left open, these would format the rest of the page

# A destination may not contain `$`, `\` or `@@`: JupyterLab puts formulas back into the finished
# HTML, with their quotes, even where their placeholder is within an attribute.
_URL_CHAR = r"""[^\s()<>\[\]"`$\\@]"""
_PATH_SEGMENT = r"(?:[\w.~+,;=*|{}-]|%20)"
_TARGET = (
    rf"(?:(?i:https?://|mailto:)|[#?]|\.{{0,2}}/(?![/\\&%])|{_PATH_SEGMENT}++(?=[/?#)\s]|\Z))"
    rf"(?:{_URL_CHAR}|@(?!@)|\\_|\({_URL_CHAR}*\))*+"
)
_TITLE = r"""(?:"[^"$\\@`<\[\]]*"|'[^'"$\\@`<\[\]]*')"""
_LINK_END = rf"(?:\s++{_TITLE})?\s*+\)"
_ALT = r"""!\[[^\[\]$\\@"<>`]*+(?=\]\[|\]\()"""

# Constructs that could run, load or link. `_replace_dangerous` replaces a group that is dangerous;
# the others are matched first because they are harmless. The quantifiers are possessive, so that
# hostile text cannot make matching slow.
_DANGEROUS = re.compile(
    rf"""
    (?P<link>   \]\(\s*+(?:{_TARGET}(?=[\s)]))?{_LINK_END} )
  | \]\(\s*+<(?P<angle>[^<>\n]*+)>(?P<rest>{_LINK_END})
  | (?P<broken> \]\( )
  | (?P<define> \]:(?!\s*+{_TARGET}(?=\s|\Z)(?:\s++{_TITLE}|(?!\s*+["'(]))) )
  | (?P<image>  (?<!!){_ALT} )
  | (?P<bang>   !(?=\[) )
  | (?P<tag>    </?(?i:{_TAGS})[ ]?/?> | <(?i:(?P<style>{_STYLES})>(?=[^\n]{{0,200}}?</(?P=style)>))
              | </(?i:{_STYLES})> | <span>&\#36;</span>
              | <pre><code>[^<>`\[\]$\\!~"\n]*+</code></pre> )
  | (?<!<)<(?P<auto>(?:https?://|mailto:)[^\s<>\[\]`"!]++|[\w.+-]++@[\w.-]++)>
  | (?P<open>   <(?=[A-Za-z/!?]) )
    """,
    re.VERBOSE,
)
_REPLACEMENTS = {"broken": "]&#40;", "define": "]&#58;", "bang": "&#33;", "open": "&lt;"}
_OPENS_FENCE = re.compile(r"(`{3,}|~{3,})([^\n]*)")
# Some renderers turn bare URLs into links by themselves.
_URL = re.compile(r"(?i:https?://|ftp://|www\.)\S*")
# Where a formula has characters that would be a tag or a link, a blank between them is invisible.
_NEEDS_BLANK = re.compile(r"(?<=<)(?=[A-Za-z/!?])|(?<=\])(?=[(:])|(?<=!)(?=\[)")

_FENCE = re.compile(
    r"(?P<quote>(?: {0,3}> ?)*+)(?P<lead>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)*+)"
    r"(?P<run>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)")
_PARAGRAPH = re.compile(r"(\n[ \t]*\n|\n(?=[ \t]*\|))")
_INLINE_BOUNDARY = re.compile(
    r"(\n[ \t]*\n|\n(?=[ \t>]*(?:[-*+]|\d{1,9}[.)]|\#{1,6})[ \t])|\n(?=[ \t]*\|))"
)
# Lines of code that could end what a renderer has open (a fence, nbconvert's formula), so that it
# would read the rest of the code as text.
_ENDS_CODE = re.compile(r"^[\s>*+.)\d-]*(?:```|~~~)|\$\$|\\\\\]|\\end\{", re.MULTILINE)
_OPENS_SPAN = re.compile(r"`+|\$\$?|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}|\\[\s\S]")

# What can begin a formula, or hides a dollar sign: code, a link's destination, a bare URL.
_OPENS_FORMULA = re.compile(
    r"`+|\]\([^()\s]*\)|(?i:https?://|www\.)\S*|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}"
    r"|\\\$|\$\$|\$|\\[\s\S]"
)
_MATH_CHARACTER = re.compile(r"[\\^_={}<>+*|]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# MathJax reads a pair of dollar signs as a formula even if Markdown's `\$` or an entity made them;
# it does not look into an element of its own.
_LITERAL_DOLLAR = "<span>&#36;</span>"

_ESCAPED_PUNCTUATION = {ord(c): f"&#{ord(c)};" for c in string.punctuation if c not in ",-./;?"}
_ESCAPED_CODE = _ESCAPED_PUNCTUATION | {ord("."): "&#46;", ord("\n"): "&#10;"}
_ESCAPED_INFO = {ord(c): f"&#{ord(c)};" for c in '"$\\@'}
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
    parts: list[str] = []
    # Consecutive pieces that are no new blocks are made harmless together: renderers could see a
    # construct that begins in one of them and ends in the next.
    pieces = _pieces(text, remote_images)
    for is_block, group in groupby(pieces, lambda piece: piece[0] == "block"):
        if is_block:
            if parts:
                parts[-1] = parts[-1].rstrip("\n")
            parts += [block for _, block in group]
            continue
        texts = []
        for kind, lines in groupby(group, lambda piece: piece[0]):
            run = "\n".join(line for _, line in lines)
            if kind == "prose":
                run = "".join(map(_normalize_formulas, _PARAGRAPH.split(run)))
                spans = _INLINE_BOUNDARY.split(run)
                run = "".join(_keep_readable(span, remote_images) for span in spans)
            texts.append(run)
        harmless = _make_harmless("\n".join(texts), remote_images)
        parts.append(harmless.lstrip("\n") if parts else harmless)
    return "\n\n".join(parts)


def _pieces(text: str, images: bool) -> Iterator[tuple[str, str]]:
    """Yield each line of "prose" or of harmless "code", and each "block" that is written anew."""
    shift = 0  # columns by which lines move to the left
    for block in _blocks(_clean(text).split("\n")):
        kind, new_block = "prose", ""
        if isinstance(block, str):
            lines = [block]
        elif _make_harmless(kept := "\n".join(block.lines), images) == kept:
            kind, lines = "code", block.lines
        else:
            new_block, lines = block.as_block(), [block.lead.rstrip()] if block.lead.strip() else []
        if lines and lines[0].strip():
            shift = min(shift, _indent(lines[0]))
        for line in lines:
            yield kind, _dedent(line, shift)
        if new_block and isinstance(block, _Code):
            yield "block", new_block
            # The new block is at the margin. What follows in the same list keeps its shape, but
            # moves to the margin, too: with four blanks before it, it would become code.
            shift = block.indent


def fenced_code(
    text: str, is_whole: Callable[[str, str], bool] = lambda _info, _code: True
) -> list[tuple[str, str, bool]]:
    """Return of each fenced block its info string, its code, and whether its fence was closed.

    Models put fences of equal length into each other, which Markdown would read as the end of the
    outer one. A fence with an info string opens an inner block; beyond that, the first closing
    fence counts with which `is_whole(info, code)`, that is, the code is a complete program.
    """
    lines, at = _clean(text).split("\n"), 0
    blocks: list[tuple[str, str, bool]] = []
    while at < len(lines):
        if not (fence := _FENCE.fullmatch(lines[at])):
            at += 1
            continue
        end, block = _fenced(lines, at, fence)
        is_closed = len(block.lines) == end - at
        info, code = fence["info"].strip(), "\n".join(block.code)
        ends = _later_ends(lines, at, end, fence) if is_closed and not is_whole(info, code) else []
        for later in ends:
            longer = "\n".join(_dedent(line, block.indent) for line in lines[at + 1 : later - 1])
            if is_whole(info, longer):
                end, code = later, longer
                break
        blocks.append((info, code, is_closed))
        at = end
    return blocks


def _later_ends(lines: list[str], start: int, end: int, fence: re.Match[str]) -> list[int]:
    """Return the lines after which a block could end later than at `end`, the likeliest first."""
    run, depth = fence["run"], 1
    found: list[int] = []
    likeliest: list[int] = []  # where as many fences have been closed as opened
    for at in range(start + 1, min(len(lines), start + MAX_NESTED_LINES)):
        inner = _FENCE.fullmatch(lines[at])
        if not inner or inner["run"][0] != run[0] or len(inner["run"]) < len(run):
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
    # Renderers read CR as a line end or as a blank, and browsers drop it from URLs.
    text = text.replace("\r\n", "\n").translate(_CONTROL_CHARACTERS)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _make_harmless(text: str, images: bool) -> str:
    """Return `text` changed so that it is harmless as text; `text` itself if it already is."""
    text = _OPENS_FENCE.sub(_escape_info, text)
    text = _URL.sub(_escape_url, text)
    return _DANGEROUS.sub(lambda found: _replace_dangerous(found, images), text)


def _escape_info(found: re.Match[str]) -> str:
    # nbconvert writes a mermaid block as live HTML, JupyterLab puts the info into an attribute.
    run, info = found.groups()
    if "mermaid" in html.unescape(info).lower():
        info = re.sub(r"(?i)(?<!text-)mermaid", "text-mermaid", info.replace("&#", "&amp;#"))
    return run + info.translate(_ESCAPED_INFO)


def _escape_url(found: re.Match[str]) -> str:
    url = re.sub(r"\\(?=\\|begin)", "%5C", found[0].replace("$", "%24").replace("@@", "%40%40"))
    return re.sub(r"(?i)\A(ftp):", r"\1&#58;", url)


def _replace_dangerous(found: re.Match[str], images: bool) -> str:
    kind = found.lastgroup or ""
    if kind == "rest":
        target = re.sub(r"\s", "%20", found["angle"].strip())
        target = target.replace("(", "%28").replace(")", "%29")
        safe = not target or re.fullmatch(_TARGET, target)
        return f"]({target}{found['rest']}" if safe else found[0].translate(_ESCAPED_PUNCTUATION)
    if kind == "image" and not images:
        return found[0][1:]
    return found["auto"] if kind == "auto" else _REPLACEMENTS.get(kind, found[0])


@dataclass(slots=True)
class _Code:
    """A block of code: its lines in the answer, and the code in them."""

    lines: list[str]
    code: list[str]
    info: str = "text"
    lead: str = ""
    indent: int = 0

    def as_block(self) -> str:
        """Return the block so that every renderer recognises it as code, or finds it harmless."""
        body = "\n".join(self.code)
        if _ENDS_CODE.search(body):
            return f"<pre><code>{body.translate(_ESCAPED_CODE)}</code></pre>"
        # A fence with an info string cannot end another one, and `body` has none (`_ENDS_CODE`).
        info = re.match(r"\s*([\w+.#-]*)", self.info, re.ASCII)
        name = info[1] if info else ""
        name = "text" if not name or name.lower().startswith("mermaid") else name
        return code_fence(body, name)


def _indent(line: str) -> int:
    lead = line[: len(line) - len(line.lstrip(" \t"))]
    return len(lead.expandtabs(4))


def _dedent(line: str, columns: int) -> str:
    if not columns:
        return line
    bare = line.lstrip(" \t")
    return " " * max(0, _indent(line) - columns) + bare


def _blocks(lines: list[str]) -> Iterator[str | _Code]:
    """Yield single lines of text, and blocks of code, fenced or indented."""
    at, in_list, blank = 0, False, True
    while at < len(lines):
        line = lines[at]
        if fence := _FENCE.fullmatch(line):
            in_list = (in_list and _indent(line) > 0) or bool(fence["lead"].strip())
            at, block = _fenced(lines, at, fence)
            blank = True
            yield block
        elif blank and not in_list and _indent(line) >= 4 and line.strip():
            start = at
            while at < len(lines) and (_indent(lines[at]) >= 4 or not lines[at].strip()):
                at += 1
            while not lines[at - 1].strip():
                at -= 1
            yield _Code(lines[start:at], [_dedent(line, 4) for line in lines[start:at]])
        else:
            if line.strip() and (blank or _ITEM.match(line)):
                in_list = bool(_ITEM.match(line)) or (in_list and _indent(line) > 1)
            at, blank = at + 1, not line.strip()
            yield line


def _fenced(lines: list[str], start: int, fence: re.Match[str]) -> tuple[int, _Code]:
    """Return the block that the line `start` opens, and the number of the line after it."""
    run, indent = fence["run"], len(fence["lead"].expandtabs(4))
    quote = re.compile(rf"(?: {{0,3}}> ?){{{fence['quote'].count('>')}}}")
    closing = re.compile(rf"[ \t]*{run[0]}{{{len(run)},}}[ \t]*")
    code: list[str] = []
    at, end = start + 1, []
    while at < len(lines):
        if not (mark := quote.match(lines[at])):
            break  # the quote has ended, and with it the block
        line = lines[at][mark.end() :]
        at += 1
        if closing.fullmatch(line) and _indent(line) <= indent + 3:
            break
        code.append(_dedent(line, indent))
    else:
        if code and not code[-1]:
            code.pop()
        # A fence that the answer left open is closed, so that what follows is not code.
        end = [f"{fence['quote']}{' ' * indent}{run}"]
    lead = fence["quote"] + fence["lead"] if fence["lead"].strip() else ""
    return at, _Code(lines[start:at] + end, code, fence["info"], lead, indent)


def _normalize_formulas(text: str) -> str:
    """Return a paragraph whose formulas have delimiters that all renderers know, prices do not."""
    parts: list[str] = []
    dollars: list[int] = []  # the indexes of literal dollar signs in `parts`
    code_ends, missing = _code_ends(text), set[str]()
    at = formulas = 0
    while mark := _OPENS_FORMULA.search(text, at):
        opening, start, after = mark[0], mark.start(), mark.end()
        parts.append(text[at:start])
        at = after
        if opening[0] == "`":
            at = code_ends.get(start, after)
        elif opening in ("\\(", "\\["):
            closing = opening.replace("(", ")").replace("[", "]")
            end = text.find(closing, after, after + MAX_FORMULA_CHARS)
            inner = text[after : max(end, after)]
            # `\[text\](address)` is a link that was escaped.
            if inner.strip() and "$" not in inner and not text.startswith("(", end + 2):
                around = "$" if opening[1] == "(" else "$$"
                inner = inner.strip() if around == "$" else inner
                parts.append(f"{around}{inner}{around}")
                formulas, at = formulas + 1, end + 2
                continue
        elif opening in ("$", "$$"):
            end = _dollar_end(text, start, opening)
            if end < 0:
                dollars += range(len(parts), len(parts) + len(opening))
                parts += opening
                continue
            formulas, at = formulas + 1, end
        elif opening == "\\$":
            dollars.append(len(parts))
        elif (end := _math_end(text, mark, missing)) > 0:
            at = end
        parts.append(text[start:at])
    # One sign alone has no partner to make a formula with, and can stay as it is.
    if len(dollars) > 1 or (dollars and formulas):
        for index in dollars:
            parts[index] = _LITERAL_DOLLAR
    return "".join((*parts, text[at:]))


def _dollar_end(text: str, start: int, opening: str) -> int:
    """Return the end of the formula that a dollar sign opens, or -1 if it is money."""
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
    following: dict[int, int] = {}  # the end of the next run of so many backticks
    # From the end on, so that the time is linear in hostile text, too.
    for run in reversed(list(re.finditer("`+", text))):
        # A backslash before the run takes its first backtick.
        for start in (run.start(), run.start() + 1):
            if (end := following.get(run.end() - start)) is not None:
                ends[start] = end
        following[len(run[0])] = run.end()
    return ends


def _keep_readable(text: str, images: bool) -> str:
    """Return text whose code spans and formulas `_make_harmless` will not change visibly."""
    if _make_harmless(text, images) == text:
        return text
    in_table = text.lstrip("\n \t").startswith("|")
    code_ends, missing = _code_ends(text), set[str]()
    parts: list[str] = []
    done = at = 0
    while mark := _OPENS_SPAN.search(text, at):
        at = mark.end()
        is_code = mark[0].startswith("`")
        end = code_ends.get(mark.start(), -1) if is_code else _math_end(text, mark, missing)
        if end <= at:
            continue
        parts.append(text[done : mark.start()])
        whole = text[mark.start() : end]
        if not is_code:
            whole = _NEEDS_BLANK.sub(" ", whole)
        elif _make_harmless(whole, images) != whole:
            code = text[at : end - len(mark[0])].replace("\n", " ")
            if code.strip() and code[0] == code[-1] == " ":
                code = code[1:-1]
            if in_table:
                code = code.replace("\\|", "|")
            whole = f"<code>{code.translate(_ESCAPED_CODE)}</code>"
        parts.append(whole)
        done = at = end
    return "".join((*parts, text[done:]))


def _math_end(text: str, mark: re.Match[str], missing: set[str]) -> int:
    """Return the end of the formula that `mark` opens, or -1 if it opens none."""
    opening = mark[0]
    if mark["env"] is not None:
        closing = f"\\end{{{mark['env']}}}"
    elif opening[-1] in "$([" and opening != "\\$":
        closing = opening.replace("(", ")").replace("[", "]")
    else:
        return -1
    if closing in missing:
        return -1
    end = text.find(closing, mark.end())
    if end < 0:
        missing.add(closing)
        return -1
    return -1 if text[end - 1] == "\\" else end + len(closing)
