"""Parses request bodies of both APIs into one type, with the checks of the real server.

Does not know limits or answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbcodex.simulator.error_responses import ErrorResponse

Api = Literal["responses", "chat"]

# Every image counts the same; its size is ignored.
IMAGE_TOKENS = 765
# The smallest `max_output_tokens` that the Responses API accepts.
MIN_OUTPUT_TOKENS = 16


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _names("""
    metadata moderation parallel_tool_calls prompt_cache_key prompt_cache_options
    prompt_cache_retention safety_identifier service_tier temperature tool_choice tools
    top_logprobs top_p user model stream stream_options store
""")
_KNOWN: Mapping[Api, frozenset[str]] = {
    "responses": _COMMON
    | _names("""
        access_programs background background_options context_management conversation image include
        input instructions max_output_tokens max_tool_calls previous_response_id prompt reasoning
        text truncation
    """),
    "chat": _COMMON
    | _names("""
        messages audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens modalities n prediction presence_penalty reasoning_effort
        response_format seed stop verbosity web_search_options
    """),
}
_TYPES: Mapping[str, tuple[type, str]] = {
    "model": (str, "a string"),
    "instructions": (str, "a string"),
    "stream": (bool, "a boolean"),
    "background": (bool, "a boolean"),
    "store": (bool, "a boolean"),
    "max_output_tokens": (int, "an integer"),
    "max_completion_tokens": (int, "an integer"),
    "max_tokens": (int, "an integer"),
    "messages": (list, "an array of objects"),
    "reasoning": (dict, "an object"),
    "stream_options": (dict, "an object"),
    "text": (dict, "an object"),
    "response_format": (dict, "an object"),
}
_TYPE_NAMES: Mapping[type, str] = {dict: "an object", list: "an array", str: "a string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request of either API in one form."""

    # api, model: the API, and the model (on Azure: the deployment).
    api: Api
    model: str
    body: Mapping[str, Any]  # the JSON body as it was sent
    turns: tuple[str, ...]  # the user's messages, oldest first; the last one is the prompt
    text: str  # all input text
    images: int  # number of input images
    max_output: int | None  # upper bound on output tokens
    effort: str | None  # reasoning effort, None where there is no reasoning
    # stream, background, azure: how the answer is delivered, and whether Azure is addressed.
    stream: bool
    background: bool
    azure: bool

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.turns[-1] if self.turns else ""

    @property
    def wants_image(self) -> bool:
        """Whether the request uses the image generation tool."""
        tools = self.body.get("tools")
        tools = tools if isinstance(tools, list) else []
        kinds = [t.get("type") for t in tools if isinstance(t, dict)]
        return "image_generation" in kinds

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema for the answer; empty if any JSON is accepted."""
        form = (self.body.get("text") or {}).get("format") or self.body.get("response_format")
        match form:
            case {"type": "json_schema", "schema": dict(schema)}:
                return schema
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return schema
            case {"type": "json_object"}:
                return {}
            case _:
                return None


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`.

    Raises
    ------
    ErrorResponse
        400 if `body` is not a JSON object.
    """
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ErrorResponse(
            400,
            "We could not parse the JSON body of your request. (HINT: This likely means you "
            "aren't using your HTTP library correctly. The OpenAI API expects a JSON payload, but "
            "what was sent was not valid JSON.)",
        )
    return data


def parse_request(
    body: dict[str, Any], *, api: Api, azure: bool = False, deployment: str = ""
) -> ParsedRequest:
    """Return `body` as a request to `api`.

    Raises
    ------
    ErrorResponse
        400 with the real server's text if a parameter is missing, unknown or of a wrong type.
    """
    if deployment:
        body = {**body, "model": deployment}
    _check_parameters(body, api)
    messages = list(_messages(body, api))
    return ParsedRequest(
        api=api,
        model=body["model"],
        body=body,
        turns=tuple(text for role, text, _ in messages if role == "user"),
        text="\n".join(text for _, text, _ in messages),
        images=sum(images for _, _, images in messages),
        max_output=_max_output(body, api),
        effort=_effort(body),
        stream=bool(body.get("stream")),
        background=bool(body.get("background")),
        azure=azure,
    )


def _check_parameters(body: Mapping[str, Any], api: Api) -> None:
    for name in body:
        if name not in _KNOWN[api]:
            raise _invalid(f"Unknown parameter: '{name}'.", "unknown_parameter", name)
    for name, (kind, words) in _TYPES.items():
        value = body.get(name)
        if value is not None and not _is_instance(value, kind):
            got = _TYPE_NAMES.get(type(value), "another type")
            message = f"Invalid type for '{name}': expected {words}, but got {got} instead."
            raise _invalid(message, "invalid_type", name)
    for name in ("model", "input" if api == "responses" else "messages"):
        if not body.get(name):
            message = f"Missing required parameter: '{name}'."
            raise _invalid(message, "missing_required_parameter", name)
    tools = body.get("tools")
    if api == "chat" and isinstance(tools, list):
        for index, tool in enumerate(tools):
            if not isinstance(tool, dict) or tool.get("type") not in {"function", "custom"}:
                message = (
                    f"Invalid value: '{tool.get('type') if isinstance(tool, dict) else tool}'. "
                    "Supported values are: 'function' and 'custom'."
                )
                raise _invalid(message, "invalid_value", f"tools[{index}].type")
    if body.get("background") and body.get("store") is False:
        raise _invalid("Background mode requires store=true.", "invalid_value", "background")


def _is_instance(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _invalid(message: str, code: str, param: str) -> ErrorResponse:
    return ErrorResponse(400, message, code=code, param=param)


def _max_output(body: Mapping[str, Any], api: Api) -> int | None:
    names = (
        ("max_output_tokens",) if api == "responses" else ("max_completion_tokens", "max_tokens")
    )
    least = MIN_OUTPUT_TOKENS if api == "responses" else 1
    for name in names:
        value: int | None = body.get(name)
        if value is not None and value < least:
            message = (
                f"Invalid '{name}': integer below minimum value. Expected a value >= {least}, but "
                f"got {value} instead."
            )
            raise _invalid(message, "integer_below_min_value", name)
        if value is not None:
            return value
    return None


def _effort(body: Mapping[str, Any]) -> str | None:
    effort = (body.get("reasoning") or {}).get("effort") or body.get("reasoning_effort")
    return effort if isinstance(effort, str) and effort != "none" else None


def _messages(body: Mapping[str, Any], api: Api) -> Iterator[tuple[str, str, int]]:
    """Yield role, text and number of images of each message."""
    if body.get("instructions"):
        yield "system", body["instructions"], 0
    items = body["input"] if api == "responses" else body["messages"]
    if isinstance(items, str):
        yield "user", items, 0
        return
    for item in items if isinstance(items, list) else [items]:
        if not isinstance(item, dict):
            message = "Invalid type for 'input': expected one of a string or array of objects."
            raise _invalid(message, "invalid_type", "input")
        yield str(item.get("role", "")), *_text_and_images(item.get("content", item.get("output")))


def _text_and_images(content: Any) -> tuple[str, int]:
    """Return the text and the number of images of a message's content."""
    if isinstance(content, str):
        return content, 0
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    texts = [p["text"] for p in parts if isinstance(p.get("text"), str)]
    images = sum("image" in str(p.get("type")) for p in parts)
    return "\n".join(texts), images
