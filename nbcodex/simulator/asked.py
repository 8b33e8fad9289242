"""What a request asks for: its body read, checked as the real server checks, and made one shape.

Must not know limits or answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbcodex.simulator.refusals import Failure

Api = Literal["responses", "chat"]

IMAGE_TOKENS = 765
"""What an image counts for, whatever it shows."""
LEAST_OUTPUT = 16
"""The smallest `max_output_tokens` that Responses takes."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _words("""
    metadata moderation parallel_tool_calls prompt_cache_key prompt_cache_options
    prompt_cache_retention safety_identifier service_tier temperature tool_choice tools
    top_logprobs top_p user model stream stream_options store
""")
_KNOWN: Mapping[Api, frozenset[str]] = {
    "responses": _COMMON
    | _words("""
        access_programs background background_options context_management conversation image include
        input instructions max_output_tokens max_tool_calls previous_response_id prompt reasoning
        text truncation
    """),
    "chat": _COMMON
    | _words("""
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
_GOT: Mapping[type, str] = {dict: "an object", list: "an array", str: "a string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for an answer, of either API.

    Parameters
    ----------
    api, model
        Which API, and which model (on Azure: deployment).
    body : mapping
        The request as it was sent.
    turns : tuple of str
        What the user said, oldest first; the last is the prompt.
    text : str
        All the text that is input.
    images : int
        How many images are input.
    max_output : int or None
        Upper bound on output tokens.
    effort : str or None
        Reasoning effort, None where there is no reasoning.
    stream, background, azure : bool
        How the answer shall come, and who is asked.
    """

    api: Api
    model: str
    body: Mapping[str, Any]
    turns: tuple[str, ...]
    text: str
    images: int
    max_output: int | None
    effort: str | None
    stream: bool
    background: bool
    azure: bool

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return self.turns[-1] if self.turns else ""

    @property
    def draws(self) -> bool:
        """Whether a picture is asked for, by the Responses API's tool."""
        tools = self.body.get("tools")
        tools = tools if isinstance(tools, list) else []
        kinds = [t.get("type") for t in tools if isinstance(t, dict)]
        return "image_generation" in kinds

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer shall have; an empty one where any JSON will do."""
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


def read_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object that `body` holds.

    Raises
    ------
    Failure
        400, if it holds none.
    """
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Failure(
            400,
            "We could not parse the JSON body of your request. (HINT: This likely means you "
            "aren't using your HTTP library correctly. The OpenAI API expects a JSON payload, but "
            "what was sent was not valid JSON.)",
        )
    return data


def read(body: dict[str, Any], *, api: Api, azure: bool = False, deployment: str = "") -> Asked:
    """Return what `body` asks of `api`.

    Raises
    ------
    Failure
        400, in the real server's words, if a parameter is missing, unknown or of a wrong type.
    """
    if deployment:
        body = {**body, "model": deployment}
    _check(body, api)
    said = list(_said(body, api))
    return Asked(
        api=api,
        model=body["model"],
        body=body,
        turns=tuple(text for role, text, _ in said if role == "user"),
        text="\n".join(text for _, text, _ in said),
        images=sum(images for _, _, images in said),
        max_output=_max_output(body, api),
        effort=_effort(body),
        stream=bool(body.get("stream")),
        background=bool(body.get("background")),
        azure=azure,
    )


def _check(body: Mapping[str, Any], api: Api) -> None:
    for name in body:
        if name not in _KNOWN[api]:
            raise _invalid(f"Unknown parameter: '{name}'.", "unknown_parameter", name)
    for name, (kind, words) in _TYPES.items():
        value = body.get(name)
        if value is not None and not _is(value, kind):
            got = _GOT.get(type(value), "another type")
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


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _invalid(message: str, code: str, param: str) -> Failure:
    return Failure(400, message, code=code, param=param)


def _max_output(body: Mapping[str, Any], api: Api) -> int | None:
    names = (
        ("max_output_tokens",) if api == "responses" else ("max_completion_tokens", "max_tokens")
    )
    least = LEAST_OUTPUT if api == "responses" else 1
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


def _said(body: Mapping[str, Any], api: Api) -> Iterator[tuple[str, str, int]]:
    """Yield each message's role, text and number of images."""
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
        yield str(item.get("role", "")), *_content(item.get("content", item.get("output")))


def _content(content: Any) -> tuple[str, int]:
    """Return the text and the number of images of a message's content."""
    if isinstance(content, str):
        return content, 0
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    texts = [p["text"] for p in parts if isinstance(p.get("text"), str)]
    images = sum("image" in str(p.get("type")) for p in parts)
    return "\n".join(texts), images
