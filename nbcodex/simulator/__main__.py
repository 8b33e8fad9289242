"""``python -m nbcodex.simulator --port 0 --tpm 30000`` runs the server as a process.

It prints its URL first. Each field of Knobs is an option; "none" removes a limit, and lists are
separated by commas.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.server import serve
from nbcodex.simulator.service import Simulator

# How an option is read, by the type of its field.
_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"on": True, "off": False}[text],
    "int | None": lambda text: None if text == "none" else int(text),
    "tuple[str, ...]": lambda text: tuple(filter(None, text.split(","))),
}


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m nbcodex.simulator",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free one")
    defaults: dict[str, Any] = asdict(Knobs())
    helps = _comments()
    for field in fields(Knobs):
        name = f"--{field.name.replace('_', '-')}"
        parse = _PARSERS.get(str(field.type), str)
        default, text = defaults[field.name], helps[field.name]
        parser.add_argument(name, type=parse, default=default, help=text)
    options = vars(parser.parse_args())
    host, port = options.pop("host"), options.pop("port")
    async with serve(Simulator(Knobs(**options)), host, port) as url:
        sys.stdout.write(f'{url}\nIn a notebook: %config Codex.base_url = "{url}/v1"\n')
        sys.stdout.flush()
        await asyncio.Event().wait()


def _comments() -> dict[str, str]:
    """Return the comment of each field of `Knobs`, for fields without one that of the last."""
    found: dict[str, str] = {}
    comment, is_complete = "", True
    for line in inspect.getsource(Knobs).splitlines():
        code, _, text = line.strip().partition("# ")
        if text:
            comment, is_complete = text if is_complete else f"{comment} {text}", bool(code)
        if code:
            found[code.partition(":")[0]] = comment.replace("`", "").replace("%", "%%")
            is_complete = True
    return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
