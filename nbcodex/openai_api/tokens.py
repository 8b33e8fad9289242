"""Estimates of tokens from characters, without the tokenizer's tables (which are downloaded).

English prose and code take about four characters a token with the o200k vocabulary, other alphabets
about two and a half, Chinese, Japanese and Korean about one. Good to some 15%; the pacing fits the
rest to what the server charges.
"""

from __future__ import annotations

import json
import re

from nbcodex.models import Request, Turn

ASCII, OTHER, WIDE = 1 / 4, 1 / 2.5, 0.9
"""Tokens per character: of ASCII, of other alphabets, of CJK and emoji."""

MESSAGE, ANSWER = 4, 3
"""Tokens that frame each message, and that open the answer (OpenAI's cookbook)."""

IMAGE = 765
"""Tokens of a picture of a megapixel (OpenAI's guide to vision); what it is not is fitted."""

_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00010000-\U0010ffff]+")


def of_text(text: str) -> int:
    """Return about how many tokens `text` has."""
    narrow = len(text.encode("ascii", "ignore"))
    if narrow == len(text):
        return round(narrow * ASCII + 0.49)
    wide = sum(map(len, _WIDE.findall(text)))
    return round(narrow * ASCII + (len(text) - narrow - wide) * OTHER + wide * WIDE + 0.49)


def of_turn(turn: Turn) -> int:
    """Return about how many input tokens an earlier turn has, with its pictures and reasoning."""
    carried = sum(of_text(json.dumps(dict(item), default=str)) for item in turn.carried)
    said = of_text(turn.prompt) + of_text(turn.answer) + 2 * MESSAGE
    return said + carried + IMAGE * len(turn.images)


def of_request(request: Request) -> int:
    """Return about how many input tokens a request has, pictures and earlier turns included."""
    total = of_text(request.prompt) + MESSAGE + ANSWER + IMAGE * len(request.images)
    total += sum(map(of_turn, request.turns))
    if request.schema:
        total += of_text(json.dumps(dict(request.schema.definition), default=str))
    if request.system:
        total += of_text(request.system) + MESSAGE
    if request.params:
        # Tools and schemas are a part of the input.
        total += of_text(json.dumps(dict(request.params), default=str))
    return total
