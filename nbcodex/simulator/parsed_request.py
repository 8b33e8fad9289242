"""Finds the endpoint of a request, checks its key, and parses its body, as the real server does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from nbcodex.simulator.http_messages import ErrorResponse, HttpRequest
from nbcodex.simulator.knobs import Knobs

Api = Literal["responses", "chat"]
Endpoint = Literal[
    Api, "compact", "models", "retrieve", "cancel", "delete", "files", "batches", "control"
]

NO_KEY_TEXT = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header "
    "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank "
    "username) if you're accessing the API from your browser and are prompted for a username and "
    "password. You can obtain an API key from https://platform.openai.com/account/api-keys."
)
AZURE_WRONG_KEY_TEXT = (
    "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a "
    "valid key for an active subscription and use a correct regional API endpoint for your "
    "resource."
)

IMAGE_TOKENS = 765  # of every image, whatever its size
MIN_OUTPUT_TOKENS = 16  # the smallest `max_output_tokens` that the Responses API accepts


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The endpoint that a request addresses."""

    endpoint: Endpoint
    is_azure: bool = False  # whether the path is one of Azure's
    id: str = ""  # id in the path (of a response, file or batch), or the control command
    deployment: str = ""  # Azure's deployment, which stands in the path in place of a model
    secret: str = ""  # the secret in the path of a control command
    query: Mapping[str, str] = field(default_factory=dict)  # the query parameters


_BASE = "(?P<base>/openai/v1|/openai|/v1)"
_DEPLOYMENT = "(?P<base>/openai)/deployments/(?P<deployment>[^/]+)"
_ID = "(?P<id>[^/]+)"
_CONTROL = "/_simulator/(?P<secret>[A-Za-z0-9_-]+)"
# Method, endpoint, and a regular expression for the path.
_ROUTES: tuple[tuple[str, Endpoint, str], ...] = (
    ("POST", "responses", f"{_BASE}/responses"),
    ("POST", "compact", f"{_BASE}/responses/compact"),
    ("POST", "chat", f"{_BASE}/chat/completions"),
    ("POST", "chat", f"{_DEPLOYMENT}/chat/completions"),
    ("GET", "models", f"{_BASE}/models"),
    ("GET", "retrieve", f"{_BASE}/responses/{_ID}"),
    ("POST", "cancel", f"{_BASE}/responses/{_ID}/cancel"),
    ("DELETE", "delete", f"{_BASE}/responses/{_ID}"),
    ("POST", "files", f"{_BASE}/files"),
    ("GET", "files", f"{_BASE}/files/{_ID}/content"),
    ("DELETE", "files", f"{_BASE}/files/{_ID}"),
    ("GET", "batches", f"{_BASE}/batches"),
    ("POST", "batches", f"{_BASE}/batches"),
    ("GET", "batches", f"{_BASE}/batches/{_ID}"),
    ("POST", "batches", f"{_BASE}/batches/{_ID}/cancel"),
    ("GET", "control", f"{_CONTROL}/(?P<id>log)"),
    # Faults for the next requests, and settings.
    ("POST", "control", f"{_CONTROL}/(?P<id>script|knobs)"),
)


def find_route(request: HttpRequest) -> Route:
    """Return the route of `request`, or raise a 404 for its path or a 405 for its method."""
    url = urlsplit(request.path)
    query = dict(parse_qsl(url.query))
    routes = {
        method: (endpoint, match)
        for method, endpoint, pattern in _ROUTES
        if (match := re.fullmatch(pattern, url.path))
    }
    if not routes:
        raise unknown_path(request)
    if request.method not in routes:
        message = (
            f"Not allowed to {request.method} on {url.path} (HINT: Perhaps you meant to use a "
            "different HTTP method?)"
        )
        raise ErrorResponse(405, message, code="method_not_supported")
    endpoint, match = routes[request.method]
    groups = match.groupdict(default="")
    base = groups.pop("base", "")
    if base == "/openai" and not query.get("api-version"):
        raise unknown_path(request)
    values = {name: unquote(value) for name, value in groups.items()}
    return Route(endpoint=endpoint, is_azure=base.startswith("/openai"), query=query, **values)


def unknown_path(request: HttpRequest) -> ErrorResponse:
    """Return the 404 for an unknown path."""
    if request.path.startswith("/openai"):
        return ErrorResponse(404, "Resource not found", type=None, code="404")
    return ErrorResponse(404, f"Invalid URL ({request.method} {urlsplit(request.path).path})")


def accepted_key(request: HttpRequest, is_azure: bool, knobs: Knobs) -> str:
    """Return the key of `request`, or raise a 401 if it is not accepted."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else ""
    if is_azure:
        key = request.headers.get("api-key", "") or key
    if key and (not knobs.keys or key in knobs.keys):
        return key
    if is_azure:
        raise ErrorResponse(401, AZURE_WRONG_KEY_TEXT, type=None, code="401")
    if not key:
        raise ErrorResponse(401, NO_KEY_TEXT)
    # Like the real server's, the message contains a part of the key, so that clients are tested
    # for showing it.
    masked_key = f"{key[:3]}{'*' * 8}{key[-4:]}" if len(key) > 11 else "*" * 8
    message = (
        f"Incorrect API key provided: {masked_key}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )
    raise ErrorResponse(401, message, code="invalid_api_key")


_COMMON_PARAMETERS = """
    metadata moderation parallel_tool_calls prompt_cache_key prompt_cache_options
    prompt_cache_retention safety_identifier service_tier temperature tool_choice tools
    top_logprobs top_p user model stream stream_options store
"""
_RESPONSES_PARAMETERS = """
    access_programs background background_options context_management conversation image include
    input instructions max_output_tokens max_tool_calls previous_response_id prompt reasoning text
    truncation
"""
_CHAT_PARAMETERS = """
    messages audio frequency_penalty function_call functions logit_bias logprobs
    max_completion_tokens max_tokens modalities n prediction presence_penalty reasoning_effort
    response_format seed stop verbosity web_search_options
"""
# The parameters that OpenAI's reference names; the real server rejects any other.
PARAMETERS: Mapping[Api, frozenset[str]] = {
    "responses": frozenset((_COMMON_PARAMETERS + _RESPONSES_PARAMETERS).split()),
    "chat": frozenset((_COMMON_PARAMETERS + _CHAT_PARAMETERS).split()),
}
# Python's type of a value, its JSON type in the error message, and the parameters of this type.
_PARAMETER_TYPES: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (str, "a string", ("model", "instructions")),
    (bool, "a boolean", ("stream", "background", "store")),
    (int, "an integer", ("max_output_tokens", "max_completion_tokens", "max_tokens")),
    (list, "an array of objects", ("messages",)),
    (dict, "an object", ("reasoning", "stream_options", "text", "response_format")),
)
_TYPE_NAMES: Mapping[type, str] = {dict: "an object", list: "an array", str: "a string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request of either API in one form."""

    api: Api
    model: str  # on Azure: the deployment
    body: Mapping[str, Any]  # the JSON body as it was sent
    turns: tuple[str, ...]  # the user's messages, oldest first; the last one is the prompt
    text: str  # all input text
    images: int  # number of input images
    max_output: int | None  # upper bound on output tokens
    effort: str | None  # reasoning effort, None where there is no reasoning
    stream: bool
    background: bool
    is_azure: bool

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.turns[-1] if self.turns else ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        tools = self.body.get("tools")
        return [t for t in tools if isinstance(t, dict)] if isinstance(tools, list) else []

    @property
    def wants_image(self) -> bool:
        """Whether the request uses the image generation tool."""
        return any(tool.get("type") == "image_generation" for tool in self.tools)

    @property
    def required_function(self) -> Mapping[str, Any] | None:
        """The tool that the answer must call, if it is a function. Only for the Responses API."""
        tool_choice = self.body.get("tool_choice")
        for tool in self.tools if self.api == "responses" else []:
            choice = {"type": "function", "name": tool.get("name")}
            if tool.items() >= choice.items() and tool_choice in ("required", choice):
                return tool
        return None

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
    """Return the JSON object in `body`, or raise the server's 400."""
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


def parse_request(body: dict[str, Any], api: Api, route: Route) -> ParsedRequest:
    """Return `body` as a request to `api`, or raise a 400 in the real server's words."""
    if route.deployment:
        body = {**body, "model": route.deployment}
    _check_parameters(body, api)
    messages = list(_messages(body, api))
    effort = (body.get("reasoning") or {}).get("effort") or body.get("reasoning_effort")
    return ParsedRequest(
        api=api,
        model=body["model"],
        body=body,
        turns=tuple(text for role, text, _ in messages if role == "user"),
        text="\n".join(text for _, text, _ in messages),
        images=sum(images for _, _, images in messages),
        max_output=_max_output(body),
        effort=effort if isinstance(effort, str) and effort != "none" else None,
        stream=bool(body.get("stream")),
        background=bool(body.get("background")),
        is_azure=route.is_azure,
    )


def _check_parameters(body: Mapping[str, Any], api: Api) -> None:
    for name in body:
        if name not in PARAMETERS[api]:
            message = f"Unknown parameter: '{name}'."
            raise ErrorResponse(400, message, code="unknown_parameter", param=name)
    for type_, expected, names in _PARAMETER_TYPES:
        for name in names:
            value = body.get(name)
            # In Python a boolean is an integer; in JSON it is not.
            is_valid = isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))
            if value is not None and not is_valid:
                got = _TYPE_NAMES.get(type(value), "another type")
                message = f"Invalid type for '{name}': expected {expected}, but got {got} instead."
                raise ErrorResponse(400, message, code="invalid_type", param=name)
    for name in ("model", "input" if api == "responses" else "messages"):
        if not body.get(name):
            message = f"Missing required parameter: '{name}'."
            raise ErrorResponse(400, message, code="missing_required_parameter", param=name)
    tools = body.get("tools") if api == "chat" else None
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        actual = tool.get("type") if isinstance(tool, dict) else "another type"
        if actual not in ("function", "custom"):
            message = f"Invalid value: '{actual}'. Supported values are: 'function' and 'custom'."
            raise ErrorResponse(400, message, code="invalid_value", param=f"tools[{index}].type")
    if body.get("background") and body.get("store") is False:
        message = "Background mode requires store=true."
        raise ErrorResponse(400, message, code="invalid_value", param="background")


def _max_output(body: Mapping[str, Any]) -> int | None:
    for name in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
        value: int | None = body.get(name)
        minimum = MIN_OUTPUT_TOKENS if name == "max_output_tokens" else 1
        if value is not None and value < minimum:
            message = (
                f"Invalid '{name}': integer below minimum value. Expected a value >= {minimum}, "
                f"but got {value} instead."
            )
            raise ErrorResponse(400, message, code="integer_below_min_value", param=name)
        if value is not None:
            return value
    return None


def _messages(body: Mapping[str, Any], api: Api) -> Iterator[tuple[str, str, int]]:
    """Yield the role, the text and the number of images of each message."""
    if body.get("instructions"):
        yield "system", body["instructions"], 0
    items = body["input"] if api == "responses" else body["messages"]
    if isinstance(items, str):
        yield "user", items, 0
        return
    for item in items if isinstance(items, list) else [items]:
        if not isinstance(item, dict):
            message = "Invalid type for 'input': expected one of a string or array of objects."
            raise ErrorResponse(400, message, code="invalid_type", param="input")
        content = item.get("content", item.get("output"))
        parts = [{"text": content}] if isinstance(content, str) else content
        parts = [p for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
        texts = [p["text"] for p in parts if isinstance(p.get("text"), str)]
        images = sum("image" in str(p.get("type")) for p in parts)
        yield str(item.get("role", "")), "\n".join(texts), images
