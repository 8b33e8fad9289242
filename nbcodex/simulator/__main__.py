"""``python -m nbcodex.simulator --port 0 --tpm 30000`` runs the server as a process.

It prints its base URL first. Each field of `Knobs` is an option; ``none`` removes a limit, and
lists are separated by commas.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.server import serve
from nbcodex.simulator.service import Simulator

_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"on": True, "off": False}[text],
    "int | None": lambda text: None if text == "none" else int(text),
    "tuple[str, ...]": lambda text: tuple(filter(None, text.split(","))),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    options = vars(_parser().parse_args(arguments))
    host, port = options.pop("host"), options.pop("port")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(Knobs(**options), host, port))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbcodex.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    defaults: dict[str, Any] = asdict(Knobs())
    for field in fields(Knobs):
        reader = _READERS.get(str(field.type), str)
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=reader, default=defaults[field.name])
    return parser


async def _serve(knobs: Knobs, host: str, port: int) -> None:
    async with serve(Simulator(knobs), host, port) as url:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    main()
