"""HTML that may stay in a notebook: of an answer, what is harmless; of ours, a button that copies.

The button's handler is a constant, and the one script there is. No answer can make an element that
passes for it, for none may have a class.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_TAGS = frozenset(
    re.findall(
        r"\w+",
        """a abbr b bdi bdo blockquote br caption center cite code col colgroup dd del details dfn
        div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q rp rt
        ruby s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul var
        wbr""",
    )
)
_ATTRIBUTES = {
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "col": {"span"},
    "colgroup": {"span"},
    "ol": {"start"},
    "td": {"align", "colspan", "rowspan"},
    "th": {"align", "colspan", "rowspan", "scope"},
}
_LINK = re.compile(r"(?i:https?://|mailto:)\S*|[#?][^\s\\]*|(?!//)[\w./~+-][^\s:\\]*")
_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
_REMOTE = re.compile(r"(?i:https?:)?//\S+")

# In what nh3 writes, every attribute is quoted, and no quote is within one.
_IMAGE = re.compile(r'<img(?: [a-z]+="[^"]*")*>')
_ATTRIBUTE = re.compile(r'([a-z]+)="([^"]*)"')

_COPY = (
    '<button type="button" class="nbcodex-copy" onclick="((b)=>{const c=b.nextElementSibling,'
    "done=()=>{b.textContent='Copied'},old=()=>{const s=getSelection();s.selectAllChildren(c);"
    "document.execCommand('copy');s.removeAllRanges();done()};navigator.clipboard?"
    'navigator.clipboard.writeText(c.textContent).then(done,old):old()})(this)">Copy</button>'
)


def sanitize_html(text: str, *, remote_images: bool, drop: Callable[[str], None]) -> str:
    """Return HTML of which only the harmless is left; `drop` hears of each image taken out."""
    import nh3  # only for this format

    def allowed(tag: str, name: str, value: str) -> str | None:
        if (tag, name) == ("a", "href"):
            return value if _LINK.fullmatch(value) else None
        if (tag, name) != ("img", "src"):
            return value
        if _PICTURE.fullmatch(value) or (remote_images and _REMOTE.fullmatch(value)):
            return value
        drop(value)
        return None

    cleaned = nh3.clean(
        text,
        tags=set(_TAGS),
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto", "data"},
        attribute_filter=allowed,
        clean_content_tags={"script", "style", "title", "template", "noscript"},
    )
    return _IMAGE.sub(_put_in_words, cleaned)


def _put_in_words(found: re.Match[str]) -> str:
    """Return an image that has nothing to show as what it was to show, in brackets."""
    attributes = dict(_ATTRIBUTE.findall(found[0]))
    if "src" in attributes:
        return found[0]
    alt = html.unescape(attributes.get("alt", ""))
    return f"[{html.escape(alt)}]" if alt else ""


def code_listing(blocks: list[str]) -> str:
    """Return blocks of code as HTML, each with a button that copies it."""
    return "".join(
        f'<div style="margin-top: 8px">{_COPY}'
        f"<pre><code>{html.escape(printable(code))}</code></pre></div>"
        for code in blocks
    )


def printable(text: str) -> str:
    """Return `text` without the control characters that could take over a terminal."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
