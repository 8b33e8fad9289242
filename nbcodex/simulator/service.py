"""The simulated server without sockets: takes a request, returns status, headers and body.

It reads the time from its clock only, so that tests can use virtual time.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from nbcodex.runtime.clock import BootClock, Clock
from nbcodex.simulator.admission import (
    PlannedRequest,
    RequestRecord,
    admit_request,
    check_access,
    limit_headers,
    raise_scripted_failure,
)
from nbcodex.simulator.api_formats import ResponsesFormat, format_answer
from nbcodex.simulator.batch_service import BatchService
from nbcodex.simulator.buckets import Account, admission_charge
from nbcodex.simulator.delivery import (
    BackgroundResponse,
    deliver,
    generate,
    generate_unstreamed,
    wait_until,
)
from nbcodex.simulator.generated_answers import plan_answer, requested_fault
from nbcodex.simulator.http_messages import (
    EVENT_STREAM_HEADERS,
    JSON_HEADERS,
    SIMULATED_HEADER,
    ErrorResponse,
    HttpRequest,
    HttpResponse,
    encode_json,
    retry_headers,
    single_chunk,
)
from nbcodex.simulator.knobs import Fault, Knobs, parse_fault
from nbcodex.simulator.parsed_request import (
    Api,
    Route,
    accepted_key,
    find_route,
    parse_body,
    parse_request,
    unknown_path,
)

# OpenAI's prompt cache takes inputs of at least this many tokens; the simulator caches these only.
CACHED_PREFIX_TOKENS = 1_024
ABSURD_HEADERS = {
    "x-ratelimit-limit-tokens": "1e999",
    "x-ratelimit-remaining-tokens": "-1",
    "x-ratelimit-reset-tokens": "NaN",
    "x-ratelimit-limit-requests": "0",
    "x-ratelimit-remaining-requests": "many",
    "x-ratelimit-reset-requests": "-5d",
    "openai-processing-ms": "soon",
    "retry-after": "99999999999999999999",
    "x-request-id": "req_" + "x" * 8_192,
}


class Simulator:
    """An imitation of OpenAI's API. By default, it uses the machine's clock."""

    def __init__(self, knobs: Knobs | None = None, *, clock: Clock | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.clock: Clock = clock or BootClock()
        self.log: list[RequestRecord] = []  # all requests, oldest first
        self._faults: deque[Fault | None] = deque()  # of the next requests, one each
        self._accounts: dict[tuple[str, str], Account] = {}  # by the key's name, and model
        self._stored: dict[str, BackgroundResponse] = {}  # by id of the response
        self._key_names: dict[str, str] = {}  # by key
        self._cached_prefixes: set[tuple[str, str, str]] = set()  # key's name, model, prefix
        self._rng = random.Random(self.knobs.seed)  # noqa: S311 - not for secrecy
        # Part of all ids, so that no id of an earlier server names another response here.
        self._server_id = secrets.token_hex(8)
        # Part of the control paths: other local users could otherwise read prompts in the log.
        self.control_secret = secrets.token_urlsafe(16)
        self.batches = BatchService(
            knobs=lambda: self.knobs,
            clock=self.clock,
            answer_line=self._answer_batch_line,
            server_id=self._server_id,
        )

    def script(self, faults: Iterable[Fault | str | None]) -> None:
        """Apply `faults` to the next requests, one each; None means no fault."""
        self._faults.extend([f if isinstance(f, Fault) else parse_fault(f) for f in faults])

    def change_knobs(self, **changes: Any) -> None:
        """Change settings, limits included, from now on."""
        self.knobs = replace(self.knobs, **changes)
        for account in self._accounts.values():
            account.set_limits(self.knobs, self.clock.now())

    def account(self, key: str, model: str) -> Account:
        """Return the buckets of `model` for the key named `key` (``key-1`` is the first)."""
        if (key, model) not in self._accounts:
            account = self._accounts[key, model] = Account()
            account.set_limits(self.knobs, self.clock.now())
        return self._accounts[key, model]

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Return the response to `request` as soon as its headers are known, or raise `Dropped`."""
        record = self._new_record(request.method, request.path, request.headers.get("host", ""))
        try:
            response = await self._respond(request, record)
        except ErrorResponse as failure:
            response = failure.as_response(self._common_headers(record))
        record.status = response.status
        return response

    async def _respond(self, request: HttpRequest, record: RequestRecord) -> HttpResponse:
        route = find_route(request)
        if route.endpoint == "control":
            if not secrets.compare_digest(route.secret, self.control_secret):
                raise unknown_path(request)
            return self._whole_response(self._control(request, route), record)
        self.log.append(record)
        is_prompt = route.endpoint in ("responses", "chat")
        # Each prompt takes a fault from the script, even if it is then refused for another reason.
        fault = self._faults.popleft() if is_prompt and self._faults else None
        if is_prompt and route.endpoint not in self.knobs.apis:
            raise unknown_path(request)
        key = accepted_key(request, route.is_azure, self.knobs)
        if key:
            record.key = self._key_names.setdefault(key, f"key-{len(self._key_names) + 1}")
        match route.endpoint:
            case "models":
                fields = {"object": "model", "created": 1_750_000_000, "owned_by": "simulator"}
                models = [{"id": name, **fields} for name in self.knobs.models]
                return self._whole_response({"object": "list", "data": models}, record)
            case "retrieve" | "cancel" | "delete":
                return self._serve_stored(route, record)
            case "compact":
                planned = self._plan(request.body, route, "responses", record, fault=None)
                self._begin_answer(planned)
                return self._whole_response(ResponsesFormat(planned).as_compaction(), record)
            case "files" | "batches":
                return self._whole_response(self.batches.serve(request, route, record.key), record)
            case "responses" | "chat" as api:
                planned = self._plan(request.body, route, api, record, fault=fault)
                try:
                    return await self._serve_prompt(planned)
                except ErrorResponse as failure:
                    headers = self._common_headers(record) | limit_headers(planned)
                    return failure.as_response(headers)

    def _new_record(self, method: str, path: str, host: str = "", key: str = "") -> RequestRecord:
        number, now = len(self.log) + 1, self.clock.now()
        return RequestRecord(number=number, at=now, method=method, path=path, host=host, key=key)

    def _control(self, request: HttpRequest, route: Route) -> Any:
        try:
            if route.id == "log":
                return [asdict(record) for record in self.log[int(route.query.get("since", "0")) :]]
            data = json.loads(request.body)  # a list of faults, or an object of settings
            if route.id == "script":
                self.script(data)
                return {"scripted": len(data)}
            # JSON has no tuples.
            tuples = {name: tuple(v) for name, v in data.items() if isinstance(v, list)}
            self.change_knobs(**(data | tuples))
        except (TypeError, ValueError, AttributeError) as exc:
            raise ErrorResponse(400, f"Invalid control command: {exc}") from exc
        return asdict(self.knobs)

    def _plan(
        self, body: bytes, route: Route, api: Api, record: RequestRecord, *, fault: Fault | None
    ) -> PlannedRequest:
        """Parse the request, add its parameters to its record, and plan its answer."""
        record.api, record.body = api, parse_body(body)
        request = parse_request(dict(record.body), api, route)
        record.model, record.prompt = request.model, request.prompt
        record.stream, record.background = request.stream, request.background
        check_access(request, self.knobs)
        plan = plan_answer(request, self.knobs)
        record.input_tokens = plan.input_tokens
        fault = fault or requested_fault(request.prompt)
        # Random numbers are drawn only for probabilities above 0: with the same seed and
        # probabilities, the same requests fail.
        if fault is None and self.knobs.failures and self._rng.random() < self.knobs.failures:
            fault = Fault("http")
        stream_failures = self.knobs.stream_failures
        if fault is None and stream_failures and self._rng.random() < stream_failures:
            fault = Fault("error_event", after=self._rng.randrange(1, 20))
        record.fault = fault.kind if fault else ""
        return PlannedRequest(
            request=request,
            plan=plan,
            fault=fault,
            account=self.account(record.key, request.model),
            record=record,
            received_at=self.clock.wall(),
            knobs=self.knobs,
            charge=admission_charge(plan.input_tokens, plan.max_output, self.knobs),
        )

    async def _serve_prompt(self, planned: PlannedRequest) -> HttpResponse:
        """Admit a request and return its answer; raise an `ErrorResponse` if either fails."""
        request, fault = planned.request, planned.fault
        admit_request(planned)
        self._begin_answer(planned)
        # Headers state the limits at admission, even if they are sent later.
        limits = limit_headers(planned)
        if request.background:
            stored = BackgroundResponse(planned, self.clock)
            self._stored[planned.record.response_id] = stored
            if request.stream:
                body = deliver(stored.follow(), fault, self.clock)
            else:
                body = single_chunk(encode_json(stored.response_object()))
        elif request.stream:
            try:
                await wait_until(planned.time_of_token(number=1), self.clock)
            except asyncio.CancelledError:  # the client has disconnected
                planned.settle_charge(self.clock.now())
                raise
            body = deliver(generate(planned, self.clock), fault, self.clock)
        else:
            body = single_chunk(await generate_unstreamed(planned, self.clock))
        headers = self._common_headers(planned.record) | limits
        headers |= EVENT_STREAM_HEADERS if request.stream else JSON_HEADERS
        if fault is not None:
            if fault.kind == "absurd_headers":
                headers |= ABSURD_HEADERS
            elif fault.kind == "azure_failed":  # these headers precede its ``response.failed``
                wait, time_of_day = fault.seconds_or_default, planned.received_at
                headers |= retry_headers(wait, retry_after="seconds", time_of_day=time_of_day)
            headers |= fault.headers
        on_close = None if request.background else lambda: planned.settle_charge(self.clock.now())
        return HttpResponse(200, headers, body, on_close)

    def _begin_answer(self, planned: PlannedRequest) -> None:
        """Give the answer its id, and look up the start of the input in the prompt cache."""
        request, record = planned.request, planned.record
        id_prefix = "resp_" if request.api == "responses" else "chatcmpl-"
        record.response_id = f"{id_prefix}{self._server_id}{record.number:08x}"
        if planned.plan.input_tokens >= CACHED_PREFIX_TOKENS:
            # A token is about four characters.
            prefix = (record.key, request.model, request.text[: CACHED_PREFIX_TOKENS * 4])
            planned.cached_tokens = CACHED_PREFIX_TOKENS if prefix in self._cached_prefixes else 0
            self._cached_prefixes.add(prefix)

    def _serve_stored(self, route: Route, record: RequestRecord) -> HttpResponse:
        """Return a background response, continue its stream, cancel it or delete it."""
        stored = self._stored.get(route.id)
        if stored is None or stored.planned.record.key != record.key:
            raise ErrorResponse(404, f"Response with id '{route.id}' not found.")
        record.response_id = route.id
        if route.endpoint in {"cancel", "delete"}:
            stored.cancel()
        if route.endpoint == "delete":
            del self._stored[route.id]
            deleted = {"id": route.id, "object": "response", "deleted": True}
            return self._whole_response(deleted, record)
        if route.endpoint == "cancel" or route.query.get("stream") != "true":
            return self._whole_response(stored.response_object(), record)
        planned, after = stored.planned, route.query.get("starting_after", "-1")
        if not planned.request.stream:
            raise ErrorResponse(400, "This response was not created with stream=true.")
        if not after.removeprefix("-").isdecimal():
            raise ErrorResponse(400, "Invalid 'starting_after': expected an integer.")
        fault = self._faults.popleft() if self._faults else None
        record.fault, record.stream = fault.kind if fault else "", True
        continued = replace(planned, fault=fault, received_at=self.clock.wall(), knobs=self.knobs)
        raise_scripted_failure(continued, stated_tokens=0)
        chunks = deliver(stored.follow(after=int(after)), fault, self.clock)
        return HttpResponse(200, self._common_headers(record) | EVENT_STREAM_HEADERS, chunks)

    def _answer_batch_line(
        self, body: dict[str, Any], path: str, key_name: str
    ) -> tuple[int, dict[str, Any]]:
        record = self._new_record("BATCH", path, key=key_name)  # no method: no request of HTTP
        self.log.append(record)
        api: Api = "chat" if path.endswith("completions") else "responses"
        try:
            planned = self._plan(encode_json(body), Route(endpoint=api), api, record, fault=None)
            if fault := planned.fault:
                raise ErrorResponse(fault.status, "The server failed to process this request.")
        except ErrorResponse as failure:
            record.status = failure.status
            return failure.status, {"error": failure.body}
        self._begin_answer(planned)
        record.status, record.finished = 200, True
        record.output_tokens = planned.plan.output_tokens
        record.charged = record.input_tokens + record.output_tokens
        return 200, format_answer(planned).as_object()

    def _whole_response(self, content: Any, record: RequestRecord) -> HttpResponse:
        """Return a response with a file's bytes or with JSON data."""
        is_file = isinstance(content, bytes)
        data = content if is_file else encode_json(content)
        headers = self._common_headers(record) | {"content-length": str(len(data))}
        headers |= {"content-type": "application/octet-stream"} if is_file else JSON_HEADERS
        return HttpResponse(200, headers, single_chunk(data))

    def _common_headers(self, record: RequestRecord) -> dict[str, str]:
        return {
            SIMULATED_HEADER: "true",
            "x-request-id": f"req_{self._server_id}{record.number:08x}",
            "openai-version": "2020-10-01",
            "openai-organization": self.knobs.organization,
            "openai-processing-ms": str(max(1, round((self.clock.now() - record.at) * 1000))),
        }
