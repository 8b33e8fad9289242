"""The simulated server without sockets: takes a request, returns status, headers and body.

Owns the accounts, the scripted faults, the log and the background responses. Reads time only from
its clock.
"""

from __future__ import annotations

import json
import random
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.simulator.admission import (
    Candidate,
    admit_request,
    check_model,
    check_stream,
    raise_scripted_failure,
    stream_error_text,
    style_of,
)
from nbcodex.simulator.batch_service import BatchService
from nbcodex.simulator.buckets import Account
from nbcodex.simulator.chat_format import ChatFormat
from nbcodex.simulator.delivery import (
    BackgroundResponse,
    Generation,
    ResponseBody,
    deliver,
    generate,
    generate_whole,
    single_chunk,
    wait_until,
)
from nbcodex.simulator.error_responses import ErrorResponse
from nbcodex.simulator.faults import DELIVERY, Fault, parse_fault
from nbcodex.simulator.generated_answers import plan_answer
from nbcodex.simulator.generation import Answer, encode_json
from nbcodex.simulator.http_responses import (
    BINARY_HEADERS,
    EVENT_STREAM_HEADERS,
    JSON_HEADERS,
    HttpResponse,
    common_headers,
    error_response,
    json_response,
    limit_headers,
    processing_header,
    success_response,
)
from nbcodex.simulator.knobs import Knobs, parse_knobs
from nbcodex.simulator.parsed_request import Api, parse_body, parse_request
from nbcodex.simulator.responses_format import ResponsesFormat
from nbcodex.simulator.routes import (
    HttpRequest,
    RequestRecord,
    Route,
    find_route,
    key_of,
    unknown_path,
)

# The prompt cache keeps this many tokens from the start of an input.
PREFIX_TOKENS = 1_024


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
    log : list of RequestRecord
        All requests, oldest first.
    """

    def __init__(self, knobs: Knobs | None = None, *, clock: Clock | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.clock: Clock = clock or BootClock()
        self.log: list[RequestRecord] = []
        self._faults: deque[Fault | None] = deque()
        self._accounts: dict[tuple[str, str], Account] = {}
        self._stored: dict[str, BackgroundResponse] = {}
        self._keys: dict[str, str] = {}
        self._prefixes: set[tuple[str, str, str]] = set()
        self._chance = random.Random(self.knobs.seed)  # noqa: S311 - chance, not secrecy
        # Ids contain a random part: an id from an earlier server must be unknown to the next one.
        self._life = secrets.token_hex(8)
        self.batches = BatchService(
            knobs=lambda: self.knobs,
            clock=self.clock,
            answering=self._answer_batch_line,
            life=self._life,
        )

    def script(self, faults: Iterable[Fault | str | None]) -> None:
        """Apply `faults` to the next requests, one each; None means no fault."""
        self._faults.extend(parse_fault(f) if isinstance(f, str) else f for f in faults)

    def change_knobs(self, **changes: Any) -> None:
        """Change settings, limits included, from now on."""
        self.knobs = replace(self.knobs, **changes)
        for account in self._accounts.values():
            account.set_limits(self.knobs, self.clock.now())

    def account(self, key: str, model: str) -> Account:
        """Return the buckets of `model` and of the key named `key` (``key-1`` is the first)."""
        if (key, model) not in self._accounts:
            account = self._accounts[key, model] = Account()
            account.set_limits(self.knobs, self.clock.now())
        return self._accounts[key, model]

    @property
    def charged(self) -> int:
        """Tokens charged to all requests together."""
        return sum(record.charged for record in self.log)

    async def answer(self, call: HttpRequest) -> HttpResponse:
        """Return the response to `call` as soon as its headers are known.

        Raises
        ------
        Dropped
            If the connection is to end without a response.
        """
        record = RequestRecord(
            number=len(self.log) + 1,
            at=self.clock.now(),
            method=call.method,
            path=call.path,
            host=call.headers.get("host", ""),
        )
        try:
            answer = await self._answer(call, record)
        except ErrorResponse as failure:
            answer = error_response(failure, self._common(record))
        record.status = answer.status
        return answer

    async def _answer(self, call: HttpRequest, record: RequestRecord) -> HttpResponse:
        route = find_route(call)
        if route.endpoint == "control":
            result = handle_control(self, route.id, query=route.query, body=call.body)
            return json_response(result, self._common(record))
        self.log.append(record)
        match route.endpoint:
            case "models":
                self._identify_key(call, route, record)
                return json_response(self._models(), self._common(record))
            case "retrieve" | "cancel":
                return self._serve_stored(call, route, record)
            case "library":
                return self._serve_batches(call, route, record)
            case api:
                return await self._serve_prompt(call, route, api, record)

    def _identify_key(self, call: HttpRequest, route: Route, record: RequestRecord) -> None:
        """Record the key of `call` under a name."""
        key = key_of(call, route.azure, self.knobs)
        record.key = self._keys.setdefault(key, f"key-{len(self._keys) + 1}") if key else ""

    def _models(self) -> dict[str, Any]:
        made = {"object": "model", "created": 1_750_000_000, "owned_by": "simulator"}
        return {"object": "list", "data": [{"id": name, **made} for name in self.knobs.models]}

    async def _serve_prompt(
        self, call: HttpRequest, route: Route, api: Api, record: RequestRecord
    ) -> HttpResponse:
        fault = self._next_fault()
        if api not in self.knobs.apis:
            raise unknown_path(call)
        self._identify_key(call, route, record)
        candidate = self._read(call, route, api, record, fault)
        try:
            return await self._serve(candidate)
        except ErrorResponse as failure:
            return error_response(failure, self._common(record) | self._limits(candidate))

    def _next_fault(self) -> Fault | None:
        return self._faults.popleft() if self._faults else None

    def _read(
        self, call: HttpRequest, route: Route, api: Api, record: RequestRecord, fault: Fault | None
    ) -> Candidate:
        """Parse the request and add its parameters to its record."""
        record.api, record.body = api, parse_body(call.body)
        request = parse_request(
            dict(record.body), api=api, azure=route.azure, deployment=route.deployment
        )
        record.model, record.prompt = request.model, request.prompt
        record.stream, record.background = request.stream, request.background
        check_model(request, self.knobs)
        check_stream(request, self.knobs)
        plan = plan_answer(request, self.knobs)
        record.input_tokens = plan.input_tokens
        fault = fault or plan.fault or self._random_fault()
        record.fault = fault.kind if fault else ""
        return Candidate(
            request=request,
            plan=plan,
            fault=fault,
            account=self.account(record.key, request.model),
            record=record,
            at=self.clock.now(),
            wall=self.clock.wall(),
        )

    def _random_fault(self) -> Fault | None:
        """Return a fault with the configured probabilities."""
        if self.knobs.failures and self._chance.random() < self.knobs.failures:
            return Fault("http")
        if self.knobs.stream_failures and self._chance.random() < self.knobs.stream_failures:
            return Fault("error_event", after=self._chance.randrange(1, 20))
        return None

    async def _serve(self, candidate: Candidate) -> HttpResponse:
        """Admit a request and return its answer.

        Raises
        ------
        ErrorResponse
            If it is refused, or if the answer fails before it begins.
        """
        generation = self._run(candidate)
        # Headers state the limits at admission, even if they are sent later.
        limits = self._limits(candidate)
        try:
            if candidate.request.background:
                return self._in_background(candidate, generation, limits)
            if not candidate.request.stream:
                return self._respond(
                    candidate,
                    limits | JSON_HEADERS,
                    ResponseBody(single_chunk(await generate_whole(generation))),
                )
            await wait_until(generation.first_at, self.clock)
        except BaseException:
            generation.settle_charge()
            raise
        chunks = deliver(generate(generation), generation.fault_among(DELIVERY), self.clock)
        return self._respond(
            candidate,
            limits | EVENT_STREAM_HEADERS,
            ResponseBody(chunks, generation.settle_charge),
        )

    def _run(self, candidate: Candidate) -> Generation:
        charge = admit_request(candidate, self.knobs)
        fault, answer_source = candidate.fault, self._make_answer(candidate)
        slow = fault.wait if fault is not None and fault.kind == "slow" else 0.0
        return Generation(
            answer=answer_source,
            format=ResponsesFormat(answer_source)
            if candidate.request.api == "responses"
            else ChatFormat(answer_source),
            account=candidate.account,
            charge=charge,
            record=candidate.record,
            fault=fault,
            message=stream_error_text(candidate, self.knobs, charge.tokens),
            first_at=candidate.at + slow + candidate.plan.latency,
            clock=self.clock,
            knobs=lambda: self.knobs,
        )

    def _make_answer(self, candidate: Candidate) -> Answer:
        prefix = "resp_" if candidate.request.api == "responses" else "chatcmpl-"
        candidate.record.response_id = f"{prefix}{self._life}{candidate.record.number:08x}"
        return Answer(
            id=candidate.record.response_id,
            created_at=candidate.wall,
            request=candidate.request,
            plan=candidate.plan,
            cached=self._cached(candidate),
            speed=self.knobs.speed,
            chunk=self.knobs.chunk,
        )

    def _cached(self, candidate: Candidate) -> int:
        """Return the number of cached input tokens, and cache the prefix for later requests."""
        if candidate.plan.input_tokens < PREFIX_TOKENS:
            return 0
        request = candidate.request
        prefix = (candidate.record.key, request.model, request.text[: PREFIX_TOKENS * 4])
        if prefix in self._prefixes:
            return PREFIX_TOKENS
        self._prefixes.add(prefix)
        return 0

    def _in_background(
        self, candidate: Candidate, generation: Generation, limits: dict[str, str]
    ) -> HttpResponse:
        stored = self._stored[generation.answer.id] = BackgroundResponse(
            generation, candidate.record.key
        )
        stored.start()
        if not candidate.request.stream:
            body = ResponseBody(single_chunk(encode_json(stored.response_object())))
            return self._respond(candidate, limits | JSON_HEADERS, body)
        chunks = deliver(stored.follow(), generation.fault_among(DELIVERY), self.clock)
        return self._respond(candidate, limits | EVENT_STREAM_HEADERS, ResponseBody(chunks))

    def _serve_stored(self, call: HttpRequest, route: Route, record: RequestRecord) -> HttpResponse:
        """Return a background response, continue its stream, or cancel it."""
        self._identify_key(call, route, record)
        stored = self._stored.get(route.id)
        if stored is None or stored.owner != record.key:
            raise ErrorResponse(404, f"Response with id '{route.id}' not found.")
        record.response_id = route.id
        if route.endpoint == "cancel":
            stored.cancel()
        elif route.query.get("stream") == "true":
            return self._continue_stream(stored, route.query.get("starting_after", "-1"), record)
        return json_response(stored.response_object(), self._common(record))

    def _serve_batches(
        self, call: HttpRequest, route: Route, record: RequestRecord
    ) -> HttpResponse:
        """Serve the Files and Batch APIs."""
        self._identify_key(call, route, record)
        result = self.batches.serve(call, route, record.key)
        if isinstance(result, bytes):
            return HttpResponse(
                200, self._common(record) | BINARY_HEADERS, ResponseBody(single_chunk(result))
            )
        return json_response(result, self._common(record))

    def _answer_batch_line(
        self, body: dict[str, Any], path: str, owner: str
    ) -> tuple[int, dict[str, Any]]:
        """Answer a request of a batch, and record it in the log."""
        record = RequestRecord(
            number=len(self.log) + 1,
            at=self.clock.now(),
            method="BATCH",
            path=path,
            host="",
            key=owner,
        )
        self.log.append(record)
        api: Api = "chat" if path.endswith("completions") else "responses"
        call = HttpRequest(method="POST", path=path, body=encode_json(body))
        try:
            candidate = self._read(call, Route(endpoint=api), api, record, None)
            if fault := candidate.fault:
                raise ErrorResponse(fault.status, "The server had an error while processing it.")
        except ErrorResponse as failure:
            record.status = failure.status
            return failure.status, {"error": failure.body}
        answer_source = self._make_answer(candidate)
        api_format = (
            ResponsesFormat(answer_source) if api == "responses" else ChatFormat(answer_source)
        )
        record.status, record.finished = 200, True
        record.output_tokens = answer_source.plan.output_tokens
        record.charged = record.input_tokens + record.output_tokens
        return 200, api_format.as_object()

    def _continue_stream(
        self, stored: BackgroundResponse, after: str, record: RequestRecord
    ) -> HttpResponse:
        request = stored.generation.answer.request
        if not request.stream:
            raise ErrorResponse(400, "This response was not created with stream=true.")
        if not after.removeprefix("-").isdecimal():
            raise ErrorResponse(400, "Invalid 'starting_after': expected an integer.")
        fault = self._next_fault()
        record.fault, record.stream = fault.kind if fault else "", True
        if fault is not None:
            raise_scripted_failure(
                fault, style_of(request, self.knobs, self.clock.wall()), self.knobs, cost=0
            )
        strikes = fault if fault is not None and fault.kind in DELIVERY else None
        chunks = deliver(stored.follow(int(after)), strikes, self.clock)
        return HttpResponse(200, self._common(record) | EVENT_STREAM_HEADERS, ResponseBody(chunks))

    def _common(self, record: RequestRecord) -> dict[str, str]:
        worked = processing_header(self.clock.now() - record.at)
        return common_headers(f"req_{self._life}{record.number:08x}", self.knobs) | worked

    def _limits(self, candidate: Candidate) -> dict[str, str]:
        if not self.knobs.headers:
            return {}
        return limit_headers(candidate.account, candidate.at)

    def _respond(
        self, candidate: Candidate, given: dict[str, str], body: ResponseBody
    ) -> HttpResponse:
        given = self._common(candidate.record) | given
        return success_response(given, body, fault=candidate.fault, wall=candidate.wall)


def handle_control(
    simulator: Simulator, what: str, *, query: Mapping[str, str], body: bytes
) -> Any:
    """Execute a control command on `simulator`, and return its result.

    Raises
    ------
    ErrorResponse
        400 if `body` is invalid.
    """
    try:
        if what == "log":
            return [asdict(record) for record in simulator.log[int(query.get("since", "0")) :]]
        data = json.loads(body)
        if what == "script":
            simulator.script([parse_fault(fault) for fault in data])
            return {"scripted": len(data)}
        simulator.change_knobs(**parse_knobs(data))
    except (TypeError, ValueError, AttributeError) as exc:
        raise ErrorResponse(400, f"The simulator cannot use this: {exc}") from exc
    return asdict(simulator.knobs)
