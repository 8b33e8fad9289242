"""The options in a cell's first line: their names, help, checks and effects on the request.

An option of `parser` that has the name of a field of `RequestOptions` becomes that field without
further code here.
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
from typing import Any, NoReturn, get_args

from IPython.core.error import UsageError

from nbcodex.errors import ConfigurationError, did_you_mean, shorten
from nbcodex.models import Api, RequestOptions
from nbcodex.notebook.variables import fill
from nbcodex.openai_api import request_body
from nbcodex.openai_api.endpoints import parse_base_url
from nbcodex.rendering.formats import INSTRUCTIONS, Format
from nbcodex.requests.options import check_thread_name
from nbcodex.requests.structured_output import ANY_JSON, to_schema
from nbcodex.settings import parse_duration

FORMATS = ["markdown", "md", "text", "code", "json", "html", "math", "image"]

# IPython needs these names itself: binding a reply to one of them would break the shell.
_RESERVED_NAMES = {"In", "Out", "get_ipython", "exit", "quit", "_", "_i", "_ih", "_oh", "_dh"}

# Providers that Jupyter AI's `%%ai` puts before a model's name, as in ``openai-chat:gpt-4o``.
_OPENAI_PROVIDERS = {
    *("openai", "openai-chat", "openai-chat-custom", "openai-custom", "azure-chat-openai")
}
_OTHER_PROVIDERS = {
    *("ai21", "anthropic", "anthropic-chat", "amazon-bedrock", "bedrock", "bedrock-chat"),
    *("bedrock-custom", "cohere", "gemini", "gpt4all", "huggingface_hub", "mistralai"),
    *("nvidia-chat", "ollama", "openrouter", "qianfan", "sagemaker-endpoint", "togetherai"),
    *("vertexai",),
}

_PARAMS_NAMES = ("-p", "--params", "--model-parameters")
_DOLLAR_NAME = re.compile(r"\$([^\W\d]\w*)")  # ``$topic``
# ``-p`` or ``--params=`` before a brace, as in ``-p {"temperature": 0}``.
_UNQUOTED_PARAMS = re.compile(rf"(?<!\S)({'|'.join(_PARAMS_NAMES)})(?:\s+|=)(?=\{{)")

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


# The types of argparse arguments: each returns the value of a text, or raises ArgumentTypeError.
def _token_count(text: str) -> int:
    # Such as ``800`` or ``2k``.
    try:
        number = int(float(text[:-1]) * 1000) if text.lower().endswith("k") else int(text)
    except (ValueError, OverflowError):
        number = 0
    # JSON numbers are exact up to 2**53 in every server's language.
    if not 1 <= number < 2**53:
        raise ArgumentTypeError(f"{text[:40]!r} is not a number of tokens, 1 or more")
    return number


def _model(text: str) -> str:
    # Jupyter AI's `-m` takes the JSON that `-p` takes here. ``{name}`` is not JSON but a variable.
    if text.lstrip().startswith("{") and not re.fullmatch(r"\{[^{}\"':\s]+\}", text):
        raise ArgumentTypeError("takes a model's name; API parameters go to -p/--params")
    check_model_name(text)
    return text


def _params(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ArgumentTypeError("is not a JSON object such as '{\"temperature\": 0}'")
        request_body.check_params(value)
    except ConfigurationError as error:
        raise ArgumentTypeError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"is not JSON ({shorten(str(error), 80)})") from None
    return value


def _variable(text: str) -> str:
    is_reserved = keyword.iskeyword(text) or text.startswith("__") or text in _RESERVED_NAMES
    if not text.isidentifier() or is_reserved:
        raise ArgumentTypeError(f"{text!r} cannot be the name of a variable")
    return text


def _validated_by(check: Callable[[str], object]) -> Callable[[str], str]:
    """Return a type whose values are the texts that `check` accepts."""

    def text_if_valid(text: str) -> str:
        try:
            check(text)
        except ConfigurationError as error:
            raise ArgumentTypeError(str(error)) from None
        return text

    return text_if_valid


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
    add = cell.add_argument_group("the question").add_argument
    add("MODEL", nargs="?", type=_model, help="model (on Azure: deployment) to ask")
    add("-m", "--model", metavar="MODEL", type=_model, help="the same, as an option")
    add("--system", metavar="TEXT", help="instructions that precede the prompt")
    image_help = "picture to send: a path or a variable"
    add("--image", metavar="EXPR", action="append", default=[], help=image_help)
    map_help = "ask once for each row of a variable: {column}, {}"
    add("--map", metavar="NAME", type=_variable, help=map_help)
    add("--eval", action="store_true", help="run the cell and send what it prints")
    add("--raw", action="store_true", help="leave {…} in the prompt as it is")
    add("--max-output", metavar="N", type=_token_count, help="maximum of output tokens")
    add("--effort", metavar="LEVEL", help="reasoning effort, such as low or high")
    params_help = "further parameters of the API: '{\"temperature\": 0}'"
    add(*_PARAMS_NAMES, metavar="JSON", type=_params, help=params_help)

    add = cell.add_argument_group("the answer").add_argument
    add("-o", "--out", metavar="NAME", type=_variable, help="variable to assign the Reply to")
    format_help = f"one of {', '.join(FORMATS)}; code goes into a new cell, and is never run"
    add("-f", "--format", metavar="FORMAT", choices=FORMATS, help=format_help)
    schema_help = "variable: a pydantic class or a JSON schema"
    add("--schema", metavar="NAME", type=_variable, help=schema_help)

    add = cell.add_argument_group("the conversation").add_argument
    thread_help = "conversation to join (default: main)"
    add("--thread", metavar="NAME", type=_validated_by(check_thread_name), help=thread_help)
    add("--new", action="store_true", help="start the conversation afresh with this cell")
    add("--no-history", action="store_true", help="neither use nor join the conversation")

    add = cell.add_argument_group("waiting and paying").add_argument
    add("-b", "--background", action="store_true", help="run other cells meanwhile")
    patience_help = "longest wait after refusals, without time in the queue: 90s, 10m, 2h"
    add("--patience", metavar="DURATION", type=_validated_by(parse_duration), help=patience_help)
    add("--dry-run", action="store_true", help="show tokens and cost, send nothing")
    reuse_help = "show the answer to an equal earlier prompt, at no cost"
    add("--reuse", action="store_true", help=reuse_help)
    durable_help = "let the server keep the answer until it has arrived"
    add("--durable", action="store_true", help=durable_help)

    add = cell.add_argument_group("the server").add_argument
    base_url = _validated_by(lambda text: parse_base_url(text, name="This"))  # in errors
    add("--api-base", metavar="URL", type=base_url, help="base URL for this request")
    add("--api", choices=get_args(Api), help="API to use")
    return cell


def parse_options(line: str) -> Namespace:
    """Return the options in `line`, or raise a UsageError."""
    try:
        words = shlex.split(_quote_params(line))
    except ValueError as error:
        raise UsageError(f"%%codex: {error} in the options: {line.strip()[:80]}") from None
    options, unknown = parser().parse_known_args(words)
    if unknown:
        known = [name for action in parser()._actions for name in action.option_strings]
        option = unknown[0].partition("=")[0]
        hint = did_you_mean(option, known)
        if hint == "." and option.startswith("--"):  # no option has a similar name
            parameter = option[2:60].replace("-", "_")
            hint = f"; a parameter of the API goes into -p '{{\"{parameter}\": …}}'."
        raise UsageError(f"%%codex: there is no option {unknown[0][:60]}{hint} See %%codex?")
    if options.MODEL and options.model and options.model != options.MODEL:
        raise UsageError(f"%%codex: two models, {options.MODEL} and {options.model}: name one")
    if options.no_history and (options.new or options.thread):
        raise UsageError(
            "%%codex: --no-history cannot be combined with --new or --thread: drop one of them"
        )
    options.model = options.model or options.MODEL
    return options


def fill_options(args: Namespace, namespace: Mapping[str, object]) -> list[str]:
    """Fill in the fields of options that are free text, and return the notes on them."""
    notes: list[str] = []
    for option in ("model", "system", "effort", "thread"):
        text = getattr(args, option)
        if text is None:
            continue
        # IPython's `$name` works as well if it is the whole value.
        if dollar_name := _DOLLAR_NAME.fullmatch(text.strip()):
            text = f"{{{dollar_name[1]}}}"
        for name in _DOLLAR_NAME.findall(text):
            if name in namespace:
                raise UsageError(f"%%codex: --{option}: write {{{name}}} instead of ${name}")
        result = fill(text, namespace)
        # A field of an unknown variable (`missing`), or of a module or private name (`restricted`),
        # would be sent with its braces, without the user's notice. No option can hold an image.
        if (unfilled := [*result.missing, *result.restricted]) or result.images:
            name = shorten((unfilled or result.filled_fields)[0], 40)
            why = "is not a variable" if result.missing else "cannot be filled in here"
            raise UsageError(
                f"%%codex: --{option}: {{{name}}} {why}. Write {{{{{name}}}}} for the text itself"
            )
        if option == "model":
            check_model_name(result.text)
        setattr(args, option, result.text)
        notes += result.notes
    args.params = _fill_values(args.params, namespace)
    return notes


def _fill_values(value: Any, namespace: Mapping[str, object]) -> Any:
    """Return a JSON value with the fields in its texts filled in; all other braces stay."""
    if isinstance(value, str):
        return fill(value, namespace).text
    if isinstance(value, dict):
        return {key: _fill_values(item, namespace) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_values(item, namespace) for item in value]
    return value


def _quote_params(line: str) -> str:
    """Return a line with quotes around its unquoted JSON, which `%%ai` takes, too."""
    for option in _UNQUOTED_PARAMS.finditer(line):
        try:
            shlex.split(line[: option.start()])  # fails if the match is inside of quotes
            _, end = json.JSONDecoder().raw_decode(line, option.end())
        except (ValueError, RecursionError):
            continue
        before, value = line[: option.start()], shlex.quote(line[option.end() : end])
        return f"{before}{option[1]} {value}{_quote_params(line[end:])}"
    return line


def check_model_name(model: str) -> None:
    """Raise a UsageError if a provider stands before a model's name, as in `%%ai`."""
    provider, colon, name = model.partition(":")
    if name and provider in _OPENAI_PROVIDERS:
        raise UsageError(f"%%codex: write {name} without {provider}: before it")
    if colon and provider in _OPENAI_PROVIDERS | _OTHER_PROVIDERS:
        raise UsageError(
            f"%%codex: {provider} is a provider, not a model. nbcodex asks OpenAI, Azure and "
            f"servers with their API: use --api-base URL -m {name or 'MODEL'}"
        )


def request_options(args: Namespace, variables: Mapping[str, Any]) -> tuple[RequestOptions, Format]:
    """Return the options of a cell's request, and the format in which its answer is shown."""
    schema = None
    if args.schema:
        if args.schema not in variables:
            raise ConfigurationError(
                f"--schema {args.schema}: there is no such variable.",
                advice="Define a pydantic class, or a dict with a JSON schema, in a cell above.",
            )
        schema = to_schema(variables[args.schema])
    given_format = {"md": "markdown"}.get(args.format, args.format)
    format_: Format = given_format or ("json" if schema else "markdown")
    if schema and format_ not in {"json", "markdown", "text"}:
        raise UsageError(
            f"%%codex: --schema makes JSON, which -f {format_} cannot show: drop one of them"
        )
    # With a schema, the format's instructions to the model would be superfluous.
    instructions = "" if schema else INSTRUCTIONS.get(format_, "")
    arguments = vars(args) | {
        "system": "\n\n".join(filter(None, (args.system, instructions))) or None,
        "schema": schema or (ANY_JSON if format_ == "json" else None),
        "reuse": args.reuse or None,  # if it is not given, `Codex.reuse` decides
    }
    if format_ == "image":
        if args.api == "chat":
            raise UsageError("%%codex: -f image needs the Responses API: drop --api chat")
        arguments["api"] = "responses"
        arguments["params"] = request_body.IMAGE_PARAMS | (args.params or {})
    # Arguments that are not fields of `RequestOptions` are ignored.
    return RequestOptions.from_arguments(arguments), format_
