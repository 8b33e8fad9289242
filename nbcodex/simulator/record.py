"""What the server saw: one record for each request, to assert on what was asked and paid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request, and what became of it.

    Parameters
    ----------
    number : int
        Counted from 1.
    at : float
        The clock's instant at which it came.
    method, path, host : str
        What was asked of whom.
    key : str
        A name for the key it showed (``key-1`` is the first one ever shown); never the key.
    api, model, prompt, stream, background
        What it asked for; `prompt` is what the user said last.
    body : mapping
        The body, as JSON.
    status : int
        HTTP status; 0 if the connection ended without one.
    fault : str
        Which fault it met.
    response_id : str
        The id of the answer.
    input_tokens, output_tokens : int
        What the server counted.
    charged : int
        Tokens taken of the limit, and not given back.
    finished : bool
        Whether the whole answer was generated.
    """

    number: int
    at: float
    method: str
    path: str
    host: str
    key: str = ""
    api: str = ""
    model: str = ""
    prompt: str = ""
    stream: bool = False
    background: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    fault: str = ""
    response_id: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    charged: int = 0
    finished: bool = False
