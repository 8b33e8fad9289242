"""Removes secrets from what a server sends: it may echo our key anywhere, split over many chunks.

Pure. Knows secrets only as strings to be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "[secret]"
MIN_SECRET_CHARS = 8  # a shorter string occurs by chance, and no provider's keys are that short

# What people set where a local server requires some key: words that answers contain anyway.
_PLACEHOLDERS = frozenset(
    {"lm-studio", "not-needed", "not-used", "no-key-required", "sk-no-key-required", "anything"}
)


def effective_secrets(secrets: Iterable[str]) -> list[str]:
    """Return the secrets that are neither placeholders nor too short to be one, longest first."""
    kept = {s for s in secrets if len(s) >= MIN_SECRET_CHARS and s.lower() not in _PLACEHOLDERS}
    return sorted(kept, key=len, reverse=True)


class Redactor:
    """Replaces secrets in a text that arrives in chunks.

    Parameters
    ----------
    secrets : iterable of str
        What must not be shown.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = effective_secrets(secrets)
        # A longer secret stands first, so that it wins over one that is its prefix.
        self._pattern = re.compile("|".join(map(re.escape, self._secrets)) or r"(?!)")
        self._held = ""

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._secrets)} secrets>"

    @property
    def holds(self) -> bool:
        """Whether a tail is held back."""
        return bool(self._held)

    def clean(self, text: str) -> str:
        """Return a whole text without the secrets."""
        return self._pattern.sub(MASK, text)

    def feed(self, text: str) -> str:
        """Return what can be shown; a tail that may be the beginning of a secret is held back."""
        text = self._held + text
        cut = self._undecided_from(text)
        self._held = text[cut:]
        return self.clean(text[:cut])

    def flush(self) -> str:
        """Return what was held back; the text has ended."""
        text, self._held = self._held, ""
        return self.clean(text)

    def _undecided_from(self, text: str) -> int:
        """Return where the part begins that depends on the next chunk."""
        cut = min((_partial_match(secret, text) for secret in self._secrets), default=len(text))
        if cut < len(text):
            # A complete match that reaches over the cut is held back whole, else its first half
            # would be shown.
            for match in self._pattern.finditer(text):
                if match.start() < cut < match.end():
                    return match.start()
        return cut


def _partial_match(secret: str, text: str) -> int:
    at = text.find(secret[0], max(0, len(text) - len(secret) + 1))
    while at >= 0 and not secret.startswith(text[at:]):
        at = text.find(secret[0], at + 1)
    return len(text) if at < 0 else at
