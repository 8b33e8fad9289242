"""HTML for notebooks: sanitized answers, and code listings with a button that copies the code."""

from __future__ import annotations

import html
import re
from unicodedata import category

# Characters without a glyph that `str.isprintable` takes for printable: Hangul and Khmer fillers,
# the Braille blank, variation selectors, tag characters; and those reserved for more of them.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_ALLOWED_TAGS = """
a abbr b bdi bdo blockquote br caption center cite code col colgroup dd del details dfn div dl dt em
figcaption figure h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q rp rt ruby s samp small span
strong sub summary sup table tbody td tfoot th thead tr u ul var wbr
"""
_ALLOWED_ATTRIBUTES = {
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "col": {"span"},
    "colgroup": {"span"},
    "ol": {"start"},
    "td": {"align", "colspan", "rowspan"},
    "th": {"align", "colspan", "rowspan", "scope"},
}
# Links of these schemes, to a part of the page, or to a relative path; ``//name`` is a server.
_LINK = re.compile(r"(?i:https?://|mailto:)\S*|[#?][^\s\\]*|(?!//)[\w./~+-][^\s:\\]*")
# SVG is left out: it can contain scripts.
_DATA_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
_REMOTE_IMAGE = re.compile(r"(?i:https?:)?//\S+")

# In the output of nh3, which quotes every attribute and escapes quotes within it.
_IMAGE = re.compile(r'<img(?: [a-z]+="[^"]*")*>')
_ATTRIBUTE = re.compile(r'([a-z]+)="([^"]*)"')

# The only script that we add. No answer can imitate the button, because answers may not have
# classes. In pages without a secure context there is no clipboard API, only the selection.
_COPY_BUTTON = (
    '<button type="button" class="nbcodex-copy" onclick="((b)=>{const c=b.nextElementSibling,'
    "done=()=>{b.textContent='Copied'},old=()=>{const s=getSelection();s.selectAllChildren(c);"
    "document.execCommand('copy');s.removeAllRanges();done()};navigator.clipboard?"
    'navigator.clipboard.writeText(c.textContent).then(done,old):old()})(this)">Copy</button>'
)


def sanitize_html(text: str, *, remote_images: bool) -> tuple[str, int]:
    """Return HTML without anything that runs or loads, and the number of images removed from it."""
    import nh3  # a native module, needed for this format only

    removed: list[str] = []

    def filter_attribute(tag: str, name: str, value: str) -> str | None:
        if (tag, name) == ("a", "href"):
            return value if _LINK.fullmatch(value) else None
        if (tag, name) != ("img", "src"):
            return value
        if _DATA_IMAGE.fullmatch(value) or (remote_images and _REMOTE_IMAGE.fullmatch(value)):
            return value
        removed.append(value)
        return None

    def alternative_text(image: re.Match[str]) -> str:
        attributes = dict(_ATTRIBUTE.findall(image[0]))
        if "src" in attributes:
            return image[0]
        alt = html.unescape(attributes.get("alt", ""))
        return f"[{html.escape(alt)}]" if alt else ""

    cleaned = nh3.clean(
        text,
        tags=set(_ALLOWED_TAGS.split()),
        attributes=_ALLOWED_ATTRIBUTES,
        url_schemes={"http", "https", "mailto", "data"},
        attribute_filter=filter_attribute,
        clean_content_tags={"script", "style", "title", "template", "noscript"},
    )
    # An image whose source was removed is replaced by its text, in brackets.
    return _IMAGE.sub(alternative_text, cleaned), len(removed)


def code_listing(blocks: list[str]) -> str:
    """Return blocks of code as HTML, each with a button that copies it."""
    return "".join(
        f'<div style="margin-top: 8px">{_COPY_BUTTON}'
        f"<pre><code>{html.escape(visible_code(code))}</code></pre></div>"
        for code in blocks
    )


def printable(text: str) -> str:
    """Return `text` without control and format characters, which could control a terminal."""
    if text.isprintable():
        return text
    # A lone CR ends a line for Python and for editors, while a terminal overwrites the line.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    harmless = {"Zs", "Cn", "Co"}  # spaces, and characters newer than this Python or private
    return "".join(c for c in text if c.isprintable() or c in "\n\t" or category(c) in harmless)


def visible_code(code: str) -> str:
    """Return code, as it is both shown and inserted, without characters that hide or move others.

    Bidirectional controls show code in another order than it runs in (CVE-2021-42574), and
    characters without width make names differ that look the same.
    """
    return _INVISIBLE.sub("", printable(code))
