"""Secrets that a hostile server echoes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.openai_api.answers import MASK, Redactor

KEY = "sk-abc-sk-abcd-0123"
OTHER = "sk-abc-sk-abcd-0123-and-more"


def shown(secrets: list[str], chunks: list[str]) -> str:
    redactor = Redactor(secrets)
    return "".join(map(redactor.feed, chunks)) + redactor.flush()


@pytest.mark.parametrize("size", range(1, 24))
def test_secret_split_over_deltas_is_replaced(size: int) -> None:
    text = f"before {KEY} between {KEY}{KEY} after"
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert shown([KEY], chunks) == text.replace(KEY, MASK)


def test_only_a_possible_prefix_is_held_back() -> None:
    redactor = Redactor([KEY])
    assert redactor.feed("Hello, a") == "Hello, a"
    assert redactor.feed(" k: sk-a") == " k: "
    assert redactor.feed("nd so on") == "sk-and so on"


def test_longer_of_two_secrets_with_one_prefix_is_replaced_whole() -> None:
    assert shown([KEY, OTHER], [KEY, OTHER[len(KEY) :]]) == MASK
    assert shown([KEY, OTHER], [KEY, " end"]) == f"{MASK} end"


@pytest.mark.parametrize("word", ["none", "EMPTY", "ollama", "lm-studio", "not-needed", ""])
def test_placeholder_keys_are_not_redacted(word: str) -> None:
    assert shown([word], [f"The word {word}."]) == f"The word {word}."


@given(
    st.lists(st.sampled_from(["ab", "a", "b", "ba", " ", "abababab", "babababa"])),
    st.integers(1, 4),
)
def test_overlapping_secrets_are_replaced_in_any_chunks(parts: list[str], size: int) -> None:
    secrets = ["abababab", "babababa"]
    text = "".join(parts)
    seen = shown(secrets, [text[i : i + size] for i in range(0, len(text), size)])
    assert not any(s in seen for s in secrets)


def test_repr_of_a_redactor_has_no_secrets() -> None:
    assert KEY not in repr(Redactor([KEY]))
