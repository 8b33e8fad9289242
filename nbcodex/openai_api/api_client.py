"""Sends one attempt of a request and yields stream events, or raises exactly one of our errors.

Owns the exchange with a server, durable answers included. Sends a request again only if it can be
adapted to the server's refusal: all other attempts are the caller's decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbcodex import errors
from nbcodex.errors import ConfigurationError, NbcodexError, shorten
from nbcodex.models import LimitSnapshot, Request, StreamPosition, Usage
from nbcodex.openai_api import answers, api_errors, connections, endpoints, pricing, request_body
from nbcodex.openai_api.answers import CompletedAnswer, Redactor, ResponseStarted, StreamEvent
from nbcodex.openai_api.api_errors import AnswerFailedError
from nbcodex.openai_api.dialects import has_match
from nbcodex.openai_api.endpoints import Endpoint
from nbcodex.openai_api.rate_limits import Headers, dicts_in, read_snapshot
from nbcodex.openai_api.readers import AnswerReader, ChatReader, ResponsesReader, safe_response_id
from nbcodex.openai_api.request_body import PATHS, PreparedRequest, ServerCapabilities
from nbcodex.openai_api.stream import FIRST_TEXT_FACTOR, WHOLE_BODY_FACTOR, AnswerStream
from nbcodex.runtime.clock import Clock
from nbcodex.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncAPIResponse, AsyncOpenAI

NOT_DURABLE_NOTICE = "not durable: this server keeps no answers"
FLEX_ADVICE = "It is retried automatically; the service tier `auto` has more capacity."
SHORT_CALL_TIMEOUT_S = 5.0  # of calls that cancel or delete an answer
# A prompt was cut if so many tokens are missing, and no more than this share was read: estimates
# err by some 15 %, for rare scripts by a half.
MIN_CUT_TOKENS, MAX_READ_SHARE = 1_000, 0.5

# The statuses of a server that lacks an answer, or the call that retrieves it.
_ANSWER_UNKNOWN_STATUSES = {400, 404, 405, 410, 422, 501}


class ApiClient:
    """Sends requests to any server. Belongs to one event loop."""

    limits_id = staticmethod(endpoints.limits_id)  # of a model and an account

    def __init__(self, *, clock: Clock, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        # Dates the limit snapshots, and gives the wall time for waits that are stated as dates.
        self.clock = clock
        self._connections = connections.Connections(transport=transport)
        self._has_transport = transport is not None  # in place of the network, in tests
        self.capabilities = ServerCapabilities()
        self._sole_models: dict[Endpoint, str] = {}  # of the servers that offer only one
        # By id of the request, how many streams in a row have ended empty, or without an ending.
        self._empty_streams: dict[str, int] = {}

    def endpoint(self, request: Request, settings: Settings) -> Endpoint:
        """Return where a request goes, or raise a ConfigurationError; nothing is sent."""
        request_body.check_params(request.params)
        if settings.client is None or request.api_base is not None:
            return endpoints.resolve(settings, request)
        # A client or a factory; what an async one makes is known only after `await_endpoint`.
        endpoint, client_secrets = self._connections.custom_endpoint(settings.client)
        endpoints.check_for_secrets(request, [*settings.secrets(), *client_secrets])
        return endpoint

    async def await_endpoint(self, request: Request, settings: Settings) -> Endpoint:
        """Return what `endpoint` does, once an async factory has made the custom client."""
        if settings.client is None:
            return self.endpoint(request, settings)
        endpoint, *_ = await self._connect(request, settings)
        return endpoint

    async def resolve_model(self, request: Request, settings: Settings) -> str:
        """Return the model that the user, the settings or the server names, or raise an error."""
        endpoint = await self.await_endpoint(request, settings)
        if named := request.model or settings.model:
            return _valid_model(named)
        if endpoint.kind == "openai":
            return DEFAULT_MODEL
        if endpoint.kind == "azure":
            raise ConfigurationError(
                "On Azure, a model is named by its deployment.", advice="Use --model DEPLOYMENT."
            )
        # A local server usually has one model loaded; its name is requested once.
        if endpoint not in self._sole_models:
            names = await self.list_models(settings, api_base=request.api_base)
            if len(names) != 1:
                some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                raise ConfigurationError(
                    f"{endpoint.host} offers {some or 'no model'}.",
                    advice=errors.Advice(
                        'Choose one: `%config Codex.model = "…"`, NBCODEX_MODEL, or --model.',
                        script="Choose one: NBCODEX_MODEL, or `model`.",
                    ),
                )
            self._sole_models[endpoint] = names[0]
        return self._sole_models[endpoint]

    async def list_models(self, settings: Settings, *, api_base: str | None = None) -> list[str]:
        """Return the names of the models that a server offers, sorted."""
        request = Request(prompt="", api_base=api_base)
        async with (
            self.connected(request, settings, path="/models") as (client, redactor),
            asyncio.timeout(settings.idle_timeout),
        ):
            response = await client.models.with_raw_response.list()
            listed: Any = json.loads(response.content.decode("utf-8", "replace"))
            payload = listed if isinstance(listed, dict) else {"data": listed}  # Together: a list
            if answers.is_error_object(payload):  # LM Studio, with HTTP 200
                raise AnswerFailedError(payload)
        # Ollama's own list has `models`, each with a `name`.
        models = dicts_in(payload.get("data")) or dicts_in(payload.get("models"))
        stated = [answers.name_value(model.get("id") or model.get("name")) for model in models]
        return [redactor.clean(name) for name in sorted({*filter(None, stated)})]

    async def stream(
        self, request: Request, settings: Settings, *, model: str
    ) -> AsyncGenerator[StreamEvent]:
        """Send a request once; yield `ResponseStarted`, deltas, and at last `CompletedAnswer`.

        `model` is that of `resolve_model`. Raises only NbcodexError, besides asyncio's
        CancelledError. The connection is closed before an error or `CompletedAnswer`.
        """
        endpoint, client, redactor = await self._connect(request, settings)
        prepared = self.capabilities.prepare(request, settings, endpoint, _valid_model(model))
        empty_streams = self._empty_streams.pop(request.id, 0)
        # Some servers end a stream at once when they refuse a request (llama-cpp-python). They
        # state the reason only if the answer is requested in one piece.
        follows_empty_streams = empty_streams == 2
        if follows_empty_streams:
            prepared.unsupported |= {"stream"}
        headers: Headers | None = None
        stream: AnswerStream | None = None
        try:
            async with contextlib.AsyncExitStack() as stack:
                response, reader, stream = await self._send(
                    stack, client, prepared, settings, redactor
                )
                # Azure states the wait in the headers of the HTTP 200 whose stream fails.
                headers = response.headers
                # An answer without an ending is charged: the second one in a row is accepted.
                reader.accepts_missing_ending = empty_streams > 0
                # The server accepted the parameters: no failure after this is due to them.
                if not follows_empty_streams:
                    self.capabilities.learn(prepared)
                yield self._start_event(response, redactor, api=prepared.api, model=prepared.model)
                async with contextlib.aclosing(stream.events()) as events:
                    async for event in events:
                        yield event
                # LM Studio can leave the answer to a schema empty (MattJColes/lgtmaybe#118).
                is_bare = not (stream.text.strip() or reader.answer.tool_calls or reader.answer.cut)
                if is_bare and prepared.move_schema_to_prompt():
                    self.capabilities.learn(prepared)
                    raise api_errors.invalid_answer("The answer to the JSON schema is empty.")
        except Exception as error:
            failure = self.translate(error, redactor, headers)
            # In an event, or in JSON with HTTP 200: the next attempt is sent without it.
            is_refusal = isinstance(failure, errors.RequestError) and not (stream and stream.text)
            is_left_out = prepared.leave_out(failure.message.lower(), is_refusal=is_refusal)
            if is_left_out and not follows_empty_streams:
                self.capabilities.learn(prepared)
                failure = api_errors.invalid_answer(failure.message)
            failure.usage = reader.answer.usage if stream else None
            # A gateway that answers each path with Chat Completions.
            if prepared.is_api_assumed and "choices" in answers.dict_member(vars(error), "payload"):
                self.capabilities.detected_apis[endpoint.base_url] = "chat"
            generated = api_errors.failed_generation(error)
            if generated is None:
                if stream and (stream.is_empty or reader.lacks_ending):
                    self._empty_streams[request.id] = empty_streams + 1
                # Missing capacity of the flex tier, for which OpenAI publishes no code, is HTTP 429
                # that names no limit. It must not close the model to requests of other tiers.
                is_flex = pricing.requested_tier(request) == "flex"
                if is_flex and isinstance(failure, errors.LimitError):
                    text, limit, wait = failure.message, failure.limit, failure.wait
                    if limit.resource is None and limit.limit is None:
                        failure = errors.OverloadedError(text, advice=FLEX_ADVICE, wait=wait)
                _improve_advice(failure, prepared)
                raise failure from None
            # Groq validates the schema itself, and refuses what it has generated and charged. It is
            # treated as an answer that does not fit its schema, which the caller can repair.
            if headers is None:
                snapshot = failure.snapshot or LimitSnapshot(at=self.clock.now())
                yield ResponseStarted(prepared.api, model, snapshot, failure.simulated, None)
            text = redactor.clean(generated)
            yield answers.Reset()
            yield answers.TextDelta(text)
            yield CompletedAnswer(text, usage=Usage(), model=model, cut=None, response_id=None)
            return
        # Whether the server keeps the answer is known only from its events.
        is_not_kept = request.durable and reader.position is None
        if is_not_kept and self.capabilities.mark_not_durable(prepared):
            yield answers.Notice(NOT_DURABLE_NOTICE)
        if prepared.is_unstreamed and not follows_empty_streams:
            yield answers.Notice(request_body.UNSTREAMED_NOTICE)
        if count := len(request.turns) - len(prepared.turns):
            yield answers.Notice(request_body.TURNS_LEFT_OUT_NOTICE.format(count=count))
        if prepared.has_schema_in_prompt:
            yield answers.Notice(request_body.SCHEMA_IN_PROMPT_NOTICE)
        answer = reader.answer.completed(stream.text, redactor, request, endpoint.kind)
        if answer.text != stream.text:  # the arguments of a call that answers the schema
            yield answers.TextDelta(answer.text)
        if notice := _prompt_cut_notice(prepared, answer.usage.input_tokens):
            yield answers.Notice(notice)
        # LiteLLM's figure, where the body has none.
        cost = answers.plausible_cost(headers.get("x-litellm-response-cost"))
        if answer.usage.stated_cost is None and cost:
            answer = replace(answer, usage=replace(answer.usage, stated_cost=cost))
        yield answer

    async def resume_stream(
        self, request: Request, settings: Settings, *, position: StreamPosition, text: str
    ) -> AsyncGenerator[StreamEvent]:
        """Continue a durable answer, at no further charge; yield what `stream` yields.

        `text` is the answer up to `position`; `CompletedAnswer` contains it, too. Raises an
        AnswerLostError if the answer is lost, so that only sending the request again can help.
        """
        if safe_response_id(position.response_id) is None:
            raise errors.AnswerLostError("The answer is lost: the journal has no valid id for it.")
        endpoint, client, redactor = await self._connect(request, settings)
        stored_position = position
        # The calls are those of OpenAI's guide "Background mode": ``GET /responses/{id}``, first
        # with ``stream`` and ``starting_after``, then without them for the whole answer.
        retrieve: Any = client.responses.with_streaming_response.retrieve
        for streamed in (True, False):
            options: dict[str, Any] = {"stream": True} if streamed else {}
            if streamed and position.sequence is not None:
                options["starting_after"] = position.sequence
            reader = ResponsesReader(durable=True, position=position)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    async with asyncio.timeout(settings.idle_timeout):
                        call = retrieve(position.response_id, **options)
                        response = await stack.enter_async_context(call)
                    yield self._start_event(response, redactor, api="responses", model=None)
                    stream = AnswerStream(
                        response.iter_bytes(),
                        reader,
                        settings,
                        secrets=redactor.secrets,
                        patience=request.patience,
                        resumed_text=text,
                    )
                    async with contextlib.aclosing(stream.events()) as events:
                        async for event in events:
                            if isinstance(event, StreamPosition):
                                position = event
                            elif isinstance(event, answers.TextDelta):
                                text += event.text
                            yield event
                yield reader.answer.completed(stream.text, redactor, request, endpoint.kind)
            except Exception as error:
                failure = self.translate(error, redactor)
                status = getattr(error, "status_code", None)
                is_lost = isinstance(error, AnswerFailedError) or status in _ANSWER_UNKNOWN_STATUSES
                is_disconnected = isinstance(failure, errors.TransportError | errors.ServerError)
                # The answer may still be there when its stream fails: its events may be dropped,
                # a cancelled one's merely end, and an `error` may concern the stream alone.
                if streamed and (is_lost or (is_disconnected and position == stored_position)):
                    continue
                if is_lost:
                    raise errors.AnswerLostError(f"The answer is lost. {failure.message}") from None
                raise failure from None
            else:
                return

    async def cancel_response(
        self, request: Request, settings: Settings, *, position: StreamPosition
    ) -> None:
        """End a durable answer at the server, if it can be reached in a few seconds."""
        with contextlib.suppress(Exception):
            async with (
                asyncio.timeout(SHORT_CALL_TIMEOUT_S),
                self.connected(request, settings) as (client, _),
                client.responses.with_streaming_response.cancel(position.response_id),
            ):
                pass

    async def delete_response(
        self, request: Request, settings: Settings, *, position: StreamPosition
    ) -> bool:
        """Delete a durable answer at the server; return whether it is known to be gone."""
        import openai

        id_ = safe_response_id(position.response_id) or ""
        with contextlib.suppress(Exception):
            async with (
                asyncio.timeout(SHORT_CALL_TIMEOUT_S),
                self.connected(request, settings) as (client, _),
            ):
                responses = client.responses.with_streaming_response
                # A server answers 404 if it lacks the answer or this call: a retrieval shows which.
                for call, is_gone in ((responses.delete, True), (responses.retrieve, False)):
                    with contextlib.suppress(openai.NotFoundError):
                        async with call(id_):
                            return is_gone
                return True
        return False

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    @contextlib.asynccontextmanager
    async def connected(
        self, request: Request, settings: Settings, *, path: str = ""
    ) -> AsyncIterator[tuple[AsyncOpenAI, Redactor]]:
        """Yield the client for a request's server, and a redactor; raise only our errors."""
        _, client, redactor = await self._connect(request, settings)
        try:
            yield client, redactor
        except Exception as error:
            failure = self.translate(error, redactor)
            if path:  # the only one that the block calls
                api_errors.explain_wrong_address(failure, str(client.base_url).rstrip("/"), path)
            raise failure from None

    async def _connect(
        self, request: Request, settings: Settings
    ) -> tuple[Endpoint, AsyncOpenAI, Redactor]:
        made: AsyncOpenAI | None = None
        if settings.client is not None and request.api_base is None:
            made = await self._connections.custom_client(settings.client)
        endpoint = self.endpoint(request, settings)
        client = made or self._connections.client(endpoint)
        redactor = Redactor([*settings.secrets(), *connections.secrets_of(client)])
        return endpoint, client, redactor

    def is_simulated(self, headers: Headers, url: str) -> bool:
        """Return whether a response is the simulator's, whose answers cost nothing."""
        # Any server could send the header and so escape the budget. The simulator runs on this
        # machine, or in this process as the transport.
        is_possible = self._has_transport or pricing.is_local_server(url)
        return is_possible and headers.get("x-nbcodex-simulated") == "true"

    def translate(
        self, error: Exception, redactor: Redactor, headers: Headers | None = None
    ) -> NbcodexError:
        """Return one of our errors, to be raised without its cause, which holds secrets."""
        clean, now = redactor.clean, self.clock.wall()
        failure = api_errors.from_exception(error, wall_time=now, headers=headers, clean=clean)
        response = getattr(error, "response", None)
        if response is not None:
            failure.simulated = self.is_simulated(response.headers, str(response.url))
            failure.snapshot = read_snapshot(response.headers, at=self.clock.now())
        # The SDK's frames and requests hold the key, which debuggers and verbose tracebacks would
        # show: its exceptions stay reachable as the context of ours.
        for each in api_errors.exception_chain(error):
            traceback.clear_frames(each.__traceback__)
            sent = getattr(each, "_request", None) or vars(each).get("request")  # httpx2, SDK
            if headers_sent := getattr(sent, "headers", None):
                headers_sent.clear()
        return failure

    async def _send(
        self,
        stack: contextlib.AsyncExitStack,
        client: AsyncOpenAI,
        prepared: PreparedRequest,
        settings: Settings,
        redactor: Redactor,
    ) -> tuple[AsyncAPIResponse[Any], AnswerReader, AnswerStream]:
        """Send the request, adapted to what the server turns out not to accept."""
        while True:
            body, is_chat = prepared.body, prepared.api == "chat"
            # The SDK transforms named arguments through its own types, which takes a tenth of a
            # request's CPU time: only the arguments that it requires are passed by name.
            required = ("model", "stream", "messages") if is_chat else ()
            named: Any = {name: body.pop(name) for name in required if name in body}
            resource: Any = client.chat.completions if is_chat else client.responses
            create = resource.with_streaming_response.create
            # The answers of Chat Completions do not list the calls of paid tools.
            reader = ChatReader() if is_chat else ResponsesReader(durable=prepared.durable)
            tools = pricing.paid_tools(prepared.request, prepared.model) if is_chat else ()
            reader.answer.hosted_tool_calls = tools
            try:
                # Without streaming, the headers come when the answer is complete.
                factor = WHOLE_BODY_FACTOR if prepared.is_unstreamed else FIRST_TEXT_FACTOR
                async with asyncio.timeout(settings.idle_timeout * factor):
                    response = await stack.enter_async_context(create(**named, extra_body=body))
                    stream = AnswerStream(
                        response.iter_bytes(),
                        reader,
                        settings,
                        secrets=redactor.secrets,
                        patience=prepared.request.patience,
                        # "openai": no tags are searched for; a stream cannot resume between them.
                        server_kind="openai" if prepared.durable else prepared.endpoint.kind,
                    )
                    if "json" in response.headers.get("content-type", ""):
                        await stream.prefetch()  # raises an error in it, to which `adapt` reacts
                    return response, reader, stream
            except Exception as error:
                if prepared.adapt(error):
                    continue
                # A token provider of the user's own client can raise anything within our call.
                if settings.client and not api_errors.is_api_exception(error):
                    raise connections.factory_error(error) from None
                raise

    def _start_event(
        self, response: AsyncAPIResponse[Any], redactor: Redactor, *, api: str, model: str | None
    ) -> ResponseStarted:
        headers = dict(response.headers.items())  # a lookup in httpx2's headers is linear
        return ResponseStarted(
            api=api,
            model=model,
            snapshot=read_snapshot(headers, at=self.clock.now()),
            simulated=self.is_simulated(headers, str(response.url)),
            request_id=shorten(redactor.clean(headers.get("x-request-id", "")), 100) or None,
        )


def _improve_advice(failure: NbcodexError, prepared: PreparedRequest) -> None:
    """Replace the advice of a refusal whose cause the request shows."""
    if not isinstance(failure, errors.RequestError | errors.ModelError):
        return
    message = failure.message.lower()
    if pricing.IMAGE_TOOL in pricing.paid_tools(prepared.request, prepared.model):
        failure.advice = request_body.NO_IMAGES_ADVICE
    elif prepared.request.turns and has_match(message, "reasoning_demanded_patterns"):
        failure.advice = errors.LONG_CONVERSATION_ADVICE
    elif prepared.request.effort and has_match(message, "effort_patterns"):
        failure.advice = "Leave out --effort, or give it another value: this model refuses it."
    elif prepared.request.max_output and has_match(message, "max_output_patterns"):
        failure.advice = "Set --max-output to a number that the message allows."
    else:
        api_errors.explain_wrong_address(failure, prepared.endpoint.base_url, PATHS[prepared.api])


def _prompt_cut_notice(prepared: PreparedRequest, read_tokens: int | None) -> str:
    """Return a notice if the server has read far less than the prompt, as Ollama does."""
    if read_tokens is None or pricing.known_provider(prepared.endpoint.base_url):
        return ""
    # Only text: servers count pictures, schemas and tools in other ways, or not at all.
    turns = tuple(replace(turn, images=(), carried=()) for turn in prepared.turns)
    text = replace(prepared.request, turns=turns, images=(), schema=None, params={})
    sent_tokens = pricing.estimate_request_tokens(text)
    if read_tokens > min(sent_tokens - MIN_CUT_TOKENS, MAX_READ_SHARE * sent_tokens):
        return ""
    return (
        f"the server read only {read_tokens:,} of some {sent_tokens:,} tokens: it may cut long "
        "prompts (Ollama: raise num_ctx)"
    )


def _valid_model(model: str) -> str:
    if not model.isprintable() or not model.strip() or len(model) > 256:
        raise ConfigurationError(
            "Invalid model name.", advice="See `%codex models` or `nbcodex doctor`."
        )
    return model
