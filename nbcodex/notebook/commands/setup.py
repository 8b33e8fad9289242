"""Words about the way to the server: models, keys, the demo, and what is wrong with it all."""

from __future__ import annotations

import getpass

from IPython.core.error import UsageError

from nbcodex import loop
from nbcodex.client import current
from nbcodex.errors import NbcodexError
from nbcodex.notebook.commands.room import Room, tell
from nbcodex.settings import Secret


class Setup(Room):
    """How requests reach a server."""

    def models(self) -> None:
        """List the models that the server offers to this key."""
        names = loop.running().submit(current().models(self._settings)).result()
        tell("\n".join(names) or "The server names none.")

    def login(self, host: str = "") -> None:
        """Ask for an API key without echo, and keep it in memory: login [HOST]."""
        from nbcodex.wire.providers import host_of

        host = (host or host_of(self._settings)).lower()
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
        tell(f"The key for {host} is kept in memory until the kernel ends.")

    def demo(self, switch: str = "on") -> None:
        """Ask a simulator with low limits from now on, no key needed: demo [off]."""
        if switch not in {"on", "off"}:
            raise UsageError("%codex demo: on or off")
        from nbcodex.notebook import demo

        if switch == "on":
            self._config.demo = demo.start()
            tell(demo.WELCOME)
        else:
            self._config.demo = None
            demo.stop()
            tell("The demo is off: requests go to the real API.")

    def doctor(self) -> None:
        """Tell which settings are in force, and what to do about those that do not fit."""
        from nbcodex import doctor

        for line in doctor.report(self._settings):
            tell(line)
