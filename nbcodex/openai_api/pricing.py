"""What an answer costs and a model can hold, by the tables of genai-prices. Offline.

Prices hold only where they are charged: at OpenAI and Azure, not at whoever else serves a model of
the same name.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from functools import cache
from typing import Literal
from urllib.parse import urlsplit

from nbcodex.models import Rates, Request, Turn, Usage

_MANY = 1_000
"""Tokens of which one's price is taken."""

_OPENAI = ("api.openai.com", ".api.openai.com")
_AZURE = (".openai.azure.com", ".services.ai.azure.com", ".cognitiveservices.azure.com")


def provider_of(base_url: str) -> Literal["openai", "azure"] | None:
    """Return ``openai`` or ``azure``, or None for a server whose prices nobody keeps."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return None
    if host == _OPENAI[0] or host.endswith(_OPENAI[1]):
        return "openai"
    return "azure" if host.endswith(_AZURE) else None


def context_window(model: str | None) -> int | None:
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


def load_prices() -> None:
    """Import the tables, which takes 0.16 s: for a thread, while an answer is under way."""
    with contextlib.suppress(Exception):
        import genai_prices  # noqa: F401

        _loaded.set()


_loaded = threading.Event()


def token_rates(model: str | None, base_url: str) -> Rates | None:
    """Return what a token costs, at once; None where nobody knows, or the tables are not loaded."""
    return _rates(model, base_url) if _loaded.is_set() else None


def is_price_unknown(model: str | None, base_url: str) -> bool:
    """Return whether it is sure that no price is known."""
    return provider_of(base_url) is None or (_loaded.is_set() and _rates(model, base_url) is None)


@cache
def _rates(model: str | None, base_url: str) -> Rates | None:
    of_input = estimate_cost(_MANY, 0, model=model, base_url=base_url)
    of_output = estimate_cost(0, _MANY, model=model, base_url=base_url)
    if of_input is None or of_output is None:
        return None
    return Rates(input=of_input / _MANY, output=of_output / _MANY)


def is_local_server(base_url: str) -> bool:
    """Return whether a server is this machine's own, where nobody sends a bill."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return False
    return host == "localhost" or host == "::1" or host.startswith("127.")


def estimate_cost(
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
    provider = provider_of(base_url)
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


# Estimates of tokens.

ASCII, OTHER, WIDE = 1 / 4, 1 / 2.5, 0.9
"""Tokens per character: of ASCII, of other alphabets, of CJK and emoji."""

MESSAGE, ANSWER = 4, 3
"""Tokens that frame each message, and that open the answer (OpenAI's cookbook)."""

IMAGE = 765
"""Tokens of a picture of a megapixel (OpenAI's guide to vision); what it is not is fitted."""

_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00010000-\U0010ffff]+")


def estimate_text_tokens(text: str) -> int:
    """Return about how many tokens `text` has."""
    narrow = len(text.encode("ascii", "ignore"))
    if narrow == len(text):
        return round(narrow * ASCII + 0.49)
    wide = sum(map(len, _WIDE.findall(text)))
    return round(narrow * ASCII + (len(text) - narrow - wide) * OTHER + wide * WIDE + 0.49)


def estimate_turn_tokens(turn: Turn) -> int:
    """Return about how many input tokens an earlier turn has, with its pictures and reasoning."""
    carried = sum(
        estimate_text_tokens(json.dumps(dict(item), default=str)) for item in turn.carried
    )
    said = estimate_text_tokens(turn.prompt) + estimate_text_tokens(turn.answer) + 2 * MESSAGE
    return said + carried + IMAGE * len(turn.images)


def estimate_request_tokens(request: Request) -> int:
    """Return about how many input tokens a request has, pictures and earlier turns included."""
    total = estimate_text_tokens(request.prompt) + MESSAGE + ANSWER + IMAGE * len(request.images)
    total += sum(map(estimate_turn_tokens, request.turns))
    if request.schema:
        total += estimate_text_tokens(json.dumps(dict(request.schema.definition), default=str))
    if request.system:
        total += estimate_text_tokens(request.system) + MESSAGE
    if request.params:
        # Tools and schemas are a part of the input.
        total += estimate_text_tokens(json.dumps(dict(request.params), default=str))
    return total
