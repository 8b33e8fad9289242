"""A real kernel for a test: runs and interrupts cells, and returns their outputs."""

from __future__ import annotations

import os
import queue
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

CLEAR_COOLDOWNS = """
from nbcodex import host
from nbcodex.client import get_client
from nbcodex.runtime import event_loop

async def _open_all():
    def reset(limiter):
        for name, queue in limiter._queues.items():
            queue.set_cooldown(None, 0.0)
            queue.own_cooldown_until = 0.0
            limiter.store.transaction(name, lambda shared: shared.__init__())
    await get_client().limiter(host.current.settings()).run_operation(reset)

event_loop.shared().submit(_open_all()).result()
"""
"""A cell that makes a kernel forget all limits and cooldowns that it knows."""

ANSI = re.compile(r"\x1b\[[0-9;]*m")

# A busy machine needs many times as long as an idle one. These only end a test that has failed.
CELL_TIMEOUT_S = 180.0
MESSAGE_TIMEOUT_S = 60.0  # for a message that the kernel sends at once


@dataclass
class CellResult:
    """The result of one cell: its reply, and its outputs as a saved notebook would contain them."""

    status: str = "none"
    error: str = ""
    traceback: list[str] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    payload: list[dict[str, Any]] = field(default_factory=list)  # such as new cells

    @property
    def stream(self) -> str:
        """What was printed."""
        return "".join(o["text"] for o in self.outputs if o["type"] == "stream")

    def data(self, mime: str) -> str:
        """All displayed data of one MIME type, the last state of each display."""
        return "\n".join(filter(None, (o.get("data", {}).get(mime) for o in self.outputs)))

    @property
    def plain(self) -> str:
        """The displayed text."""
        return self.data("text/plain")

    @property
    def markdown(self) -> str:
        """The displayed Markdown."""
        return self.data("text/markdown")

    @property
    def shown_error(self) -> list[str]:
        """The error's lines as a reader sees them."""
        return ANSI.sub("", "\n".join(self.traceback)).splitlines()

    @property
    def new_cells(self) -> list[str]:
        """The sources of the cells that it puts below itself."""
        return [each["text"] for each in self.payload if each["source"] == "set_next_input"]


class Kernel:
    """One kernel process and its client."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client
        self._results: dict[str, CellResult] = {}

    def start(self, code: str, *, cell: str | None = None) -> str:
        """Start a cell and return the id of its message; `cell` is its id in the notebook."""
        if cell is None:
            return self.client.execute(code)
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        message = self.client.session.msg("execute_request", content, metadata={"cellId": cell})
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def messages(
        self, message_id: str, timeout: float = CELL_TIMEOUT_S
    ) -> Iterator[dict[str, Any]]:
        """Yield what the kernel publishes for a cell, until it is idle again."""
        end = time.monotonic() + timeout
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"the cell did not end within {timeout} s") from None
            if message["parent_header"].get("msg_id") != message_id:
                continue
            add_message(
                self._results.setdefault(message_id, CellResult()),
                message["msg_type"],
                message["content"],
            )
            yield message
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return

    def finish(self, message_id: str, timeout: float = CELL_TIMEOUT_S) -> CellResult:
        """Wait for a cell's end, and return its result."""
        for _ in self.messages(message_id, timeout):
            pass
        ran = self._results.pop(message_id)
        reply = self.client.get_shell_msg(timeout=MESSAGE_TIMEOUT_S)
        while reply["parent_header"].get("msg_id") != message_id:
            reply = self.client.get_shell_msg(timeout=MESSAGE_TIMEOUT_S)
        ran.status, ran.payload = reply["content"]["status"], reply["content"].get("payload", [])
        return ran

    def run(
        self, code: str, timeout: float = CELL_TIMEOUT_S, *, cell: str | None = None
    ) -> CellResult:
        """Run a cell to its end."""
        return self.finish(self.start(code, cell=cell), timeout)

    def wait_for(self, message_id: str, text: str, timeout: float = CELL_TIMEOUT_S) -> None:
        """Wait until the cell's output shows `text`."""
        for message in self.messages(message_id, timeout):
            if text in str(message["content"]):
                return
        raise AssertionError(f"the cell ended without {text!r}")

    def interrupt(self) -> None:
        """Press Stop."""
        self.manager.interrupt_kernel()

    def lives(self) -> bool:
        """Whether the kernel still works."""
        return self.run("1+1").plain == "2"


def add_message(ran: CellResult, kind: str, content: dict[str, Any]) -> None:
    """Add a published message to the result of its cell."""
    display_id = content.get("transient", {}).get("display_id")
    match kind:
        case "stream":
            ran.outputs.append({"type": "stream", "text": content["text"]})
        case "display_data" | "execute_result":
            ran.outputs.append({"type": kind, "data": content["data"], "id": display_id})
        case "update_display_data":
            for output in ran.outputs:
                if output.get("id") == display_id:
                    output["data"] = content["data"]
        case "clear_output":
            ran.outputs.clear()
        case "error":
            ran.error, ran.traceback = content["ename"], content["traceback"]


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until `holds` returns true."""
    deadline = time.monotonic() + MESSAGE_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@contextmanager
def kernel(**environ: str) -> Iterator[Kernel]:
    """Start a kernel with these environment variables; end it afterwards.

    It gets no keys of the user who runs the test, and a data folder of its own by default.
    """
    with TemporaryDirectory(prefix="nbcodex-") as folder:
        home = os.environ.get("NBCODEX_HOME", f"{folder}/kept")
        yield from _kernel({"NBCODEX_HOME": home, **environ})


def _kernel(environ: dict[str, str]) -> Iterator[Kernel]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "AZURE_OPENAI_", "JPY_"))
    }
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**inherited, **environ})
    client = manager.client()
    client.start_channels()
    client.allow_stdin = False  # a cell that asks a question would wait for an answer for ever
    try:
        client.wait_for_ready(timeout=CELL_TIMEOUT_S)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
