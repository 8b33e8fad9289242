"""`nbcodex.ask` and `nbcodex.aask`: one prompt, one answer, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbcodex import host
from nbcodex.client import current
from nbcodex.models import Origin, Reply, Request
from nbcodex.requests.handle import reply_or_raise
from nbcodex.requests.options import build_request
from nbcodex.settings import Settings


def ask(prompt: str, **options: Any) -> Reply:
    """Ask, and wait for the answer, whatever limits stand in its way.

    Parameters
    ----------
    prompt : str
        The text.
    **options
        ``model``, ``system``, ``max_output`` (tokens), ``effort``, ``params`` (mapping of further
        API parameters), ``patience`` (seconds, or text like ``"10m"``), ``api`` (``"auto"``,
        ``"responses"`` or ``"chat"``), ``api_base``, ``reuse`` (whether an equal request's answer
        in the journal will do), ``durable`` (whether the server shall keep the answer, so that a
        broken stream or a restarted kernel goes on with it and pays nothing again), ``schema`` (a
        pydantic class, or a JSON schema as a dict: `Reply.parsed` is the instance, or the dict),
        ``images`` (paths, bytes, `Image` records, matplotlib figures or PIL images), ``thread``
        (name of the conversation that the answer joins; without one, it sees and joins none).

    Returns
    -------
    Reply
        The finished answer.

    Raises
    ------
    NbcodexError
        If there is none; `ParkedError` where it would take longer than the patience,
        `AnswerError` where it does not fit the schema, asked for twice.
    """
    settings = host.current.settings()
    handle = current().handle(_composed(prompt, settings, options), settings)
    return reply_or_raise(host.current.follow(handle), handle.request)


async def aask(prompt: str, **options: Any) -> Reply:
    """Ask without blocking the caller's event loop; the parameters are those of `ask`."""
    settings = host.current.settings()
    request = _composed(prompt, settings, options)
    return reply_or_raise(await current().follow(request, settings), request)


def _composed(prompt: str, settings: Settings, options: Mapping[str, Any]) -> Request:
    # No cell: a loop in one of them makes many turns.
    origin = Origin(notebook=host.current.notebook())
    request = replace(build_request(prompt, settings, **options), origin=origin)
    return request if request.thread is None else current().join(request, settings).request
