"""`%config Codex`: what a user or a site sets, as traits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from traitlets import Any as AnyTrait
from traitlets import Bool, Dict, Enum, Float, Integer, TraitError, Unicode, validate
from traitlets.config import Configurable

from nbcodex.errors import ConfigurationError
from nbcodex.settings import Secret, Settings

if TYPE_CHECKING:
    from nbcodex.models import Reply
    from nbcodex.notebook.cell_errors import LastError

_MINE = {
    "aliases",
    "max_history",
    "display",
    "patience",
    "journal",
    "reuse",
    "remote_images",
    "budgets",
    "ask_above",
    "keep_files",
}
"""What stays as the user has set it while the demo is on."""


class Codex(Configurable):
    """Settings of nbcodex. What is not set here comes from the environment, else is the default."""

    model = Unicode("", help="Model (on Azure: deployment) to ask where a cell names none.").tag(
        config=True
    )
    api = Enum(["auto", "responses", "chat"], "auto", help="API to speak; `auto` finds out.").tag(
        config=True
    )
    base_url = Unicode("", help="Base URL of the server, instead of OPENAI_BASE_URL.").tag(
        config=True
    )
    organization = Unicode("", help="Organisation to ask for, instead of OPENAI_ORG_ID.").tag(
        config=True
    )
    project = Unicode("", help="Project to ask for, instead of OPENAI_PROJECT_ID.").tag(config=True)
    keys = Dict(
        help="API keys by host, such as {'gateway.example.org': '…'}: each goes to its host alone."
    ).tag(config=True)
    client = AnyTrait(
        None,
        allow_none=True,
        help="Factory of an openai.AsyncOpenAI, for what the other settings cannot say.",
    ).tag(config=True)
    patience = Unicode(
        "10m", help="How long limits and faults may keep a cell waiting before it is parked."
    ).tag(config=True)
    idle_timeout = Unicode(
        "60s", help="Silence after which a stream that has begun counts as broken."
    ).tag(config=True)
    display = Enum(["auto", "widget", "text"], "auto", help="How requests are shown.").tag(
        config=True
    )
    remote_images = Bool(
        False, help="Whether images in answers are fetched: doing so tells their server about you."
    ).tag(config=True)

    journal = Bool(
        True, help="Whether prompts and answers are kept on disk, so that they survive the kernel."
    ).tag(config=True)
    reuse = Bool(
        False, help="Whether an equal prompt that was answered is shown again, at no cost."
    ).tag(config=True)

    aliases = Dict(
        key_trait=Unicode(),
        value_trait=Unicode(),
        help="Short names of models, such as {'mini': 'gpt-5.6-mini'}; %codex alias adds to them.",
    ).tag(config=True)

    max_history = Integer(
        None,
        allow_none=True,
        min=0,
        help="How many earlier turns a cell sees at most; None: as many as the model holds.",
    ).tag(config=True)

    budget = Unicode(
        "", help="Cap on what may be used, such as 200k, $5 or $20/month; %codex budget adds to it."
    ).tag(config=True)

    @validate("budget")
    def _is_budget(self, proposal: dict[str, Any]) -> str:
        text = str(proposal["value"]).strip()
        if text:
            from nbcodex.requests.spending_cap import LEAST, read

            try:
                cap = read(text)
            except ConfigurationError as error:
                raise TraitError(f"Codex.budget: {error}") from None
            if cap.unit == "tokens" and cap.amount < LEAST:
                raise TraitError(
                    f"Codex.budget: {cap.words(cap.amount)} let nothing through. %config takes $5 "
                    "for a variable: write 5usd instead of $5, and 5k for 5,000 tokens."
                )
        return text

    ask_above = Float(
        1.0, min=0.0, help="US dollars that a map may be estimated to cost before it asks first."
    ).tag(config=True)

    keep_files = Bool(
        False, help="Whether the files of batches stay with the provider when all is answered."
    ).tag(config=True)

    @validate("patience", "idle_timeout")
    def _is_duration(self, proposal: dict[str, Any]) -> str:
        try:
            Settings.typed({proposal["trait"].name: proposal["value"]})
        except ConfigurationError as error:
            # An error would stay in the shell's configuration, where `%reload_ext` met it again.
            name = proposal["trait"].name
            usual = str(proposal["trait"].default())
            warnings.warn(f"Codex.{name} is {usual}: {error}", stacklevel=2)
            return usual
        return str(proposal["value"])

    @validate("keys")
    def _hidden(self, proposal: dict[str, Any]) -> dict[str, Secret]:
        return {
            host: key if isinstance(key, Secret) else Secret(str(key))
            for host, key in proposal["value"].items()
        }

    @validate("client")
    def _is_factory(self, proposal: dict[str, Any]) -> Any:
        factory = proposal["value"]
        if factory is not None and not callable(factory):
            raise TraitError("Codex.client is a function that returns an openai.AsyncOpenAI.")
        return factory

    demo: Settings | None = None
    """What `%codex demo` puts in the place of everything else, the environment included."""

    own_budget: str = ""
    """What `%codex budget` caps this session at."""

    last: Reply | None = None
    """The answer whose code `%codex insert` takes: the newest one."""

    last_error: LastError | None = None
    """The user's last error, for `%codex fix`: failures of our magics are not to hide it."""

    offered: tuple[str, ...] = ()
    """The models that the server named last, for Tab."""

    def take_over(self, before: Any) -> None:
        """Keep what was typed in and lies in no file: keys, and whether the demo is on."""
        self.demo = before.demo
        self.own_budget = before.own_budget
        self.keys = {**self.keys, **before.keys}
        self.aliases = {**self.aliases, **before.aliases}
        self.last, self.last_error, self.offered = before.last, before.last_error, before.offered

    def settings(self) -> Settings:
        """Return the settings in force now."""
        traits = self.traits(config=True)
        values = {name: getattr(self, name) for name in traits if name != "budget"}
        chosen = {name: v for name, v in values.items() if v != traits[name].default()}
        chosen["budgets"] = tuple(filter(None, (self.budget, self.own_budget)))
        if self.demo is None:
            return Settings.read(chosen)
        from nbcodex.simulator import Knobs

        kept = {name: value for name, value in chosen.items() if name in _MINE}
        if self.model in Knobs().models:  # of others the simulator knows nothing
            kept["model"] = self.model
        return replace(self.demo, **Settings.typed(kept))
