"""One HTTP try: a request goes out, text comes back, or exactly one of our errors.

Owns the reading of the stream and its silence. Never tries twice for the same reason: whether
another attempt is made is the engine's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from nbcodex.errors import (
    ConfigurationError,
    GoneError,
    ModelError,
    NbcodexError,
    RequestError,
)
from nbcodex.models import Request, StreamPosition
from nbcodex.openai_api import (
    api_client,
    api_errors,
    connections,
    durable,
    endpoints,
    exchange,
    rate_limits,
    request_body,
    responses,
)
from nbcodex.openai_api.answers import (
    Notice,
    StreamEvent,
    TextDelta,
)
from nbcodex.openai_api.dialects import Dialects, Question
from nbcodex.openai_api.endpoints import Endpoint
from nbcodex.openai_api.redaction import Redactor
from nbcodex.openai_api.stream import BEFORE_TEXT, BEFORE_WHOLE, whole_body
from nbcodex.runtime.clock import Clock
from nbcodex.settings import DEFAULT_MODEL, Settings

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncAPIResponse, AsyncOpenAI


NOT_KEPT = "not durable: this server keeps no answers"


class ApiClient:
    """The way to every server. Belongs to one event loop.

    Parameters
    ----------
    clock : Clock
        Dates the snapshots, and tells the wall time for waits given as dates.
    transport : httpx2.AsyncBaseTransport or None
        Stands in for the network.
    """

    def __init__(self, *, clock: Clock, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.clock = clock
        self._connections = connections.Connections(transport=transport)
        self.dialects = Dialects()
        self._only: dict[Endpoint, str] = {}

    def endpoint(self, request: Request, settings: Settings) -> Endpoint:
        """Return where a request goes; nothing is sent.

        A client that an async factory makes is known only after `resolve_model` was awaited.

        Raises
        ------
        ConfigurationError
            If a setting or a parameter makes no sense, no key is known, or the request contains
            one.
        """
        request_body.check_params(request.params)
        if settings.client is None or request.api_base is not None:
            return endpoints.resolve(settings, request)
        client = self._connections.custom_now(settings.client)
        own = connections.secrets_of(client) if client else []
        endpoints.check_texts(request, [*settings.secrets(), *own])
        if client is None:
            scope = connections.custom_scope(settings.client)
            return Endpoint(kind="compatible", base_url="", host="", scope=scope)
        return connections.endpoint_of(client, settings.client)

    def bucket_id(self, endpoint: Endpoint, model: str, *, salt: bytes) -> str:
        """Return the name of the limits that a request draws on: a hash that tells nothing of them.

        It is the same in all processes that have the same `salt`, but for custom clients.
        """
        return endpoints.bucket_id(endpoint, model, salt=salt)

    def detected_api(self, endpoint: Endpoint) -> str | None:
        """Return which API a server was found to speak; None where it was not asked yet."""
        return self.dialects.detected_api(endpoint.base_url)

    async def resolve_model(self, request: Request, settings: Settings) -> str:
        """Return the model to ask, which the user, the settings or the server names.

        Raises
        ------
        ConfigurationError
            If nobody names one, or the server offers several.
        """
        named = request.model or settings.model
        if named and settings.client is None:
            return _checked(named)
        endpoint, client = await self.client_for(request, settings)
        if named:
            return _checked(named)
        if endpoint.kind == "openai":
            return DEFAULT_MODEL
        if endpoint.kind == "azure":
            raise ConfigurationError(
                "On Azure, a model is named by its deployment.", advice="Use -m DEPLOYMENT."
            )
        if endpoint not in self._only:
            self._only[endpoint] = _only(await self._offered(client, settings), endpoint)
        return self._only[endpoint]

    async def list_models(self, settings: Settings, *, api_base: str | None = None) -> list[str]:
        """Return the names of the models that a server offers, sorted."""
        request = Request(prompt="", api_base=api_base)
        _, client = await self.client_for(request, settings)
        return await self._offered(client, settings)

    async def stream(
        self, request: Request, settings: Settings, *, model: str
    ) -> AsyncGenerator[StreamEvent]:
        """Send a request once, and yield what comes back: `Opened`, text, at last `Completed`.

        Parameters
        ----------
        request, settings
            What to send, and how.
        model : str
            As `resolve_model` returned it.

        Raises
        ------
        NbcodexError
            Nothing else, but for the CancelledError of asyncio. The connection is closed then, as
            it is before `Completed` is yielded.
        """
        endpoint, client = await self.client_for(request, settings)
        redactor = exchange.redactor_for(settings, client)
        question = self.dialects.question(request, settings, endpoint, _checked(model))
        sent: rate_limits.Headers | None = None
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._open(stack, client, question, settings)
                sent = response.headers
                self.dialects.learn(question)
                reader = responses.reader(question.api, durable=question.durable)
                yield exchange.opened(
                    response, redactor, clock=self.clock, api=question.api, model=question.model
                )
                reading = exchange.begin(response, reader, client, settings)
                async with contextlib.aclosing(exchange.pieces(reading, redactor)) as pieces:
                    async for piece in pieces:
                        yield piece
        except Exception as error:
            failure, cause = self.translate(error, redactor, sent)
            if request_body.asks_for_images(request.params) and isinstance(
                failure, RequestError | ModelError
            ):
                failure.advice = request_body.NO_IMAGES_ADVICE
            raise failure from cause
        if request.durable and reading.mark is None and self.dialects.forgo(question):
            yield Notice(api_client.NOT_KEPT)
        if question.in_one_piece:
            yield Notice(request_body.UNSTREAMED)
        if question.in_words:
            yield Notice(request_body.NO_MODE)
        yield exchange.completed(reading.text, reader.ending, redactor)

    async def resume_stream(
        self, request: Request, settings: Settings, *, mark: StreamPosition, text: str
    ) -> AsyncGenerator[StreamEvent]:
        """Go on with a durable answer, at no further charge; yield what `stream` yields.

        Parameters
        ----------
        mark : Mark
            Where it goes on.
        text : str
            The answer up to there, which `Completed` holds, too.

        Raises
        ------
        GoneError
            If the answer is lost, so that only asking anew can help.
        NbcodexError
            Anything else that goes wrong.
        """
        if durable.usable(mark.response_id) is None:
            raise GoneError("The answer is lost: the journal has no name for it.")
        _, client = await self.client_for(request, settings)
        redactor, start = exchange.redactor_for(settings, client), mark
        for call in (durable.streamed, durable.fetched):
            going_on = exchange.go_on(
                call(client, mark), client, settings, clock=self.clock, mark=mark, text=text
            )
            try:
                async with contextlib.aclosing(going_on) as pieces:
                    async for piece in pieces:
                        match piece:
                            case StreamPosition():
                                mark = piece
                            case TextDelta(more):
                                text += more
                        yield piece
            except Exception as error:
                failure, cause = self.translate(error, redactor)
                is_open = durable.tells_nothing(error, failure, moved=mark != start)
                if call is durable.streamed and is_open:
                    continue
                if isinstance(error, api_errors.FailedError) or durable.refused(error):
                    raise GoneError(f"The answer is lost. {failure.message}") from cause
                raise failure from cause
            else:
                return

    async def cancel_response(
        self, request: Request, settings: Settings, *, mark: StreamPosition
    ) -> None:
        """Tell the server that a durable answer is not wanted any more: it may never hear of it."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(durable.CANCELLING):
                _, client = await self.client_for(request, settings)
                async with durable.cancelled(client, mark):
                    pass

    async def _open(
        self,
        stack: contextlib.AsyncExitStack,
        client: AsyncOpenAI,
        question: Question,
        settings: Settings,
    ) -> AsyncAPIResponse[Any]:
        """Send the request; in another way, where the server turns out not to take the first."""
        while True:
            try:
                patience = BEFORE_WHOLE if question.in_one_piece else BEFORE_TEXT
                async with asyncio.timeout(settings.idle_timeout * patience):
                    return await stack.enter_async_context(_call(client, question))
            except Exception as error:
                if question.rephrase(error):
                    continue
                if settings.client and not api_errors.is_known(error):
                    raise connections.failed(error) from None
                raise

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    async def client_for(
        self, request: Request, settings: Settings
    ) -> tuple[Endpoint, AsyncOpenAI]:
        """Return the endpoint of a request, and the client for it."""
        if settings.client is None or request.api_base is not None:
            endpoint = self.endpoint(request, settings)
            return endpoint, self._connections.client(endpoint)
        client = await self._connections.custom(settings.client)
        return self.endpoint(request, settings), client

    async def _offered(self, client: AsyncOpenAI, settings: Settings) -> list[str]:
        """Ask the server for its models."""
        redactor = exchange.redactor_for(settings, client)
        try:
            async with (
                asyncio.timeout(settings.idle_timeout),
                client.models.with_streaming_response.list() as response,
            ):
                body = await whole_body(response.iter_bytes())
            return [redactor.clean(name) for name in responses.model_names(body)]
        except Exception as error:
            failure, cause = self.translate(error, redactor)
            raise failure from cause

    def translate(
        self, error: Exception, redactor: Redactor, sent: rate_limits.Headers | None = None
    ) -> tuple[NbcodexError, BaseException | None]:
        """Return one of our errors, and what may be shown as its cause: nothing with a secret."""
        failure = api_errors.from_exception(
            error, wall=self.clock.wall(), headers=sent, clean=redactor.clean
        )
        response = getattr(error, "response", None)
        if failure.snapshot is None and response is not None:
            failure.snapshot = rate_limits.snapshot(
                response.headers, at=self.clock.now(), clean=redactor.clean
            )
        if response is not None:
            failure.simulated = rate_limits.is_simulated(response.headers)
        if failure is error:
            return failure, error.__cause__
        shown = " ".join(api_errors.chain(error))
        return failure, error if redactor.clean(shown) == shown else None


def _call(client: AsyncOpenAI, question: Question) -> Any:
    """Return the call of the SDK that sends a question, as a context that closes its response."""
    body = question.body
    # What is named is looked through for the SDK's own types, at a tenth of a request's cost: only
    # what it asks for by name is.
    if question.api == "responses":
        return client.responses.with_streaming_response.create(extra_body=body)
    named = {name: body.pop(name) for name in ("model", "stream", "messages") if name in body}
    return client.chat.completions.with_streaming_response.create(**named, extra_body=body)


def _checked(model: str) -> str:
    """Return a model's name, or raise if it cannot be one."""
    if not model.isprintable() or not model.strip() or len(model) > 256:
        raise ConfigurationError("The model's name is no name.", advice="See `%codex models`.")
    return model


def _only(names: list[str], endpoint: Endpoint) -> str:
    """Return the one name of a list, or raise a ConfigurationError that shows the others."""
    if len(names) == 1:
        return names[0]
    some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    raise ConfigurationError(
        f"{endpoint.host} offers {some}." if names else f"{endpoint.host} offers no model.",
        advice="Name one with -m, or in NBCODEX_MODEL.",
    )
