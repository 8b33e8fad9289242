"""Several kernels on one key, in real time: processes, a SQLite ledger, HTTP over loopback.

Run with ``python -m tests.benchmarks.kernels_real [--prompts N] [--kernels N] [--policy P]``.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from nbcodex.clock import BootClock
from nbcodex.pacing.ledger import Ledger
from nbcodex.pacing.stores.sqlite import SqliteStore
from nbcodex.settings import Secret, Settings
from nbcodex.wire.attempt import Wire
from tests.benchmarks.kernels import jain
from tests.benchmarks.pacing_wire import Crowd
from tests.benchmarks.world import Prompt, workload
from tests.simulated import KEY, simulated

LIMIT = 600_000


async def ask_all(crowd: Crowd, prompts: list[Prompt]) -> None:
    """Ask all prompts, and give a sign of life meanwhile."""
    asked = asyncio.gather(*(crowd.ask(prompt) for prompt in prompts))
    while not asked.done():
        crowd.ledger.beat(crowd.clock.now())
        await asyncio.wait([asked], timeout=1)
    await asked


def kernel(url: str, path: Path, index: int, prompts: list[Prompt], out: Any) -> None:
    """Be one kernel."""
    clock = BootClock()
    crowd = Crowd(
        Wire(clock=clock),
        Ledger(SqliteStore(path, boot="one"), holder=str(index)),
        clock,
        Settings(api_key=Secret(KEY), base_url=f"{url}/v1"),
        seed=index,
    )
    asyncio.run(ask_all(crowd, prompts))
    out.put((index, sum(n != 1 for n in crowd.finished.values()), len(crowd.finished)))


def main() -> None:
    """Print the figures of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--kernels", type=int, default=4)
    parser.add_argument("--policy", default="refunded")
    options = parser.parse_args()
    prompts = workload(options.prompts, 0)
    shares = [prompts[i :: options.kernels] for i in range(options.kernels)]
    spawn = multiprocessing.get_context("spawn")
    knobs = {"tpm": LIMIT, "rpm": 20_000, "policy": options.policy, "sigma": 0.4, "chunk": 1000}
    with simulated(**knobs) as server, tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "ledger", spawn.Queue()
        SqliteStore(path, boot="one").close()
        workers = [
            spawn.Process(target=kernel, args=(server.url, path, i, share, out))
            for i, share in enumerate(shares)
        ]
        for worker in workers:
            worker.start()
        ends = [out.get() for _ in workers]
        for worker in workers:
            worker.join()
        report(server.core.log, prompts, shares, ends)


def report(log: Any, prompts: list[Prompt], shares: list[list[Prompt]], ends: Any) -> None:
    """Print how fully and how fairly the limit was used."""
    at = {int(seen.prompt.split()[0]): seen for seen in log if seen.status == 200}
    began, last = min(seen.at for seen in log), max(seen.at for seen in at.values())
    charged = sum(seen.charged for seen in log)
    bound = (charged - LIMIT) / (LIMIT / 60)
    end = min(max(at[p.number].at for p in share) for share in shares)
    served = [sum(at[p.number].charged for p in s if at[p.number].at <= end) for s in shares]
    refused = sum(seen.status == 429 for seen in log)
    answered = sum(count for _, _, count in ends)
    print(
        f"{len(shares)} kernels, {answered} of {len(prompts)} answered, "
        f"{sum(twice for _, twice, _ in ends)} twice; token bound over last admission "
        f"{bound / (last - began):.3f} ({last - began:.1f} s), "
        f"429s {100 * refused / len(log):.2f}%, Jain {jain(served):.3f}"
    )


if __name__ == "__main__":
    main()
