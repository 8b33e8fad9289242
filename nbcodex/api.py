"""`nbcodex.ask` and `nbcodex.aask`: one prompt, one answer, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbcodex import host
from nbcodex.client import current
from nbcodex.models import Api, Origin, Reply, Request
from nbcodex.requests.handle import reply_or_raise
from nbcodex.requests.options import RequestOptions, build_request
from nbcodex.settings import Settings


def ask(
    prompt: str,
    *,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: Api | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool = False,
    schema: object = None,
    images: Iterable[Any] = (),
    thread: str | None = None,
) -> Reply:
    """Send a prompt and wait for its answer, through rate limits and faults.

    Parameters
    ----------
    prompt : str
        The prompt.
    model : str, optional
        The model; by default ``Codex.model``, or the provider's choice.
    system : str, optional
        Instructions that precede the prompt.
    max_output : int, optional
        Upper bound on output tokens, reasoning included.
    effort : str, optional
        Reasoning effort, such as ``"low"``.
    params : mapping, optional
        Further parameters of the API, such as ``{"temperature": 0}``.
    patience : str or float, optional
        The longest wait for limits and faults, as ``"10m"`` or in seconds, before the request is
        parked.
    api : {"auto", "responses", "chat"}, optional
        Which API to use.
    api_base : str, optional
        Base URL of another server.
    reuse : bool, optional
        Whether the answer to an equal request in the journal is acceptable.
    durable : bool
        Whether the server stores the answer, so that after a broken stream or a kernel restart
        it is continued and not paid again.
    schema : type or mapping, optional
        A pydantic class, another type such as ``list[Person]``, or a JSON schema: `Reply.parsed`
        is then a value of the type, or the JSON value.
    images : iterable
        Paths, bytes, matplotlib figures or PIL images.
    thread : str, optional
        Name of the conversation that the prompt continues; by default it belongs to none.

    Returns
    -------
    Reply
        The finished answer.

    Raises
    ------
    NbcodexError
        If there is no answer: `ParkedError` if it would take longer than the patience,
        `AnswerError` if two answers in a row do not fit the schema.

    Examples
    --------
    >>> reply = nbcodex.ask("Name three rivers.", max_output=200)
    >>> reply.text, reply.cost
    """
    settings = host.current.settings()
    request = _build(prompt, settings, RequestOptions.from_arguments(locals()))
    handle = current().handle(request, settings)
    return reply_or_raise(host.current.follow(handle), request)


async def aask(
    prompt: str,
    *,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: Api | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool = False,
    schema: object = None,
    images: Iterable[Any] = (),
    thread: str | None = None,
) -> Reply:
    """Ask without blocking the caller's event loop; the parameters are those of `ask`.

    Examples
    --------
    >>> replies = await asyncio.gather(*(nbcodex.aask(f"Define {word}.") for word in words))
    """
    settings = host.current.settings()
    request = _build(prompt, settings, RequestOptions.from_arguments(locals()))
    handle = current().handle(request, settings)
    return reply_or_raise(await handle.follow_async(), request)


def _build(prompt: str, settings: Settings, options: RequestOptions) -> Request:
    # Not a cell's origin: in a cell, a loop makes many turns.
    origin = Origin(notebook=host.current.notebook())
    request = build_request(prompt, settings, options, origin=origin)
    return request if request.thread is None else current().join(request, settings)[0]
