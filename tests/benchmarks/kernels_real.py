"""Several kernels on one key, in real time: processes with journal and shared limiter.

Run with ``python -m tests.benchmarks.kernels_real [equal|light|killed ...] [--prompts N]``.

equal    four kernels with as many prompts: how fully and how fairly the limit is used
light    one with thousands, three that ask now and then: how long these wait, beside alone
killed   one of four is killed by SIGKILL: how fast the others take up what it leaves
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.benchmarks.bucket_level import LevelRecorder
from tests.benchmarks.kernels import jain
from tests.benchmarks.pacing_wire import text_of
from tests.benchmarks.world import Prompt, workload
from tests.simulated import Simulated, simulated

LIMIT = 600_000
RATE = LIMIT / 60
KILLED_AFTER_S = 60.0
# From RECOVERY_S after the kill on, the other kernels should use the whole limit; for MEASURED_S,
# it is measured whether they do.
RECOVERY_S, MEASURED_S = 10.0, 30.0
LIGHT_PAUSE_S = 1.5  # between two prompts of a light kernel


def kernel(environ: dict[str, str], prompts: list[Prompt], pause: float, out: Any) -> None:
    """Run one kernel: it sends all prompts at once, or with a pause one after the other."""
    os.environ.update(environ)
    from nbcodex.client import get_client
    from nbcodex.events import Finished
    from nbcodex.models import RequestOptions
    from nbcodex.requests.options import build_request
    from nbcodex.settings import Settings

    settings = Settings.read()

    async def ask(prompt: Prompt) -> float | None:
        began = time.monotonic()
        request = build_request(
            text_of(prompt), settings, RequestOptions(max_output=prompt.max_output)
        )
        ending = await get_client().create_handle(request, settings).follow_async()
        return time.monotonic() - began if isinstance(ending, Finished) else None

    async def main() -> list[float | None]:
        if not pause:
            return list(await asyncio.gather(*map(ask, prompts)))
        took = []
        for prompt in prompts:
            took.append(await ask(prompt))
            await asyncio.sleep(pause)
        return took

    out.put(asyncio.run(main()))


@contextmanager
def started_kernels(
    server: Simulated, shares: Sequence[list[Prompt]], pauses: Sequence[float]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Start the kernels, and end them afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as home:
        environ = {**server.environ, "NBCODEX_HOME": home}
        outs = [spawn.Queue() for _ in shares]
        workers = [
            spawn.Process(target=kernel, args=(environ, share, pause, out))
            for share, pause, out in zip(shares, pauses, outs, strict=True)
        ]
        for worker in workers:
            worker.start()
        try:
            yield workers, outs
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def equal(policy: str, count: int) -> None:
    """Print how fully and how fairly four kernels use the limit."""
    prompts = workload(count, 0)
    shares = [prompts[i::4] for i in range(4)]
    with served(policy) as server, started_kernels(server, shares, [0.0] * 4) as (_, outs):
        took = [seconds for out in outs for seconds in out.get()]
        log = asked(server)
    at = {number(seen): seen for seen in log if seen.status == 200}
    began, last = min(seen.at for seen in log), max(seen.at for seen in at.values())
    charged = sum(seen.charged for seen in log)
    end = min(max(at[p.number].at for p in share) for share in shares)
    charged_by_kernel = [
        sum(at[p.number].charged for p in s if at[p.number].at <= end) for s in shares
    ]
    refused = sum(seen.status == 429 for seen in log)
    twice = len([seen for seen in log if seen.status == 200]) - len(at)
    print(
        f"equal, {policy}: {len([t for t in took if t])} of {count} answered, {twice} twice; token "
        f"bound over last admission {(charged - LIMIT) / RATE / (last - began):.3f} "
        f"({last - began:.1f} s), 429s {100 * refused / len(log):.2f}%, "
        f"Jain {jain(charged_by_kernel):.3f}",
        flush=True,
    )


def light(policy: str, count: int) -> None:
    """Print how long the light kernels wait beside a heavy one, and alone."""
    prompts = workload(count + 60, 1)
    few = [prompts[count + i :: 3][:20] for i in range(3)]
    figures = []
    for heavy in (0, count):
        shares = ([prompts[:heavy]] if heavy else []) + few
        pauses = ([0.0] if heavy else []) + [LIGHT_PAUSE_S] * 3
        with served(policy) as server, started_kernels(server, shares, pauses) as (_, outs):
            took = [sorted(t or 1e9 for t in out.get()) for out in outs[-3:]]
            refused = sum(seen.status == 429 for seen in asked(server))
        every = sorted(t for each in took for t in each)
        figures.append((statistics.median(every), every[len(every) * 99 // 100], refused))
    (alone, alone99, _), (beside, beside99, refused) = figures
    print(
        f"light, {policy}: from question to answer alone {alone:.2f} s (p99 {alone99:.2f}), "
        f"beside a heavy one {beside:.2f} s (p99 {beside99:.2f}), p99 {beside99 / alone99:.2f} "
        f"times; 429s {refused}",
        flush=True,
    )


def killed(policy: str, count: int) -> None:
    """Print what the others use of the limit after one of four was killed."""
    prompts = workload(count, 2)
    shares = [prompts[i::4] for i in range(4)]
    with (
        served(policy) as server,
        LevelRecorder(server.core) as level,
        started_kernels(server, shares, [0.0] * 4) as (workers, _),
    ):
        while not asked(server):
            time.sleep(0.1)
        time.sleep(KILLED_AFTER_S)
        os.kill(workers[0].pid, signal.SIGKILL)
        dead_at = server.core.clock.now()
        time.sleep(RECOVERY_S + MEASURED_S + 1)
        log = asked(server)
    steps = [level.used_share(dead_at + step, dead_at + step + 5) for step in range(-5, 11, 5)]
    back = level.used_share(dead_at + RECOVERY_S, dead_at + RECOVERY_S + MEASURED_S)
    refused = sum(seen.status == 429 for seen in log)
    print(
        f"killed, {policy}: of the refill are used, from 5 s before the kill on, in steps of 5 s "
        f"{', '.join(f'{step:.2f}' for step in steps)}; from {RECOVERY_S:.0f} s after it on "
        f"{back:.3f}; 429s {100 * refused / len(log):.2f}%",
        flush=True,
    )


def served(policy: str) -> Any:
    """Return a simulator with the limit."""
    return simulated(tpm=LIMIT, rpm=20_000, policy=policy, latency_sigma=0.4, chunk=1000)


def asked(server: Simulated) -> list[Any]:
    """Return the requests in the server's log that carry prompts."""
    return [seen for seen in list(server.core.log) if seen.api]


def number(seen: Any) -> int:
    """Return the number of a prompt."""
    return int(seen.prompt.split()[0])


SCENES = {"equal": equal, "light": light, "killed": killed}


def main() -> None:
    """Print the figures of one run of each scene."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help="one of " + ", ".join(SCENES))
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--policy", default="refunded")
    options = parser.parse_args()
    for scene in options.scenes or SCENES:
        SCENES[scene](options.policy, options.prompts)


if __name__ == "__main__":
    main()
