"""Secrets that a hostile server echoes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.openai_api.redaction import MASK, Redactor

KEY = "sk-abc-sk-abcd-0123"
OTHER = "sk-abc-sk-abcd-0123-and-more"


def shown(secrets: list[str], pieces: list[str]) -> str:
    redactor = Redactor(secrets)
    return "".join(map(redactor.feed, pieces)) + redactor.flush()


@pytest.mark.parametrize("size", range(1, 24))
def test_a_secret_in_pieces_is_replaced(size: int) -> None:
    """However a key is cut into deltas, it is not shown, and the text around it is."""
    text = f"before {KEY} between {KEY}{KEY} after"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert shown([KEY], pieces) == text.replace(KEY, MASK)


def test_only_a_possible_beginning_is_held_back() -> None:
    """Text that cannot become a secret is shown at once."""
    redactor = Redactor([KEY])
    assert redactor.feed("Hello, a") == "Hello, a"
    assert redactor.feed(" k: sk-a") == " k: "
    assert redactor.feed("nd so on") == "sk-and so on"


def test_a_secret_that_begins_another() -> None:
    """Of two secrets that begin alike, no part of the longer stays behind."""
    assert shown([KEY, OTHER], [KEY, OTHER[len(KEY) :]]) == MASK
    assert shown([KEY, OTHER], [KEY, " end"]) == f"{MASK} end"


@pytest.mark.parametrize("word", ["none", "EMPTY", "ollama", "lm-studio", "not-needed", ""])
def test_placeholders_are_no_secrets(word: str) -> None:
    """What people set for a server without keys is an ordinary word of answers."""
    assert shown([word], [f"The word {word}."]) == f"The word {word}."


@given(
    st.lists(st.sampled_from(["ab", "a", "b", "ba", " ", "abababab", "babababa"])),
    st.integers(1, 4),
)
def test_no_secret_comes_through(parts: list[str], size: int) -> None:
    """Overlapping, self-similar secrets in any pieces never come out whole."""
    secrets = ["abababab", "babababa"]
    text = "".join(parts)
    seen = shown(secrets, [text[i : i + size] for i in range(0, len(text), size)])
    assert not any(s in seen for s in secrets)


def test_a_redactor_does_not_show_its_secrets() -> None:
    """Its repr is safe to log."""
    assert KEY not in repr(Redactor([KEY]))
