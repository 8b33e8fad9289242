"""Computes what an answer costs, by the tables of genai-prices, and estimates tokens. Offline.

Prices hold only where they are charged: at OpenAI and Azure, not at another server that offers a
model of the same name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Literal
from urllib.parse import urlsplit

from nbcodex.models import Rates, Request, Turn, Usage

_RATE_TOKENS = 1_000  # a token's price is computed from the price of this many

# Tools that OpenAI charges for besides tokens (its price list), by the beginning of their `type`,
# such as ``web_search_call``. genai-prices has a price per call for two of them, under these names.
_TOOL_UNITS = {"web_search": "web_searches", "file_search": "storage_searches"}
IMAGE_TOOL = "image_generation"  # OpenAI's guide to image generation
_PAID_TOOLS = (*_TOOL_UNITS, IMAGE_TOOL, "code_interpreter", "computer", "shell")

_OPENAI_HOST = "api.openai.com"  # and regional ones such as eu.api.openai.com
_AZURE_HOSTS = (".openai.azure.com", ".services.ai.azure.com", ".cognitiveservices.azure.com")

# Tokens per character with the o200k vocabulary: of ASCII (English prose and code), of other
# alphabets, of Chinese, Japanese, Korean and emoji. They err by some 15 %; the limiter learns the
# ratio to what the server charges. tiktoken is more exact, but downloads its tables.
ASCII_TOKENS, OTHER_TOKENS, WIDE_TOKENS = 1 / 4, 1 / 2.5, 0.9
_ROUND_UP = 0.49  # tokens that are added before rounding, so that a part of a token counts as one
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00010000-\U0010ffff]+")

# Tokens that frame each message, and that open the answer (OpenAI's cookbook on tiktoken).
MESSAGE_TOKENS, ANSWER_TOKENS = 4, 3

BATCH_TIER = "batch"  # `Usage.service_tier` of what went through the Batch API
_BATCH_PRICE_FACTOR = 0.5  # where the tables have no batch price (OpenAI's price list)

IMAGE_TOKENS = 765  # of a picture of a megapixel (OpenAI's guide "Images and vision")

_loaded = threading.Event()
_loader: threading.Thread | None = None


def known_provider(base_url: str) -> Literal["openai", "azure"] | None:
    """Return ``openai`` or ``azure``, or None for a server without known prices."""
    hostname = _hostname(base_url).rstrip(".")
    if f".{hostname}".endswith(f".{_OPENAI_HOST}"):
        return "openai"
    return "azure" if hostname.endswith(_AZURE_HOSTS) else None


def is_local_server(base_url: str) -> bool:
    """Return whether a server runs on this machine, where answers are free."""
    hostname = _hostname(base_url)
    # RFC 6761: every name under .localhost is this machine.
    if hostname == "localhost" or hostname.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False


def _hostname(base_url: str) -> str:
    try:
        return urlsplit(base_url).hostname or ""
    except ValueError:
        return ""


def requested_tier(request: Request) -> str | None:
    """Return the service tier that a request names, by whose price its cost is estimated."""
    tier = request.params.get("service_tier")
    return tier if isinstance(tier, str) else None


def paid_tool(item_type: object) -> str | None:
    """Return the name of the paid tool that the `type` of a tool or of its call belongs to."""
    return next((name for name in _PAID_TOOLS if str(item_type).startswith(name)), None)


def paid_tools(request: Request, model: str | None) -> tuple[str, ...]:
    """Return the paid tools that a request allows its model to call, each once."""
    tools = request.params.get("tools")
    listed = tools if isinstance(tools, list | tuple) else ()
    given = [tool.get("type") for tool in listed if isinstance(tool, Mapping)]
    # Models with ``-search-`` in their name search before each answer (OpenAI's "Web search").
    if "web_search_options" in request.params or "-search-" in (model or ""):
        given.append("web_search")
    return tuple(dict.fromkeys(filter(None, map(paid_tool, given))))


def load_prices() -> None:
    """Import the tables, which takes 0.16 s: for a thread, while an answer is being generated."""
    with contextlib.suppress(Exception):
        import genai_prices  # noqa: F401

        _loaded.set()


def start_loading(base_url: str) -> None:
    """Start to load the tables in a thread, unless the server's prices are in none of them."""
    global _loader
    if known_provider(base_url) and not (_loaded.is_set() or (_loader and _loader.is_alive())):
        _loader = threading.Thread(target=load_prices, daemon=True)
        _loader.start()


def context_window(model: str | None) -> int | None:
    """Return the tokens of a model's context window, or None where it is not known."""
    try:
        from genai_prices import data_snapshot

        find = data_snapshot.get_snapshot().find_provider_model
        _, info = find(model or "", provider=None, provider_id="openai", provider_api_url=None)
    except Exception:
        return None
    return info.context_window or None


def token_rates(model: str | None, base_url: str, service_tier: str | None = None) -> Rates | None:
    """Return what a token costs; None where no price is known, or the tables are not loaded."""
    return _token_rates(model, base_url, service_tier) if _loaded.is_set() else None


def is_price_unknown(model: str | None, base_url: str) -> bool:
    """Return whether it is certain that no price is known."""
    has_prices = known_provider(base_url) is not None
    return not has_prices or (_loaded.is_set() and _token_rates(model, base_url) is None)


@cache
def _token_rates(model: str | None, base_url: str, service_tier: str | None = None) -> Rates | None:
    usage = partial(Usage, service_tier=service_tier)
    of_input = cost(usage(input_tokens=_RATE_TOKENS, output_tokens=0), model, base_url)
    of_output = cost(usage(input_tokens=0, output_tokens=_RATE_TOKENS), model, base_url)
    if of_input is None or of_output is None:
        return None
    return Rates(input=of_input / _RATE_TOKENS, output=of_output / _RATE_TOKENS)


def cost(usage: Usage, model: str | None, base_url: str) -> float | None:
    """Return US dollars for a request that `model` answered; None if unknown, 0 only if stated."""
    provider = known_provider(base_url)
    if provider is None:
        return usage.stated_cost  # the provider's own figure (OpenRouter, Perplexity)
    if not model or usage.input_tokens is None or usage.output_tokens is None:
        return None
    try:
        import genai_prices

        tokens = genai_prices.Usage(
            input_tokens=usage.input_tokens,
            cache_read_tokens=usage.cached_tokens or 0,
            cache_write_tokens=usage.cache_written_tokens or 0,
            output_tokens=usage.output_tokens,
            input_audio_tokens=usage.input_audio_tokens or 0,
            output_audio_tokens=usage.output_audio_tokens or 0,
        )
        is_batch = usage.service_tier == BATCH_TIER
        tier = {"processing" if is_batch else "service_tier": usage.service_tier or "default"}
        price = genai_prices.calc_price(tokens, model, provider_id=provider, price_context=tier)
        has_tier = any(tier == variant.when for variant in price.model.price_variants or ())
        factor = _BATCH_PRICE_FACTOR if is_batch and not has_tier else 1.0
        calls = [_call_price(tool, model, provider) for tool in usage.hosted_tool_calls]
        return float(price.total_price) * factor + sum(filter(None, calls)) or None
    except Exception:
        # An unknown model, implausible figures or a broken table must not cost an answer.
        return None


def unpriced_parts(usage: Usage, model: str | None, base_url: str) -> tuple[str, ...]:
    """Return what `cost` cannot count: paid tools, audio, a regional surcharge; sorted."""
    provider = known_provider(base_url)
    if provider is None:  # another provider's own figure includes all of it
        return ()
    missing = [t for t in {*usage.hosted_tool_calls} if not _call_price(t, model, provider)]
    # Where a model has no price for audio, the tables count it as text.
    of_text = replace(usage, input_audio_tokens=None, output_audio_tokens=None)
    if of_text != usage and cost(of_text, model, base_url) == cost(usage, model, base_url):
        missing.append("audio")
    # Newer models cost 10 % more at regional hosts (OpenAI's price list); genai-prices lacks that.
    if provider == "openai" and _hostname(base_url) != _OPENAI_HOST:
        missing.append("the regional surcharge")
    return tuple(sorted(missing))


@cache
def _call_price(tool: str, model: str | None, provider: str) -> float | None:
    """Return US dollars for one call of a tool, or None where the tables have no price."""
    try:
        import genai_prices

        call = genai_prices.Usage(**{_TOOL_UNITS[tool]: 1})
        price = genai_prices.calc_price(call, model or "", provider_id=provider)
    except Exception:
        return None
    return float(price.total_price) or None


def estimate_text_tokens(text: str) -> int:
    """Return about how many tokens `text` has."""
    narrow = len(text.encode("ascii", "ignore"))
    wide = 0 if text.isascii() else sum(map(len, _WIDE.findall(text)))
    other = len(text) - narrow - wide
    return round(narrow * ASCII_TOKENS + other * OTHER_TOKENS + wide * WIDE_TOKENS + _ROUND_UP)


def estimate_turn_tokens(turn: Turn) -> int:
    """Return about how many input tokens an earlier turn has, with its pictures and reasoning."""
    # The reasoning of Chat Completions is sent only to a server that demands it.
    items = [dict(item) for item in turn.carried if "reasoning_content" not in item]
    carried = sum(estimate_text_tokens(json.dumps(item, default=str)) for item in items)
    texts = estimate_text_tokens(turn.prompt) + estimate_text_tokens(turn.answer)
    return texts + 2 * MESSAGE_TOKENS + carried + IMAGE_TOKENS * len(turn.images)


def estimate_request_tokens(request: Request) -> int:
    """Return about how many input tokens a request has, pictures and earlier turns included."""
    total = estimate_text_tokens(request.prompt) + MESSAGE_TOKENS + ANSWER_TOKENS
    total += IMAGE_TOKENS * len(request.images) + sum(map(estimate_turn_tokens, request.turns))
    if request.system:
        total += estimate_text_tokens(request.system) + MESSAGE_TOKENS
    # The schema is a part of the input, and so are the tools in the params.
    for part in (request.schema and request.schema.definition, request.params):
        total += estimate_text_tokens(json.dumps(dict(part), default=str)) if part else 0
    return total
