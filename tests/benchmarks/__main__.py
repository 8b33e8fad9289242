"""``python -m tests.benchmarks [NAME...]``: run some benchmarks, or all, each in a fresh process.

loading     what ``%load_ext nbcodex`` and the first imports cost
streaming   what a streamed answer costs, beside the bare SDK
overhead    what a request costs, compared with the bare SDK
journal     what storing prompts and answers costs
map         memory and CPU of many rows
pacing      how well limits are used, compared with an oracle
redis       the same for four hosts that share a key, and what Redis costs
browser     bytes and CPU of a page: one answer, and a monitor of fifty requests
prices      what answers cost, compared with two other price tables (downloads them)
ablation    what each heuristic of the limiter gains (takes minutes; only if it is named)
peers       how well other libraries use limits (from PyPI, takes hours; only if it is named)

To pass options, run one alone: ``python -m tests.benchmarks.streaming --rounds 3``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

NAMES = ("loading", "streaming", "overhead", "journal", "map", "pacing", "redis", "browser")
LONG = ("peers", "ablation", "prices")


def main() -> int:
    """Run the named benchmarks; return how many failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="some of " + ", ".join((*NAMES, *LONG))
    )
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - {*NAMES, *LONG}):
        parser.error(f"there is no benchmark {unknown[0]!r}")
    failed = 0
    for name in names:
        print(f"## {name}\n", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"{__package__}.{name}"]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
