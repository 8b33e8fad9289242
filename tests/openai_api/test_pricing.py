"""Estimates of tokens, and prices."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from nbcodex.models import Image, Request, Schema, Turn, Usage
from nbcodex.openai_api import pricing
from nbcodex.openai_api.answers import Notice, read_usage
from tests.openai_api.scripted import (
    DONE,
    Script,
    Server,
    chunk,
    completed,
    delta,
    ending_of,
    event,
    play,
    settings,
)

OPENAI = "https://api.openai.com/v1"
AZURE = "https://me.openai.azure.com/openai/v1"


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0, 0),
        ("word", 1, 2),
        ("The quick brown fox jumps over the lazy dog. " * 100, 900, 1300),
        ("敏捷的棕色狐狸跳过了懒狗" * 100, 900, 1400),
        ("Быстрая коричневая лиса прыгает " * 100, 1000, 1700),
        ("\ud800", 0, 2),
    ],
)
def test_token_estimates_are_near_o200k(text: str, low: int, high: int) -> None:
    assert low <= pricing.estimate_text_tokens(text) <= high


def test_system_and_params_count_as_input() -> None:
    plain = pricing.estimate_request_tokens(Request(prompt="x" * 400))
    assert 100 <= plain <= 120
    assert (
        pricing.estimate_request_tokens(Request(prompt="x" * 400, system="y" * 400)) >= plain + 100
    )
    assert (
        pricing.estimate_request_tokens(Request(prompt="x" * 400, params={"a": "z" * 400}))
        >= plain + 100
    )


def test_cached_input_is_cheaper() -> None:
    full = pricing.cost(Usage(input_tokens=1000, output_tokens=100), "gpt-5", OPENAI)
    cached = pricing.cost(
        Usage(input_tokens=1000, cached_tokens=900, output_tokens=100), "gpt-5", OPENAI
    )
    assert full
    assert cached
    assert 0 < cached < full


@pytest.mark.parametrize(
    ("usage", "model", "base_url"),
    [
        (Usage(), "gpt-5", OPENAI),
        (Usage(input_tokens=1000), "gpt-5", OPENAI),
        (Usage(input_tokens=1, output_tokens=1), "no-such-model", OPENAI),
        (Usage(input_tokens=1, output_tokens=1), None, OPENAI),
        (Usage(input_tokens=1, output_tokens=1), "gpt-5", "http://localhost:11434/v1"),
        (Usage(input_tokens=1, output_tokens=1), "gpt-5", "https://evil.example/api.openai.com"),
        (Usage(input_tokens=1, output_tokens=1), "gpt-5", "https://[broken"),
        (Usage(input_tokens=1, cached_tokens=5, output_tokens=1), "gpt-5", OPENAI),
        (Usage(input_tokens=0, output_tokens=0), "gpt-5", OPENAI),
        (Usage(input_tokens=9, output_tokens=9), "phi-4-reasoning:free", AZURE),
    ],
)
def test_unknown_price_is_none(usage: Usage, model: str | None, base_url: str) -> None:
    assert pricing.cost(usage, model, base_url) is None


def test_azure_hosts_have_azure_prices() -> None:
    usage = Usage(input_tokens=1000, output_tokens=100)
    assert pricing.cost(usage, "gpt-4o", "https://me.openai.azure.com/openai/v1")


def test_importing_the_package_imports_neither_sdk_nor_prices() -> None:
    code = (
        "import sys, pkgutil, importlib, nbcodex.openai_api as w\n"
        "for m in pkgutil.iter_modules(w.__path__):\n"
        "    importlib.import_module('nbcodex.openai_api.' + m.name)\n"
        "print(sorted({'openai','httpx2','pydantic','genai_prices','anyio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_token_rates_are_unknown_until_prices_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "_loaded", threading.Event())
    assert pricing.token_rates("gpt-5", OPENAI) is None
    pricing.load_prices()
    rates = pricing.token_rates("gpt-5", OPENAI)
    usage = Usage(input_tokens=1000, output_tokens=100)
    assert rates is not None
    assert rates.cost(usage) == pytest.approx(pricing.cost(usage, "gpt-5", OPENAI))


@pytest.mark.parametrize(("model", "base_url"), [("gpt-5", "http://127.0.0.1/v1"), ("x", OPENAI)])
def test_unknown_model_or_server_has_no_rates(model: str, base_url: str) -> None:
    pricing.load_prices()
    assert pricing.token_rates(model, base_url) is None


@pytest.mark.parametrize(
    ("figures", "cached", "written"),
    [
        ({"input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 4}}, 3, 4),
        ({"prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 4}}, 3, 4),
        ({"prompt_cache_hit_tokens": 3, "prompt_cache_miss_tokens": 7}, 3, None),
        ({"input_tokens_details": {"cache_write_tokens": -1}}, None, None),
        ({"cache_read_input_tokens": 3, "cache_creation_input_tokens": 4}, 3, 4),  # Anthropic
        ({"prompt_tokens_details": {"cached_tokens": None}, "cached_tokens": 3}, 3, None),
        # LiteLLM (#11789): 0 under one name, the figure under another.
        ({"prompt_tokens_details": {"cached_tokens": 0}, "cache_read_input_tokens": 3}, 3, None),
        ({"prompt_tokens_details": {"cached_tokens": 0}, "cached_tokens": 3}, 3, None),
        (
            {
                "cached_tokens": 0,
                "prompt_cache_hit_tokens": 3,
                "cache_write_tokens": 0,
                "cache_creation_input_tokens": 4,
            },
            3,
            4,
        ),
        ({"input_tokens_details": {"cached_tokens": 0}, "cache_read_input_tokens": 0}, 0, None),
    ],
)
def test_cache_reads_and_writes_are_in_the_usage(
    figures: dict[str, Any], cached: int | None, written: int | None
) -> None:
    usage = read_usage({"input_tokens": 10, "output_tokens": 5, **figures})
    assert (usage.cached_tokens, usage.cache_written_tokens) == (cached, written)


def test_cache_writes_cost_more_than_input() -> None:
    plain = Usage(input_tokens=100_000, output_tokens=0)
    written = replace(plain, cache_written_tokens=100_000)
    cost = pricing.cost(plain, "gpt-5.6-sol", OPENAI)
    assert cost
    assert pricing.cost(written, "gpt-5.6-sol", OPENAI) == pytest.approx(cost * 1.25)


@pytest.mark.parametrize(
    ("figures", "stated"),
    [
        ({"cost": 0.0123}, 0.0123),
        ({"cost": {"total_cost": 0.006}}, 0.006),
        ({"cost": 0}, 0.0),
        ({"cost": -1}, None),
        ({"cost": 1e15}, None),
        ({"cost": float("nan")}, None),
        ({"cost": "0.0123"}, 0.0123),
        ({"cost": "cheap"}, None),
        ({"cost": True}, None),
        ({"estimated_cost": 0.0000268}, 0.0000268),  # DeepInfra
        ({"cost_in_usd_ticks": 94_000_000}, 0.0094),  # xAI
        # OpenRouter with the user's own key (Zoo-Code #5144).
        ({"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.036}}, 0.036),
        ({"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 1}}, 1.001),
        ({"cost": 0.5, "cost_details": {"upstream_inference_cost": 0.4}}, 0.5),
    ],
)
def test_providers_own_cost_counts_where_prices_are_unknown(
    figures: dict[str, Any], stated: float | None
) -> None:
    usage = read_usage({"prompt_tokens": 10, "completion_tokens": 5, **figures})
    assert pricing.cost(usage, "any/model", "https://openrouter.ai/api/v1") == stated
    known = Usage(input_tokens=10, output_tokens=5)
    assert pricing.cost(usage, "gpt-5", OPENAI) == pricing.cost(known, "gpt-5", OPENAI)


@pytest.mark.parametrize(
    "figures",
    [
        {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 540},  # Gemini
        {
            "prompt_tokens": 30,
            "completion_tokens": 10,
            "total_tokens": 540,
            "completion_tokens_details": {"reasoning_tokens": 500},  # xAI
        },
        {"input_tokens": "30", "output_tokens": 510.0, "total_tokens": 100},
        {  # Perplexity, whose total lacks the reasoning (open-webui-cost-tracker#6)
            "prompt_tokens": 30,
            "completion_tokens": 10,
            "total_tokens": 40,
            "citation_tokens": 7299,
            "num_search_queries": 74,
            "reasoning_tokens": 500,
        },
        {
            "prompt_tokens": 30,
            "completion_tokens": 10,
            "total_tokens": 7339,
            "citation_tokens": 7299,
            "completion_tokens_details": {"reasoning_tokens": 500},
        },
    ],
)
def test_output_contains_the_reasoning(figures: dict[str, Any]) -> None:
    usage = read_usage(figures)
    assert (usage.input_tokens, usage.output_tokens) == (30, 510)
    assert usage.reasoning_tokens in (None, 500)


@pytest.mark.parametrize(
    "chunks",
    [
        [
            chunk("Hi"),
            chunk(finish="stop", x_groq={"usage": {"prompt_tokens": 7, "completion_tokens": 3}}),
        ],
        [
            chunk("Hi"),
            event(
                {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {},
                            "finish_reason": "stop",
                            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
                        }
                    ]
                }
            ),
        ],
        [
            chunk("Hi", usage={"prompt_tokens": 7, "completion_tokens": 1}),
            chunk(finish="stop"),
            chunk(usage={"completion_tokens": 3}),
        ],
        [
            chunk("Hi"),
            chunk(finish="stop", usage={"prompt_tokens": 7, "completion_tokens": 3}),
            chunk(usage={"prompt_tokens": 0, "completion_tokens": 0}),
        ],
        [
            chunk("Hi"),
            chunk(finish="stop", timings={"prompt_n": 5, "cache_n": 2, "predicted_n": 3}),
        ],
    ],
    ids=["Groq", "Moonshot", "in parts", "zeros at the end", "llama.cpp"],
)
def test_usage_is_read_where_the_server_puts_it(chunks: list[bytes]) -> None:
    body = b"".join(chunks) + DONE
    usage = ending_of(play(Server(Script([body])), chosen=settings(api="chat"))).usage
    assert (usage.input_tokens, usage.output_tokens) == (7, 3)


def test_stated_cost_of_zero_is_known() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "cost": 0}
    for parts in (
        [chunk("Hi", finish="stop"), chunk(usage=usage), DONE],
        [chunk("Hi", finish="stop", usage=usage), chunk(usage={"prompt_tokens": 0}), DONE],
    ):
        answer = ending_of(play(Server(Script(parts)), chosen=settings(api="chat")))
        assert pricing.cost(answer.usage, "m", "https://openrouter.ai/api/v1") == 0.0


@pytest.mark.parametrize(
    ("base_url", "details", "missing"),
    [
        (OPENAI, {}, ()),
        (OPENAI, {"completion_tokens_details": {"audio_tokens": 90}}, ("audio",)),
        (OPENAI, {"prompt_tokens_details": {"audio_tokens": 1}}, ("audio",)),
        ("https://eu.api.openai.com/v1", {}, ("the regional surcharge",)),
        ("https://us.api.openai.com/v1", {}, ("the regional surcharge",)),
        ("https://openrouter.ai/api/v1", {"completion_tokens_details": {"audio_tokens": 9}}, ()),
    ],
)
def test_what_has_no_price_makes_the_cost_a_lower_bound(
    base_url: str, details: dict[str, Any], missing: tuple[str, ...]
) -> None:
    usage = read_usage({"prompt_tokens": 100, "completion_tokens": 100, **details})
    assert pricing.unpriced_parts(usage, "gpt-5", base_url) == missing


def test_audio_has_its_own_price_where_the_tables_have_one() -> None:
    figures = {"prompt_tokens": 1000, "completion_tokens": 1000}
    details = {"audio_tokens": 1000}
    audio = read_usage(
        figures | {"prompt_tokens_details": details, "completion_tokens_details": details}
    )
    # gpt-audio: 32 and 64 dollars a million tokens of audio, against 2.5 and 10 of text.
    assert pricing.cost(audio, "gpt-audio", OPENAI) == pytest.approx(0.032 + 0.064)
    assert pricing.cost(read_usage(figures), "gpt-audio", OPENAI) == pytest.approx(0.0125)
    assert pricing.unpriced_parts(audio, "gpt-audio", OPENAI) == ()
    assert pricing.unpriced_parts(audio, "gpt-5", OPENAI) == ("audio",)
    assert pricing.unpriced_parts(audio, "unknown", OPENAI) == ("audio",)


@pytest.mark.parametrize(
    ("read", "is_cut"),
    [(4096, True), (11_000, True), (20_000, False), (None, False), (25_000, False)],
)
def test_prompt_that_the_server_has_cut_is_noted(read: int | None, is_cut: bool) -> None:
    usage = {} if read is None else {"usage": {"prompt_tokens": read, "completion_tokens": 3}}
    body = chunk("Hi", finish="stop", **usage) + DONE
    events = play(Server(Script([body])), chosen=settings(api="chat"), prompt="word " * 20_000)
    assert any("read only" in e.text for e in events if isinstance(e, Notice)) == is_cut


def test_pictures_and_schemas_that_a_server_does_not_count_are_not_a_cut_prompt() -> None:
    image = Image(b"\x89PNG\r\n\x1a\n")
    schema = Schema(name="pet", definition={"description": "word " * 20_000})
    for options in (
        {"images": (image,) * 20},
        {"turns": (Turn(prompt="a", answer="b", images=(image,) * 20),)},
        {"schema": schema},
        {"params": {"tools": [{"type": "function", "name": "x" * 50_000}]}},
    ):
        body = chunk("{}", finish="stop", usage={"prompt_tokens": 9, "completion_tokens": 3}) + DONE
        events = play(Server(Script([body])), chosen=settings(api="chat"), **options)
        assert not any(isinstance(each, Notice) for each in events)


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_cost_in_a_header_of_litellm_is_read(api: str) -> None:
    body = delta("Hi") + completed() if api == "responses" else chunk("Hi", finish="stop") + DONE
    headers = {"content-type": "text/event-stream", "x-litellm-response-cost": "0.0123"}
    answer = ending_of(play(Server(Script([body], 200, headers)), chosen=settings(api=api)))
    assert answer.usage.stated_cost == 0.0123


@pytest.mark.parametrize(("tier", "factor"), [("flex", 0.5), ("priority", 2), ("default", 1)])
def test_price_is_that_of_the_tier_that_was_used(tier: str, factor: float) -> None:
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    plain = pricing.cost(read_usage(usage), "gpt-5", OPENAI)
    assert plain
    assert pricing.cost(read_usage(usage, tier), "gpt-5", OPENAI) == pytest.approx(plain * factor)
    request = Request(prompt="?", params={"service_tier": tier})
    requested = read_usage(usage, pricing.requested_tier(request))
    assert pricing.cost(requested, "gpt-5", OPENAI) == pytest.approx(plain * factor)


@pytest.mark.parametrize("model", ["gpt-5", "gpt-4-0613"], ids=["in the tables", "by the rule"])
def test_batch_costs_half(model: str) -> None:
    usage = Usage(input_tokens=100_000, output_tokens=5_000)
    batch = replace(usage, service_tier=pricing.BATCH_TIER)
    plain = pricing.cost(usage, model, OPENAI)
    assert plain is not None
    assert pricing.cost(batch, model, OPENAI) == pytest.approx(plain / 2)


@pytest.mark.parametrize("tier", ["flex", "priority"])
def test_tier_is_read_from_answers_of_both_apis(tier: str) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    chat = chunk("hi", finish="stop", service_tier=tier) + chunk(usage=usage) + DONE
    responses = delta("hi") + completed(
        usage={"input_tokens": 9, "output_tokens": 3}, service_tier=tier
    )
    for api, body in (("chat", chat), ("responses", responses)):
        done = ending_of(play(Server(Script([body])), chosen=settings(api=api)))
        assert done.usage.service_tier == tier


@pytest.mark.parametrize(
    "figures",
    [
        {"input_tokens": 10, "output_tokens": 9 * 10**15},
        {"input_tokens": 9 * 10**15, "output_tokens": 9 * 10**15},
        {"prompt_tokens": 30_000_000, "completion_tokens": 5},
        {"prompt_tokens": -1, "completion_tokens": 10**40},
    ],
)
def test_implausible_token_counts_are_unknown(figures: dict[str, Any]) -> None:
    usage = read_usage(figures)
    assert all((count or 0) <= 10 for count in (usage.input_tokens, usage.output_tokens))
    assert None in (usage.input_tokens, usage.output_tokens)


@pytest.mark.parametrize(
    "tools", [None, 5, "web_search", [None, 7, {"type": 3}, {"type": "function"}, {}]]
)
def test_malformed_and_free_tools_are_not_paid(tools: object) -> None:
    assert pricing.paid_tools(Request(prompt="?", params={"tools": tools}), "gpt-5") == ()


def test_each_paid_tool_of_a_request_is_named_once() -> None:
    kinds = ["web_search_preview_2025_03_11", "web_search", "code_interpreter", "mcp"]
    request = Request(prompt="?", params={"tools": [{"type": kind} for kind in kinds]})
    assert pricing.paid_tools(request, None) == ("web_search", "code_interpreter")
