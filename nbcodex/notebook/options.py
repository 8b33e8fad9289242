"""What may stand behind `%%codex`: the options of a cell, read into plain values."""

from __future__ import annotations

import argparse
import functools
import json
import keyword
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from IPython.core.error import UsageError

from nbcodex.errors import ConfigurationError, did_you_mean, shorten
from nbcodex.models import Schema
from nbcodex.openai_api import request_body
from nbcodex.rendering.formats import INSTRUCTIONS, Format
from nbcodex.requests.structured_output import ANY_JSON, declare
from nbcodex.settings import parse_duration

T = TypeVar("T")

_TAKEN = {"In", "Out", "get_ipython", "exit", "quit", "_", "_i", "_ih", "_oh", "_dh"}
"""Names that IPython itself needs."""


_OPENAI = {"openai", "openai-chat", "openai-chat-custom", "openai-custom", "azure-chat-openai"}
_PROVIDERS = _OPENAI | {
    *("ai21", "anthropic", "anthropic-chat", "amazon-bedrock", "bedrock", "bedrock-chat"),
    *("bedrock-custom", "cohere", "gemini", "gpt4all", "huggingface_hub", "mistralai"),
    *("nvidia-chat", "ollama", "openrouter", "qianfan", "sagemaker-endpoint", "togetherai"),
    *("vertexai",),
}
"""What stands before a model's name in `%%ai`, with a colon."""

_INSERT_HINT = "`%codex insert` puts it into a cell"

FORMATS = ["markdown", "md", "text", "code", "json", "html", "math", "image"]
"""How an answer may be shown."""

_PARAMS = ("-p", "--params", "--model-parameters")
_BARE = re.compile(rf"(?<!\S)({'|'.join(_PARAMS)})(?:\s+|=)(?=\{{)")

_EPILOG = """\
{name} in the prompt is filled in from the notebook; --raw leaves it alone. Examples:
  %%codex -o answer                   bind the Reply: .text .parsed .usage .cost .status
  %%codex gpt-5.6-mini -f code        the code goes into a new cell; nothing is run
  %%codex --schema Person -o p        p.parsed is a validated Person
  %%codex -b --patience 2h            go on meanwhile, whatever the limits
%codex help lists what else there is, %config Codex the settings.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises IPython's own error instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%%codex: {message.rstrip('.')}. See %%codex?")


def _count(text: str) -> int:
    """Read a number of tokens: ``800``, ``2k``."""
    try:
        number = int(float(text[:-1]) * 1000) if text.lower().endswith("k") else int(text)
    except (ValueError, OverflowError):
        number = 0
    if not 1 <= number < 2**53:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of tokens, 1 or more")
    return number


def _model(text: str) -> str:
    if text.lstrip().startswith("{"):
        raise argparse.ArgumentTypeError("takes a model's name; API parameters go to -p/--params")
    return text


def _params(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({shorten(str(error), 80)})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is not a JSON object such as '{\"temperature\": 0}'")
    from nbcodex.openai_api.request_body import check_params

    return _checked(check_params, value)


def _url(text: str) -> str:
    from nbcodex.openai_api.endpoints import parse_base_url

    return _checked(lambda url: parse_base_url(url, "This"), text)


def _checked(check: Callable[[T], object], value: T) -> T:
    """Return `value` if `check` has nothing against it."""
    try:
        check(value)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _thread(text: str) -> str:
    from nbcodex.requests.options import LONGEST_NAME, is_thread

    if not is_thread(text):
        raise argparse.ArgumentTypeError(f"is a name of at most {LONGEST_NAME} characters")
    return text


def _wait(text: str) -> str:
    return _checked(parse_duration, text)


def _name(text: str) -> str:
    taken = keyword.iskeyword(text) or text.startswith("__") or text in _TAKEN
    if not text.isidentifier() or taken:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a variable")
    return text


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Return the parser of a cell's options."""
    cell = _Parser(
        prog="%%codex",
        usage="%%%%codex [MODEL] [options]",
        add_help=False,
        allow_abbrev=False,
        description="Ask a model; the text below the first line is the prompt.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, add_options in _GROUPS.items():
        add_options(cell.add_argument_group(title).add_argument)
    return cell


def _question(add: Callable[..., object]) -> None:
    add("MODEL", nargs="?", type=_model, help="model (on Azure: deployment) to ask")
    add("-m", "--model", type=_model, metavar="MODEL", help="the same, as an option")
    add("--system", metavar="TEXT", help="instructions to stand before the prompt")
    add(
        "--image", action="append", default=[], metavar="EXPR", help="picture: a path or a variable"
    )
    add("--map", type=_name, metavar="NAME", help="ask for each row of a variable: {column}, {}")
    add("--eval", action="store_true", help="run the cell: what it prints is the prompt")
    add("--raw", action="store_true", help="leave {…} in the prompt alone")
    add("--max-output", type=_count, metavar="N", help="upper bound on output tokens")
    add("--effort", metavar="LEVEL", help="reasoning effort, such as low or high")
    add(
        *_PARAMS,
        type=_params,
        metavar="JSON",
        help="further parameters of the API: '{\"temperature\": 0}'",
    )


def _answer(add: Callable[..., object]) -> None:
    add("-o", "--out", type=_name, metavar="NAME", help="variable that the Reply is bound to")
    add(
        "-f",
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"how it is shown: {', '.join(FORMATS)}; code goes into a new cell, and is never run",
    )
    add("--schema", type=_name, metavar="NAME", help="variable: a pydantic class or JSON schema")


def _conversation(add: Callable[..., object]) -> None:
    add("--thread", metavar="NAME", type=_thread, help="conversation to join (usually: main)")
    add("--new", action="store_true", help="start the conversation afresh with this cell")
    add("--no-history", action="store_true", help="neither see the conversation nor join it")


def _course(add: Callable[..., object]) -> None:
    add("-b", "--background", action="store_true", help="go on with other cells meanwhile")
    add("--patience", type=_wait, metavar="DURATION", help="longest wait for limits: 90s, 10m, 2h")
    add("--dry-run", action="store_true", help="tell tokens and cost, and send nothing")
    add("--reuse", action="store_true", help="show the answer to an equal prompt again, at no cost")
    add("--durable", action="store_true", help="have the server keep the answer until it is here")


def _server(add: Callable[..., object]) -> None:
    add("--api-base", type=_url, metavar="URL", help="base URL for this request")
    add("--api", choices=["auto", "responses", "chat"], help="API to speak")


_GROUPS = {
    "the question": _question,
    "the answer": _answer,
    "the conversation": _conversation,
    "waiting and paying": _course,
    "the server": _server,
}


def read(line: str) -> argparse.Namespace:
    """Return the options that stand in `line`.

    Raises
    ------
    UsageError
        If they make no sense; it says which one, and names the nearest that exists.
    """
    try:
        words = shlex.split(_quoted(line))
    except ValueError as error:
        raise UsageError(f"%%codex: {error} in the options: {line.strip()[:80]}") from None
    cell = parser()
    options, rest = cell.parse_known_args(words)
    if rest:
        raise UsageError(f"%%codex: {_unknown(cell, rest[0])} See %%codex?")
    if options.MODEL and options.model and options.model != options.MODEL:
        raise UsageError(f"%%codex: two models, {options.MODEL} and {options.model}: name one")
    if options.no_history and (options.new or options.thread):
        raise UsageError("%%codex: --no-history joins no conversation: drop it, or --new, --thread")
    options.model = check_provider(options.model or options.MODEL)
    return options


def _quoted(line: str) -> str:
    """Return a line with the JSON that stands there without quotes, as `%%ai` takes it, in them."""
    for found in _BARE.finditer(line):
        try:
            shlex.split(line[: found.start()])  # fails inside of quotes
            _, end = json.JSONDecoder().raw_decode(line, found.end())
        except (ValueError, RecursionError):
            continue
        rest = _quoted(line[end:])
        return f"{line[: found.start()]}{found[1]} {shlex.quote(line[found.end() : end])}{rest}"
    return line


def check_provider(model: str | None) -> str | None:
    """Return a model's name, or say what stands for the provider before it in `%%ai`.

    Raises
    ------
    UsageError
        If a provider stands before it.
    """
    provider, colon, name = (model or "").partition(":")
    if not colon or provider not in _PROVIDERS:
        return model
    if provider in _OPENAI:
        raise UsageError(f"%%codex: write {name or 'the model'} without {provider}: before it")
    raise UsageError(
        f"%%codex: {provider} is no model: nbcodex asks OpenAI, Azure and servers that speak their "
        f"API. Use --api-base URL -m {name or 'MODEL'}"
    )


def _unknown(cell: argparse.ArgumentParser, word: str) -> str:
    known = [name for action in cell._actions for name in action.option_strings]
    return f"there is no option {word[:60]}{did_you_mean(word.partition('=')[0], known)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """The format of a cell's answer, and what has to be sent so that the answer has it.

    Parameters
    ----------
    format : Format
        The format in which the answer is shown.
    system, params, api, schema
        As `build_request` takes them.
    notes : tuple of str
        Shown beside the figures.
    """

    format: Format
    system: str | None
    params: Mapping[str, Any] | None
    api: str | None
    schema: Schema | None
    notes: tuple[str, ...] = ()


def output_spec(chosen: argparse.Namespace, variables: Mapping[str, Any]) -> OutputSpec:
    """Return the output that a cell's options ask for.

    Raises
    ------
    UsageError, ConfigurationError
        If the options contradict each other, or the schema does not exist.
    """
    schema = _schema(chosen.schema, variables) if chosen.schema else None
    named = {"md": "markdown"}.get(chosen.format, chosen.format)
    format_: Format = named or ("json" if schema else "markdown")
    if schema and format_ not in {"json", "markdown", "text"}:
        raise UsageError(f"%%codex: --schema makes JSON, not {format_}: leave -f {format_} out")
    params, api = chosen.params, chosen.api
    if format_ == "image":
        if api == "chat":
            raise UsageError("%%codex: -f image needs the Responses API: leave --api chat out")
        params, api = {**request_body.image_generation_params(), **(params or {})}, "responses"
    instructions = "" if schema else INSTRUCTIONS.get(format_, "")
    return OutputSpec(
        format=format_,
        system="\n\n".join(filter(None, (chosen.system, instructions))) or None,
        params=params,
        api=api,
        schema=schema or (ANY_JSON if format_ == "json" else None),
        notes=(_INSERT_HINT,) if format_ == "code" and chosen.background else (),
    )


def _schema(name: str, variables: Mapping[str, Any]) -> Schema | None:
    if name not in variables:
        raise ConfigurationError(
            f"--schema {name}: there is no such variable.",
            advice="Define a pydantic class, or a dict with a JSON schema, in a cell above.",
        )
    return declare(variables[name])
