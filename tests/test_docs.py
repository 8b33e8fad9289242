"""The documentation is true: its code runs, and what it names exists."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import TransformerManager

import nbcodex
from nbcodex import cli, errors
from nbcodex.errors import NbcodexError
from nbcodex.models import Reply
from nbcodex.notebook import cell_options, commands
from nbcodex.notebook.config import Codex
from nbcodex.ratelimit.stores.redis import RedisStore
from nbcodex.settings import _ENVIRONMENT
from nbcodex.simulator import generated_answers
from nbcodex.simulator.parsed_request import ParsedRequest
from tests.kernel_client import CellResult, Kernel, kernel
from tests.redis_server import redis_server
from tests.simulated import Simulated, simulated

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
PAGES = sorted(commands.PAGES_FOLDER.glob("*.md"))
DOCUMENTS = [README, CONTRIBUTING, ROOT / ".github" / "CHANGELOG.md", *PAGES]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

_FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n\n?)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_ANSWERS = re.compile(r"<!-- simulated answers\n(.*?)-->", re.DOTALL)
_VARIES = re.compile(r"\b[0-9a-f]{8}\b|[\d.,]+")
_NOTES = ("not run: ", "ends in ", "the simulator stands for ")


def name_of(page: Path) -> str:
    return page.name


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page, and the HTML comment before it."""

    page: Path
    language: str
    code: str
    note: str = ""

    def after(self, note: str) -> str:
        """Return what follows `note` in the block's comment; empty if it says something else."""
        return self.note.removeprefix(note) if self.note.startswith(note) else ""

    def __str__(self) -> str:
        return f"{self.page.name}: {self.code.splitlines()[0]}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = (
        Block(page=page, language=m["language"], code=m["code"], note=m["note"] or "")
        for m in _FENCE.finditer(page.read_text(encoding="utf-8"))
    )
    return [block for block in found if not languages or block.language in languages]


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_blocks_have_known_language_and_note(page: Path) -> None:
    """Every block is a cell, a console session or an output; its comment is understood."""
    for block in blocks(page):
        assert block.language in {"python", "console", "text"}, block
        assert not block.note or block.note.startswith(_NOTES), block


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    """Blocks that are not run are valid cells."""
    for block in blocks(page, "python"):
        cell = TransformerManager().transform_cell(block.code)
        compile(cell, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_console_blocks_name_existing_commands(page: Path) -> None:
    """What a console block installs, runs or sets exists; nothing of it is executed."""
    for block in blocks(page, "console"):
        for line in block.code.splitlines():
            for command in line.split(" && "):
                _check_command(shlex.split(command, comments=True))


def _check_command(words: list[str]) -> None:
    program, *rest = words
    match Path(program).name:
        case "nbcodex":
            with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
                cli.main([*rest, "--help"])
            assert ended.value.code == 0
            for option in rest:
                assert option in printed.getvalue()
        case "pip":
            assert rest[0] == "install"
            for word in rest[1:]:
                assert word in {"-q", "-e"} or _is_installable(word), word
        case "python" | "python3":
            assert rest[0] == "-m"
            assert find_spec(rest[1]), rest[1]
            if rest[1] == "pytest":
                _check_pytest_options(rest[2:])
        case "export":
            assert rest[0].partition("=")[0] in _ENVIRONMENT, rest
        case "pytest":
            _check_pytest_options(rest)
        case other:
            assert other in _OTHER_PROGRAMS, other


_OTHER_PROGRAMS = {"git", "cd", "ruff", "mypy", "lint-imports", "redis-server", "redis-cli"}


def _is_installable(word: str) -> bool:
    name, _, extra = word.rstrip("]").partition("[")
    extras = PYPROJECT["project"]["optional-dependencies"]
    return name in {".", "nbcodex"} and (not extra or extra in extras)


def _check_pytest_options(words: list[str]) -> None:
    for option, value in zip(words, [*words[1:], ""], strict=True):
        match option:
            case "-m":
                markers = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
                assert value in {marker.partition(":")[0] for marker in markers}
            case "-n":
                assert find_spec("xdist")
            case path if path.startswith("tests/"):
                assert (ROOT / path).exists()


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is a file, and its anchor a heading there."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith("https://"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_slug(heading) for heading in headings}, target


def _slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_files_named_for_contributors_exist() -> None:
    """Every path in CONTRIBUTING is a file or folder of the package or the checkout."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?|\w+\.(?:py|toml|md))`", text):
        assert (ROOT / "nbcodex" / path).exists() or (ROOT / path).exists(), path


def test_picture_of_the_layers_is_that_of_import_linter() -> None:
    """CONTRIBUTING shows the packages of each layer in one line, from top to bottom."""
    (picture,) = blocks(CONTRIBUTING, "text")
    drawn = re.findall(r"^\d +(.*)$", picture.code, re.MULTILINE)
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    for line, layer in zip(drawn, layers, strict=True):
        names = {name.removeprefix("nbcodex.") for name in layer.split(" | ")}
        assert names <= {word.removesuffix(".py").rstrip("/") for word in line.split()}, layer


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_named_commands_options_and_settings_exist(page: Path) -> None:
    """`%codex WORD`, `--option` and `Codex.setting` are what the program knows."""
    text = page.read_text(encoding="utf-8")
    words = {*commands.COMMANDS, *commands._SYNONYMS}
    assert set(re.findall(r"(?<!%)%codex ([a-z]+)", text)) <= words
    assert set(re.findall(r"\bCodex\.([a-z_]+)", text)) <= set(Codex.class_trait_names())
    known = {name for action in cell_options.parser()._actions for name in action.option_strings}
    prose = re.sub(r"^```console\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose))
    assert named <= known | _OTHER_OPTIONS, named - known


_OTHER_OPTIONS = {
    *("--everywhere", "--at-reset", "--new-server"),  # %codex resume
    "--headless",  # nbcodex demo
    *("--region-name", "--request-schema", "--response-path"),  # %%ai
    "--api-key",  # vLLM
    *("--port", "--tpm"),  # nbcodex.simulator
}


def test_readme_lists_all_options_and_commands() -> None:
    """Every option of a cell and every command is in README, every setting in its page."""
    text = README.read_text(encoding="utf-8")
    for action in cell_options.parser()._actions:
        assert any(name in text for name in action.option_strings or ["MODEL"]), action
    for word in commands.COMMANDS:
        assert f"`{word}" in text or f"%codex {word}" in text, word
    settings = (commands.PAGES_FOLDER / "settings.md").read_text(encoding="utf-8")
    for name in Codex.class_trait_names(config=True):
        assert f"`{name}" in settings, name
    for variable in _ENVIRONMENT:
        assert f"`{variable}`" in settings, variable


def test_python_page_names_existing_attributes_and_errors() -> None:
    """What the page calls an option, an attribute of a reply, or an error exists."""
    text = (commands.PAGES_FOLDER / "python.md").read_text(encoding="utf-8")
    options_table, reply_table, errors_table = (
        re.findall(r"^\|([^|]+)\|", section.partition("\n## ")[0], re.MULTILINE)
        for section in (text.partition(f"## {title}\n")[2] for title in _PYTHON_SECTIONS)
    )
    named = set(re.findall(r"`(\w+)`", "".join(options_table)))
    assert named == set(inspect.signature(nbcodex.ask).parameters) - {"prompt"}
    assert set(re.findall(r"`(\w+)`", "".join(reply_table))) <= {f.name for f in fields(Reply)}
    for name in re.findall(r"`(\w+)`", "".join(errors_table)):
        assert issubclass(getattr(errors, name), NbcodexError)


_PYTHON_SECTIONS = ("Options", "Reply", "Errors")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_is_readable_in_a_terminal(page: Path) -> None:
    """The text of a page has no fences, comments or file links, and loses no code."""
    text = commands.page_text(page.stem)
    assert not re.search(r"```|<!--|\]\(|\(\S*\.md", text)
    assert text.splitlines()[0] == commands.page_markdown(page.stem).partition("\n")[0].lstrip("# ")
    for block in blocks(page):
        assert block.code.splitlines()[0] in text


def test_topic_is_found_by_its_beginning() -> None:
    """A unique beginning is enough; otherwise the error names the topics that it may be."""
    assert commands.find_page("rate") == "rate-limits"
    with pytest.raises(UsageError, match="may be privacy or prompts"):
        commands.find_page("pr")
    with pytest.raises(UsageError, match="did you mean budgets"):
        commands.find_page("bugdets")


@pytest.mark.kernel
def test_help_shows_pages() -> None:
    """`%codex help` lists the pages; `%codex help TOPIC` renders one in a notebook."""
    with kernel() as cell:
        cell.run("%load_ext nbcodex")
        listed = cell.run("%codex help").stream
        for page in PAGES:
            assert f"%codex help {page.stem}" in listed
        shown = cell.run("%codex help rate")
        assert shown.markdown == commands.page_markdown("rate-limits")
        assert shown.plain == commands.page_text("rate-limits")
        assert "%codex resume [ID|all]" in cell.run("%codex help resume").stream


@pytest.fixture(scope="module")
def model() -> Iterator[Simulated]:
    """Start a simulator that answers as the pages say, and otherwise as usual."""
    stated = _simulated_answers()
    usual = generated_answers.answer_tokens

    def answer_tokens(request: ParsedRequest) -> tuple[str, ...]:
        text = stated.get(request.prompt)
        return usual(request) if text is None else generated_answers.tokenize(text)

    with (
        pytest.MonkeyPatch.context() as patch,
        simulated(
            tpm=10_000_000, rpm=100_000, latency=0.01, speed=5_000.0, models=(), batch_seconds=0.1
        ) as running,
    ):
        patch.setattr(generated_answers, "answer_tokens", answer_tokens)
        yield running


@pytest.fixture(scope="module")
def cell(model: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel for all pages; each page resets it first."""
    home = str(tmp_path_factory.mktemp("home"))
    with kernel(**model.environ, NBCODEX_HOME=home) as started:
        started.run("%load_ext nbcodex")
        yield started


_RESET = """\
%codex forget all
%codex budget off
%reset -f
import nbcodex
_codex = next(c for c in get_ipython().configurables if type(c).__name__ == "Codex")
for _name, _trait in _codex.traits(config=True).items():
    setattr(_codex, _name, _trait.default())
"""


def _simulated_answers() -> Mapping[str, str]:
    lines = [
        line
        for page in DOCUMENTS
        for found in _ANSWERS.findall(page.read_text(encoding="utf-8"))
        for line in found.splitlines()
    ]
    pairs = (line.split(" => ", 1) for line in lines)
    return {prompt: answer.replace(r"\n", "\n") for prompt, answer in pairs}


@pytest.mark.kernel
@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_code_blocks_run(page: Path, cell: Kernel, model: Simulated, tmp_path: Path) -> None:
    """The cells of a page run from top to bottom, and show what the page says they show."""
    assert cell.run(f"{_RESET}import os; os.chdir({str(tmp_path)!r})").error == ""
    ran = CellResult()
    for block in blocks(page):
        if server := block.after("the simulator stands for "):
            _check_configuration(cell, block, server, model)
        elif block.after("not run: "):
            continue
        elif block.language == "python":
            ran = cell.run(block.code)
            shown_error = "\n".join(ran.shown_error)
            assert ran.error == block.after("ends in "), f"{block}\n{shown_error}"
        elif block.language == "text":
            results = (o for o in ran.outputs if o["type"] == "execute_result")
            shown = ran.stream + "".join(o["data"]["text/plain"] for o in results)
            assert _VARIES.sub("#", block.code).split() == _VARIES.sub("#", shown).split(), block


def _check_configuration(cell: Kernel, block: Block, server: str, model: Simulated) -> None:
    """Run a block that configures another server, with the simulator in its place, and ask."""
    here = f"{model.url}/v1" if "/v1" in server else model.url
    host, local = (url.split("/")[2] for url in (server, here))
    assert server in block.code
    code = block.code.replace(server, here).replace(host, local)
    if block.language == "console":
        lines = (shlex.split(line, comments=True) for line in code.splitlines())
        exports = dict(words[1].split("=", 1) for words in lines if words)
        cell.run(f"{_FORGET}os.environ.update({exports!r})")
    else:
        assert cell.run(_FORGET).error == ""
        assert cell.run(code).error == ""
    before = len(model.prompts)
    ran = cell.run("%%codex --no-history\n[[echo: here]]")
    assert ran.error == "", f"{block}\n" + "\n".join(ran.shown_error)
    assert len(model.prompts) > before
    cell.run(f"{_FORGET}os.environ.update({dict(model.environ)!r})")


_FORGET = """\
import os
for name in list(os.environ):
    if name.startswith(("OPENAI_", "AZURE_OPENAI_", "NBCODEX_MODEL")):
        del os.environ[name]
%config Codex.base_url = ""
%config Codex.keys = {}
%config Codex.model = ""
"""


@pytest.mark.server
def test_redis_user_of_the_page_may_do_what_the_store_needs(tmp_path: Path) -> None:
    """The access rule in the page on shared limits suffices for the Redis store."""
    (block,) = blocks(commands.PAGES_FOLDER / "shared-limits.md", "console")
    code = block.code.replace("$ADMIN_PASSWORD", "admin").replace("$CLASS_PASSWORD", "class")
    words = shlex.split(code.splitlines()[1])
    rule = words[words.index("ACL") :]
    with redis_server(tmp_path) as server:
        assert b"OK" in server.ask(*rule)
        store = RedisStore(server.url("class", user="nbcodex"))
        for _ in range(2):
            assert store.transaction("model", lambda _: "done") == "done"
        store.close()
