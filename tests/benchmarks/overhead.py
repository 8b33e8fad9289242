"""What a request costs, compared with the bare SDK: CPU of the whole process, over loopback HTTP.

A server in another process answers at once. Each client runs in a process of its own, in turns:
short answers, 64 requests in flight, 200 a second; journal and shared limiter are on. Then without
a fixed rate, and with limits that are never reached: how many requests a core handles.

Run with ``python -m tests.benchmarks.overhead [--requests N] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.benchmarks.table import spread, table

MODEL = "gpt-5.6-sol"
AT_ONCE, RATE, WARM = 64, 200.0, 100

CLIENTS = {
    "plain": "`AsyncOpenAI().responses.create()`",
    "streamed": "`AsyncOpenAI().responses.create(stream=True)`, typed events, deltas joined",
    "floor": "floor: the SDK's raw response on a thread of its own, events read, commits",
    "ours": "`nbcodex.aask`, journal and shared limiter on",
}

WORDS = [f"word{number} " for number in range(20)]


def response(status: str, output: list[Any]) -> dict[str, Any]:
    """Return a response as the Responses API words it."""
    usage = {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 40,
    }
    return {
        "id": "resp_0",
        "object": "response",
        "created_at": 1_800_000_000,
        "model": "gpt-5.6-sol",
        "status": status,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if output else None,
    }


def bodies() -> tuple[bytes, bytes]:
    """Return the two answers, with their headers: whole, and streamed."""
    part = {"type": "output_text", "text": "".join(WORDS), "annotations": [], "logprobs": []}
    item = {"id": "msg_0", "type": "message", "role": "assistant", "status": "completed"}
    whole = response("completed", [item | {"content": [part]}])
    place = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    events: list[tuple[str, dict[str, Any]]] = [
        ("created", {"response": response("in_progress", [])}),
        ("output_item.added", {"output_index": 0, "item": item | {"content": []}}),
        ("content_part.added", place | {"part": part | {"text": ""}}),
        *(("output_text.delta", place | {"delta": word, "logprobs": []}) for word in WORDS),
        ("output_text.done", place | {"text": part["text"], "logprobs": []}),
        ("content_part.done", place | {"part": part}),
        ("output_item.done", {"output_index": 0, "item": item | {"content": [part]}}),
        ("completed", {"response": whole}),
    ]
    stream = "".join(
        f"event: response.{kind}\ndata: "
        f"{json.dumps({'type': f'response.{kind}', 'sequence_number': n} | details)}\n\n"
        for n, (kind, details) in enumerate(events)
    )
    return _http("application/json", json.dumps(whole)), _http("text/event-stream", stream)


def _http(kind: str, body: str) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        "openai-processing-ms: 1\r\nx-request-id: req_0\r\n"
        "x-ratelimit-limit-tokens: 1000000000\r\nx-ratelimit-remaining-tokens: 999990000\r\n"
        "x-ratelimit-reset-tokens: 1ms\r\nx-ratelimit-limit-requests: 10000000\r\n"
        "x-ratelimit-remaining-requests: 9999999\r\nx-ratelimit-reset-requests: 1ms\r\n\r\n"
    )
    return (head + body).encode()


def serve(port: Connection) -> None:
    """Run the server, as small a one as suffices."""
    plain, streamed = bodies()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await converse(reader, writer)
        writer.close()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            asked = await reader.readexactly(size)
            writer.write(streamed if b'"stream":true' in asked.replace(b" ", b"") else plain)

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def plain() -> Callable[[int], Awaitable[int]]:
    """Return a function that sends by the bare SDK, without streaming."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(max_retries=0)

    async def ask(number: int) -> int:
        prompt = prompt_of(number)
        return len((await client.responses.create(model=MODEL, input=prompt)).output_text)

    return ask


def streamed() -> Callable[[int], Awaitable[int]]:
    """Return a function that sends by the bare SDK, with streaming."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(max_retries=0)

    async def ask(number: int) -> int:
        stream = await client.responses.create(model=MODEL, input=prompt_of(number), stream=True)
        parts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        return len("".join(parts))

    return ask


def floor() -> Callable[[int], Awaitable[int]]:
    """Return a function that does only what cannot be left out: the SDK's call and two commits.

    As an answer must show while a cell blocks the kernel, the SDK runs on a loop in a thread of its
    own, and each event is read. Before and after the call, there is a commit to each of two files,
    which have a thread and a connection each; commits to the journal wait for the disk.
    """
    from openai import AsyncOpenAI

    client, home = AsyncOpenAI(max_retries=0), Path(os.environ["NBCODEX_HOME"])

    def opened(name: str, synchronous: str) -> tuple[ThreadPoolExecutor, sqlite3.Connection]:
        file = sqlite3.connect(home / name, isolation_level=None, check_same_thread=False)
        file.execute("PRAGMA journal_mode = WAL")
        file.execute(f"PRAGMA synchronous = {synchronous}")
        file.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, text TEXT)")
        return ThreadPoolExecutor(1), file

    files = [opened("journal", "FULL"), opened("ledger", "NORMAL")]

    async def commit(statement: str, *values: Any) -> None:
        loop = asyncio.get_running_loop()

        def operation(file: sqlite3.Connection) -> None:
            file.execute(statement, values)  # a transaction of its own

        await asyncio.gather(*(loop.run_in_executor(pool, operation, file) for pool, file in files))

    async def asked(number: int) -> int:
        asked = {"model": MODEL, "input": prompt_of(number), "stream": True}
        await commit("INSERT OR REPLACE INTO entries VALUES (?, ?)", number, asked["input"])
        text = ""
        async with client.responses.with_streaming_response.create(extra_body=asked) as response:
            body = b"".join([chunk async for chunk in response.iter_bytes()])
            for line in body.splitlines():
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if event["type"] == "response.output_text.delta":
                        text += event["delta"]
        await commit("UPDATE entries SET text = ?2 WHERE id = ?1", number, text)
        return len(text)

    there = asyncio.new_event_loop()
    threading.Thread(target=there.run_forever, daemon=True).start()

    async def ask(number: int) -> int:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked(number), there))

    return ask


def ours() -> Callable[[int], Awaitable[int]]:
    """Return a function that sends by nbcodex, with journal and shared limiter."""
    from nbcodex.client import get_client
    from nbcodex.events import Finished
    from nbcodex.requests.options import build_request
    from nbcodex.settings import Settings

    settings = Settings.read()

    async def ask(number: int) -> int:
        ending = (
            await get_client()
            .create_handle(build_request(prompt_of(number), settings), settings)
            .follow_async()
        )
        assert isinstance(ending, Finished), ending
        return len(ending.reply.text)

    return ask


def prompt_of(number: int) -> str:
    """Return a prompt."""
    return f"prompt {number}: " + "what is a token bucket? " * 3


async def many(ask: Callable[[int], Awaitable[int]], count: int, rate: float | None) -> None:
    """Send many prompts, 64 in flight, at a rate or as fast as possible."""
    gate = asyncio.Semaphore(AT_ONCE)
    want = len("".join(WORDS))

    async def one(number: int) -> None:
        async with gate:
            assert await ask(number) == want

    began, asked = time.perf_counter(), []
    for number in range(count):
        if rate is not None:
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        asked.append(asyncio.ensure_future(one(number)))
    await asyncio.gather(*asked)


def run(way: str, count: int, rate: float | None) -> None:
    """Run one client in this process; print CPU and wall seconds."""

    async def main() -> None:
        ask = {"plain": plain, "streamed": streamed, "floor": floor, "ours": ours}[way]()
        await many(ask, WARM, rate)
        began, cpu = time.perf_counter(), time.process_time()
        await many(ask, count, rate)
        print(time.process_time() - cpu, time.perf_counter() - began)

    asyncio.run(main())


def reservations(count: int = 2000) -> list[float]:
    """Return the seconds that each reservation takes, worker thread included."""
    from nbcodex.models import Usage
    from nbcodex.ratelimit.charge_policy import Need, Permit
    from nbcodex.ratelimit.rate_limiter import RateLimiter
    from nbcodex.ratelimit.worker import SharedLimiter, open_store
    from nbcodex.runtime.clock import BootClock

    clock, took = BootClock(), []

    def reserve(core: RateLimiter) -> Permit:
        permit = core.try_acquire(core.enqueue("b", Need(10, 90), lambda: None), clock.now())
        assert isinstance(permit, Permit)
        return permit

    async def main(folder: Path) -> None:
        limiter = SharedLimiter(lambda: open_store(folder), clock=clock, on_problem=print)
        for _ in range(count):
            began = time.perf_counter()
            given = await limiter.run_operation(reserve)
            took.append(time.perf_counter() - began)
            limiter.post(lambda core, given=given: core.observe(given, None, clock.now()))
            limiter.post(lambda core, given=given: core.settle(given, Usage(), clock.now()))
            await asyncio.sleep(0.005)
        limiter.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
    return sorted(took)


def measured(way: str, count: int, rate: float | None, url: str) -> tuple[float, float]:
    """Return CPU and wall seconds of one client, in a fresh process."""
    with tempfile.TemporaryDirectory() as home:
        environ = {
            **os.environ,
            "NBCODEX_HOME": home,
            "OPENAI_BASE_URL": url,
            "OPENAI_API_KEY": "sk-benchmark-0123456789",
            "NBCODEX_MODEL": MODEL,
        }
        code = f"from tests.benchmarks.overhead import run; run({way!r}, {count}, {rate})"
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        )
    cpu, wall = map(float, ran.stdout.split())
    return cpu, wall


def main() -> None:
    """Measure all clients in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    server = spawning.Process(target=serve, args=(there,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    try:
        rows = []
        costs: dict[tuple[str, float | None], list[float]] = {}
        for _ in range(options.rounds):
            for way in CLIENTS:
                for rate in (RATE, None):
                    cpu, _wall = measured(way, options.requests, rate, url)
                    costs.setdefault((way, rate), []).append(cpu / options.requests)
        bare = statistics.median(costs["plain", RATE])
        for way, description in CLIENTS.items():
            paced, flat = costs[way, RATE], costs[way, None]
            rows.append(
                [
                    description,
                    spread(paced, 1000),
                    f"{statistics.median(paced) / bare:.2f}",
                    spread(flat, 1000),
                    f"{1 / statistics.median(flat):.0f}",
                ]
            )
    finally:
        server.terminate()
        server.join()
    print(
        f"{options.requests:,} requests, {AT_ONCE} in flight at most, short answers; "
        f"{options.rounds} rounds, in turns, 2 cores.\n"
    )
    heads = ["way", "CPU at 200/s, ms", "of the SDK's", "flat out, ms", "requests/s a core"]
    print(table(heads, rows))
    took = reservations()
    print(
        f"\nA reservation, thread and file included: median {took[len(took) // 2] * 1e6:.0f} µs, "
        f"p99 {took[len(took) * 99 // 100] * 1e3:.2f} ms, 200 a second."
    )


if __name__ == "__main__":
    main()
