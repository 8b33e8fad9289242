"""Our costs beside two other price tables: chatlas's ``prices.json`` and LiteLLM's.

For each OpenAI model that all three know, the same usage is priced in several ways: plain, with
cached and with cache-written tokens, above the long-context threshold, and in the tiers flex,
priority and batch. Prints how many agree within 1 %, and each difference.

Run with ``python -m tests.benchmarks.prices [--tables FOLDER]``. The tables are taken from the
wheels that pip downloads (44 MB), or from a folder that holds these wheels.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nbcodex.models import Usage
from nbcodex.openai_api import pricing
from tests.benchmarks.table import table

OPENAI = "https://api.openai.com/v1"
FILES = {
    "chatlas": "chatlas/data/prices.json",
    "litellm": "litellm/model_prices_and_context_window_backup.json",
}
TOLERANCE = 0.01
# Why a table differs from genai-prices, by usage, beginning of the model's name, and table.
REASONS = {
    ("cached", "gpt-4o-search", ""): "OpenAI's list has no price for cached input of this model",
    ("cached", "gpt-5.4-pro", "chatlas"): "no price for cached input; LiteLLM agrees",
    ("cached", "gpt-5.5-pro", "chatlas"): "no price for cached input; LiteLLM agrees",
    ("long context", "gpt-5.6-cyber", ""): "genai-prices has no long-context price: a lower bound",
    ("priority", "gpt-5", "chatlas"): "chatlas's table is older; LiteLLM agrees",
}
MILLION = 1e6

PLAIN = Usage(input_tokens=100_000, output_tokens=5_000)
SCENES = {
    "plain": PLAIN,
    "cached": replace(PLAIN, cached_tokens=60_000),
    "cache-written": replace(PLAIN, cache_written_tokens=60_000),
    "long context": Usage(input_tokens=400_000, output_tokens=5_000),
    "flex": replace(PLAIN, service_tier="flex"),
    "priority": replace(PLAIN, service_tier="priority"),
    "batch": replace(PLAIN, service_tier="batch"),
}
Price = Callable[[str, Usage], float | None]


@dataclass(frozen=True)
class Rates:
    """US dollars for a token; None where a table does not state it."""

    input: float | None
    output: float | None
    cached: float | None = None
    written: float | None = None

    def cost(self, usage: Usage) -> float | None:
        """Return what a usage costs; None if a rate that it needs is missing."""
        cached, written = usage.cached_tokens or 0, usage.cache_written_tokens or 0
        plain = (usage.input_tokens or 0) - cached - written
        parts = [
            (plain, self.input),
            (cached, self.cached),
            (written, self.written),
            (usage.output_tokens or 0, self.output),
        ]
        total = 0.0
        for count, rate in parts:
            if count and rate is None:
                return None
            total += count * (rate or 0.0)
        return total


def chatlas_price(listed: dict[str, Any]) -> Price:
    """Return the price function of chatlas's table, which has a row for each model and variant."""
    rows = {
        (row["model"], row["variant"]): row for row in listed["data"] if row["provider"] == "OpenAI"
    }
    variants = {"flex": "flex", "priority": "priority", "batch": "batches", None: ""}

    def price(model: str, usage: Usage) -> float | None:
        variant = variants[usage.service_tier]
        if (usage.input_tokens or 0) > 272_000 and (model, "above_272k_tokens") in rows:
            variant = "above_272k_tokens"
        row = rows.get((model, variant), {})
        per_token = {name: row[name] / MILLION for name in row if name.endswith("put")}
        return Rates(
            per_token.get("input"), per_token.get("output"), per_token.get("cached_input")
        ).cost(usage)

    return price


def litellm_price(listed: dict[str, Any]) -> Price:
    """Return the price function of LiteLLM's table, which has members for tiers and thresholds."""
    suffixes = {"flex": "_flex", "priority": "_priority", "batch": "_batches", None: ""}

    def price(model: str, usage: Usage) -> float | None:
        row = listed.get(model, {})
        suffix = suffixes[usage.service_tier]
        above = "_above_272k_tokens"
        if (usage.input_tokens or 0) > 272_000 and f"input_cost_per_token{above}" in row:
            suffix = above
        names = ("input_cost_per_token", "output_cost_per_token")
        cached, written = "cache_read_input_token_cost", "cache_creation_input_token_cost"
        return Rates(*(row.get(name + suffix) for name in (*names, cached, written))).cost(usage)

    return price


def our_price(model: str, usage: Usage) -> float | None:
    """Return what nbcodex says."""
    return pricing.cost(usage, model, OPENAI)


def compare(others: dict[str, Price], models: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of the summary and of the differences."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    differences = []
    for scene, usage in SCENES.items():
        for model in models:
            ours = our_price(model, usage)
            for name, price in others.items():
                theirs = price(model, usage)
                if theirs is None:
                    outcome = "not stated"
                elif ours is None:
                    outcome = "unknown here"
                elif abs(ours - theirs) <= TOLERANCE * theirs:
                    outcome = "equal"
                else:
                    outcome = "different"
                counts[scene, name, outcome] += 1
                if outcome in {"different", "unknown here"}:
                    shown = "-" if ours is None else f"{ours:.4f}"
                    why = reason(scene, model, name)
                    differences.append([scene, model, name, shown, f"{theirs:.4f}", why])
    outcomes = ("equal", "different", "unknown here", "not stated")
    summary = [
        [scene, name, *(str(counts[scene, name, outcome]) for outcome in outcomes)]
        for scene in SCENES
        for name in others
    ]
    return summary, differences


def reason(scene: str, model: str, name: str) -> str:
    """Return why a price differs; empty if that is not known."""
    for (of_scene, start, of_table), why in REASONS.items():
        if scene == of_scene and model.startswith(start) and of_table in {"", name}:
            return why
    return ""


def read_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tables in the wheels of a folder."""
    tables = {}
    for name, member in FILES.items():
        (wheel,) = folder.glob(f"{name}-*.whl")
        print(f"- {wheel.name}")
        tables[name] = json.loads(zipfile.ZipFile(wheel).read(member))
    return tables


def main() -> int:
    """Print the comparison; return 1 if a price differs for no known reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.prices", description=__doc__)
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="where the wheels are")
    folder = parser.parse_args().tables
    with tempfile.TemporaryDirectory() as downloaded:
        if folder is None:
            folder = Path(downloaded)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *FILES]
            subprocess.run([*command, "-d", downloaded], check=True)
        tables = read_tables(folder)
    print(f"- genai-prices {metadata.version('genai-prices')}, used by nbcodex\n")
    pricing.load_prices()
    others = {
        "chatlas": chatlas_price(tables["chatlas"]),
        "litellm": litellm_price(tables["litellm"]),
    }
    models = [
        model
        for model, row in tables["litellm"].items()
        if row.get("litellm_provider") == "openai"
        and row.get("mode") in {"chat", "responses"}
        and not model.startswith(("ft:", "openai/"))
        and "audio" not in model
        and all(price(model, PLAIN) for price in (our_price, *others.values()))
    ]
    summary, differences = compare(others, models)
    print(f"{len(models)} models that all three know.\n")
    heads = ["usage", "table", "equal", "different", "unknown here", "not stated there"]
    print(table(heads, summary), end="\n\n")
    print(table(["usage", "model", "table", "here, $", "there, $", "reason"], differences))
    return not all(difference[-1] for difference in differences)


if __name__ == "__main__":
    sys.exit(main())
