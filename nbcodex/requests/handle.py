"""One request, as the thread that asked holds it: set going, followed, ordered about.

Owns the way from a thread that waits to the loop that works. An interrupt may strike anywhere in
here; whatever it finds, the request ends and its last event is painted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from nbcodex.errors import CancelledError, ConfigurationError, NbcodexError, Stopped, shorten
from nbcodex.events import (
    Cancelled,
    Ending,
    Event,
    Failed,
    Finished,
    Interrupted,
    Parked,
    Queued,
)
from nbcodex.models import Reply, Request, Resumption, Status
from nbcodex.requests.event_queue import WAIT_SLICE_S, EventQueue
from nbcodex.runtime import event_loop
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.runner import Order, Run
    from nbcodex.requests.services import Services

log = logging.getLogger(__name__)

_STOPPING = 0.2
"""Seconds that Stop waits for the last events; the request ends on the loop in any case."""

AWAKE = 0.05
"""Seconds after which a caller's loop is woken, to look whether it was interrupted."""

PaintEvents = Callable[[tuple[Event, ...]], None]
Listener = Callable[[Event], None]


class Handle:
    """One request on its way. Orders return at once.

    Parameters
    ----------
    request, settings
        What is asked, and how.
    services : callable
        Returns the services; called on the loop's thread.
    listeners : sequence of callable
        Hear every event, on the loop's thread, beside whoever follows.
    resumption : Resumption or None
        How to take up a request that is in the journal already.
    """

    def __init__(
        self,
        request: Request,
        settings: Settings,
        *,
        services: Callable[[], Services],
        listeners: Sequence[Listener] = (),
        resumption: Resumption | None = None,
    ) -> None:
        self.request = request
        self._settings, self._services = settings, services
        self._feed = EventQueue()
        self._listeners: Sequence[Listener] = (self._feed, *listeners)
        self._resumption = resumption
        self._run: Run | None = None
        self._kept = threading.Event()
        self._ending: Future[Ending] = Future()
        self._ending.set_running_or_notify_cancel()  # whoever gives up waiting cancels nothing

    def start(self) -> None:
        """Set the request going, unless it is."""
        event_loop.shared().call_soon(self._begin)

    def _begin(self) -> None:
        if self._run is not None:
            return
        try:
            services = self._services()
            from nbcodex.requests import runner  # with all that it takes, not before it is needed

            self._run = runner.start(
                services,
                self.request,
                self._settings,
                self._hear,
                resumption=self._resumption,
                kept=self._kept.set,
            )
        except Exception as error:
            failure = NbcodexError(
                f"nbcodex cannot start: {shorten(repr(error))}.", advice="Try `%codex doctor`."
            )
            self._hear(
                Failed(
                    request_id=self.request.id, at=0.0, error=failure, reply=self._nothing("failed")
                )
            )

    def _hear(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)
        if not isinstance(event, Queued):
            self._kept.set()
        if isinstance(event, Ending) and not self._ending.done():
            self._ending.set_result(event)

    def end(self, order: Order) -> None:
        """End the request: ``stop``, ``cancel`` or ``park``. The first order counts."""
        event_loop.shared().call_soon(self._end, order)

    def _end(self, order: Order) -> None:
        if self._run is not None:
            self._run.end(order)

    def stop(self) -> None:
        """End the request as interrupted; the text so far is kept."""
        self.end("stop")

    def cancel(self) -> None:
        """End the request for good."""
        self.end("cancel")

    def park(self) -> None:
        """Keep the request for later."""
        self.end("park")

    def park_at_exit(self) -> None:
        """Park the request because the process ends; threads that follow it get no more events."""
        self._listeners = ()
        self.park()

    def retry_now(self) -> None:
        """Send the request through its wait, as a probe."""
        event_loop.shared().call_soon(self._retry_now)

    def _retry_now(self) -> None:
        if self._run is not None:
            self._run.retry_now()

    def follow(
        self,
        paint: PaintEvents = lambda _: None,
        *,
        tick: Callable[[], float | None] = lambda: None,
    ) -> Ending:
        """Start the request and wait for its ending, handing each batch of events to `paint`.

        Parameters
        ----------
        paint : callable
            Called in this thread; with no events when `tick()` seconds passed without any.
        tick : callable
            Returns how often to call it at the least; None means only for events.

        Returns
        -------
        Ending
            The last event. An interrupt ends the request, and returns `Interrupted`; if the ending
            was already on its way, that one is painted and the interrupt is raised again.
        """
        stopped, start = False, self.start
        try:
            while True:
                try:
                    try:
                        start()
                        ending = self._painted(paint, tick, within=_STOPPING if stopped else None)
                        break
                    except KeyboardInterrupt:
                        stopped, start = True, self.stop
                except KeyboardInterrupt:  # a second one, while the first was being noted
                    stopped, start = True, self.stop
        finally:
            if not self._ending.done():
                self.stop()
        if stopped and not isinstance(ending, Interrupted):
            raise Stopped("Stopped, when the request had just ended.", reply=ending.reply)
        return ending

    def _painted(
        self, paint: PaintEvents, tick: Callable[[], float | None], *, within: float | None
    ) -> Ending:
        """Paint batch after batch up to the ending; after `within` seconds, make one up."""
        while True:
            batch = self._feed.take(tick() if within is None else within)
            if not batch and within is not None:
                batch = (self._last_event(),)
            paint(batch)
            if batch and isinstance(ending := batch[-1], Ending):
                return ending

    def wait_until_committed(self) -> None:
        """Wait until the request is in the journal, or it is known that it cannot be."""
        while not self._kept.wait(WAIT_SLICE_S):
            pass

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._ending.done()

    @property
    def ending(self) -> Future[Ending]:
        """The future of the event that ends the request."""
        return self._ending

    def wait(self) -> Ending:
        """Wait for the ending, without painting; an interrupt ends the wait, not the request.

        Raises
        ------
        ConfigurationError
            On the loop's own thread, where the wait would never end.
        """
        if event_loop.shared().is_current_thread and not self._ending.done():
            raise ConfigurationError("A reply cannot be waited for on nbcodex's own event loop.")
        while True:
            with contextlib.suppress(TimeoutError):
                return self._ending.result(WAIT_SLICE_S)

    def _last_event(self) -> Ending:
        """Return the ending for someone who stops waiting, even if none has come."""
        if self._ending.done():
            return self._ending.result()
        return Interrupted(request_id=self.request.id, at=0.0, reply=self._nothing("interrupted"))

    def _nothing(self, status: Status) -> Reply:
        return Reply(id=self.request.id, status=status, attempts=0)

    async def follow_async(self) -> Ending:
        """Start the request and wait for its ending on the caller's event loop."""
        try:
            self.start()
            with _awake(asyncio.get_running_loop()):
                return await asyncio.wrap_future(self._ending)
        finally:
            if not self._ending.done():
                self.stop()


_waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int] = weakref.WeakKeyDictionary()
_ticking: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


@contextlib.contextmanager
def _awake(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have a loop wake now and then: a kernel's takes an interrupt only when it does.

    However many wait, one timer does it.
    """
    _waiting[loop] = _waiting.get(loop, 0) + 1
    if loop not in _ticking:
        _ticking.add(loop)
        _tick(loop)
    try:
        yield
    finally:
        _waiting[loop] -= 1


def _tick(loop: asyncio.AbstractEventLoop) -> None:
    if _waiting.get(loop):
        loop.call_later(AWAKE, _tick, loop)
    else:
        _ticking.discard(loop)


class PendingReply(Reply):
    """A `Reply` that fills: reading what is not known yet waits for it, and Stop ends the wait.

    Parameters
    ----------
    handle : Handle
        The request, on its way.
    """

    __slots__ = ("_handle",)

    def __init__(self, handle: Handle) -> None:
        object.__setattr__(self, "_handle", handle)

    def __getattribute__(self, name: str) -> Any:
        if name not in _FIELDS:
            return object.__getattribute__(self, name)
        handle: Handle = object.__getattribute__(self, "_handle")
        if name == "id":
            return handle.request.id
        if name == "status" and not handle.done:
            return "running"
        return getattr(handle.wait().reply, name)

    def __repr__(self) -> str:
        if not self._handle.done:
            return f"<Reply {self.id}: under way>"
        return repr(self._handle.wait().reply)

    def _repr_markdown_(self) -> str:
        if not self._handle.done:
            return f"*{self.id} is under way; reading its text waits for it.*"
        return str(self._handle.wait().reply._repr_markdown_())

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


_FIELDS = frozenset(field.name for field in dataclasses.fields(Reply))


def reply_or_raise(ending: Ending, request: Request | None = None) -> Reply:
    """Return the answer that a request ended with, or raise why there is none.

    Raises
    ------
    NbcodexError
        The failure; the text so far is in its `reply`.
    Stopped
        Where the user pressed Stop.
    """
    match ending:
        case Finished(reply=reply):
            return reply
        case Failed(error=error, reply=reply) | Parked(error=error, reply=reply):
            error.reply = reply
            raise error
        case Cancelled(reply=reply):
            cancelled = CancelledError("Cancelled by you.", advice="Run it again to ask anew.")
            cancelled.reply = reply
            raise cancelled
        case Interrupted(reply=reply):
            kept = "the text so far is kept" if reply.text else "nothing had arrived"
            go_on = f"`%codex resume {reply.id}` goes on with it."
            advice = go_on if request and request.durable else "Run it again to ask anew."
            raise Stopped(f"Stopped; {kept}.", reply=reply, advice=advice)


def run_uninterrupted(operation: Callable[[], None]) -> bool:
    """Run an operation to its end, repeating it if Stop interrupts it; return whether it did.

    Python has no way to block KeyboardInterrupt, so `operation` must do no harm if it runs twice.
    """
    was_interrupted = False
    while True:
        try:
            operation()
        except KeyboardInterrupt:
            was_interrupted = True
        else:
            return was_interrupted
