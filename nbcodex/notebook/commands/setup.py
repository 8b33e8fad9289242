"""Commands about the connection to the server: models, aliases, keys, the demo and the doctor."""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from nbcodex.client import get_client
from nbcodex.doctor import Finding, report
from nbcodex.errors import EntryError, NbcodexError
from nbcodex.mapping.map_runner import active_runners
from nbcodex.notebook import cell_options, identity
from nbcodex.notebook.display import can_show_widgets
from nbcodex.notebook.session import Session
from nbcodex.openai_api.endpoints import configured_host
from nbcodex.rendering.html import printable
from nbcodex.runtime import event_loop
from nbcodex.settings import DEFAULT_MODEL, DEMO_FOLDER_NAME, Secret, Settings, data_folder

if TYPE_CHECKING:
    from nbcodex.simulator.server import SimulatorServer

_demo_server: SimulatorServer | None = None  # one per process, shared by all shells
# Other local users can reach the server's port, but not use it without this key.
_DEMO_KEY = secrets.token_urlsafe(16)
_DEMO_PORT = 27_182
# The simulator's settings by the argument of `%codex demo`: latency in s, speed in tokens/s.
_DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "on": {"tpm": 3_000, "rpm": 60, "latency": 0.4, "speed": 60.0},
    "calm": {"tpm": 1_000_000, "rpm": 5_000, "latency": 0.2, "speed": 200.0},
}
# The waits that the refusals of the demo's first requests state; None: the request is answered.
# The refusals stand for other users of the same key. Without them, the demo would never show a
# limit, because the limiter sends no request that would exceed one.
_DEMO_REFUSALS_S = (None, 6.0, None, 5.0, 4.0)

MAX_LISTED_MODELS = 200  # more would flood the notebook; gateways list some hundred


def list_models(session: Session, substring: str = "") -> None:
    """List the server's models, all or those whose name contains PART: models [PART]."""
    names = event_loop.run(get_client().services().api_client.list_models(session.settings))
    session.config.listed_models = tuple(names)
    matching = [name for name in names if substring.lower() in name.lower()]
    if matching:
        print("\n".join(map(printable, matching[:MAX_LISTED_MODELS])))
    else:
        condition = f" with {substring[:40]!r} in it" if substring else "s"
        print(f"The server lists no model{condition}.")
    if (more := len(matching) - MAX_LISTED_MODELS) > 0:
        print(f"… and {more:,} more: `%codex models PART` lists those with PART in them.")
    for name, target in session.config.aliases.items():
        print(f"{name} → {target}")


def alias(session: Session, name: str, target: str) -> None:
    """Define a short name for a model in this session: alias NAME TARGET."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("-"):
        raise UsageError("%codex alias: a name has letters, digits, '.', '_' and '-' only")
    cell_options.check_model_name(target)
    if name == target or target in session.config.aliases:
        raise UsageError(f"%codex alias: {target} is an alias itself: give the model's name")
    session.config.aliases = {**session.config.aliases, name: target}
    advice = "To keep it, set c.Codex.aliases in ipython_config.py."
    print(f"{name} → {target}, in this session. {advice}")


def dealias(session: Session, name: str) -> None:
    """Remove an alias: dealias ALIAS."""
    aliases = session.config.aliases
    if name not in aliases:
        known = ", ".join(aliases) or "none"
        raise UsageError(f"%codex dealias: there is no alias {name[:40]} (known: {known})")
    session.config.aliases = {n: target for n, target in aliases.items() if n != name}
    print(f"The alias {name} is removed.")


def login(session: Session, server: str = "") -> None:
    """Ask for an API key without showing it, and keep it in memory: login [HOST]."""
    server = (server or configured_host(session.settings)).lower()
    try:
        key = getpass.getpass(f"API key for {server}: ")
    except Exception as error:
        raise NbcodexError(
            f"This front end cannot ask for a key ({type(error).__name__}).",
            advice="Set OPENAI_API_KEY in the environment that starts the kernel.",
        ) from None
    if not key.strip():
        raise NbcodexError("No key was entered; nothing has changed.")
    session.config.keys = {**session.config.keys, server: Secret(key)}
    print(f"The key for {server} is kept in memory until the kernel ends.")


def demo(session: Session, mode: str = "on") -> None:
    """Use a simulator instead of the API, low or high limits, no key: demo [on|calm|off]."""
    global _demo_server
    # Imported here, because only the demo needs the simulator.
    from nbcodex.simulator import Fault, Knobs, Simulator
    from nbcodex.simulator.server import SimulatorServer

    if mode != "off" and mode not in _DEMO_SETTINGS:
        raise UsageError("%codex demo: on, calm or off")
    knobs = Knobs(keys=(_DEMO_KEY,), **_DEMO_SETTINGS[mode]) if mode != "off" else None
    if _demo_server is not None and _demo_server.simulator.knobs != knobs:
        _demo_server.stop()
        _demo_server = None
    if knobs is None:
        session.config.demo = None
        print(f"The demo is off: requests go to {configured_host(session.config.settings())}.")
        return
    if _demo_server is None:
        simulator = Simulator(knobs)
        if mode == "on":
            simulator.script(
                None if seconds is None else Fault("tokens_per_minute", seconds=seconds)
                for seconds in _DEMO_REFUSALS_S
            )
        # At the same address, what the demo of an earlier kernel answered is found again.
        _demo_server = SimulatorServer(simulator, port=_DEMO_PORT)
        try:
            _demo_server.start()
        except OSError:  # the demo of another kernel has this port
            _demo_server = SimulatorServer(simulator)
    was_on = session.config.demo is not None
    # Simulated requests stay out of the user's journal and limiter files: the next simulator may
    # have the same port, and other limits.
    session.config.demo = Settings(
        api_key=Secret(_DEMO_KEY),
        base_url=f"{_demo_server.url or _demo_server.start()}/v1",
        model=DEFAULT_MODEL,
        home=data_folder(Settings.read()) / DEMO_FOLDER_NAME,
        private_limits=True,
    )
    session.settings = session.config.settings()
    effect = "no limit is reached" if mode == "calm" else "you see how other programs use them up"
    is_on_disk = session.settings.journal
    kept = (
        "The journal of the demo survives the kernel; the next demo empties it if nothing in it "
        "is open. "
    )
    print(
        f"From now on a simulator answers, with {knobs.tpm:,} tokens a minute, so that {effect}. "
        f"Nothing leaves this machine. {kept * is_on_disk}`%codex demo off` ends the demo."
    )
    if was_on or not is_on_disk:
        return  # the journal in memory is not the demo's: it holds the user's own prompts, too
    session.report_unfinished()
    journal, client = session.journal, get_client()
    is_running = client.active_handles() or active_runners() or journal.other_kernels().requests
    if not is_running and not session.unfinished_ids(notebook=None):
        with contextlib.suppress(EntryError):  # the file cannot be written
            event_loop.run(journal.delete())
        event_loop.run(journal.reset_spending())
        event_loop.run(client.services().budget.set_shared_cap(journal, cap=None))


def run_doctor(session: Session) -> None:
    """Check the settings, the server and this notebook, with advice for what is wrong."""
    if session.config.demo is not None:
        print("The demo is on: the server and key below are the simulator's.")
    notebook = _notebook_findings(session.shell, session.settings.display)
    for finding in chain(report(session.settings, get_client()), notebook):
        print(finding)


def _notebook_findings(shell: InteractiveShell, display_setting: str) -> Iterator[Finding]:
    """Yield the findings on the kernel, on the display, and on the notebook's path."""
    kernel, path = getattr(shell, "kernel", None), identity.notebook_id(shell)
    if kernel is None:
        yield Finding("kernel", "none: this is a terminal, which shows countdowns as lines")
        yield Finding("notebook", path)
        return
    try:
        name = f"ipykernel {version('ipykernel')}"
    except PackageNotFoundError:  # such as the kernel of Xeus
        name = "a kernel of unknown version"
    if getattr(kernel, "_supports_kernel_subshells", False):
        yield Finding("kernel", f"{name}: buttons work while a cell runs")
    else:
        advice = "Cancel interrupts the kernel; Retry now and Park need ipykernel 7."
        yield Finding("kernel", f"{name}: buttons work only between cells", advice)
    if display_setting == "text":
        yield Finding("display", "text, as configured")
    elif not can_show_widgets(shell, display_setting):
        yield Finding("display", "text: this front end is not known to show widgets")
    else:
        # The kernel cannot see whether JupyterLab has anywidget's extension for the browser.
        advice = (
            "If a cell only shows `Loading widget`, install anywidget beside JupyterLab, or set "
            "Codex.display='text'."
        )
        yield Finding("display", f"widget, by anywidget {version('anywidget')}", advice)
    advice = "The front end does not name it: `%codex resume` finds this kernel's requests only."
    yield Finding("notebook", path, advice if path.startswith("kernel ") else "")
