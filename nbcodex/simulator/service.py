"""The simulated server without sockets: a request in; status, headers and a stream of bytes out.

Owns the accounts, the script of faults, the log and the background responses; knows the time only
by its clock.
"""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.simulator import headers
from nbcodex.simulator.admission import (
    Applicant,
    admit,
    broken_text,
    check_model,
    check_stream,
    refuse,
    style,
)
from nbcodex.simulator.answers import plan
from nbcodex.simulator.asked import Api, read, read_body
from nbcodex.simulator.background import Stored
from nbcodex.simulator.batches import Library
from nbcodex.simulator.buckets import Account
from nbcodex.simulator.chat import ChatWire
from nbcodex.simulator.control import control
from nbcodex.simulator.delivery import Body, Run, deliver, generate, once, until, whole
from nbcodex.simulator.faults import DELIVERY, Fault, read_fault
from nbcodex.simulator.generation import Making, encode
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.record import Seen
from nbcodex.simulator.refusals import Failure
from nbcodex.simulator.replies import Answer, answered, in_json, refused
from nbcodex.simulator.responses import ResponsesWire
from nbcodex.simulator.routes import Call, Route, key_of, route, unknown

PREFIX_TOKENS = 1_024
"""Tokens at the start of an input that the server's cache keeps."""


class Simulator:
    """A look-alike of OpenAI's API.

    Parameters
    ----------
    knobs : Knobs or None
        How it behaves.
    clock : Clock or None
        The time; None means the machine's.

    Attributes
    ----------
    log : list of Seen
        The requests seen, oldest first.
    """

    def __init__(self, knobs: Knobs | None = None, *, clock: Clock | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.clock: Clock = clock or BootClock()
        self.log: list[Seen] = []
        self._faults: deque[Fault | None] = deque()
        self._accounts: dict[tuple[str, str], Account] = {}
        self._stored: dict[str, Stored] = {}
        self._keys: dict[str, str] = {}
        self._prefixes: set[tuple[str, str, str]] = set()
        self._chance = random.Random(self.knobs.seed)  # noqa: S311 - chance, not secrecy
        # An id of one life of the server must mean nothing to the next.
        self._life = secrets.token_hex(8)
        self.library = Library(
            knobs=lambda: self.knobs,
            clock=self.clock,
            answering=self._answer_at_once,
            life=self._life,
        )

    def script(self, faults: Iterable[Fault | str | None]) -> None:
        """Let the next requests for an answer meet `faults`, one each; None: no fault."""
        self._faults.extend(read_fault(f) if isinstance(f, str) else f for f in faults)

    def change(self, **changes: Any) -> None:
        """Change knobs, limits included, from now on."""
        self.knobs = replace(self.knobs, **changes)
        for account in self._accounts.values():
            account.apply(self.knobs, self.clock.now())

    def account(self, key: str, model: str) -> Account:
        """Return the buckets of `model` and of the key named `key` (``key-1`` is the first)."""
        if (key, model) not in self._accounts:
            account = self._accounts[key, model] = Account()
            account.apply(self.knobs, self.clock.now())
        return self._accounts[key, model]

    @property
    def charged(self) -> int:
        """Tokens that all requests together were charged."""
        return sum(seen.charged for seen in self.log)

    async def answer(self, call: Call) -> Answer:
        """Return the server's response to `call`, at the moment of its headers.

        Raises
        ------
        Dropped
            Where the connection shall end without a response.
        """
        seen = Seen(
            number=len(self.log) + 1,
            at=self.clock.now(),
            method=call.method,
            path=call.path,
            host=call.headers.get("host", ""),
        )
        try:
            answer = await self._answer(call, seen)
        except Failure as failure:
            answer = refused(failure, self._common(seen))
        seen.status = answer.status
        return answer

    async def _answer(self, call: Call, seen: Seen) -> Answer:
        where = route(call)
        if where.door == "control":
            told = control(self, where.id, query=where.query, body=call.body)
            return in_json(told, self._common(seen))
        self.log.append(seen)
        match where.door:
            case "models":
                self._recognize(call, where, seen)
                return in_json(self._models(), self._common(seen))
            case "retrieve" | "cancel":
                return self._pick_up(call, where, seen)
            case "library":
                return self._lend(call, where, seen)
            case api:
                return await self._ask(call, where, api, seen)

    def _recognize(self, call: Call, where: Route, seen: Seen) -> None:
        """Note whose key `call` shows."""
        key = key_of(call, where.azure, self.knobs)
        seen.key = self._keys.setdefault(key, f"key-{len(self._keys) + 1}") if key else ""

    def _models(self) -> dict[str, Any]:
        made = {"object": "model", "created": 1_750_000_000, "owned_by": "simulator"}
        return {"object": "list", "data": [{"id": name, **made} for name in self.knobs.models]}

    async def _ask(self, call: Call, where: Route, api: Api, seen: Seen) -> Answer:
        fault = self._next_fault()
        if api not in self.knobs.apis:
            raise unknown(call)
        self._recognize(call, where, seen)
        applicant = self._read(call, where, api, seen, fault)
        try:
            return await self._serve(applicant)
        except Failure as failure:
            return refused(failure, self._common(seen) | self._limits(applicant))

    def _next_fault(self) -> Fault | None:
        return self._faults.popleft() if self._faults else None

    def _read(
        self, call: Call, where: Route, api: Api, seen: Seen, fault: Fault | None
    ) -> Applicant:
        """Return the request as one that can be admitted; note what it asks for."""
        seen.api, seen.body = api, read_body(call.body)
        asked = read(dict(seen.body), api=api, azure=where.azure, deployment=where.deployment)
        seen.model, seen.prompt = asked.model, asked.prompt
        seen.stream, seen.background = asked.stream, asked.background
        check_model(asked, self.knobs)
        check_stream(asked, self.knobs)
        planned = plan(asked, self.knobs)
        seen.input_tokens = planned.input_tokens
        fault = fault or planned.fault or self._mishap()
        seen.fault = fault.kind if fault else ""
        return Applicant(
            asked=asked,
            plan=planned,
            fault=fault,
            account=self.account(seen.key, asked.model),
            seen=seen,
            at=self.clock.now(),
            wall=self.clock.wall(),
        )

    def _mishap(self) -> Fault | None:
        """Return a fault, if chance has one."""
        if self.knobs.failures and self._chance.random() < self.knobs.failures:
            return Fault("http")
        if self.knobs.breaks and self._chance.random() < self.knobs.breaks:
            return Fault("error_event", after=self._chance.randrange(1, 20))
        return None

    async def _serve(self, applicant: Applicant) -> Answer:
        """Return the answer to a request, if it is admitted.

        Raises
        ------
        Failure
            If it is not, or if the answer fails before it begins.
        """
        run = self._run(applicant)
        # Taken now: the headers tell the limits of the moment of admission, when they come later.
        limits = self._limits(applicant)
        try:
            if applicant.asked.background:
                return self._in_background(applicant, run, limits)
            if not applicant.asked.stream:
                return self._respond(applicant, limits | headers.JSON, Body(once(await whole(run))))
            await until(run.first_at, self.clock)
        except BaseException:
            run.end()
            raise
        chunks = deliver(generate(run), run.strikes_in(DELIVERY), self.clock)
        return self._respond(applicant, limits | headers.EVENTS, Body(chunks, run.end))

    def _run(self, applicant: Applicant) -> Run:
        charge = admit(applicant, self.knobs)
        fault, making = applicant.fault, self._making(applicant)
        slow = fault.wait if fault is not None and fault.kind == "slow" else 0.0
        return Run(
            making=making,
            wire=ResponsesWire(making) if applicant.asked.api == "responses" else ChatWire(making),
            account=applicant.account,
            charge=charge,
            seen=applicant.seen,
            fault=fault,
            message=broken_text(applicant, self.knobs, charge.tokens),
            first_at=applicant.at + slow + applicant.plan.latency,
            clock=self.clock,
            knobs=lambda: self.knobs,
        )

    def _making(self, applicant: Applicant) -> Making:
        prefix = "resp_" if applicant.asked.api == "responses" else "chatcmpl-"
        applicant.seen.response_id = f"{prefix}{self._life}{applicant.seen.number:08x}"
        return Making(
            id=applicant.seen.response_id,
            created_at=applicant.wall,
            asked=applicant.asked,
            plan=applicant.plan,
            cached=self._cached(applicant),
            speed=self.knobs.speed,
            chunk=self.knobs.chunk,
        )

    def _cached(self, applicant: Applicant) -> int:
        """Return the input tokens that were seen before, and remember them for the next time."""
        if applicant.plan.input_tokens < PREFIX_TOKENS:
            return 0
        asked = applicant.asked
        prefix = (applicant.seen.key, asked.model, asked.text[: PREFIX_TOKENS * 4])
        if prefix in self._prefixes:
            return PREFIX_TOKENS
        self._prefixes.add(prefix)
        return 0

    def _in_background(self, applicant: Applicant, run: Run, limits: dict[str, str]) -> Answer:
        stored = self._stored[run.making.id] = Stored(run, applicant.seen.key)
        stored.start()
        if not applicant.asked.stream:
            body = Body(once(encode(stored.response())))
            return self._respond(applicant, limits | headers.JSON, body)
        chunks = deliver(stored.follow(), run.strikes_in(DELIVERY), self.clock)
        return self._respond(applicant, limits | headers.EVENTS, Body(chunks))

    def _pick_up(self, call: Call, where: Route, seen: Seen) -> Answer:
        """Return a background response, or go on with its stream, or cancel it."""
        self._recognize(call, where, seen)
        stored = self._stored.get(where.id)
        if stored is None or stored.owner != seen.key:
            raise Failure(404, f"Response with id '{where.id}' not found.")
        seen.response_id = where.id
        if where.door == "cancel":
            stored.cancel()
        elif where.query.get("stream") == "true":
            return self._go_on(stored, where.query.get("starting_after", "-1"), seen)
        return in_json(stored.response(), self._common(seen))

    def _lend(self, call: Call, where: Route, seen: Seen) -> Answer:
        """Take a file or a batch in, or give one out."""
        self._recognize(call, where, seen)
        told = self.library.serve(call, where, seen.key)
        if isinstance(told, bytes):
            return Answer(200, self._common(seen) | headers.BINARY, Body(once(told)))
        return in_json(told, self._common(seen))

    def _answer_at_once(
        self, body: dict[str, Any], path: str, owner: str
    ) -> tuple[int, dict[str, Any]]:
        """Answer a request of a batch, and note it as one that was seen."""
        seen = Seen(
            number=len(self.log) + 1,
            at=self.clock.now(),
            method="BATCH",
            path=path,
            host="",
            key=owner,
        )
        self.log.append(seen)
        api: Api = "chat" if path.endswith("completions") else "responses"
        call = Call(method="POST", path=path, body=encode(body))
        try:
            applicant = self._read(call, Route(door=api), api, seen, None)
            if fault := applicant.fault:
                raise Failure(fault.status, "The server had an error while processing it.")
        except Failure as failure:
            seen.status = failure.status
            return failure.status, {"error": failure.body}
        making = self._making(applicant)
        wire = ResponsesWire(making) if api == "responses" else ChatWire(making)
        seen.status, seen.finished = 200, True
        seen.output_tokens = making.plan.output_tokens
        seen.charged = seen.input_tokens + seen.output_tokens
        return 200, wire.whole()

    def _go_on(self, stored: Stored, after: str, seen: Seen) -> Answer:
        asked = stored.run.making.asked
        if not asked.stream:
            raise Failure(400, "This response was not created with stream=true.")
        if not after.removeprefix("-").isdecimal():
            raise Failure(400, "Invalid 'starting_after': expected an integer.")
        fault = self._next_fault()
        seen.fault, seen.stream = fault.kind if fault else "", True
        if fault is not None:
            refuse(fault, style(asked, self.knobs, self.clock.wall()), self.knobs, cost=0)
        strikes = fault if fault is not None and fault.kind in DELIVERY else None
        chunks = deliver(stored.follow(int(after)), strikes, self.clock)
        return Answer(200, self._common(seen) | headers.EVENTS, Body(chunks))

    def _common(self, seen: Seen) -> dict[str, str]:
        worked = headers.processing(self.clock.now() - seen.at)
        return headers.common(f"req_{self._life}{seen.number:08x}", self.knobs) | worked

    def _limits(self, applicant: Applicant) -> dict[str, str]:
        if not self.knobs.headers:
            return {}
        return headers.limits(applicant.account, applicant.at)

    def _respond(self, applicant: Applicant, given: dict[str, str], body: Body) -> Answer:
        given = self._common(applicant.seen) | given
        return answered(given, body, fault=applicant.fault, wall=applicant.wall)
