"""What the options of a cell say about the shape of its answer. Must not know how it is shown."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from IPython.core.error import UsageError

from nbcodex.errors import ConfigurationError
from nbcodex.models import Schema
from nbcodex.openai_api import request_body
from nbcodex.rendering.formats import INSTRUCTIONS, Format
from nbcodex.requests.structured_output import ANY_JSON, declare

_INSERT = "`%codex insert` puts it into a cell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a request is to be put so that its answer can be shown as it was asked for.

    Parameters
    ----------
    form : Format
        What the answer stays as.
    system, params, api, schema
        As `build_request` takes them.
    notes : tuple of str
        What is said beside the figures.
    """

    form: Format
    system: str | None
    params: Mapping[str, Any] | None
    api: str | None
    schema: Schema | None
    notes: tuple[str, ...] = ()


def read(chosen: Namespace, variables: Mapping[str, Any]) -> Wish:
    """Return what a cell's options ask for.

    Raises
    ------
    UsageError, ConfigurationError
        If they contradict each other, or name no schema.
    """
    schema = _schema(chosen.schema, variables) if chosen.schema else None
    named = {"md": "markdown"}.get(chosen.format, chosen.format)
    form: Format = named or ("json" if schema else "markdown")
    if schema and form not in {"json", "markdown", "text"}:
        raise UsageError(f"%%codex: --schema makes JSON, not {form}: leave -f {form} out")
    params, api = chosen.params, chosen.api
    if form == "image":
        if api == "chat":
            raise UsageError("%%codex: -f image needs the Responses API: leave --api chat out")
        params, api = {**request_body.image_generation_params(), **(params or {})}, "responses"
    return Wish(
        form=form,
        system=_system(chosen.system, form if schema is None else ""),
        params=params,
        api=api,
        schema=schema or (ANY_JSON if form == "json" else None),
        notes=(_INSERT,) if form == "code" and chosen.background else (),
    )


def _schema(name: str, variables: Mapping[str, Any]) -> Schema | None:
    if name not in variables:
        raise ConfigurationError(
            f"--schema {name}: there is no such variable.",
            advice="Define a pydantic class, or a dict with a JSON schema, in a cell above.",
        )
    return declare(variables[name])


def _system(said: str | None, form: str) -> str | None:
    told = "\n\n".join(filter(None, (said, INSTRUCTIONS.get(form))))
    return told or None
