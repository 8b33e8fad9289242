"""The command line: ``nbcodex demo`` and ``nbcodex doctor``."""

from __future__ import annotations

import argparse
import json
import os
import re
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

_PACKAGE_FOLDER = Path(__file__).parent
CELL_TIMEOUT_S = 120.0  # a cell of the quick start waits for a limit at most a minute


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
    options, lab_options = parser.parse_known_args(arguments)
    if lab_options and (options.command != "demo" or options.headless):
        parser.error(f"unrecognized option {lab_options[0]}")
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "doctor":
        from nbcodex import doctor
        from nbcodex.client import get_client
        from nbcodex.settings import Settings

        has_problem = False
        for finding in doctor.report(Settings.read(), get_client()):
            print(finding, flush=True)
            has_problem = has_problem or finding.is_problem
        return int(has_problem)
    if find_spec("jupyterlab") is None:
        print("The demo needs JupyterLab: pip install 'nbcodex[lab]'", file=sys.stderr)
        return 1
    return run_notebook(quickstart()) if options.headless else _open_lab(lab_options)


def quickstart() -> Path:
    """Return the path of the quick start notebook, in the wheel or in a checkout."""
    in_wheel = _PACKAGE_FOLDER / "quickstart.ipynb"
    in_checkout = _PACKAGE_FOLDER.parent / "notebooks" / "quickstart.ipynb"
    return in_wheel if in_wheel.exists() else in_checkout


def _open_lab(options: list[str]) -> int:
    """Open JupyterLab with a copy of the quick start, so that the original stays unchanged."""
    if getattr(os, "geteuid", lambda: 1)() == 0:
        # JupyterLab does not run as root, the usual user in containers. Without other options, it
        # accepts connections from this machine only.
        options = ["--allow-root", *options]
    folder = tempfile.mkdtemp(prefix="nbcodex-demo-")
    copy = shutil.copy(quickstart(), folder)
    print(f"The quick start is a copy: {copy}", flush=True)
    command = [sys.executable, "-m", "jupyterlab", "--notebook-dir", folder, *options, str(copy)]
    if os.name == "posix":
        # JupyterLab replaces this process, receives its signals and shuts its own kernels down.
        os.execv(command[0], command)  # noqa: S606 - our own interpreter
    # On Ctrl+C, Windows interrupts both processes. JupyterLab asks the user whether to end, so this
    # process must wait.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.call(command)  # noqa: S603 - our own interpreter


def run_notebook(path: Path) -> int:
    """Run a notebook in a new kernel, print its outputs, and return 0 if every cell is as expected.

    Cell metadata may state what is expected: ``{"nbcodex": {"error": NAME, "shows": [TEXT]}}`` with
    the name of the error that ends the cell, and texts that its output must contain.
    """
    from jupyter_client.manager import start_new_kernel  # slow to import, not used by the doctor

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
    """Run one cell and print its outputs; return whether they are as its metadata states."""
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
                text = content["data"].get("text/plain", "").removesuffix("\n")
                # While a request runs, its output ends with a status line. Only that is printed,
                # and only once its last part, a hint for pages that get no further output.
                line = text.rpartition("\n")[2]
                text = line if line.startswith("[") and line.endswith("]") else text
                if message["msg_type"] == "update_display_data":
                    text = re.sub(r" · if it stays open: .*\]$", "]", text)
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
