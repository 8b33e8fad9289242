"""Keeps secrets out of what comes back: a hostile server may echo our key anywhere, piecemeal.

Pure. Knows secrets only as strings to be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "[secret]"

SHORTEST = 8
"""A shorter string occurs by chance, and nobody's real key is that short."""

_PLACEHOLDERS = frozenset(
    {"lm-studio", "not-needed", "not-used", "no-key-required", "sk-no-key-required", "anything"}
)
"""What people set where a local server wants some key: words, not secrets."""


def worth_hiding(secrets: Iterable[str]) -> list[str]:
    """Return the secrets that are neither placeholders nor too short to be one, longest first."""
    kept = {s for s in secrets if len(s) >= SHORTEST and s.lower() not in _PLACEHOLDERS}
    return sorted(kept, key=len, reverse=True)


class Redactor:
    """Replaces secrets in a text that arrives in pieces.

    Parameters
    ----------
    secrets : iterable of str
        What must not be seen.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = worth_hiding(secrets)
        # A longer secret stands first, so that it wins over one that it begins with.
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
        """Return what is safe to show; a tail that may begin a secret is held back."""
        text = self._held + text
        cut = self._doubtful(text)
        self._held = text[cut:]
        return self.clean(text[:cut])

    def flush(self) -> str:
        """Return what was held back; the text has ended."""
        text, self._held = self._held, ""
        return self.clean(text)

    def _doubtful(self, text: str) -> int:
        """Return where the part begins on which the next piece may still decide."""
        cut = min((_begun(secret, text) for secret in self._secrets), default=len(text))
        if cut < len(text):
            for match in self._pattern.finditer(text):
                if match.start() < cut < match.end():
                    return match.start()
        return cut


def _begun(secret: str, text: str) -> int:
    """Return where the end of `text` begins to be `secret`; its length if it does not."""
    at = text.find(secret[0], max(0, len(text) - len(secret) + 1))
    while at >= 0 and not secret.startswith(text[at:]):
        at = text.find(secret[0], at + 1)
    return len(text) if at < 0 else at
