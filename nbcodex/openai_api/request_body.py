"""Makes the body that is sent: a request as one server accepts it. Sends nothing itself.

Compatible servers differ in the API that they have and in the parameters that they accept. What
their refusals show is remembered for the process, so that nothing is refused twice.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nbcodex.errors import Advice, ConfigurationError
from nbcodex.models import Image, Request, Schema, Turn
from nbcodex.openai_api import dialects
from nbcodex.openai_api.endpoints import Endpoint
from nbcodex.openai_api.pricing import IMAGE_TOOL
from nbcodex.openai_api.sent_schema import as_object, sent_form
from nbcodex.settings import Settings

Body = dict[str, Any]
DetectedApi = Literal["responses", "chat"]  # the API of a request; ``auto`` is decided before

PATHS: dict[DetectedApi, str] = {"responses": "/responses", "chat": "/chat/completions"}

UNSTREAMED_NOTICE = "in one piece: the server does not stream this model to your account"
TURNS_LEFT_OUT_NOTICE = (
    "earlier turns left out ({count}): the server demands their reasoning; --new starts afresh"
)
SCHEMA_IN_PROMPT_NOTICE = (
    "the server does not accept this JSON schema: it is in the prompt, and checked here"
)
NO_IMAGES_ADVICE = (
    "Pictures need the Responses API's tool image_generation: this model or server may lack it."
)

# The params that make the model answer with a picture.
IMAGE_PARAMS = {"tools": [{"type": IMAGE_TOOL}], "tool_choice": {"type": IMAGE_TOOL}}

# Parameters that cannot be set with -p, and what to use instead.
RESERVED_PARAMS = {
    name: advice
    for names, advice in {
        "model": "Use --model.",
        "input messages prompt": "It is the prompt itself.",
        "instructions": "Use --system.",
        "max_output_tokens max_completion_tokens max_tokens": "Use --max-output.",
        "reasoning_effort": "Use --effort.",
        "store background": "The provider would store prompt and answer: use --durable for that.",
        "conversation": "The provider would keep the conversation: use --thread NAME instead.",
        "stream stream_options": "Answers are always streamed.",
        "n": "A request has one answer; use --map for many.",
        "extra_headers headers default_headers": "Codex.client accepts a client that sends them.",
        "extra_query base_url api_base url": "Use --api-base or OPENAI_BASE_URL.",
        "extra_body": "Write its contents directly.",
        "api_key": Advice("Use `%codex login` or OPENAI_API_KEY.", script="Use OPENAI_API_KEY."),
        "organization": "Use OPENAI_ORG_ID.",
        "project": "Use OPENAI_PROJECT_ID.",
        "timeout": "Use Codex.idle_timeout and --patience.",
        "max_retries": "Use --patience.",
        "http_client": "Use Codex.client.",
    }.items()
    for name in names.split()
}

# Prefixes of OpenAI's models that reason: for others it refuses ``reasoning.encrypted_content``.
# After a model that is missing here, the next turn is sent without the reasoning of this one.
_REASONING_MODELS = ("gpt-5", "gpt-6", "o1", "o3", "o4", "codex")

# Our parameter for a schema. After a refusal of it, the schema is sent in the prompt instead.
_SCHEMA_PARAM_OF: dict[DetectedApi, str] = {"responses": "text", "chat": "response_format"}
_OUTPUT_PARAMS = ("max_completion_tokens", "max_tokens")
# Parameters of ours that can be left out, or sent under another name, where they are refused.
_OPTIONAL_PARAMS = ("stream_options", *_OUTPUT_PARAMS, "include")

# Forms of earlier turns, listed among the parameters that a server refuses: never both of them.
_BARE_TURNS, _REASONING_IN_TURNS = "turns without reasoning", "reasoning in turns"
_REJECTED_STATUSES = {400, 422}
_UNREAD_STATUSES = {401, 402, 408, 413, 425, 429}  # those of refusals that are about no parameter
_MAX_ADAPTATIONS = 6  # of one request; a refused attempt costs no tokens


@dataclass(slots=True)
class PreparedRequest:
    """A request as one server is expected to accept it; it adapts itself to refusals."""

    request: Request
    endpoint: Endpoint
    model: str
    api: DetectedApi  # which API it is sent to
    is_api_assumed: bool = False  # whether the server may turn out to have only the other API
    # What the server does not accept: parameters, ``system``, or turns without or with reasoning.
    unsupported: frozenset[str] = frozenset()
    adaptations: int = 0  # so far
    reasoning_refusals: int = 0  # of turns without reasoning, or with it
    durable: bool = False  # whether the server is asked to store the answer

    @property
    def is_unstreamed(self) -> bool:
        """Whether the answer is requested in one piece."""
        return "stream" in self.unsupported

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The earlier turns that are sent: those whose reasoning is known, if it is demanded."""
        demanded = _BARE_TURNS in self.unsupported
        turns = self.request.turns
        return tuple(t for t in turns if _reasoning_items(t, self.api)) if demanded else turns

    @property
    def has_schema_in_prompt(self) -> bool:
        """Whether the schema is part of the instructions, because the server has no mode for it."""
        schema = self.request.schema
        return bool(schema and schema.definition) and _SCHEMA_PARAM_OF[self.api] in self.unsupported

    def move_schema_to_prompt(self) -> bool:
        """Put the schema into the instructions if the server may lack a mode for it."""
        name = _SCHEMA_PARAM_OF[self.api]
        is_ours = name in self.body and self.request.schema and name not in self.request.params
        is_movable = bool(is_ours) and self.endpoint.kind == "compatible"
        self.unsupported |= {name} if is_movable else set()
        return is_movable

    def leave_out(self, words: str, *, is_refusal: bool) -> bool:
        """Leave out the reasoning of earlier turns, or in a refusal a parameter, as words say."""
        is_sent = any("encrypted_content" in item for item in self.body.get("input", ()))
        if is_sent and dialects.has_match(words, "reasoning_refused_patterns"):
            self.unsupported = self.unsupported - {_BARE_TURNS} | {_REASONING_IN_TURNS}
            return True
        name = _refused_param(words, self.request, self.body) if is_refusal else None
        if name is None or name in {_BARE_TURNS, _REASONING_IN_TURNS, *self.unsupported}:
            return False
        self.unsupported |= {name}
        return True

    def adapt(self, error: Exception) -> bool:
        """Change or leave out what the server refused; return whether to send the request again."""
        status = getattr(error, "status_code", None)
        codes = [str(getattr(error, name, "")).lower() for name in ("code", "type")]
        # Our AnswerFailedError (HTTP 200) has a payload, the SDK's errors have a body.
        stated = getattr(error, "payload", None) or getattr(error, "body", "")
        words = f"{getattr(error, 'param', '')} {stated!s:.4000}".lower()
        if status and self.leave_out(words, is_refusal=False):
            return True
        if dialects.has_phrase(words, "no_such_call_phrases"):
            status = 404
        elif status and status >= 500:
            # Relays answer 500 for a provider's 400 and quote it; llama-cpp-python for a schema.
            is_about_schema = self.request.schema and "json_schema" in words
            is_wrapped = dialects.has_phrase(words, "wrapped_request_codes") or is_about_schema
            if is_wrapped or dialects.has_phrase(words, "wrapped_request_phrases"):
                status = 400
        elif status and status not in {*_REJECTED_STATUSES, *_UNREAD_STATUSES}:
            # Azure refuses an unknown parameter with HTTP 404 (567-labs/instructor#381).
            is_refused = dialects.has_phrase(words, "unsupported_phrases")
            if is_refused and _refused_param(words, self.request, self.body):
                status = 400
        no_such_call = status in {404, 405, 501}
        if no_such_call and dialects.has_code(codes, "model_codes"):
            return False
        # Ollama, llama.cpp and most gateways have Chat Completions only.
        if self.is_api_assumed and self.api == "responses" and no_such_call:
            self.api, self.durable = "chat", False
            return True
        is_about_storage = any(word in words for word in ("background", "store", "retention"))
        denies_storage = status in {*_REJECTED_STATUSES, 403} and is_about_storage
        if self.durable and (no_such_call or denies_storage):
            self.durable = False
            return True
        if status not in _REJECTED_STATUSES or self.adaptations >= _MAX_ADAPTATIONS:
            return False
        self.adaptations += 1
        name = _refused_param(words, self.request, self.body)
        if name is None or name in self.unsupported:
            return False
        if name in (_BARE_TURNS, _REASONING_IN_TURNS):
            self.reasoning_refusals += 1
            # A relay may use a provider that demands the reasoning and one that refuses it. Each
            # form is sent twice in a row: if the two alternate, the second attempt succeeds.
            if self.reasoning_refusals % 2 == 0:
                return True
            self.unsupported -= {_BARE_TURNS, _REASONING_IN_TURNS}
        self.unsupported |= {name}
        return True

    @property
    def body(self) -> Body:
        """The body to send; the user's params override ours."""
        ours = self._chat_body() if self.api == "chat" else self._responses_body()
        # The bound on the output is never left out.
        unsupported = self.unsupported.difference(_OUTPUT_PARAMS)
        body = {n: value for n, value in ours.items() if value is not None and n not in unsupported}
        for name, value in self.request.params.items():
            # Objects, such as ``reasoning``, are merged.
            if isinstance(body.get(name), dict) and isinstance(value, Mapping):
                value = {**body[name], **value}
            body[name] = value
        return body

    def _responses_body(self) -> Body:
        request, system = self._place_instructions()
        schema = _schema_format(request.schema)
        messages = _messages(request, "responses", self.unsupported)
        has_reasoning = self.endpoint.kind == "openai" and self.model.startswith(_REASONING_MODELS)
        return {
            "model": self.model,
            "input": messages if request.turns or request.images else request.prompt,
            "stream": True,
            "store": self.durable,  # OpenAI's default is true
            "background": self.durable or None,
            "instructions": system or None,
            "max_output_tokens": request.max_output,
            "reasoning": {"effort": request.effort} if request.effort else None,
            "text": {"format": {"type": "json_schema", **schema}} if schema else None,
            # The server does not store the reasoning: the next turn has to send it.
            "include": ["reasoning.encrypted_content"] if has_reasoning else None,
        }

    def _chat_body(self) -> Body:
        request, system = self._place_instructions()
        schema = _schema_format(request.schema)
        first = [{"role": "system", "content": system}] if system else []
        # Compatible servers often accept only ``max_tokens``, OpenAI's newer models the other.
        names = _OUTPUT_PARAMS[::-1] if self.endpoint.kind == "compatible" else _OUTPUT_PARAMS
        output_param = next((name for name in names if name not in self.unsupported), names[0])
        return {
            "model": self.model,
            "messages": [*first, *_messages(request, "chat", self.unsupported)],
            "stream": True,
            # OpenAI refuses it without ``stream``.
            "stream_options": None if self.is_unstreamed else {"include_usage": True},
            output_param: request.max_output,
            "reasoning_effort": request.effort or None,
            "response_format": {"type": "json_schema", "json_schema": schema} if schema else None,
        }

    def _place_instructions(self) -> tuple[Request, str]:
        """Return the request, and the system text that is sent beside it."""
        request, system = replace(self.request, turns=self.turns), self.request.system or ""
        if request.schema and _SCHEMA_PARAM_OF[self.api] in self.unsupported:
            definition = as_object(request.schema.definition)
            schema = json.dumps(definition, ensure_ascii=False, default=str)
            words = f"Answer with one JSON object of this JSON schema, and nothing else:\n{schema}"
            system = f"{system}\n\n{words}" if system else words
        if not system or "system" not in self.unsupported:
            return request, system
        # A server without system messages gets the text before the conversation's first prompt.
        if not request.turns:
            return replace(request, prompt=f"{system}\n\n{request.prompt}"), ""
        first = replace(request.turns[0], prompt=f"{system}\n\n{request.turns[0].prompt}")
        return replace(request, turns=(first, *request.turns[1:])), ""


def _schema_format(schema: Schema | None) -> Body | None:
    if not (schema and schema.definition):
        return None
    definition, is_strict = sent_form(schema)
    return {"name": schema.name, "schema": definition, "strict": is_strict}


class ServerCapabilities:
    """What servers have been found to accept, while this process runs."""

    def __init__(self) -> None:
        self.detected_apis: dict[str, DetectedApi] = {}  # by base URL
        # By server, API, model and, for what concerns a schema, its definition: another may pass.
        self._unsupported: dict[tuple[str, ...], frozenset[str]] = {}
        self._not_durable: set[tuple[str, str, str]] = set()  # base URLs, accounts and models

    def prepare(
        self, request: Request, settings: Settings, endpoint: Endpoint, model: str
    ) -> PreparedRequest:
        """Return a request as its server is known, or expected, to accept it."""
        chosen = settings.api if request.api == "auto" else request.api
        detected = self.detected_apis.get(endpoint.base_url)
        api: DetectedApi = (detected or "responses") if chosen == "auto" else chosen
        at_account = endpoint.base_url, endpoint.account, model
        at_server = endpoint.base_url, api, model
        for_schema = (*at_server, _definition_text(request))
        learned = (self._unsupported.get(key, frozenset()) for key in (at_server, for_schema))
        # Only the model that reasoned can decrypt its reasoning; another server could store it.
        recipient = (model, endpoint.base_url)
        turns = tuple(
            turn
            if recipient == (turn.model or model, turn.base_url or endpoint.base_url)
            else replace(turn, carried=())
            for turn in request.turns
        )
        return PreparedRequest(
            replace(request, turns=turns) if turns != request.turns else request,
            endpoint,
            model,
            api,
            # OpenAI has both APIs: a 404 of its server is about the model.
            is_api_assumed=chosen == "auto" and detected is None and endpoint.kind != "openai",
            # A server has an API for all its models, but parameters differ between them.
            unsupported=frozenset().union(*learned),
            durable=request.durable and api == "responses" and at_account not in self._not_durable,
        )

    def mark_not_durable(self, prepared: PreparedRequest) -> bool:
        """Remember that a server keeps no answers of a model; return whether that is new."""
        at_account = prepared.endpoint.base_url, prepared.endpoint.account, prepared.model
        is_new = at_account not in self._not_durable
        self._not_durable.add(at_account)
        return is_new

    def learn(self, prepared: PreparedRequest) -> None:
        """Remember the form in which a server accepted a request."""
        base_url = prepared.endpoint.base_url
        if prepared.is_api_assumed:
            self.detected_apis[base_url] = prepared.api
        at_server = base_url, prepared.api, prepared.model
        if unsupported := prepared.unsupported.difference(_SCHEMA_PARAM_OF.values()):
            self._unsupported[at_server] = unsupported
        if prepared.has_schema_in_prompt:
            for_schema = (*at_server, _definition_text(prepared.request))
            self._unsupported[for_schema] = frozenset({_SCHEMA_PARAM_OF[prepared.api]})


def _definition_text(request: Request) -> str:
    return json.dumps(dict(request.schema.definition), default=str) if request.schema else ""


def _refused_param(words: str, request: Request, body: Body) -> str | None:
    """Return the parameter of ours that a refusal names, if the request can go without it."""
    # Never ``store``, without which the provider stores what is sent, nor one that the user set.
    is_streamed = "stream" in body and "stream_options" not in words
    if is_streamed and dialects.has_match(words, "no_stream_patterns"):
        return "stream"
    first = (body.get("messages") or [{}])[0]
    has_system = "instructions" in body or first.get("role") == "system"
    if has_system and dialects.has_match(words, "no_system_patterns"):
        return "system"
    is_unsupported = dialects.has_phrase(words, "unsupported_phrases")
    has_reasoning = any("reasoning_content" in message for message in body.get("messages", ()))
    if has_reasoning and "reasoning_content" in words and is_unsupported:
        return _REASONING_IN_TURNS
    if request.turns and dialects.has_match(words, "reasoning_demanded_patterns"):
        return _BARE_TURNS
    if "encrypted" in words and "include" in body and "include" not in request.params:
        return "include"
    for name in _SCHEMA_PARAM_OF.values():
        is_ours = request.schema and name in body and name not in request.params
        if is_ours and dialects.has_match(words, "schema_patterns"):
            return name
    names = [n for n in _OPTIONAL_PARAMS if n in words and n in body and n not in request.params]
    return names[0] if names and is_unsupported else None


def check_params(params: Mapping[str, Any]) -> None:
    """Raise a ConfigurationError for params that we set ourselves."""
    for name in params:
        if not isinstance(name, str) or name in RESERVED_PARAMS:
            raise ConfigurationError(
                f"The parameter {str(name)[:40]!r} cannot be set in the params.",
                advice=RESERVED_PARAMS.get(name, "Names must be strings."),
            )


def _reasoning_items(turn: Turn, api: DetectedApi) -> list[Body]:
    """Return the reasoning in `turn.carried` that has the form of one API."""
    return [dict(item) for item in turn.carried if (api == "chat") == ("reasoning_content" in item)]


def _messages(request: Request, api: DetectedApi, unsupported: frozenset[str]) -> list[Body]:
    messages: list[Body] = []
    for turn in request.turns:
        messages.append({"role": "user", "content": _content(turn.prompt, turn.images, api)})
        answer: Body = {"role": "assistant", "content": turn.answer}
        reasoning = _reasoning_items(turn, api)
        if api == "responses":
            messages += [] if _REASONING_IN_TURNS in unsupported else reasoning
            # llama.cpp does not accept a string here, as OpenAI does (ggml-org/llama.cpp#26394).
            answer["type"] = "message"
            answer["content"] = [{"type": "output_text", "text": turn.answer}]
        elif _BARE_TURNS in unsupported:
            answer |= reasoning[0]  # turns without any are left out: see `PreparedRequest.turns`
        messages.append(answer)
    messages.append({"role": "user", "content": _content(request.prompt, request.images, api)})
    return messages


def _content(text: str, images: tuple[Image, ...], api: DetectedApi) -> str | list[Body]:
    if not images:
        return text
    urls = [f"data:{i.media_type};base64,{b64encode(i.data).decode('ascii')}" for i in images]
    if api == "responses":
        pictures: list[Body] = [{"type": "input_image", "image_url": url} for url in urls]
        return [{"type": "input_text", "text": text}, *pictures]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": "text", "text": text}, *pictures]
