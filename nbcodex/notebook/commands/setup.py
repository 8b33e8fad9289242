"""Words about the way to the server: models, keys, the demo, and what is wrong with it all."""

from __future__ import annotations

import getpass
import re

from IPython.core.error import UsageError

from nbcodex.client import current
from nbcodex.errors import NbcodexError
from nbcodex.notebook import options
from nbcodex.notebook.commands.base import CommandGroup, print_line
from nbcodex.rendering.html import printable
from nbcodex.runtime import event_loop
from nbcodex.settings import Secret


class Setup(CommandGroup):
    """How requests reach a server."""

    def models(self) -> None:
        """List the models that the server offers, and the aliases: models (also list)."""
        names = event_loop.shared().submit(current().models(self._settings)).result()
        self._config.offered = tuple(names)
        print_line("\n".join(map(printable, names)) or "The server names none.")
        for name, target in self._config.aliases.items():
            print_line(f"{name} → {target}")

    def alias(self, name: str, target: str) -> None:
        """Let a short name stand for a model in this session: alias NAME TARGET."""
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("-"):
            raise UsageError("%codex alias: a name of letters, digits, '.', '_' and '-'")
        options.plain(target)
        if name == target or target in self._config.aliases:
            raise UsageError(f"%codex alias: {target} is an alias itself: name the model")
        self._config.aliases = {**self._config.aliases, name: target}
        print_line(
            f"{name} → {target}, in this session; c.Codex.aliases in ipython_config.py keeps it."
        )

    def dealias(self, name: str) -> None:
        """Forget an alias: dealias NAME."""
        if name not in self._config.aliases:
            known = ", ".join(self._config.aliases) or "none"
            raise UsageError(f"%codex dealias: there is no alias {name[:40]} (known: {known})")
        self._config.aliases = {n: t for n, t in self._config.aliases.items() if n != name}
        print_line(f"{name} stands for nothing any more.")

    def login(self, host: str = "") -> None:
        """Ask for an API key without echo, and keep it in memory: login [HOST]."""
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
            raise NbcodexError("No key was given; nothing has changed.")
        self._config.keys = {**self._config.keys, host: Secret(key)}
        print_line(f"The key for {host} is kept in memory until the kernel ends.")

    def demo(self, switch: str = "on") -> None:
        """Ask a simulator with low limits, or with high ones, no key needed: demo [calm|off]."""
        if switch not in {"on", "calm", "off"}:
            raise UsageError("%codex demo: on, calm or off")
        from nbcodex.notebook import demo

        if switch == "off":
            self._config.demo = None
            demo.stop()
            print_line("The demo is off: requests go to the real API.")
        else:
            self._config.demo = demo.start(calm=switch == "calm")
            print_line(demo.welcome(calm=switch == "calm"))

    def doctor(self) -> None:
        """Tell which settings are in force, and what to do about those that do not fit."""
        from nbcodex import doctor
        from nbcodex.notebook import checkup

        if self._config.demo is not None:
            print_line(
                "The demo is on: server and key below are its own, not those of the environment."
            )
        for finding in doctor.report(self._settings, current()):
            print_line(str(finding))
        for finding in checkup.report(self._session.shell, self._settings):
            print_line(str(finding))
