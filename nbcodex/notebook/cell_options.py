"""The options of a `%%codex` cell: parsing its first line, and what the answer's format needs.

Owns the option names, their help, and their checks. An option in `_OPTIONS` that is named as a
field of `RequestOptions` reaches the request without further code here.
"""

from __future__ import annotations

import argparse
import functools
import json
import keyword
import re
import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from IPython.core.error import UsageError

from nbcodex.errors import ConfigurationError, did_you_mean, shorten
from nbcodex.models import Schema
from nbcodex.notebook.variables import fill
from nbcodex.openai_api import request_body
from nbcodex.rendering.formats import INSTRUCTIONS, Format
from nbcodex.requests.options import MAX_THREAD_NAME_CHARS, RequestOptions, is_thread_name
from nbcodex.requests.structured_output import ANY_JSON, to_schema
from nbcodex.settings import parse_duration

ValueT = TypeVar("ValueT")

FORMATS = ["markdown", "md", "text", "code", "json", "html", "math", "image"]

_INSERT_HINT = "`%codex insert` puts it into a cell"

# IPython needs these names itself: binding a reply to one of them would break the shell.
_RESERVED_NAMES = {"In", "Out", "get_ipython", "exit", "quit", "_", "_i", "_ih", "_oh", "_dh"}

# Providers that Jupyter AI's `%%ai` puts before a model's name, with a colon.
_OPENAI_PROVIDERS = {
    *("openai", "openai-chat", "openai-chat-custom", "openai-custom", "azure-chat-openai"),
}
_OTHER_PROVIDERS = {
    *("ai21", "anthropic", "anthropic-chat", "amazon-bedrock", "bedrock", "bedrock-chat"),
    *("bedrock-custom", "cohere", "gemini", "gpt4all", "huggingface_hub", "mistralai"),
    *("nvidia-chat", "ollama", "openrouter", "qianfan", "sagemaker-endpoint", "togetherai"),
    *("vertexai",),
}

_PARAMS = ("-p", "--params", "--model-parameters")
_UNQUOTED_PARAMS = re.compile(rf"(?<!\S)({'|'.join(_PARAMS)})(?:\s+|=)(?=\{{)")

_EPILOG = """\
{name} in the prompt is filled in from the notebook's variables; --raw turns this off. Examples:
  %%codex -o answer                   assign the Reply: .text .parsed .usage .cost .status
  %%codex gpt-5.6-mini -f code        put the code into a new cell, without running it
  %%codex --schema Person -o p        p.parsed is a validated Person
  %%codex -b --patience 2h            run other cells while this one waits for limits
%codex help lists the commands, %config Codex the settings.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises IPython's own error instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%%codex: {message.rstrip('.')}. See %%codex?")


def _token_count(text: str) -> int:
    """Parse a number of tokens such as ``800`` or ``2k``."""
    try:
        number = int(float(text[:-1]) * 1000) if text.lower().endswith("k") else int(text)
    except (ValueError, OverflowError):
        number = 0
    # JSON numbers are exact up to 2**53 in every server's language.
    if not 1 <= number < 2**53:
        raise ArgumentTypeError(f"{text[:40]!r} is not a number of tokens, 1 or more")
    return number


def _model(text: str) -> str:
    # `%%ai -m` takes what `-p` takes here. `{name}` is a variable with the model's name.
    if text.lstrip().startswith("{") and not re.fullmatch(r"\{[^{}\"':\s]+\}", text):
        raise ArgumentTypeError("takes a model's name; API parameters go to -p/--params")
    return text


def _params(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"is not JSON ({shorten(str(error), 80)})") from None
    if not isinstance(value, dict):
        raise ArgumentTypeError("is not a JSON object such as '{\"temperature\": 0}'")
    return _checked(request_body.check_params, value)


def _url(text: str) -> str:
    from nbcodex.openai_api.endpoints import parse_base_url

    return _checked(lambda url: parse_base_url(url, "This"), text)


def _thread(text: str) -> str:
    if not is_thread_name(text):
        raise ArgumentTypeError(f"must be a name of at most {MAX_THREAD_NAME_CHARS} characters")
    return text


def _duration(text: str) -> str:
    return _checked(parse_duration, text)


def _checked(check: Callable[[ValueT], object], value: ValueT) -> ValueT:
    """Return `value`, or raise what argparse reports in one line."""
    try:
        check(value)
    except ConfigurationError as error:
        raise ArgumentTypeError(str(error)) from None
    return value


def _variable(text: str) -> str:
    is_taken = keyword.iskeyword(text) or text.startswith("__") or text in _RESERVED_NAMES
    if not text.isidentifier() or is_taken:
        raise ArgumentTypeError(f"{text!r} cannot be the name of a variable")
    return text


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


def _flag(*names: str, help: str) -> tuple[tuple[str, ...], dict[str, Any]]:  # noqa: A002
    return names, {"action": "store_true", "help": help}


_OPTIONS = {
    "the question": (
        _option("MODEL", nargs="?", type=_model, help="model (on Azure: deployment) to ask"),
        _option("-m", "--model", type=_model, metavar="MODEL", help="the same, as an option"),
        _option("--system", metavar="TEXT", help="instructions that precede the prompt"),
        _option(
            "--image",
            action="append",
            default=[],
            metavar="EXPR",
            help="picture to send: a path or a variable",
        ),
        _option(
            "--map",
            type=_variable,
            metavar="NAME",
            help="ask once for each row of a variable: {column}, {}",
        ),
        _flag("--eval", help="run the cell and send what it prints"),
        _flag("--raw", help="leave {…} in the prompt as it is"),
        _option("--max-output", type=_token_count, metavar="N", help="maximum of output tokens"),
        _option("--effort", metavar="LEVEL", help="reasoning effort, such as low or high"),
        _option(
            *_PARAMS,
            type=_params,
            metavar="JSON",
            help="further parameters of the API: '{\"temperature\": 0}'",
        ),
    ),
    "the answer": (
        _option(
            "-o", "--out", type=_variable, metavar="NAME", help="variable to assign the Reply to"
        ),
        _option(
            "-f",
            "--format",
            choices=FORMATS,
            metavar="FORMAT",
            help=f"one of {', '.join(FORMATS)}; code goes into a new cell, and is never run",
        ),
        _option(
            "--schema",
            type=_variable,
            metavar="NAME",
            help="variable: a pydantic class or a JSON schema",
        ),
    ),
    "the conversation": (
        _option(
            "--thread", metavar="NAME", type=_thread, help="conversation to join (default: main)"
        ),
        _flag("--new", help="start the conversation afresh with this cell"),
        _flag("--no-history", help="neither use nor join the conversation"),
    ),
    "waiting and paying": (
        _flag("-b", "--background", help="run other cells meanwhile"),
        _option(
            "--patience",
            type=_duration,
            metavar="DURATION",
            help="longest wait for limits: 90s, 10m, 2h",
        ),
        _flag("--dry-run", help="show tokens and cost, send nothing"),
        _flag("--reuse", help="show the answer to an equal earlier prompt, at no cost"),
        _flag("--durable", help="let the server keep the answer until it has arrived"),
    ),
    "the server": (
        _option("--api-base", type=_url, metavar="URL", help="base URL for this request"),
        _option("--api", choices=["auto", "responses", "chat"], help="API to use"),
    ),
}


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Return the parser of a cell's options."""
    cell = _Parser(
        prog="%%codex",
        usage="%%%%codex [MODEL] [options]",
        add_help=False,
        # An abbreviation that is clear today could be ambiguous once there are more options.
        allow_abbrev=False,
        description="Ask a model; the text below the first line is the prompt.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, options in _OPTIONS.items():
        group = cell.add_argument_group(title)
        for names, settings in options:
            group.add_argument(*names, **settings)
    return cell


def parse_options(line: str) -> Namespace:
    """Return the options that stand in `line`.

    Raises
    ------
    UsageError
        If an option does not exist, or its value or a combination is not valid.
    """
    try:
        words = shlex.split(_quote_params(line))
    except ValueError as error:
        raise UsageError(f"%%codex: {error} in the options: {line.strip()[:80]}") from None
    options, rest = parser().parse_known_args(words)
    if rest:
        known = [name for action in parser()._actions for name in action.option_strings]
        hint = did_you_mean(rest[0].partition("=")[0], known)
        raise UsageError(f"%%codex: there is no option {rest[0][:60]}{hint} See %%codex?")
    if options.MODEL and options.model and options.model != options.MODEL:
        raise UsageError(f"%%codex: two models, {options.MODEL} and {options.model}: name one")
    if options.no_history and (options.new or options.thread):
        raise UsageError(
            "%%codex: --no-history cannot be combined with --new or --thread: drop one of them"
        )
    options.model = check_provider(options.model or options.MODEL)
    return options


def fill_options(chosen: Namespace, namespace: Mapping[str, object]) -> list[str]:
    """Fill in the fields of options that are free text, and return the notes on them.

    IPython's ``$name`` works as well, where it is the whole value.

    Raises
    ------
    UsageError
        If a field would stay as it is written: an option has no reader who would notice.
    """
    notes: list[str] = []
    for option in ("model", "system", "effort", "thread"):
        if (text := getattr(chosen, option)) is None:
            continue
        for dollar in re.finditer(r"\$([^\W\d]\w*)", text):
            if dollar[0] == text.strip():
                text = f"{{{dollar[1]}}}"
            elif dollar[1] in namespace:
                raise UsageError(
                    f"%%codex: --{option}: write {{{dollar[1]}}} instead of {dollar[0]}"
                )
        filled = fill(text, namespace)
        if (unfilled := [*filled.missing, *filled.left_alone]) or filled.images:
            name = unfilled[0] if unfilled else filled.filled[0]
            why = "is not a variable" if filled.missing else "cannot be filled in here"
            raise UsageError(
                f"%%codex: --{option}: {{{shorten(name, 40)}}} {why}. "
                f"Write {{{{{shorten(name, 40)}}}}} for the text itself"
            )
        if option == "model":
            check_provider(filled.text)
        if option == "thread":
            _checked(_thread, filled.text)
        setattr(chosen, option, filled.text)
        notes += filled.notes
    if chosen.params:
        chosen.params = _checked(request_body.check_params, _fill_values(chosen.params, namespace))
    return notes


def _fill_values(value: Any, namespace: Mapping[str, object]) -> Any:
    """Fill in the texts in a JSON value; in JSON, other braces in texts are common."""
    match value:
        case str():
            return fill(value, namespace).text
        case dict():
            return {key: _fill_values(item, namespace) for key, item in value.items()}
        case list():
            return [_fill_values(item, namespace) for item in value]
        case _:
            return value


def _quote_params(line: str) -> str:
    """Return a line whose unquoted JSON, as `%%ai` takes it, is in quotes."""
    for found in _UNQUOTED_PARAMS.finditer(line):
        try:
            shlex.split(line[: found.start()])  # fails if the match is inside of quotes
            _, end = json.JSONDecoder().raw_decode(line, found.end())
        except (ValueError, RecursionError):
            continue
        rest = _quote_params(line[end:])
        return f"{line[: found.start()]}{found[1]} {shlex.quote(line[found.end() : end])}{rest}"
    return line


def check_provider(model: str | None) -> str | None:
    """Return a model's name.

    Raises
    ------
    UsageError
        If a provider stands before it, as in `%%ai`.
    """
    provider, _, name = (model or "").partition(":")
    if name and provider in _OPENAI_PROVIDERS:
        raise UsageError(f"%%codex: write {name} without {provider}: before it")
    if ":" in (model or "") and provider in _OPENAI_PROVIDERS | _OTHER_PROVIDERS:
        raise UsageError(
            f"%%codex: {provider} is a provider, not a model. nbcodex asks OpenAI, Azure and "
            f"servers with their API: use --api-base URL -m {name or 'MODEL'}"
        )
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """The format of a cell's answer, and the request options that make the answer fit it."""

    format: Format  # the format in which the answer is shown
    request: RequestOptions  # all options of the cell's request
    notes: tuple[str, ...] = ()  # shown beside the figures


def output_spec(chosen: Namespace, variables: Mapping[str, Any]) -> OutputSpec:
    """Return the output that a cell's options ask for.

    Raises
    ------
    UsageError, ConfigurationError
        If the options contradict each other, or the schema does not exist.
    """
    schema = _find_schema(chosen.schema, variables) if chosen.schema else None
    named = {"md": "markdown"}.get(chosen.format, chosen.format)
    format_: Format = named or ("json" if schema else "markdown")
    if schema and format_ not in {"json", "markdown", "text"}:
        raise UsageError(
            f"%%codex: --schema makes JSON, which -f {format_} cannot show: drop one of them"
        )
    # A schema says more about the answer than the format's instructions.
    instructions = "" if schema else INSTRUCTIONS.get(format_, "")
    arguments = vars(chosen) | {
        "system": "\n\n".join(filter(None, (chosen.system, instructions))) or None,
        "schema": schema or (ANY_JSON if format_ == "json" else None),
        "reuse": chosen.reuse or None,  # if it is not given, `Codex.reuse` decides
    }
    if format_ == "image":
        if chosen.api == "chat":
            raise UsageError("%%codex: -f image needs the Responses API: drop --api chat")
        arguments["api"] = "responses"
        arguments["params"] = request_body.image_generation_params() | (chosen.params or {})
    return OutputSpec(
        format=format_,
        # Options of equal names are passed on as they are.
        request=RequestOptions.from_arguments(arguments),
        # A background thread cannot insert a cell: IPython would put it below any other one.
        notes=(_INSERT_HINT,) if format_ == "code" and chosen.background else (),
    )


def _find_schema(name: str, variables: Mapping[str, Any]) -> Schema | None:
    if name not in variables:
        raise ConfigurationError(
            f"--schema {name}: there is no such variable.",
            advice="Define a pydantic class, or a dict with a JSON schema, in a cell above.",
        )
    return to_schema(variables[name])
