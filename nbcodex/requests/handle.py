"""One request as the calling thread holds it: started, followed, ended, and read as a reply.

Calls go from that thread to the event loop, and events come back. A KeyboardInterrupt may occur at
any instruction in here; wherever it does, the request ends and its last event is rendered.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

from nbcodex import errors, events
from nbcodex.events import Delta, EndAction, Ending, Event, Listener
from nbcodex.models import Reply, Request, Resumption, Status
from nbcodex.runtime import event_loop
from nbcodex.runtime.event_loop import INTERRUPT_CHECK_INTERVAL_S
from nbcodex.settings import Settings

if TYPE_CHECKING:
    from nbcodex.requests.runner import RequestRunner, Services

ResultT = TypeVar("ResultT")
RenderEvents = Callable[[tuple[Event, ...]], None]

DELTA_INTERVAL_S = 0.1  # between two batches of deltas; the first delta is delivered at once
STOP_TIMEOUT_S = 0.2  # Stop waits this long for the last events; the request ends in any case
REPEATED_STOP_S = 2.0  # an interrupt this soon after the first is the same press of Stop
LOOP_WAKE_INTERVAL_S = 0.05  # how late an interrupt may be noticed in a caller's event loop

log = logging.getLogger(__name__)


class EventQueue:
    """Receives events on the loop's thread, and passes them in batches to the rendering thread.

    Deltas are collected, so that 2,000 of them in a second make ten batches; no other event waits.
    """

    def __init__(self) -> None:
        # Its `put` and `get` are reentrant, unlike those of `Queue`: an interrupt may occur
        # anywhere in the rendering thread, and must not leave a lock behind.
        self._batches: queue.SimpleQueue[tuple[Event, ...]] = queue.SimpleQueue()
        self._collected: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._delivered_at = float("-inf")

    def __call__(self, event: Event) -> None:
        """Receive an event, on the loop's thread."""
        self._collected.append(event)
        if not isinstance(event, Delta):
            self._deliver()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            due = self._delivered_at + DELTA_INTERVAL_S
            if loop.time() >= due:
                self._deliver()
            else:
                self._timer = loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if isinstance(self._collected[0], Delta):
            self._delivered_at = asyncio.get_running_loop().time()
        batch: list[Event] = []
        # Consecutive deltas of the answer, or of the reasoning, become one. None: of other events.
        for is_reasoning, group in itertools.groupby(
            self._collected, lambda event: getattr(event, "reasoning", None)
        ):
            joined = list(group)
            if is_reasoning is not None:
                text = "".join(delta.text for delta in cast(list[Delta], joined))
                joined = [dataclasses.replace(cast(Delta, joined[-1]), text=text)]
            batch += joined
        self._batches.put(tuple(batch))
        self._collected = []

    def next_batch(self, timeout: float | None = None) -> tuple[Event, ...]:
        """Return the next batch of events, or an empty one after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        # On Windows an interrupt does not wake this thread, so it wakes regularly; None elsewhere.
        interval_s = INTERRUPT_CHECK_INTERVAL_S or threading.TIMEOUT_MAX
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                return self._batches.get(timeout=min(left, interval_s))
            except queue.Empty:
                if left <= interval_s:
                    return ()


class Handle:
    """One request; its methods may be called from any thread.

    `services` and `listeners` are called on the loop's thread; the listeners receive every event.
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
        self._queue = EventQueue()
        self._listeners: Sequence[Listener] = (self._queue, *listeners)
        self._resumption = resumption
        self._runner: RequestRunner | None = None
        # Set once the request is in the journal, as a resumed one is, or will never be in it.
        self._committed = threading.Event()
        if resumption is not None:
            self._committed.set()
        self.ending: Future[Ending] = Future()  # of the request's last event
        # A future that is marked as running cannot be cancelled by a caller that waits for it.
        self.ending.set_running_or_notify_cancel()

    def start(self) -> None:
        """Start the request; without effect if it has been started."""
        event_loop.shared().call_soon(self._start)

    def _start(self) -> None:
        """Start the runner, on the loop's thread."""
        if self._runner is not None:
            return
        # An exception in here becomes an event, because a thread waits for one.
        try:
            services = self._services()
            # Imported when it is first needed, with tenacity, the journal and the SDK.
            from nbcodex.requests.runner import RequestRunner

            self._runner = RequestRunner(
                services,
                self.request,
                self._settings,
                self._on_event,
                resumption=self._resumption,
                on_committed=self._committed.set,
            ).start()
        except Exception as error:
            failure = errors.NbcodexError(
                f"nbcodex cannot start: {errors.shorten(repr(error))}.",
                advice="Try `nbcodex doctor`.",
            )
            reply = Reply(id=self.request.id, status="failed", attempts=0)
            # At 0.0, because the clock is one of the services.
            self._on_event(events.Failed(request_id=reply.id, at=0.0, error=failure, reply=reply))

    def _on_event(self, event: Event) -> None:
        # A listener that fails must not keep the event from the others, nor from a waiting thread.
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)
        if isinstance(event, Ending):
            self._committed.set()  # a request that was not written before its ending never will be
            if not self.ending.done():
                self.ending.set_result(event)

    def end(self, action: EndAction) -> None:
        """Ask the request to end, and return at once; later calls have no effect."""
        self._call_runner(lambda runner: runner.end(action))

    def park_at_exit(self) -> None:
        """Park the request as the process ends; threads that follow it get no more events."""
        # Rendering while the interpreter shuts down would fail.
        self._listeners = ()
        self.end("park")

    def retry_now(self) -> None:
        """Send a waiting request now, to find out whether the limit still holds."""
        self._call_runner(lambda runner: runner.retry_now())

    def _call_runner(self, call: Callable[[RequestRunner], None]) -> None:
        # On the loop's thread, where `_start` creates the runner: calls take effect in order.
        event_loop.shared().call_soon(lambda: call(self._runner) if self._runner else None)

    def follow(
        self,
        render: RenderEvents = lambda _batch: None,
        *,
        max_idle: Callable[[], float | None] = lambda: None,
    ) -> Ending:
        """Start the request and wait for its ending, passing each batch of events to `render`.

        `render` is called in this thread; with an empty batch after `max_idle()` seconds without
        an event (None: never). An interrupt ends the request, and `Interrupted` is returned; if the
        request had ended just before, its ending is rendered and `Stopped` is raised.
        """
        self._check_thread()
        try:
            ending, stop_pressed = run_uninterrupted(
                lambda stop_pressed: self._render_all(render, max_idle, stop_pressed=stop_pressed)
            )
        finally:
            if not self.done:
                self.end("stop")
        if stop_pressed and not isinstance(ending, events.Interrupted):
            raise errors.Stopped("Stopped when the request had just ended.", reply=ending.reply)
        return ending

    def _render_all(
        self, render: RenderEvents, max_idle: Callable[[], float | None], *, stop_pressed: bool
    ) -> Ending:
        """Start the request and render all batches; after Stop, end it and do not wait long."""
        if stop_pressed:
            self.end("stop")
        else:
            self.start()
        while True:
            batch = self._queue.next_batch(STOP_TIMEOUT_S if stop_pressed else max_idle())
            if stop_pressed and not batch:
                # No ending came in time: the thread goes on with one of its own.
                reply = Reply(id=self.request.id, status="interrupted", attempts=0)
                # The clock belongs to the event loop's thread, so the event is dated 0.0.
                own_ending = events.Interrupted(request_id=reply.id, at=0.0, reply=reply)
                batch = (self.ending.result() if self.done else own_ending,)
            render(batch)
            if batch and isinstance(ending := batch[-1], Ending):
                return ending

    def wait_until_committed(self) -> None:
        """Wait until the request is in the journal, or cannot be written to it."""
        while not self._committed.wait(INTERRUPT_CHECK_INTERVAL_S):
            pass

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.ending.done()

    def wait(self) -> Ending:
        """Wait for the ending without rendering; an interrupt ends the wait, not the request."""
        self._check_thread()
        while True:
            with contextlib.suppress(TimeoutError):
                return self.ending.result(INTERRUPT_CHECK_INTERVAL_S)

    async def follow_async(self) -> Ending:
        """Start the request and wait for its ending on the caller's event loop."""
        loop = asyncio.get_running_loop()
        if loop not in _awaited_counts:
            _awaited_counts[loop] = 0
            loop.call_later(LOOP_WAKE_INTERVAL_S, _wake_again, loop)
        _awaited_counts[loop] += 1
        try:
            self.start()
            return await asyncio.wrap_future(self.ending)
        finally:
            _awaited_counts[loop] -= 1
            if not self.done:
                self.end("stop")

    def _check_thread(self) -> None:
        if event_loop.shared().is_current_thread and not self.done:
            raise errors.ConfigurationError(
                "This call would never end: it would wait for its own event loop.",
                advice="Use `await nbcodex.aask(…)` there.",
            )


# The number of requests that are awaited on each of the callers' event loops. A loop handles an
# interrupt only when it wakes, so one timer for each loop in here wakes it regularly.
_awaited_counts: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()


def _wake_again(loop: asyncio.AbstractEventLoop) -> None:
    if _awaited_counts[loop]:
        loop.call_later(LOOP_WAKE_INTERVAL_S, _wake_again, loop)
    else:
        del _awaited_counts[loop]


class PendingReply(Reply):
    """The reply of a running request: reading its answer waits for it, and Stop ends the wait.

    Inspection does not wait: Tab, ``?``, ``%whos``, `dir`, `repr`, `str`, or a copy.
    """

    __slots__ = ("_handle",)
    _handle: Handle

    def __init__(self, handle: Handle) -> None:
        object.__setattr__(self, "_handle", handle)

    @property
    def id(self) -> str:
        """The request's id."""
        return self._handle.request.id

    # `bool` reads it, for example in a loop over pending replies, so it does not wait.
    @property
    def status(self) -> Status:
        """The status of the reply; ``running`` until there is one."""
        return self._now().status

    def _now(self) -> Reply:
        """Return what is known without waiting."""
        if self._handle.done:
            return self._handle.wait().reply
        return Reply(id=self.id, status="running", attempts=0)

    def __repr__(self) -> str:
        return repr(self._now()) if self._handle.done else f"<Reply {self.id}: running>"

    def __str__(self) -> str:
        return str(self._now()) if self._handle.done else repr(self)

    def __format__(self, spec: str) -> str:
        # Inspectors call `str`, but not this: an f-string wants the answer.
        return format(self.text, spec)

    def _repr_markdown_(self) -> str:
        if not self._handle.done:
            return f"*{self.id} is still running; reading its text waits for it.*"
        return str(self._now()._repr_markdown_())

    def __deepcopy__(self, _memo: object = None) -> PendingReply:
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process cannot wait for this process's request: it gets the reply as it is now.
        return copy.copy, (self._now(),)

    # By identity: to compare the fields would wait for them.
    __eq__, __hash__ = object.__eq__, object.__hash__


def _waiting_property(name: str) -> Any:
    return property(lambda self: getattr(self._handle.wait().reply, name))


# Properties, because completers and inspectors evaluate slots, but not properties.
for _name in {_field.name for _field in dataclasses.fields(Reply)} - {"id", "status"}:
    setattr(PendingReply, _name, _waiting_property(_name))


def reply_or_raise(ending: Ending, request: Request | None = None) -> Reply:
    """Return the reply of a finished request; otherwise raise why there is no answer."""
    reply, error, advice = ending.reply, ending.error, "Run it again to ask again."
    if isinstance(ending, events.Finished):
        return reply
    if isinstance(ending, events.Cancelled):
        error = errors.CancelledError("Cancelled by you.", advice=advice)
    if error is not None:
        error.reply = reply
        raise error
    kept = "the text so far is kept" if reply.text else "nothing had arrived"
    if request and request.durable:
        command = f"`%codex resume {reply.id}`"
        advice = errors.Advice(f"{command} continues it.", f"{command} in a notebook continues it.")
    raise errors.Stopped(f"Stopped; {kept}.", reply=reply, advice=advice)


def ignore_repeated_stop() -> None:
    """Ignore interrupts for the next `REPEATED_STOP_S` seconds.

    An interrupt after a cell's code has ended makes ipykernel lose the cell's reply, and the front
    end waits for it forever.
    """
    # Handlers can be set in the main thread only; None, one set in C, could not be restored.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or (previous := signal.getsignal(signal.SIGINT)) is None:
        return
    ignored_until = time.monotonic() + REPEATED_STOP_S

    def handle(number: int, _: object) -> None:
        if time.monotonic() >= ignored_until:
            signal.signal(number, previous)
            signal.raise_signal(number)

    signal.signal(signal.SIGINT, handle)


def run_uninterrupted(
    operation: Callable[[bool], ResultT], *, stop_pressed: bool = False
) -> tuple[ResultT, bool]:
    """Run an operation to its end, again if Stop interrupts it; return its result, and if it did.

    The operation receives whether Stop was pressed, and must do no harm if it runs twice.
    """
    # Python has no way to block KeyboardInterrupt.
    while True:
        try:
            try:
                if stop_pressed:
                    ignore_repeated_stop()
                return operation(stop_pressed), stop_pressed
            except KeyboardInterrupt:
                stop_pressed = True
        except KeyboardInterrupt:  # a second one, while the first was being handled
            stop_pressed = True
