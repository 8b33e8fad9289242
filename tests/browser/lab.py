"""A JupyterLab server and a notebook in it, for the tests in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import zmq
from playwright.sync_api import Locator, Page

from nbcodex.runtime.clock import BootClock

REPOSITORY = Path(__file__).parents[2]
# A request that a click ends would take at least twice as long without the click. A busy machine
# needs some of this time.
MAX_CLICK_S = 15.0
CHROMIUM = Path(os.environ.get("NBCODEX_TEST_CHROMIUM", "/usr/bin/chromium"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}

_NOTEBOOK = "const nb = window.jupyterapp.shell.currentWidget;"
_READY = """(path) => {
  const nb = window.jupyterapp?.shell.currentWidget;
  const kernel = nb?.context?.path === path && nb.context.sessionContext.session?.kernel;
  return Boolean(kernel) && kernel.status === 'idle' && kernel.connectionStatus === 'connected';
}"""


# Only the page can time these: each reading of the countdown, the last click, the end of the cell.
_TIMELINE = """() => {
  const timeline = { readings: [], clicked: 0, ended: 0 };
  const look = () => {
    const number = document.querySelector('.nbcodex-wait:not([hidden]) .nbcodex-number');
    const left = number && Number(number.textContent.replace('now', '0'));
    const last = timeline.readings.at(-1);
    if (number && last?.[1] !== left) timeline.readings.push([Date.now(), left]);
  };
  new MutationObserver(look).observe(
    document.body, { subtree: true, childList: true, characterData: true },
  );
  document.addEventListener('click', () => { timeline.clicked = Date.now(); }, true);
  return timeline;
}"""


@dataclass(frozen=True, slots=True)
class Lab:
    """A running server: its address, its token, and the folder that it shows."""

    url: str
    token: str
    folder: Path

    def write(self, name: str, *cells: str, kernel: str = "python3") -> Path:
        """Write a notebook with these code cells; return its path."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel}
        path = self.folder / name
        nbformat.write(notebook, path)
        return path

    def add_kernel(self, name: str, packages: Path) -> str:
        """Add a kernel that imports packages from that folder first; return its name."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        path = os.pathsep.join([str(packages), str(REPOSITORY)])
        spec = {"argv": command, "display_name": name, "language": "python"}
        folder = self.folder.parent / "data" / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(spec | {"env": {"PYTHONPATH": path}}))
        return name

    def reset(self) -> None:
        """End every kernel and delete what nbcodex kept, so that no test depends on another.

        The next simulator may get the port of an earlier one, and would inherit its cooldowns.
        """
        for session in json.loads(self._call("GET", "api/sessions")):
            self._call("DELETE", f"api/sessions/{session['id']}")
        shutil.rmtree(self.folder.parent / "nbcodex", ignore_errors=True)

    @contextlib.contextmanager
    def kept_awake(self) -> Iterator[None]:
        """Connect to each kernel four times a second.

        The shell channel of ipykernel 7.0 to 7.3 can leave a request unread until another client
        connects (https://github.com/ipython/ipykernel/issues/1554): one start in sixty hangs.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._connect_until, args=(done,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _connect_until(self, done: threading.Event) -> None:
        with zmq.Context() as context:
            context.linger = 0
            while not done.wait(0.25):
                for file in (self.folder.parent / "runtime").glob("kernel-*.json"):
                    with contextlib.suppress(OSError, ValueError):
                        connection = json.loads(file.read_text())
                        with context.socket(zmq.DEALER) as client:
                            client.connect(f"tcp://{connection['ip']}:{connection['shell_port']}")
                            done.wait(0.05)

    def _call(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Lab]:
    """Run a JupyterLab on a free loopback port, with no file outside of `root`."""
    folder = root / "notebooks"
    folder.mkdir()
    notices = root / "settings" / "@jupyterlab" / "apputils-extension"
    notices.mkdir(parents=True)
    (notices / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}/", secrets.token_hex(16), folder)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={lab.token}",
        "--ServerApp.jpserver_extensions={'jupyterlab': True, 'notebook': True}",
        "--JupyterNotebookApp.expose_app_in_browser=True",
        # A fifth of the default, so that a slow machine reaches it as well.
        "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=200",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=",
        "--LabApp.extension_manager=readonly",
        f"--LabApp.user_settings_dir={root / 'settings'}",
        f"--LabApp.workspaces_dir={root / 'workspaces'}",
    ]
    with (root / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=_environment(root), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _await(lab, server)
            yield lab
            lab.reset()
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _environment(root: Path) -> dict[str, str]:
    names = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "NBCODEX_HOME": "nbcodex",
        "HOME": "home",
    }
    strange = ("OPENAI_", "AZURE_", "JUPYTER", "NBCODEX_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    ours = {name: str(root / folder) for name, folder in names.items()}
    return kept | ours | {"PYTHONPATH": str(REPOSITORY), "JUPYTER_NO_CONFIG": "1"}


def _await(lab: Lab, server: subprocess.Popen[bytes], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            lab._call("GET", "api/status")
            return
        time.sleep(0.1)
    raise RuntimeError("JupyterLab did not start")


class Notebook:
    """A notebook that is open in a page."""

    def __init__(self, page: Page, lab: Lab, name: str) -> None:
        self.page, self.lab, self.name = page, lab, name

    def open(self, face: str = "lab/tree") -> Notebook:
        """Open it in the page, and wait until its kernel is idle and connected.

        `face` is where the front end lives: ``lab/tree`` or ``notebooks``.
        """
        self.page.goto(f"{self.lab.url}{face}/{self.name}?reset&token={self.lab.token}")
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Wait until the notebook is open and its kernel is idle and connected."""
        self.page.wait_for_function(_READY, arg=self.name, timeout=40_000)

    def reload(self) -> None:
        """Load the page again; it is not ready yet."""
        self.page.once("dialog", lambda dialog: dialog.accept())
        self.page.reload()

    def run(self, index: int) -> None:
        """Start the cell."""
        self.page.evaluate(
            f"""(index) => {{ {_NOTEBOOK}
              nb.content.activeCellIndex = index;
              window.timeline = window.timeline ?? ({_TIMELINE})();
              window.timeline.ended = 0;
              window.jupyterapp.commands.execute('notebook:run-cell')
                .then(() => {{ window.timeline.ended = Date.now(); }});
            }}""",
            index,
        )

    def deselect(self) -> None:
        """Make the first cell the active one, so that no other shows its toolbar."""
        self.page.evaluate(f"() => {{ {_NOTEBOOK} nb.content.activeCellIndex = 0; }}")

    def wait(self) -> None:
        """Wait until the cell that was started last has ended, with or without an error.

        The kernel's status cannot tell: a click that a subshell serves makes it look idle.
        """
        self.page.wait_for_function("() => window.timeline.ended", timeout=60_000)

    def until(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Wait until a condition outside of the page is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            self.page.wait_for_timeout(20)

    def countdown(self, selector: str = ".nbcodex-number") -> tuple[float, float]:
        """Return the first number in the page's countdown, and the page's clock in seconds."""
        text, at = self.page.evaluate(
            "(selector) => [document.querySelector(selector).textContent, performance.now()]",
            selector,
        )
        found = re.search(r"\d+(?:\.\d+)?(?= s\b)|^\d+(?:\.\d+)?$", text)
        assert found, text
        return float(found[0]), at / 1000

    def readings(self) -> list[tuple[float, float]]:
        """Return the readings of the countdown: instants of `BootClock`, and seconds left."""
        readings = self.page.evaluate("() => window.timeline.readings")
        booted = time.time() - BootClock().now()
        return [(at / 1000 - booted, left) for at, left in readings]

    def seconds_from_click(self) -> float:
        """Return the seconds from the last click to the end of the cell."""
        lasted: float = self.page.evaluate("() => window.timeline.ended - window.timeline.clicked")
        return lasted / 1000

    def interrupt(self) -> None:
        """Click the notebook's own Stop."""
        self.page.locator('[data-command="notebook:interrupt-kernel"]').first.click()

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """Return the cell's outputs, as they would be saved."""
        outputs: list[dict[str, Any]] = self.page.evaluate(
            f"(i) => {{ {_NOTEBOOK} return nb.content.widgets[i].model.outputs.toJSON(); }}", index
        )
        return outputs

    def clear(self, index: int) -> None:
        """Clear the cell's outputs."""
        self.page.evaluate(
            f"""(index) => {{ {_NOTEBOOK}
              nb.content.activeCellIndex = index;
              return window.jupyterapp.commands.execute('notebook:clear-cell-output');
            }}""",
            index,
        )

    def text(self, index: int) -> str:
        """Return what the cell has printed."""
        streams = [o for o in self.outputs(index) if o["output_type"] == "stream"]
        return "".join("".join(o["text"]) for o in streams)

    @property
    def trusted(self) -> bool:
        """Whether the front end trusts all outputs."""
        trusted: bool = self.page.evaluate(
            f"() => {{ {_NOTEBOOK} return nb.content.widgets.every((c) => c.model.trusted); }}"
        )
        return trusted

    def save(self) -> nbformat.NotebookNode:
        """Save, and return what the file holds."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return nbformat.read(self.lab.folder / self.name, as_version=4)

    def press(self, label: str) -> None:
        """Click the panel's button of that name."""
        self.panel.get_by_role("button", name=label).click()

    def shoot(self, path: Path) -> None:
        """Write a picture of the panel."""
        self.panel.screenshot(path=path)

    def use_theme(self, name: str) -> None:
        """Change the theme of JupyterLab: ``JupyterLab Light`` or ``JupyterLab Dark``."""
        self.page.evaluate(
            "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name
        )

    @property
    def panel(self) -> Locator:
        """The panel of the request that runs."""
        return self.page.locator(".nbcodex-panel")
