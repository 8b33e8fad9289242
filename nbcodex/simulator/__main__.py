"""`python -m nbcodex.simulator --port 0 --tpm 30000` runs the server as a process.

It prints its URL first. Each field of Knobs is an option; "none" removes a limit, and lists are
separated by commas.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.server import serve
from nbcodex.simulator.service import Simulator

# How an option is read, by the type of its field of Knobs.
_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"on": True, "off": False}[text],
    "int | None": lambda text: None if text == "none" else int(text),
    "tuple[str, ...]": lambda text: tuple(filter(None, text.split(","))),
}
# A field's comments, above it and beside it. A field without any shares those of the field before.
_COMMENTS = re.compile(r"((?:^    # .*\n)*)^    \w+: [^#\n]*(?:# (.*))?$", re.MULTILINE)


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m nbcodex.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free one")
    parser.set_defaults(**asdict(Knobs()))
    comments, text = _COMMENTS.findall(inspect.getsource(Knobs)), ""
    for field, (above, beside) in zip(fields(Knobs), comments, strict=True):
        name = f"--{field.name.replace('_', '-')}"
        parse = _PARSERS.get(str(field.type), str)
        text = " ".join(re.sub(r"# |[`%]", "", f"{above} {beside}").split()) or text
        parser.add_argument(name, type=parse, help=f"{text} (%(default)s)")
    options = vars(parser.parse_args())
    host, port = options.pop("host"), options.pop("port")
    simulator = Simulator(Knobs(**options))
    async with serve(simulator, host, port) as url:
        sys.stdout.write(f'{url}\nIn a notebook: %config Codex.base_url = "{url}/v1"\n')
        base = f"{url}/_simulator/{simulator.control_secret}/"
        # A list of faults for the next requests is posted to the second, settings to the third.
        sys.stdout.write(f"To control it, add log (GET), script or knobs (POST JSON) to: {base}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
