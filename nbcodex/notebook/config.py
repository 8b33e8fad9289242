"""`%config Codex`: the settings of a user or a site, as traits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from traitlets import Bool, Callable, Dict, Enum, Float, Integer, TraitError, Unicode, validate
from traitlets.config import Configurable

from nbcodex.errors import ConfigurationError
from nbcodex.settings import Secret, Settings

if TYPE_CHECKING:
    from nbcodex.models import Reply
    from nbcodex.notebook.cell_errors import LastError

# The demo replaces all other settings, because they are about the real server and its key.
_SETTINGS_KEPT_IN_DEMO = {
    *("aliases", "max_history", "display", "patience", "journal", "reuse", "remote_images"),
    *("budgets", "ask_above", "keep_files"),
}


class Codex(Configurable):
    """Settings of nbcodex. The environment, then the defaults, apply to what is not set here."""

    model = Unicode("", help="Model (on Azure: deployment) for cells that do not name one.")
    api = Enum(["auto", "responses", "chat"], "auto", help="API to use; `auto` finds out.")
    base_url = Unicode("", help="Base URL of the server, instead of OPENAI_BASE_URL.")
    organization = Unicode("", help="Organisation to ask for, instead of OPENAI_ORG_ID.")
    project = Unicode("", help="Project to ask for, instead of OPENAI_PROJECT_ID.")
    # One key for each server: a wrong base URL must not carry the OpenAI key to another server.
    keys = Dict(
        help="API keys by host, such as {'gateway.example.org': '…'}, {'localhost:*': ''} or "
        "{'http://gateway:8000': '…'}; sent to that host only."
    )
    client = Callable(
        None,
        allow_none=True,
        help="Function that returns an openai.AsyncOpenAI, for what has no setting here.",
    )
    patience = Unicode(
        "10m", help="Longest wait for limits and failures; beyond it, a cell is parked."
    )
    idle_timeout = Unicode("60s", help="Silence after which a started stream counts as broken.")
    max_answer = Integer(
        2_000_000, min=1, help="Characters after which an answer is cut: it is a model in a loop."
    )
    display = Enum(["auto", "widget", "text"], "auto", help="How requests are shown.")
    remote_images = Bool(
        False, help="Whether images in answers are loaded: their server then learns about you."
    )
    journal = Bool(
        True,
        help="Whether prompts and answers are kept on disk, so that they survive the kernel. "
        "IPython's history keeps each cell, unless c.HistoryManager.enabled = False in its config.",
    )
    reuse = Bool(False, help="Whether an equal prompt shows the earlier answer again, at no cost.")
    aliases = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        help="Short names of models, such as {'mini': 'gpt-5.6-mini'}; %codex alias adds to them.",
    )
    max_history = Integer(
        None,
        allow_none=True,
        min=0,
        help="Maximum of earlier turns that a cell sends; None: as many as the model holds.",
    )
    budget = Unicode(
        "", help="Cap on usage, such as 200k, $5 or $20/month; %codex budget adds to it."
    )
    ask_above = Float(
        1.0, min=0.0, help="Estimated cost in US dollars from which on a map asks before it starts."
    )
    keep_files = Bool(
        False, help="Whether a batch's files stay with the provider after all rows are answered."
    )

    @validate("budget")
    def _check_budget(self, proposal: dict[str, Any]) -> str:
        text = str(proposal["value"]).strip()
        if text:
            from nbcodex.requests.budget import parse_cap

            try:
                parse_cap(text, check_minimum=True)
            except ConfigurationError as error:
                raise TraitError(f"Codex.budget: {error} {error.advice}") from None
        return text

    @validate("patience", "idle_timeout")
    def _check_duration(self, proposal: dict[str, Any]) -> str:
        try:
            Settings.convert({proposal["trait"].name: proposal["value"]})  # only to check it
        except ConfigurationError as error:
            # A TraitError would leave the value in the shell's configuration, and the next
            # `%reload_ext` would fail; a warning and the default do not.
            name, default = proposal["trait"].name, str(proposal["trait"].default())
            warnings.warn(f"Codex.{name} is {default}: {error}", stacklevel=2)
            return default
        return str(proposal["value"])

    # `%config Codex` prints all values, and `Secret` has no readable repr.
    @validate("keys")
    def _hide_keys(self, proposal: dict[str, Any]) -> dict[str, Secret]:
        return {
            server: key if isinstance(key, Secret) else Secret(str(key))
            for server, key in proposal["value"].items()
        }

    # The state of a session; not traits, so that neither `%config` nor a file sets them.
    demo: Settings | None = None  # while the demo is on: its settings, instead of all others
    own_budget: str = ""  # the session's cap, set by `%codex budget`
    last_reply: Reply | None = None  # the newest answer, whose code `%codex insert` takes
    last_error: LastError | None = None  # for `%codex fix`; our own errors do not replace it
    listed_models: tuple[str, ...] = ()  # models that the server listed last, for Tab

    def copy_state(self, earlier: Any) -> None:
        """Copy what the user typed in before a reload, which is in no file."""
        for name in ("demo", "own_budget", "last_reply", "last_error", "listed_models"):
            # After an upgrade in the same kernel, the earlier class may lack some of them.
            setattr(self, name, getattr(earlier, name, getattr(self, name)))
        self.keys = {**self.keys, **earlier.keys}
        self.aliases = {**self.aliases, **earlier.aliases}

    def settings(self) -> Settings:
        """Return the settings in force now."""
        traits = self.traits(config=True)
        values = {name: getattr(self, name) for name in traits if name != "budget"}
        # A value that equals the default is left out, so that the environment applies to it.
        changed = {name: v for name, v in values.items() if v != traits[name].default()}
        changed["budgets"] = tuple(filter(None, (self.budget, self.own_budget)))
        if self.demo is None:
            return Settings.read(changed)
        from nbcodex.simulator import Knobs

        kept = {name: value for name, value in changed.items() if name in _SETTINGS_KEPT_IN_DEMO}
        if self.model in Knobs().models:  # those that the simulator offers
            kept["model"] = self.model
        return replace(self.demo, **Settings.convert(kept))


for _trait in Codex.class_own_traits().values():
    _trait.tag(config=True)  # every trait of the class is a setting
