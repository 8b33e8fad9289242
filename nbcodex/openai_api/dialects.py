"""Which API a server speaks, and which parameters it does not take: asked once, then remembered.

"Compatible" means something else everywhere. Sends nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nbcodex.models import Request
from nbcodex.openai_api import codes, request_body
from nbcodex.openai_api.endpoints import Endpoint
from nbcodex.settings import Settings

Spoken = Literal["responses", "chat"]

_NO_SUCH_CALL = {404, 405, 501}
_REJECTED = {400, 422}
_DENIED = {*_REJECTED, 403}
_LESSONS = 3
"""How often one request is put in other words; each is refused before it costs a token."""


@dataclass(slots=True)
class Question:
    """A request in the words of one API.

    Parameters
    ----------
    api : {"responses", "chat"}
        Which one.
    probing : bool
        Whether the server may turn out to speak only the other.
    avoid : frozenset of str
        Parameters that the server does not take.
    durable : bool
        Whether the server is asked to keep the answer.
    """

    request: Request
    endpoint: Endpoint
    model: str
    api: Spoken
    probing: bool = False
    avoid: frozenset[str] = frozenset()
    lessons: int = 0
    durable: bool = False

    @property
    def body(self) -> request_body.Body:
        """The body to send."""
        kind, avoid = self.endpoint.kind, self.avoid
        if self.api == "chat":
            return request_body.chat_body(self.request, model=self.model, kind=kind, avoid=avoid)
        return request_body.responses_body(
            self.request, model=self.model, kind=kind, avoid=avoid, durable=self.durable
        )

    @property
    def in_one_piece(self) -> bool:
        """Whether the answer is not streamed, as the server would refuse that."""
        return "stream" in self.avoid

    @property
    def in_words(self) -> bool:
        """Whether the schema is told in words, for want of a mode for it."""
        mode = "response_format" if self.api == "chat" else "text"
        return bool(self.request.schema and self.request.schema.definition) and mode in self.avoid

    def rephrase(self, error: Exception) -> bool:
        """Put the request in words that were not refused; return whether there are any."""
        status = getattr(error, "status_code", None)
        no_call = status in _NO_SUCH_CALL
        if no_call and str(getattr(error, "code", "")).lower() in codes.MODEL:
            return False
        if self.probing and self.api == "responses" and no_call:
            self.api, self.durable = "chat", False
            return True
        told = f"{getattr(error, 'param', '')} {getattr(error, 'body', '')!s:.4000}"
        if self.durable and (
            no_call or (status in _DENIED and request_body.is_about_keeping(told))
        ):
            self.durable = False
            return True
        if status not in _REJECTED or self.lessons >= _LESSONS:
            return False
        self.lessons += 1
        name = request_body.objection(told, self.request, self.body)
        if name is None:
            return False
        self.avoid |= {name}
        return True


class Dialects:
    """What the servers of this process have taught about themselves."""

    def __init__(self) -> None:
        self._apis: dict[str, Spoken] = {}
        self._avoid: dict[tuple[str, str, str], frozenset[str]] = {}
        self._forgetful: set[tuple[str, str, str]] = set()

    def question(
        self, request: Request, settings: Settings, endpoint: Endpoint, model: str
    ) -> Question:
        """Return a request in the words that its server is known, or thought, to take."""
        asked = settings.api if request.api == "auto" else request.api
        api: Spoken = self._apis.get(endpoint.base_url, "responses") if asked == "auto" else asked
        unknown = asked == "auto" and endpoint.base_url not in self._apis
        return Question(
            _own(request, endpoint, model),
            endpoint,
            model,
            api,
            probing=unknown and endpoint.kind != "openai",
            avoid=self._avoid.get((endpoint.base_url, api, model), frozenset()),
            durable=request.durable
            and api == "responses"
            and (endpoint.base_url, endpoint.scope, model) not in self._forgetful,
        )

    def detected_api(self, base_url: str) -> Spoken | None:
        """Return the API that a server has turned out to speak."""
        return self._apis.get(base_url)

    def forgo(self, question: Question) -> bool:
        """Remember that an account cannot have a model's answers kept; return whether it is new."""
        place = question.endpoint.base_url, question.endpoint.scope, question.model
        is_new = place not in self._forgetful
        self._forgetful.add(place)
        return is_new

    def learn(self, question: Question) -> None:
        """Remember in which words a server took a request."""
        base_url = question.endpoint.base_url
        if question.probing:
            self._apis[base_url] = question.api
        if question.avoid:
            self._avoid[base_url, question.api, question.model] = question.avoid


def _own(request: Request, endpoint: Endpoint, model: str) -> Request:
    """Return a request without the reasoning of other models, or of other servers."""
    here = (model, endpoint.base_url)
    turns = tuple(
        turn
        if here == (turn.model or model, turn.base_url or endpoint.base_url)
        # Never sent to whoever did not encrypt it: it could not be read there, but be kept.
        else replace(turn, carried=())
        for turn in request.turns
    )
    return replace(request, turns=turns) if turns != request.turns else request
