"""Answers as Markdown that runs and fetches nothing in any program that renders it.

Owns what a stored answer may contain. No two renderers agree on what is code, so the result is
harmless even if all of it were read as ordinary text with raw HTML. The one exception are fenced
blocks that every renderer recognises.
"""

from __future__ import annotations

import html
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

MAX_FORMULA_CHARS = 2_000  # bounds the search for the end of a formula, or of code beside one
MAX_NESTED_LINES = 2_000  # how far the end of a block with fences in it is looked for

_TAGS = "br|del|details|hr|ins|kbd|mark|p|q|samp|sub|summary|sup|var"
_STYLES = "b|code|em|i|s|small|strong|u"  # left open, these would format the rest of the page

# A destination may not contain `$`, `\` or `@@`: JupyterLab puts formulas back into the finished
# HTML, with their quotes, even where their placeholder is within an attribute.
_CHAR = r"""[^\s()<>\[\]"`$\\@]"""
_SEGMENT = r"(?:[\w.~+,;=*|{}-]|%20)"
_TARGET = (
    rf"(?:(?i:https?://|mailto:)|[#?]|\.{{0,2}}/(?![/\\&%])|{_SEGMENT}++(?=[/?#)\s]|\Z))"
    rf"(?:{_CHAR}|@(?!@)|\\_|\({_CHAR}*\))*+"
)
_TITLE = r"""(?:"[^"$\\@`<\[\]]*"|'[^'"$\\@`<\[\]]*')"""
_REST = rf"(?:\s++{_TITLE})?\s*+\)"
_ALT = r"""!\[[^\[\]$\\@"<>`]*+(?=\]\[|\]\()"""

# Constructs that could run, load or link: the handler of each named group is in `_defuse`. The
# quantifiers are possessive, so that hostile text cannot make matching slow.
_DANGER = re.compile(
    rf"""
    (?P<link>   \]\(\s*+(?:{_TARGET}(?=[\s)]))?{_REST} )
  | \]\(\s*+<(?P<angle>[^<>\n]*+)>(?P<rest>{_REST})
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
_OPENS_FENCE = re.compile(r"(`{3,}|~{3,})([^\n]*)")
# Some renderers turn bare URLs into links by themselves.
_URL = re.compile(r"(?i:https?://|ftp://|www\.)\S*")
# Where a formula has characters that would be a tag or a link, a blank between them is invisible.
_TIGHT = re.compile(r"(?<=<)(?=[A-Za-z/!?])|(?<=\])(?=[(:])|(?<=!)(?=\[)")

_FENCE = re.compile(
    r"(?P<quote>(?: {0,3}> ?)*+)(?P<lead>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)*+)"
    r"(?P<run>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_QUOTE = re.compile(r" {0,3}> ?")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)")
_PIECE = re.compile(r"(\n[ \t]*\n|\n(?=[ \t>]*(?:[-*+]|\d{1,9}[.)]|\#{1,6})[ \t])|\n(?=[ \t]*\|))")
# Lines of code that could end what a renderer has open (a fence, nbconvert's formula), so that it
# would read the rest of the code as text.
_ENDS = re.compile(r"^[\s>*+.)\d-]*(?:```|~~~)|\$\$|\\\\\]|\\end\{", re.MULTILINE)
_MARK = re.compile(r"`+|\$\$?|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}|\\[\s\S]")

# What can begin a formula, or hides a dollar sign: code, a link's destination, a bare URL.
_FORMULA_MARK = re.compile(
    r"`+|\]\([^()\s]*\)|(?i:https?://|www\.)\S*|\\\\?[(\[]|\\begin\{(?P<env>[a-z]*\*?)\}"
    r"|\\\$|\$\$|\$|\\[\s\S]"
)
_MATH_CHARACTER = re.compile(r"[\\^_={}<>+*|]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# MathJax reads a pair of dollar signs as a formula even if Markdown's `\$` or an entity made them;
# it does not look into an element of its own.
_DOLLAR = "<span>&#36;</span>"

_SPECIAL = {ord(c): f"&#{ord(c)};" for c in string.punctuation if c not in ",-./;?"}
_ENTITIES = _SPECIAL | {ord("."): "&#46;", ord("\n"): "&#10;"}
_INFO = {ord(c): f"&#{ord(c)};" for c in '"$\\@'}
_CONTROLS: dict[int, str | None] = {
    **dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFEFF)),
    **dict.fromkeys((0x0D, 0x85, 0x2028, 0x2029), "\n"),
}


def sanitize_markdown(text: str, *, remote_images: bool = False) -> str:
    """Return Markdown that looks like `text`, and runs and fetches nothing in any renderer.

    Parameters
    ----------
    text : str
        A model's answer.
    remote_images : bool
        Whether images stay. Otherwise they become links, because loading one sends data out.

    Returns
    -------
    str
        The Markdown. It keeps a few HTML tags without attributes, and links to ``http``,
        ``https``, ``mailto``, fragments and relative paths; the rest is shown as text.
    """
    document = _Document(remote_images)
    for block in _blocks(_clean(text).split("\n")):
        if isinstance(block, str):
            document.write(block)
        elif _disarm(kept := "\n".join(block.lines), remote_images) == kept:
            document.write(*block.lines, code=True)
        else:
            document.insert(block)
    return document.result()


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of an answer: the text behind the opening fence, and the code."""
    blocks = _blocks(_clean(text).split("\n"))
    return [
        (block.info.strip(), "\n".join(block.code))
        for block in blocks
        if isinstance(block, _Code) and _FENCE.fullmatch(block.lines[0])
    ]


def fenced_code(text: str, is_whole: Callable[[str, str], bool]) -> list[tuple[str, str, bool]]:
    """Return the fenced blocks of an answer with the fences inside of them.

    Models put fences of equal length into each other, which Markdown would read as the end of the
    outer one. A fence with an info string opens an inner block; beyond that, the first closing
    fence counts that makes the code whole.

    Parameters
    ----------
    text : str
        The answer.
    is_whole : callable
        Whether a block's info string and code are a complete program.

    Returns
    -------
    list of tuple
        Of each block the info string, the code, and whether its fence was closed.
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
            indent = len(fence["lead"].expandtabs(4))
            longer = "\n".join(_dedent(line, indent) for line in lines[at + 1 : later - 1])
            if is_whole(info, longer):
                end, code = later, longer
                break
        blocks.append((info, code, is_closed))
        at = end
    return blocks


def _later_ends(lines: list[str], start: int, end: int, fence: re.Match[str]) -> list[int]:
    """Return the lines after which a block could end later than at `end`, the likeliest first."""
    run, depth = fence["run"], 1
    likeliest: list[int] = []
    others: list[int] = []
    for at in range(start + 1, min(len(lines), start + MAX_NESTED_LINES)):
        inner = _FENCE.fullmatch(lines[at])
        if not inner or inner["run"][0] != run[0] or len(inner["run"]) < len(run):
            continue
        if inner["info"].strip():
            depth += 1
            continue
        depth -= 1
        if at + 1 > end:
            (others if likeliest or depth else likeliest).append(at + 1)
    return [*likeliest, *others]


def code_fence(code: str, info: str = "") -> str:
    """Return `code` as a fenced block that no fence within it can end."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{info}\n{code}\n{fence}"


def escape_inline(text: str) -> str:
    """Escape a short plain text, such as a model's name, for use in a line of Markdown."""
    return " ".join(_clean(text).split()).translate(_SPECIAL)


def _clean(text: str) -> str:
    # Renderers read CR as a line end or as a blank, and browsers drop it from URLs.
    text = text.replace("\r\n", "\n").translate(_CONTROLS)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _disarm(text: str, images: bool) -> str:
    """Return `text` changed so that it is harmless as text; `text` itself if it already is."""
    text = _OPENS_FENCE.sub(_plain_info, text)
    text = _URL.sub(_plain_url, text)
    return _DANGER.sub(lambda found: _defuse(found, images), text)


def _plain_info(found: re.Match[str]) -> str:
    # nbconvert writes a mermaid block as live HTML, JupyterLab puts the info into an attribute.
    run, info = found.groups()
    if "mermaid" in html.unescape(info).lower():
        info = re.sub(r"(?i)(?<!text-)mermaid", "text-mermaid", info.replace("&#", "&amp;#"))
    return run + info.translate(_INFO)


def _plain_url(found: re.Match[str]) -> str:
    url = re.sub(r"\\(?=\\|begin)", "%5C", found[0].replace("$", "%24").replace("@@", "%40%40"))
    return re.sub(r"(?i)\A(ftp):", r"\1&#58;", url)


def _defuse(found: re.Match[str], images: bool) -> str:
    match found.lastgroup:
        case "rest":
            target = re.sub(r"\s", "%20", found["angle"].strip())
            target = target.replace("(", "%28").replace(")", "%29")
            safe = not target or re.fullmatch(_TARGET, target)
            return f"]({target}{found['rest']}" if safe else found[0].translate(_SPECIAL)
        case "broken":
            return "]&#40;"
        case "define":
            return "]&#58;"
        case "image":
            return found[0] if images else found[0][1:]
        case "bang":
            return "&#33;"
        case "auto":
            return found["auto"]
        case "open":
            return "&lt;"
        case _:
            return found[0]


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
        if _ENDS.search(body):
            return f"<pre><code>{body.translate(_ENTITIES)}</code></pre>"
        # A fence with an info string cannot end another one, and none is in `body` (see `_ENDS`).
        info = re.match(r"\s*([\w+.#-]*)", self.info, re.ASCII)
        name = info[1] if info else ""
        name = "text" if not name or name.lower().startswith("mermaid") else name
        return code_fence(body, name)


@dataclass(slots=True)
class _Document:
    """The Markdown so far: finished parts, and lines that the next ones may still join."""

    images: bool
    parts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    shift: int = 0

    def write(self, *lines: str, code: bool = False) -> None:
        """Add lines of text, or a block of code that is harmless as it is."""
        if lines[0].strip():
            self.shift = min(self.shift, _indent(lines[0]))
        lines = tuple(_dedent(line, self.shift) for line in lines)
        if code:
            self._disarm_prose()
            self.lines += lines
        else:
            self.prose += lines

    def insert(self, block: _Code) -> None:
        """Add a block of code that has to be rendered anew, at the margin."""
        # What follows in the same list keeps its shape, but moves to the margin, too: with four
        # blanks before it, it would become code.
        if block.lead.strip():
            self.write(block.lead.rstrip())
        self._flush()
        if self.parts:
            self.parts[-1] = self.parts[-1].rstrip("\n")
        self.parts.append(block.as_block())
        self.shift = block.indent

    def result(self) -> str:
        """Return all of it."""
        self._flush()
        return "\n\n".join(self.parts)

    def _disarm_prose(self) -> None:
        if self.prose:
            text = _set_formulas("\n".join(self.prose))
            self.lines.append(_spell(text, self.images))
            self.prose = []

    def _flush(self) -> None:
        self._disarm_prose()
        if self.lines:
            text = _disarm("\n".join(self.lines), self.images)
            self.parts.append(text.lstrip("\n") if self.parts else text)
            self.lines = []


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
            at, block = _indented(lines, at)
            yield block
        else:
            if line.strip() and (blank or _ITEM.match(line)):
                in_list = bool(_ITEM.match(line)) or (in_list and _indent(line) > 1)
            at, blank = at + 1, not line.strip()
            yield line


def _fenced(lines: list[str], start: int, fence: re.Match[str]) -> tuple[int, _Code]:
    depth, run = fence["quote"].count(">"), fence["run"]
    indent = len(fence["lead"].expandtabs(4))
    closing = re.compile(rf"[ \t]*{run[0]}{{{len(run)},}}[ \t]*")
    code: list[str] = []
    at, end = start + 1, []
    while at < len(lines):
        line = _unquote(lines[at], depth)
        if line is None:
            break
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


def _unquote(line: str, depth: int) -> str | None:
    """Return `line` without its quote marks; None if it is outside of the quote."""
    for _ in range(depth):
        if not (mark := _QUOTE.match(line)):
            return None
        line = line[mark.end() :]
    return line


def _indented(lines: list[str], start: int) -> tuple[int, _Code]:
    at = start
    while at < len(lines) and (_indent(lines[at]) >= 4 or not lines[at].strip()):
        at += 1
    while not lines[at - 1].strip():
        at -= 1
    return at, _Code(lines[start:at], [_dedent(line, 4) for line in lines[start:at]])


def _set_formulas(text: str) -> str:
    """Return prose whose formulas have delimiters that all renderers know, and prices do not."""
    if "$" not in text and "\\(" not in text and "\\[" not in text:
        return text
    return "".join(
        _set_formulas_of(part) for part in re.split(r"(\n[ \t]*\n|\n(?=[ \t]*\|))", text)
    )


def _set_formulas_of(text: str) -> str:
    parts: list[str] = []
    dollars: list[int] = []  # the indexes of literal dollar signs in `parts`
    at = formulas = 0
    missing: set[str] = set()
    while mark := _FORMULA_MARK.search(text, at):
        opening, start, after = mark[0], mark.start(), mark.end()
        parts.append(text[at:start])
        at = after
        if opening[0] == "`":
            same = re.compile(rf"(?<!`){opening}(?!`)").search(
                text, after, after + MAX_FORMULA_CHARS
            )
            at = same.end() if same and opening not in missing else after
            missing |= set() if same else {opening}
        elif opening in ("\\(", "\\["):
            closing = {"(": "\\)", "[": "\\]"}[opening[1]]
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
            parts[index] = _DOLLAR
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


def _spell(text: str, images: bool) -> str:
    """Return text whose code spans and formulas still look right after `_disarm`."""
    return "".join(_spell_piece(piece, images) for piece in _PIECE.split(text))


def _spell_piece(text: str, images: bool) -> str:
    if _disarm(text, images) == text:
        return text
    runs: dict[int, list[int]] = {}
    for run in re.finditer("`+", text):
        runs.setdefault(len(run[0]), []).append(run.start())
    missing: set[str] = set()
    parts: list[str] = []
    done = at = 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        code = mark[0].startswith("`")
        end = _code_end(runs, mark) if code else _math_end(text, mark, missing)
        if end > at:
            parts.append(text[done : mark.start()])
            whole = text[mark.start() : end]
            parts.append(
                _code_span(whole, at - mark.start(), text, images)
                if code
                else _TIGHT.sub(" ", whole)
            )
            done = at = end
    return "".join((*parts, text[done:]))


def _code_end(runs: dict[int, list[int]], mark: re.Match[str]) -> int:
    size = len(mark[0])
    same = runs.get(size, [])
    nth = bisect_left(same, mark.end())
    return same[nth] + size if nth < len(same) else -1


def _math_end(text: str, mark: re.Match[str], missing: set[str]) -> int:
    """Return the end of the formula that `mark` opens, or -1 if it opens none."""
    opening = mark[0]
    match opening[-1]:
        case "$":
            closing = opening
        case "(" | "[":
            closing = opening[:-1] + {"(": ")", "[": "]"}[opening[-1]]
        case "}" if mark["env"] is not None:
            closing = f"\\end{{{mark['env']}}}"
        case _:
            return -1
    if opening == "\\$" or closing in missing:
        return -1
    end = text.find(closing, mark.end())
    if end < 0:
        missing.add(closing)
        return -1
    return -1 if text[end - 1] == "\\" else end + len(closing)


def _code_span(whole: str, size: int, text: str, images: bool) -> str:
    if _disarm(whole, images) == whole:
        return whole
    code = whole[size:-size].replace("\n", " ")
    if code.strip() and code[0] == code[-1] == " ":
        code = code[1:-1]
    if text.lstrip("\n \t").startswith("|"):
        code = code.replace("\\|", "|")
    return f"<code>{code.translate(_ENTITIES)}</code>"
