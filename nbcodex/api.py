"""The functions for Python code: `nbcodex.ask` and `map`, and `aask` and `amap` for event loops."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from nbcodex import host
from nbcodex.client import get_client
from nbcodex.errors import NbcodexError, Stopped, advice_for_script
from nbcodex.models import Api, MapListener, Origin, Reply, RequestOptions
from nbcodex.requests.handle import Handle, reply_or_raise
from nbcodex.requests.options import build_request

if TYPE_CHECKING:
    from nbcodex.mapping.map_run import MapRun

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

MIN_SIMILARITY = 0.75  # of names (`difflib`): "template" is not meant by "temperature"
MAX_KEPT_RUNS = 8  # of maps, with all their replies, in `nbcodex.map.recent`

# What to use in place of options of cells, or of the SDK, that `ask` does not have.
_CELL_OPTIONS = {
    **dict.fromkeys(("out", "format", "raw"), "The returned Reply holds the answer."),
    **dict.fromkeys(("new", "no_history"), "Use thread; without it, no earlier turn is sent."),
    "background": "Use `nbcodex.aask`, or `nbcodex.amap` for many rows.",
    "eval": "Use an f-string.",
    "response_format": "Use schema.",
}


def _public(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """Return a function for users: its errors have short tracebacks, and advice that fits."""
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        _check_names(function.__name__, options, names)
        try:
            return function(*args, **options)
        except (NbcodexError, Stopped) as error:
            raise _shown_error(error) from None

    return call


def _public_async(
    sync: Callable[P, Any],
) -> Callable[
    [Callable[..., Coroutine[Any, Any, ResultT]]], Callable[P, Coroutine[Any, Any, ResultT]]
]:
    """Return a decorator like `_public`, for a coroutine function with the parameters of `sync`."""
    signature = inspect.signature(sync)

    def decorate(function: Callable[..., Coroutine[Any, Any, ResultT]]) -> Any:
        @functools.wraps(function)
        async def call(*args: Any, **options: Any) -> ResultT:
            _check_names(function.__name__, options, signature.parameters)
            try:
                return await function(*args, **options)
            except (NbcodexError, Stopped) as error:
                raise _shown_error(error) from None

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _check_names(function: str, options: Iterable[str], names: Collection[str]) -> None:
    """Raise a TypeError that names the right option, if a user has given an unknown one."""
    for name in set(options) - set(names):
        from nbcodex.openai_api.request_body import RESERVED_PARAMS

        hint = f"If it is a parameter of the API, use params={{{name!r}: …}}."
        if near := difflib.get_close_matches(name, names, n=1, cutoff=MIN_SIMILARITY):
            hint = f"Did you mean {near[0]}?"
        hint = _CELL_OPTIONS.get(name) or RESERVED_PARAMS.get(name) or hint
        if name in {"thread", "new", "no_history"} and "thread" not in names:
            hint = "The rows of a map belong to no conversation."
        error = f"{function}() got an unexpected keyword argument {name!r}."
        raise TypeError(f"{error} {advice_for_script(hint)}")


def _shown_error(error: NbcodexError | Stopped) -> NbcodexError | Stopped:
    # An error of the event loop's thread has a long traceback, all of it ours.
    host.current.adapt_advice(error)
    return error.with_traceback(None)


@_public
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
        The longest wait for limits and faults before it is parked: ``"10m"``, or seconds.
    api : {"auto", "responses", "chat"}, optional
        Which API to use.
    api_base : str, optional
        Base URL of another server.
    reuse : bool, optional
        Whether the answer to an equal request in the journal is acceptable.
    durable : bool
        Whether the server keeps the answer, to continue it after a broken stream or a restart.
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
    handle = _create_handle(prompt, RequestOptions.from_arguments(locals()))
    return reply_or_raise(host.current.follow(handle), handle.request)


@_public_async(ask)
async def aask(prompt: str, **options: Any) -> Reply:
    """Ask without blocking the caller's event loop; the parameters are those of `ask`.

    Examples
    --------
    >>> replies = await asyncio.gather(*(nbcodex.aask(f"Define {word}.") for word in words))
    """
    handle = _create_handle(prompt, RequestOptions(**options))
    return reply_or_raise(await handle.follow_async(), handle.request)


def _create_handle(prompt: str, options: RequestOptions) -> Handle:
    """Return the handle of a request that joins its thread, if it names one."""
    settings, client = host.current.settings(), get_client()
    # Without the cell's id: all calls in a cell would be one turn, each replacing the last.
    origin = Origin(notebook=host.current.origin().notebook)
    request = build_request(prompt, settings, options, origin=origin)
    if request.thread is not None:
        store = client.journal(settings).conversations
        request, _notes = client.conversations.join(request, store, settings, start_new=False)
    return client.create_handle(request, settings)


@_public
def map(  # noqa: A001 - it is nbcodex.map
    template: str | Callable[[Any], object],
    data: Any,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    row_key: str | Callable[[Any], object] | None = None,
    on_error: Literal["keep", "raise"] = "keep",
    engine: Literal["live", "batch"] = "live",
    confirm: bool | None = None,
    model: str | None = None,
    system: str | None = None,
    max_output: int | None = None,
    effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    patience: str | float | None = None,
    api: Api | None = None,
    api_base: str | None = None,
    reuse: bool | None = None,
    durable: bool | None = None,
    schema: object = None,
    images: Iterable[Any] | None = None,
) -> Any:
    """Send one prompt for each of many rows; return the answers as the same kind of data.

    Rows share the rate limits with all other requests, and as many are sent at once as the limits
    allow. Each one is kept in the journal: a map that runs again costs only what is missing. A row
    is the same as an earlier one if its request (prompt, model, options) and its row key are equal.
    Equal rows of one map are sent once.

    Parameters
    ----------
    template : str or callable
        ``"Translate {text} to {lang}"`` with column names; ``{}`` or ``{item}`` is the item
        itself. Or a function of an item (for a frame: a dict of the row's columns) that returns a
        prompt, or a dict of ``prompt`` and options for this row. It is called in this thread; for
        some rows twice, since the cost of all is estimated first.
    data : list, tuple, dict, pandas or polars frame or series, or iterator
        The rows. An iterator is read only as far as rows can be started, and not kept.
    limit : int or None
        Use only the first rows.
    dry_run : bool
        Return an `Estimate` of tokens and cost, and send nothing. Reads an iterator to its end.
    row_key : str, callable or None
        Names rows in listings and errors: a column, or a function of an item. Rows with equal
        requests but different keys are sent separately.
    on_error : {"keep", "raise"}
        Keep a row that fails as a false reply with its reason in `error`, or end the map and park
        the rest. A parked row has not failed.
    engine : {"live", "batch"}
        Send each row now, or upload all to the provider's Batch API, at half the price and
        answered within a day. A batch survives the kernel: run the map again, or
        ``%codex resume ID``.
    confirm : bool or None
        True starts it without a question. Else it asks above ``Codex.ask_above`` dollars, and if
        the template has no ``{field}``, so that all rows would get the same prompt.
    model, system, max_output, effort, params, patience, api, api_base, durable, schema, images
        As for `nbcodex.ask`. Without a `patience`, rows wait as long as limits and faults last.
    reuse : bool or None
        False sends all rows again, equal ones included.

    Returns
    -------
    list, tuple, dict or frame
        Replies in order; by key; or a copy of the frame with the columns ``answer``, ``finish``
        (``stop`` or what cut it), ``input_tokens``, ``output_tokens``, ``cost``, ``error``, ``id``,
        and with a schema ``parsed`` and its fields. A name that is taken gets a number, unless its
        column is the result of the same map: that is filled again. For an iterator: an iterator of
        replies, in order. With `dry_run`: an `Estimate`.

    Raises
    ------
    ConfigurationError
        If a column is missing, braces are a misspelt or unsupported field, an option is invalid,
        or the cost cannot be confirmed; nothing was sent.
    NbcodexError
        If an error would meet every row (key, quota, model, budget), or with
        ``on_error="raise"``.
    Stopped
        If the user pressed Stop: ``%codex resume ID`` continues, and ``nbcodex.map.last`` holds
        what is finished.
    CancelledError, ParkedError
        If the user ended it with ``%codex cancel ID``, ``park ID`` or in the monitor.

    Examples
    --------
    >>> frame = nbcodex.map("Sentiment of {text}, one word", frame, max_output=20)
    >>> frame["answer"]
    """
    run = _prepare_map(locals())
    if dry_run:
        return run
    from nbcodex.mapping import map_runner

    return map_runner.run_map(run) if run.keeps_replies else map_runner.stream_map(run)


@_public_async(map)
async def amap(*args: Any, **options: Any) -> Any:
    """Do what `map` does on the caller's event loop; for an iterator, return an async iterator.

    Examples
    --------
    >>> replies = await nbcodex.amap("Translate {} to French", ["cheese", "wine"])
    >>> async for reply in await nbcodex.amap("Translate {} to French", iter(words)):
    ...     print(reply)
    """
    arguments = inspect.signature(map).bind(*args, **options)
    arguments.apply_defaults()
    run = _prepare_map(arguments.arguments)
    if arguments.arguments["dry_run"]:
        return run
    from nbcodex.mapping import map_runner

    if run.keeps_replies:
        return await map_runner.run_map_async(run)
    return map_runner.stream_map_async(run)


def _prepare_map(arguments: Mapping[str, Any]) -> Any:
    """Return a run that is ready to be started, or the `Estimate` of a dry run."""
    # Imported here: a single prompt needs none of this.
    from nbcodex.mapping.estimate import Estimate
    from nbcodex.mapping.map_api import prepare_map

    names = ("limit", "dry_run", "row_key", "on_error", "engine", "confirm")
    run = prepare_map(
        *(arguments["template"], arguments["data"], RequestOptions.from_arguments(arguments)),
        settings=host.current.settings(),
        origin=host.current.origin(),
        **{name: arguments[name] for name in names},
    )
    if not isinstance(run, Estimate):
        keep_run(run, host.current.map_listener())
    return run


def keep_run(run: MapRun, on_stats: MapListener) -> None:
    """Make a run `nbcodex.map.last`; `on_stats` shows its progress."""
    from nbcodex.mapping.map_api import LastMap, kept_runs

    run.on_stats = on_stats
    map.last = LastMap(run)  # type: ignore[attr-defined]
    kept_runs.pop(run.id, None)  # a resumed run becomes the newest
    kept_runs[run.id] = run
    for id_ in list(kept_runs)[:-MAX_KEPT_RUNS]:
        del kept_runs[id_]
    # `%codex resume` may resume several maps, of which `last` is only one.
    map.recent = {kept.id: LastMap(kept) for kept in kept_runs.values()}  # type: ignore[attr-defined]


map.last = None  # type: ignore[attr-defined]
map.recent = {}  # type: ignore[attr-defined]
