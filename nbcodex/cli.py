"""The command line: ``nbcodex demo`` and ``nbcodex doctor``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_client.blocking.client import BlockingKernelClient

_HERE = Path(__file__).parent
# A cell of the quick start waits for limits of at most a minute.
CELL_TIMEOUT_S = 120.0


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="nbcodex", description="Try nbcodex, or check its settings."
    )
    commands = parser.add_subparsers(dest="command")
    demo = commands.add_parser(
        "demo",
        help="open the quick start with simulated limits, no key needed; passes options to Lab",
    )
    demo.add_argument(
        "--headless", action="store_true", help="run it in a kernel and print what happens"
    )
    commands.add_parser("doctor", help="show the settings in force, and check them")
    options, further = parser.parse_known_args(arguments)
    if further and (options.command != "demo" or options.headless):
        parser.error(f"unrecognized option {further[0]}")
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "doctor":
        from nbcodex import doctor
        from nbcodex.client import current
        from nbcodex.settings import Settings

        is_wrong = False
        for finding in doctor.report(Settings.read(), current()):
            print(finding, flush=True)
            is_wrong = is_wrong or finding.wrong
        return int(is_wrong)
    if find_spec("jupyterlab") is None:
        print("The demo needs JupyterLab: pip install 'nbcodex[lab]'", file=sys.stderr)
        return 1
    return run_notebook(quickstart()) if options.headless else _lab(further)


def quickstart() -> Path:
    """Return the path of the quick start notebook, in the wheel or in a checkout."""
    installed = _HERE / "quickstart.ipynb"
    return installed if installed.exists() else _HERE.parent / "notebooks" / "quickstart.ipynb"


def _lab(options: list[str]) -> int:
    """Open JupyterLab with a copy of the quick start, so that the original stays unchanged."""
    if getattr(os, "geteuid", lambda: 1)() == 0:
        # Containers often run as root, which JupyterLab refuses by default; it listens on loopback.
        options = ["--allow-root", *options]
    folder = tempfile.mkdtemp(prefix="nbcodex-demo-")
    copy = shutil.copy(quickstart(), folder)
    print(f"The quick start is a copy: {copy}", flush=True)
    command = [sys.executable, "-m", "jupyterlab", "--notebook-dir", folder, *options, str(copy)]
    if os.name == "posix":
        # JupyterLab replaces this process: it receives the signals, and shuts its kernels down.
        os.execv(command[0], command)  # noqa: S606 - our own interpreter
    # On Ctrl+C the console signals both processes; JupyterLab asks the user, and we wait.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.call(command)  # noqa: S603 - the same


def run_notebook(path: Path) -> int:
    """Run a notebook in a new kernel, print its outputs, and return 0 if every cell is as expected.

    Cell metadata may state what is expected: ``{"nbcodex": {"error": NAME, "shows": [TEXT]}}`` with
    the name of the error that ends the cell, and texts that its output must contain.
    """
    from jupyter_client.manager import start_new_kernel  # slow, and not needed by the doctor

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        failures = sum(not _run_cell(client, cell) for cell in cells)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    print(f"\n{failures} cells failed." if failures else "\nAll as it should be.")
    return 1 if failures else 0


def _run_cell(client: BlockingKernelClient, cell: dict[str, Any]) -> bool:
    """Run and print one cell; return whether it did what its metadata expects."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        print(f"\n{source}")
        return True
    print("\n" + "\n".join(f"│ {line}" for line in source.splitlines()))
    expected = cell["metadata"].get("nbcodex", {})
    shown, error = "", None

    def show(message: dict[str, Any]) -> None:
        nonlocal shown, error
        content, end = message["content"], "\n"
        match message["msg_type"]:
            case "stream":
                text, end = content["text"], ""
            case "execute_result" | "display_data" | "update_display_data":
                text = content["data"].get("text/plain", "")
                # A panel's text form ends with a status line in brackets until the request has
                # ended. Only this line is new.
                text = text.rpartition("\n")[2] if text.endswith("]") else text
            case "error":
                text, error = "\n".join(content["traceback"]), content["ename"]
            case _:
                return
        print(text, end=end, flush=True)
        shown += text

    try:
        client.execute_interactive(
            source, allow_stdin=False, timeout=CELL_TIMEOUT_S, output_hook=show
        )
    except TimeoutError:
        error = f"no result after {CELL_TIMEOUT_S:g} s"
    problems = [
        f"missing output: {text!r}" for text in expected.get("shows", []) if text not in shown
    ]
    if error != expected.get("error"):
        problems.append(f"ended with {error} instead of {expected.get('error')}")
    for problem in problems:
        print(f"✗ {problem}")
    return not problems
