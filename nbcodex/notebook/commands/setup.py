"""Commands about the connection to the server: models, aliases, keys, the demo and the doctor.

Owns the simulator that `%codex demo` runs in this process, and what only a notebook can report to
the doctor.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbcodex.client import current
from nbcodex.errors import NbcodexError
from nbcodex.notebook import cell_options, identity
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.notebook.display import can_show_widgets
from nbcodex.rendering.html import printable
from nbcodex.runtime import event_loop
from nbcodex.settings import DEFAULT_MODEL, Secret, Settings

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.doctor import Finding
    from nbcodex.simulator.server import SimulatorServer

_server: SimulatorServer | None = None  # of `%codex demo`: one per process, shared by all shells

_DEMO_LIMITS: dict[str, dict[str, Any]] = {
    "on": {"tpm": 3_000, "rpm": 60, "latency": 0.4, "speed": 60.0},
    "calm": {"tpm": 1_000_000, "rpm": 5_000, "latency": 0.2, "speed": 200.0},
}
# Seconds to wait that the first requests of a demo are refused with, None being an answer. These
# refusals stand for other users of the same key: the limiter plans its own use, and so would
# never meet a limit in the demo.
_DEMO_REFUSALS_S = (None, 6.0, None, 5.0, 4.0)


MAX_LISTED_MODELS = 200  # more would flood the notebook; gateways list some hundred


def _no_models(part: str) -> str:
    return (
        f"The server lists no model with {part[:40]!r} in it."
        if part
        else ("The server lists no models.")
    )


class SetupCommands(CommandGroup):
    """The connection to a server."""

    def models(self, part: str = "") -> None:
        """List the server's models, all or those whose name contains PART: models [PART]."""
        names = (
            event_loop.shared()
            .submit(current().services().api_client.list_models(self._settings))
            .result()
        )
        self._config.offered = tuple(names)
        matching = [name for name in names if part.lower() in name.lower()]
        print_line("\n".join(map(printable, matching[:MAX_LISTED_MODELS])) or _no_models(part))
        if (more := len(matching) - MAX_LISTED_MODELS) > 0:
            print_line(f"… and {more:,} more: `%codex models PART` lists those with PART in them.")
        for name, target in self._config.aliases.items():
            print_line(f"{name} → {target}")

    def alias(self, name: str, target: str) -> None:
        """Define a short name for a model in this session: alias NAME TARGET."""
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("-"):
            raise UsageError("%codex alias: a name has letters, digits, '.', '_' and '-' only")
        cell_options.check_provider(target)
        if name == target or target in self._config.aliases:
            raise UsageError(f"%codex alias: {target} is an alias itself: give the model's name")
        self._config.aliases = {**self._config.aliases, name: target}
        print_line(
            f"{name} → {target}, in this session. To keep it, set c.Codex.aliases in "
            "ipython_config.py."
        )

    def dealias(self, name: str) -> None:
        """Remove an alias: dealias NAME."""
        if name not in self._config.aliases:
            known = ", ".join(self._config.aliases) or "none"
            raise UsageError(f"%codex dealias: there is no alias {name[:40]} (known: {known})")
        self._config.aliases = {n: t for n, t in self._config.aliases.items() if n != name}
        print_line(f"The alias {name} is removed.")

    def login(self, host: str = "") -> None:
        """Ask for an API key without showing it, and keep it in memory: login [HOST]."""
        from nbcodex.openai_api.endpoints import configured_host

        host = (host or configured_host(self._settings)).lower()
        try:
            key = getpass.getpass(f"API key for {host}: ")
        except Exception as error:
            raise NbcodexError(
                f"This front end cannot ask for a key ({type(error).__name__}).",
                advice="Set OPENAI_API_KEY in the environment that starts the kernel.",
            ) from None
        if not key.strip():
            raise NbcodexError("No key was entered; nothing has changed.")
        self._config.keys = {**self._config.keys, host: Secret(key)}
        print_line(f"The key for {host} is kept in memory until the kernel ends.")

    def demo(self, mode: str = "on") -> None:
        """Use a simulator instead of the API, with low or high limits, no key: demo [calm|off]."""
        if mode not in {"on", "calm", "off"}:
            raise UsageError("%codex demo: on, calm or off")
        if mode == "off":
            self._config.demo = None
            stop_demo()
            print_line("The demo is off: requests go to the real API.")
            return
        self._config.demo = start_demo(mode)
        effect = "no limit is reached" if mode == "calm" else "you see limits at work"
        print_line(
            f"From now on a simulator answers, with {_DEMO_LIMITS[mode]['tpm']:,} tokens a "
            f"minute, so that {effect}. Nothing leaves this machine. `%codex demo off` ends it."
        )

    def doctor(self) -> None:
        """Check the settings, the server and this notebook, with advice for what is wrong."""
        from nbcodex import doctor

        if self._config.demo is not None:
            print_line("The demo is on: the server and key below are the simulator's.")
        for finding in doctor.report(self._settings, current()):
            print_line(str(finding))
        for finding in notebook_findings(self._session.shell, self._settings):
            print_line(str(finding))


def start_demo(mode: str) -> Settings:
    """Start the simulator, unless it runs with these limits, and return settings for it alone."""
    global _server
    # Imported here, because only the demo needs the simulator.
    from nbcodex.simulator import Fault, Knobs, Simulator
    from nbcodex.simulator.server import SimulatorServer

    knobs = Knobs(**_DEMO_LIMITS[mode])
    if _server is not None and _server.simulator.knobs != knobs:
        stop_demo()
    if _server is None:
        simulator = Simulator(knobs)
        if mode == "on":
            simulator.script(
                None if seconds is None else Fault("tokens_per_minute", seconds=seconds)
                for seconds in _DEMO_REFUSALS_S
            )
        _server = SimulatorServer(simulator)
    # Simulated requests stay out of the user's journal and limiter files: the next simulator may
    # have the same port, and other limits.
    return Settings(
        api_key=Secret("no-key-is-needed-here"),
        base_url=f"{_server.url or _server.start()}/v1",
        model=DEFAULT_MODEL,
        journal=False,
        home=Settings.read().home,
        private_limits=True,
    )


def stop_demo() -> None:
    """Stop the simulator, if it runs."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


def notebook_findings(shell: InteractiveShell, settings: Settings) -> Iterator[Finding]:
    """Yield what the doctor cannot know outside of a notebook: kernel, display and path."""
    from nbcodex.doctor import Finding

    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        yield Finding("kernel", "none: this is a terminal, which shows countdowns as lines")
    else:
        name = f"ipykernel {_installed('ipykernel') or '(unknown version)'}"
        if getattr(kernel, "_supports_kernel_subshells", False):
            yield Finding("kernel", f"{name}: buttons work while a cell runs")
        else:
            yield Finding(
                "kernel",
                f"{name}: buttons work only between cells",
                "Cancel interrupts the kernel; Retry now and Park need ipykernel 7.",
            )
        yield _display_finding(shell, settings)
    path = identity.notebook_id(shell)
    is_unknown = kernel is not None and path.startswith("kernel ")
    advice = "The front end does not name it: `%codex resume` finds this kernel's requests only."
    yield Finding("notebook", path, advice if is_unknown else "")


def _display_finding(shell: InteractiveShell, settings: Settings) -> Finding:
    from nbcodex.doctor import Finding

    if settings.display == "text":
        return Finding("display", "text, as configured")
    if not can_show_widgets(shell, settings.display):
        return Finding("display", "text: this front end is not known to show widgets")
    if not (installed := _installed("anywidget")):
        return Finding("display", "text: anywidget is not installed", "pip install anywidget")
    # Whether the server has anywidget's browser side cannot be seen from the kernel.
    return Finding(
        "display",
        f"widget, by anywidget {installed}",
        "If a cell only shows `Loading widget`, install anywidget beside JupyterLab, or set "
        "Codex.display='text'.",
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
