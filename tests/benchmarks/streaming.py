"""What a streamed answer costs, compared with the bare synchronous SDK.

A server in another process sends 4,000 deltas at 2,000 a second, each in a packet of its own. One
kernel reads them by each client in turn, with everything imported and connected. Measured are the
CPU seconds of the whole process, and the time from the call to the first delta that is shown.

Run with ``python -m tests.benchmarks.streaming [--rounds N] [--firsts N]``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from tests.benchmarks.table import spread, table
from tests.kernel_client import Kernel, kernel

EVENTS, RATE = 4_000, 2_000
# Deltas of an answer of which only the first one is timed. It lasts longer than the interval
# between two updates of the display, so the first delta is not shown only because the answer ended.
SHORT = 300

# By name: the function in the kernel, `Codex.display`, and a description for the table.
CLIENTS = {
    "sdk": ("sdk", "auto", "`OpenAI().responses.create(stream=True)`, typed events, deltas joined"),
    "widget": ("cell", "auto", "`%%codex`, widget"),
    "text": ("cell", "text", "`%%codex`, text output"),
    "ask": ("ask", "auto", "`nbcodex.ask`"),
}

IN_THE_KERNEL = """
import os, time
import nbcodex
from openai import OpenAI
from nbcodex.events import Delta
from nbcodex.notebook.display import CellOutput

%load_ext nbcodex
%config Codex.api = "responses"
bare = OpenAI()
seen = []


def sdk(prompt):
    parts = []
    stream = bare.responses.create(model=os.environ["NBCODEX_MODEL"], input=prompt, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            if not parts:
                seen.append(time.perf_counter())
            parts.append(event.delta)
    return "".join(parts)


def cell(prompt):
    get_ipython().run_cell_magic("codex", "--new -o reply", prompt)
    return reply.text


def ask(prompt):
    return nbcodex.ask(prompt).text


def timed_on_events(self, events, on_events=CellOutput.on_events):
    on_events(self, events)
    if not seen and any(isinstance(event, Delta) for event in events):
        seen.append(time.perf_counter())


CellOutput.on_events = timed_on_events


def measure(way, display, prompt):
    get_ipython().run_line_magic("config", f"Codex.display = {display!r}")
    seen.clear()
    called, began = time.perf_counter(), time.process_time()
    answer = way(prompt)
    elapsed = time.perf_counter() - called
    time.sleep(0.05)  # the kernel's own thread sends what is left
    spent = time.process_time() - began
    assert len(answer.split()) == int(prompt), len(answer.split())
    print(spent, seen[0] - called, elapsed)
"""


class Source:
    """A server whose answer to a number has that many deltas, at a constant rate."""

    def __init__(self, port: Connection) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port.send(listening.getsockname()[1])
            while True:
                connection, _ = listening.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        requests = connection.makefile("rb")
        while requests.readline():
            size = 0
            while (line := requests.readline().strip()) and line:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    size = int(value)
            self._answer(connection, _number(json.loads(requests.read(size))["input"]))

    def _answer(self, connection: socket.socket, deltas: int) -> None:
        packets = [_chunk(event) for event in _events(deltas)]
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        began = time.perf_counter()
        for number, packet in enumerate(packets):
            if (early := began + number / RATE - time.perf_counter()) > 0:
                time.sleep(early)
            connection.sendall(packet)
        connection.sendall(b"0\r\n\r\n")


def _number(asked: str | list[dict[str, object]]) -> int:
    """Return the number in an input, which is text or a list of messages."""
    if isinstance(asked, str):
        return int(asked)
    content = asked[-1]["content"]
    return int(content if isinstance(content, str) else content[0]["text"])  # type: ignore[index]


def _chunk(event: dict[str, object]) -> bytes:
    data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _events(deltas: int) -> Iterator[dict[str, object]]:
    """Yield the events of one answer of the Responses API."""
    words = [f" word{number}" for number in range(deltas)]
    answer = "".join(words)
    part: dict[str, object] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    item: dict[str, object] = {"id": "msg_0", "type": "message", "role": "assistant"}
    response: dict[str, object] = {
        "id": "resp_0",
        "object": "response",
        "created_at": 1_800_000_000,
        "model": "gpt-5.6-sol",
        "status": "in_progress",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    whole = part | {"text": answer}
    done = item | {"status": "completed", "content": [whole]}
    usage = {
        "input_tokens": 8,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": deltas,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": deltas + 8,
    }
    place: dict[str, object] = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    events: list[tuple[str, dict[str, object]]] = [
        ("created", {"response": response}),
        ("in_progress", {"response": response}),
        ("output_item.added", {"output_index": 0, "item": item | {"content": []}}),
        ("content_part.added", place | {"part": part}),
        *(("output_text.delta", place | {"delta": word, "logprobs": []}) for word in words),
        ("output_text.done", place | {"text": answer, "logprobs": []}),
        ("content_part.done", place | {"part": whole}),
        ("output_item.done", {"output_index": 0, "item": done}),
        (
            "completed",
            {"response": response | {"status": "completed", "output": [done], "usage": usage}},
        ),
    ]
    for number, (kind, details) in enumerate(events):
        yield {"type": f"response.{kind}", "sequence_number": number} | details


@contextmanager
def source() -> Iterator[str]:
    """Start the server in a process of its own; return its base URL."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=Source, args=(there,), daemon=True)
    process.start()
    there.close()  # so that a server that does not start is an EOFError here
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def timed(session: Kernel, way: str, deltas: int) -> list[float]:
    """Return CPU seconds, seconds to the first delta, and seconds to the end, of one answer."""
    function, display, _ = CLIENTS[way]
    ran = session.run(f"measure({function}, {display!r}, '{deltas}')")
    if ran.error:
        raise AssertionError("\n".join(ran.shown_error))
    return [float(figure) for figure in ran.stream.split()]


def main() -> None:
    """Measure all clients in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--firsts", type=int, default=40)
    chosen = parser.parse_args()
    cpu: dict[str, list[float]] = {way: [] for way in CLIENTS}
    elapsed: dict[str, list[float]] = {way: [] for way in CLIENTS}
    first: dict[str, list[float]] = {way: [] for way in CLIENTS}
    with source() as url, tempfile.TemporaryDirectory() as home:
        environ = {
            "NBCODEX_HOME": home,
            "OPENAI_BASE_URL": url,
            "OPENAI_API_KEY": "sk-benchmark-0123456789",
            "NBCODEX_MODEL": "gpt-5.6-sol",
            "JPY_SESSION_NAME": "benchmark.ipynb",
        }
        with kernel(**environ) as session:
            ran = session.run(IN_THE_KERNEL)
            assert not ran.error, ran.shown_error
            for way in CLIENTS:
                timed(session, way, SHORT)
            for _ in range(chosen.rounds):
                for way in CLIENTS:
                    spent, _, whole = timed(session, way, EVENTS)
                    cpu[way].append(spent)
                    elapsed[way].append(whole)
            for _ in range(chosen.firsts):
                for way in CLIENTS:
                    first[way].append(timed(session, way, SHORT)[1])
    bare = {name: statistics.median(of["sdk"]) for name, of in (("cpu", cpu), ("first", first))}
    rows = [
        [
            description,
            spread(cpu[way]),
            f"{statistics.median(cpu[way]) / bare['cpu']:.2f}",
            spread(first[way], 1000),
            f"{(statistics.median(first[way]) - bare['first']) * 1000:+.1f}",
            f"{statistics.median(elapsed[way]):.2f}",
        ]
        for way, (_, _, description) in CLIENTS.items()
    ]
    print(f"{EVENTS:,} deltas at {RATE:,} a second; {chosen.rounds} rounds, 2 cores.\n")
    heads = [
        "way",
        "CPU, s",
        "of the SDK's",
        "first delta, ms",
        "later than the SDK's, ms",
        "all, s",
    ]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
