"""What is sent: the bodies of the two APIs, from a request. Pure.

Also what servers have taught about themselves, for "compatible" means something else everywhere.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from nbcodex.errors import ConfigurationError
from nbcodex.models import Image, Request, Schema
from nbcodex.openai_api.endpoints import Kind

Body = dict[str, Any]

_PROMPT = "It is the prompt itself."
_HEADERS = "Headers cannot be set; Codex.client takes a client that sends them."
_ADDRESS = "The address is set with --api-base or OPENAI_BASE_URL."
_KEPT = "The provider would keep prompt and answer: choose that with --durable, which says so."
_OURS = {
    "model": "Use -m MODEL.",
    "input": _PROMPT,
    "messages": _PROMPT,
    "prompt": _PROMPT,
    "instructions": "Use --system.",
    "max_output_tokens": "Use --max-output.",
    "max_completion_tokens": "Use --max-output.",
    "max_tokens": "Use --max-output.",
    "reasoning_effort": "Use --effort.",
    "store": _KEPT,
    "background": _KEPT,
    "stream": "Answers are always streamed.",
    "stream_options": "Answers are always streamed.",
    "n": "There is one answer to a request; use --map for many.",
    "extra_headers": _HEADERS,
    "headers": _HEADERS,
    "default_headers": _HEADERS,
    "extra_query": _ADDRESS,
    "extra_body": "Write its contents directly.",
    "base_url": _ADDRESS,
    "api_base": _ADDRESS,
    "url": _ADDRESS,
    "api_key": "Use `%codex login` or OPENAI_API_KEY.",
    "organization": "Use OPENAI_ORG_ID.",
    "project": "Use OPENAI_PROJECT_ID.",
    "timeout": "Use Codex.idle_timeout and --patience.",
    "max_retries": "Use --patience.",
    "http_client": "Use Codex.client.",
}

_REASONING = ("gpt-5", "gpt-6", "o1", "o3", "o4", "codex")
"""Starts of the names of OpenAI's models that reason. For others OpenAI refuses
``reasoning.encrypted_content``; a name that is missing here costs only the reasoning carried on."""

_SCHEMA_MODES = {"response_format": ("response_format",), "text": ("text.format", "'text'")}
"""Our parameters for a schema, and how refusals name them: of whatever kind such a refusal is, the
answer can be had without."""

_OPTIONAL = ("stream_options", "max_completion_tokens", "max_tokens", "include")
_UNSUPPORTED = (
    "unsupported",
    "not supported",
    "not support",
    "unrecognized",
    "unknown",
    "unexpected",
    "not permitted",
    "not allowed",
    "extra_forbidden",
)

_NO_STREAM = re.compile(r"verified to stream|^stream |\bstream(ing)?\b.{0,40}\bnot (supported|all)")
"""How a refusal to stream is worded: OpenAI's, where an organization is not verified, which names
``stream`` as its parameter too; and that of servers which stream nothing."""

UNSTREAMED = "in one piece: this model is not streamed to you"
NO_MODE = "the server takes no JSON schema: told in words, and checked here"

_KEEPING = ("background", "store", "retention")


def check_params(params: Mapping[str, Any]) -> None:
    """Raise a ConfigurationError for params that are ours, or that are no JSON of the body's."""
    for name in params:
        if not isinstance(name, str) or name in _OURS:
            raise ConfigurationError(
                f"The parameter {str(name)[:40]!r} cannot be given among the params.",
                advice=_OURS.get(name, "Names are text."),
            )
    try:
        json.dumps(dict(params), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ConfigurationError(
            "The params are no JSON.",
            advice="Use text, numbers, true, false, null, lists.",
        ) from None


def responses_body(
    request: Request, *, model: str, kind: Kind, avoid: frozenset[str], durable: bool = False
) -> Body:
    """Return the body of ``POST /responses``; `avoid` names what the server does not take."""
    plainly = not (request.turns or request.images)
    body: Body = {
        "model": model,
        "input": request.prompt if plainly else _items(request),
        "stream": True,
        "store": durable,
    }
    if durable:
        body["background"] = True
    if system := _system(request, "text" in avoid):
        body["instructions"] = system
    if request.max_output is not None:
        body["max_output_tokens"] = request.max_output
    if request.effort:
        body["reasoning"] = {"effort": request.effort}
    if request.schema and request.schema.definition:
        body["text"] = {"format": {"type": "json_schema", **_shape(request.schema)}}
    if kind == "openai" and model.startswith(_REASONING):
        # What the server does not keep, the next turn has to bring along.
        body["include"] = ["reasoning.encrypted_content"]
    return _joined(body, request.params, avoid)


def chat_body(request: Request, *, model: str, kind: Kind, avoid: frozenset[str]) -> Body:
    """Return the body of ``POST /chat/completions``; `avoid` names what the server does not take.

    Compatible servers often know only ``max_tokens``, OpenAI's newer models only
    ``max_completion_tokens``.
    """
    said = _system(request, "response_format" in avoid)
    system = [{"role": "system", "content": said}] if said else []
    body: Body = {
        "model": model,
        "messages": [*system, *_messages(request)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if "stream" in avoid:
        avoid |= {"stream_options"}
    if request.max_output is not None:
        names = ["max_completion_tokens", "max_tokens"]
        usual = names[kind == "compatible"]
        body[next((n for n in (usual, *names) if n not in avoid), usual)] = request.max_output
        avoid -= set(names)
    if request.effort:
        body["reasoning_effort"] = request.effort
    if request.schema and request.schema.definition:
        body["response_format"] = {"type": "json_schema", "json_schema": _shape(request.schema)}
    return _joined(body, request.params, avoid)


def _items(request: Request) -> list[Body]:
    """Return the conversation as input items of the Responses API."""
    items: list[Body] = []
    for turn in request.turns:
        items.append({"role": "user", "content": _parts(turn.prompt, turn.images, "input_")})
        items += [dict(item) for item in turn.carried]
        items.append({"role": "assistant", "content": turn.answer})
    return [*items, {"role": "user", "content": _parts(request.prompt, request.images, "input_")}]


def _messages(request: Request) -> list[Body]:
    """Return the conversation as messages of Chat Completions, which carries no reasoning on."""
    messages: list[Body] = []
    for turn in request.turns:
        messages.append({"role": "user", "content": _parts(turn.prompt, turn.images)})
        messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": _parts(request.prompt, request.images)}]


def _parts(text: str, images: tuple[Image, ...], kind: str = "") -> str | list[Body]:
    """Return a message's content; `kind` is how the Responses API's types begin."""
    if not images:
        return text
    urls = [f"data:{i.media_type};base64,{b64encode(i.data).decode('ascii')}" for i in images]
    pictures: list[Body]
    if kind:
        pictures = [{"type": "input_image", "image_url": url} for url in urls]
    else:
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": f"{kind}text", "text": text}, *pictures]


def _shape(schema: Schema) -> Body:
    return {"name": schema.name, "schema": dict(schema.definition), "strict": schema.strict}


def _system(request: Request, tells_schema: bool) -> str:
    """Return the instructions; with the schema in them, where the server knows no mode for it."""
    if not (request.schema and tells_schema):
        return request.system or ""
    schema = told_in_json(request.schema)
    told = f"Answer with one JSON object of this JSON schema, and nothing else:\n{schema}"
    return f"{request.system}\n\n{told}" if request.system else told


def told_in_json(schema: Schema) -> str:
    """Return a schema's definition as a model can read it."""
    return json.dumps(dict(schema.definition), ensure_ascii=False, default=str)


def _joined(body: Body, params: Mapping[str, Any], avoid: frozenset[str]) -> Body:
    """Add the user's params, which win; inside of ``reasoning`` both count."""
    body = {name: value for name, value in body.items() if name not in avoid}
    for name, value in params.items():
        ours = body.get(name)
        if isinstance(ours, dict) and isinstance(value, Mapping):
            value = {**ours, **value}
        body[name] = value
    return body


def is_about_keeping(told: str) -> bool:
    """Whether a refusal objects to an answer that is kept: no such mode, or no right to it."""
    return any(word in told.lower() for word in _KEEPING)


def objection(told: str, request: Request, body: Body) -> str | None:
    """Return the parameter of ours that a refusal objects to, if the request can go without it.

    ``store`` is not among them: without it the server would keep what was asked.
    """
    told = told.lower()
    if "stream" in body and "stream_options" not in told and _NO_STREAM.search(told):
        return "stream"
    if "encrypted" in told and "include" in body and "include" not in request.params:
        return "include"
    for name, words in _SCHEMA_MODES.items():
        about = any(word in told for word in (*words, "json_schema"))
        if request.schema and about and name in body and name not in request.params:
            return name
    if not any(word in told for word in _UNSUPPORTED):
        return None
    names = [n for n in _OPTIONAL if n in told and n in body and n not in request.params]
    return names[0] if names else None


# Pictures that a model makes (OpenAI's guide to image generation).

IMAGE_TOOL = "image_generation"
NO_IMAGES_ADVICE = (
    "Pictures need the Responses API's tool image_generation: this model or server may lack it."
)


def image_generation_params() -> dict[str, Any]:
    """Return the parameters that let the model make a picture, and nothing else."""
    return {"tools": [{"type": IMAGE_TOOL}], "tool_choice": {"type": IMAGE_TOOL}}


def asks_for_images(params: Mapping[str, Any]) -> bool:
    """Whether a request's parameters ask for pictures."""
    tools = params.get("tools")
    given = tools if isinstance(tools, list | tuple) else ()
    return any(isinstance(tool, Mapping) and tool.get("type") == IMAGE_TOOL for tool in given)
