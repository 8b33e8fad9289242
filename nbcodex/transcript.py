"""A notebook run in a real kernel, and printed as it happens: the demo without a browser.

A cell may say what it should do in its metadata: ``{"nbcodex": {"error": NAME, "shows": [TEXT]}}``,
the name of the error it must end in, and texts that its output must show on the way.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

LONGEST = 120.0
"""Seconds that one cell may take."""


def play(path: Path) -> int:
    """Run a notebook and print what happens; return 0 if every cell did what it should."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        wrong = [cell for cell in cells if not _played(client, cell)]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    print(
        f"\n{len(wrong)} cells did not do what they should." if wrong else "\nAll as it should be."
    )
    return 1 if wrong else 0


def _played(client: BlockingKernelClient, cell: dict[str, Any]) -> bool:
    """Run one cell, printing it and what it shows; return whether it did what it should."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        print(f"\n{source}")
        return True
    print("\n" + "\n".join(f"│ {line}" for line in source.splitlines()))
    expected = cell["metadata"].get("nbcodex", {})
    shown, error = "", None
    for kind, text in _outputs(client, client.execute(source)):
        if kind == "ended in":
            error = text
            continue
        print(text, end="" if kind == "stream" else "\n", flush=True)
        shown += text
    wrong = [f"{text!r} was not shown" for text in expected.get("shows", []) if text not in shown]
    if error != expected.get("error"):
        wrong.append(f"it ended in {error}, not in {expected.get('error')}")
    for complaint in wrong:
        print(f"✗ {complaint}")
    return not wrong


def _outputs(client: BlockingKernelClient, asked: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each output, and the name of the error it ended in."""
    end = time.monotonic() + LONGEST
    while True:
        try:
            message = client.get_iopub_msg(timeout=max(end - time.monotonic(), 0.01))
        except queue.Empty:
            yield "ended in", f"no end after {LONGEST:g} s"
            return
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                yield "stream", content["text"]
            case "execute_result" | "display_data" | "update_display_data":
                yield "display", _news(content["data"].get("text/plain", ""))
            case "error":
                yield "display", "\n".join(content["traceback"])
                yield "ended in", content["ename"]
            case "status" if content["execution_state"] == "idle":
                return


def _news(text: str) -> str:
    """Return the line of status of an output under way, and all of a finished one."""
    return text.rpartition("\n")[2] if text.endswith("]") else text
