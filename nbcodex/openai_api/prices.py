"""What an answer costs and a model can hold, by the tables of genai-prices. Offline.

Prices hold only where they are charged: at OpenAI and Azure, not at whoever else serves a model of
the same name.
"""

from __future__ import annotations

import contextlib
import threading
from functools import cache
from typing import Literal
from urllib.parse import urlsplit

from nbcodex.models import Rates, Usage

_MANY = 1_000
"""Tokens of which one's price is taken."""

_OPENAI = ("api.openai.com", ".api.openai.com")
_AZURE = (".openai.azure.com", ".services.ai.azure.com", ".cognitiveservices.azure.com")


def seller(base_url: str) -> Literal["openai", "azure"] | None:
    """Return ``openai`` or ``azure``, or None for a server whose prices nobody keeps."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return None
    if host == _OPENAI[0] or host.endswith(_OPENAI[1]):
        return "openai"
    return "azure" if host.endswith(_AZURE) else None


def context(model: str | None) -> int | None:
    """Return the tokens of a model's context window; None where nobody knows."""
    if model is None:
        return None
    try:
        from genai_prices import data_snapshot

        tables = data_snapshot.get_snapshot()
        _, known = tables.find_provider_model(model, None, "openai", None)
    except Exception:
        return None
    return known.context_window or None


def load() -> None:
    """Import the tables, which takes 0.16 s: for a thread, while an answer is under way."""
    with contextlib.suppress(Exception):
        import genai_prices  # noqa: F401

        _loaded.set()


_loaded = threading.Event()


def rates(model: str | None, base_url: str) -> Rates | None:
    """Return what a token costs, at once; None where nobody knows, or the tables are not loaded."""
    return _rates(model, base_url) if _loaded.is_set() else None


def are_unknown(model: str | None, base_url: str) -> bool:
    """Return whether it is sure that no price is known."""
    return seller(base_url) is None or (_loaded.is_set() and _rates(model, base_url) is None)


@cache
def _rates(model: str | None, base_url: str) -> Rates | None:
    of_input = expected(_MANY, 0, model=model, base_url=base_url)
    of_output = expected(0, _MANY, model=model, base_url=base_url)
    if of_input is None or of_output is None:
        return None
    return Rates(input=of_input / _MANY, output=of_output / _MANY)


def may_be_free(base_url: str) -> bool:
    """Return whether a server is this machine's own, where nobody sends a bill."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return False
    return host == "localhost" or host == "::1" or host.startswith("127.")


def expected(
    input_tokens: int, output_tokens: int, *, model: str | None, base_url: str
) -> float | None:
    """Return US dollars for so many tokens, or None where no price is known."""
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return cost(usage, model, base_url)


def cost(usage: Usage, model: str | None, base_url: str) -> float | None:
    """Return US dollars, or None where no price is known; never 0, never an error.

    Parameters
    ----------
    usage : Usage
        Of one request. If it is estimated, so is the cost.
    model : str or None
        The model that answered, in the server's words.
    base_url : str
        Where it answered.
    """
    provider = seller(base_url)
    if not (provider and model) or usage.input_tokens is None or usage.output_tokens is None:
        return None
    try:
        import genai_prices

        tokens = genai_prices.Usage(
            input_tokens=usage.input_tokens,
            cache_read_tokens=usage.cached_tokens or 0,
            output_tokens=usage.output_tokens,
        )
        price = genai_prices.calc_price(tokens, model, provider_id=provider)
        return float(price.total_price) or None
    except Exception:
        # A model that is not in the table, figures that make no sense, a table that is broken:
        # an answer is never lost over its price.
        return None
