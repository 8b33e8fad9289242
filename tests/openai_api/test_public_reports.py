"""Responses from public bug reports about other clients of these APIs, rebuilt as small inputs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from nbcodex import errors
from nbcodex.errors import LimitError, NbcodexError
from nbcodex.openai_api.answers import CompletedAnswer, ReasoningDelta, judge
from tests.openai_api.scripted import (
    DONE,
    Part,
    Script,
    Server,
    chunk,
    event,
    play,
    settings,
    text_of,
)

SSE = {"content-type": "text/event-stream"}
JSON = {"content-type": "application/json"}
HTML = {"content-type": "text/html"}


@dataclass(frozen=True)
class Answered:
    """The answer that a response must be read as."""

    source: str  # the public report
    parts: Iterable[Part]
    text: str
    headers: dict[str, str] | None = None
    api: str = "chat"
    cut: str | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Refused:
    """The error that a response must be read as."""

    source: str  # the public report
    status: int
    body: object  # bytes are sent as they are
    error: type[NbcodexError]
    words: str = ""  # a part of the message or the advice
    wait: float | None = None  # seconds
    limit: float | None = None
    resource: str | None = None
    window: float | None = None  # seconds
    headers: dict[str, str] | None = None
    api: str = "chat"


def reasoning_chunk(text: str, name: str = "reasoning_content") -> bytes:
    return event({"choices": [{"index": 0, "delta": {name: text}, "finish_reason": None}]})


def raw(*lines: str, end: str = "\n\n") -> list[Part]:
    return [f"{line}{end}".encode() for line in lines]


def delta_line(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})


FINISH = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})

ANSWERS = {
    "empty finish reason in each chunk": Answered(
        "ollama/ollama#4357, sgl-project/sglang#3912",
        [chunk("He", finish=""), chunk("llo", finish=""), chunk("", finish="stop"), DONE],
        "Hello",
    ),
    "finish reason left out of inner chunks": Answered(
        "mudler/LocalAI#1194, vllm-project/vllm#19650",
        [*raw(f"data: {delta_line('Hel')}", f"data: {delta_line('lo')}"), chunk(finish="stop")],
        "Hello",
    ),
    "text in the chunk that ends with length": Answered(
        "vllm-project/vllm#35705",
        [chunk("He"), chunk("llo", finish="length"), DONE],
        "Hello",
        cut="max_tokens",
    ),
    "first chunk without choices": Answered(
        "Azure, openai/openai-python",
        [event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}), chunk("Hello"),
         chunk(finish="stop"), DONE],
        "Hello",
    ),
    "null delta": Answered(
        "BerriAI/litellm",
        [event({"choices": [{"index": 0, "delta": None}]}), chunk("Hello"), chunk(finish="stop")],
        "Hello",
    ),
    "null choices beside usage": Answered(
        "vercel/ai",
        [chunk("Hello"), chunk(finish="stop"),
         event({"choices": None, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}), DONE],
        "Hello",
    ),
    "no space after the colon": Answered(
        "spring-projects/spring-ai",
        raw(f"data:{delta_line('Hello')}", f"data:{FINISH}", "data:[DONE]"),
        "Hello",
    ),
    "carriage returns and comments": Answered(
        "OpenRouter",
        raw(": OPENROUTER PROCESSING", f"data: {delta_line('Hello')}", f"data: {FINISH}",
            "data: [DONE]", end="\r\n\r\n"),
        "Hello",
    ),
    "byte order mark": Answered(
        "WHATWG html event streams",
        [b"\xef\xbb\xbf", *raw(f"data: {delta_line('Hello')}", f"data: {FINISH}")],
        "Hello",
    ),
    "no end marker after a finish reason": Answered(
        "continuedev/continue",
        [chunk("Hello"), chunk(finish="stop")],
        "Hello",
    ),
    "last event without a blank line": Answered(
        "huggingface/text-generation-inference",
        [chunk("Hello"), f"data: {FINISH}\n".encode()],
        "Hello",
    ),
    "one JSON answer where a stream was asked for": Answered(
        "open-webui/open-webui",
        [json.dumps({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]})
         .encode()],
        "Hello",
        headers=JSON,
    ),
    "event stream with another content type": Answered(
        "ggml-org/llama.cpp, one-api",
        [chunk("Hello"), chunk(finish="stop"), DONE],
        "Hello",
        headers={"content-type": "text/plain; charset=utf-8"},
    ),
    "gzip within the event stream": Answered(
        "encode/httpx",
        [gzip.compress(chunk("Hello") + chunk(finish="stop") + DONE)],
        "Hello",
        headers={**SSE, "content-encoding": "gzip"},
    ),
    "character split over chunks of bytes": Answered(
        "ollama/ollama-python",
        [part for byte in chunk("Grüße 👋", finish="stop") for part in [bytes([byte])]],
        "Grüße 👋",
    ),
    "surrogate pair split over two deltas": Answered(
        "vllm-project/vllm",
        [*raw('data: {"choices":[{"index":0,"delta":{"content":"Hi \\ud83d"}}]}',
              'data: {"choices":[{"index":0,"delta":{"content":"\\udc4b"}}]}'),
         chunk(finish="stop")],
        "Hi 👋",
    ),
    "reasoning under the name reasoning": Answered(
        "vllm-project/vllm, OpenRouter",
        [reasoning_chunk("Hm.", "reasoning"), chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "reasoning twice under two names": Answered(
        "BerriAI/litellm",
        [event({"choices": [{"index": 0, "delta": {"reasoning": "Hm.", "reasoning_content": "Hm."}
                             }]}),
         chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "text only in the done event": Answered(
        "vllm-project/vllm",
        [event({"type": "response.created", "response": {"model": "m"}}),
         event({"type": "response.output_text.done", "text": "Hello"}),
         event({"type": "response.completed", "response": {"model": "m", "status": "completed",
                "output": [{"type": "message", "content": [
                    {"type": "output_text", "text": "Hello"}]}]}})],
        "Hello",
        api="responses",
    ),
    "unknown events between known ones": Answered(
        "openai/openai-python",
        [event({"type": "response.queued", "response": {}}), event({"type": "keepalive"}),
         event({"type": "response.output_text.delta", "delta": "Hello"}),
         event({"type": "response.rate_limits.updated", "rate_limits": []}),
         event({"type": "response.completed", "response": {"model": "m"}})],
        "Hello",
        api="responses",
    ),
}  # fmt: skip

REFUSALS = {
    "answer in the reasoning alone": Refused(
        "vllm-project/vllm#40816", 200,
        reasoning_chunk("Hello", "reasoning") + chunk(finish="stop"),
        errors.AnswerError, headers=SSE,
    ),
    "error after reasoning in a 200": Refused(
        "jjang-ai/vmlx#67", 200,
        reasoning_chunk("Hm.") + event({"error": {"message": "only internal reasoning"}}),
        errors.ServerError, "only internal reasoning", headers=SSE,
    ),
    "no choices at all": Refused(
        "ogx-ai/ogx#1424", 200, event({"id": "c", "choices": []}) + DONE,
        errors.TransientError, headers=SSE,
    ),
    "tool call without an index that ends with stop": Refused(
        "open-webui/computer#224, googleapis/python-genai#2868", 200,
        event({"choices": [{"index": 0, "delta": {"tool_calls": [
            {"id": "c1", "function": {"name": "weather", "arguments": "{}"}}]}}]})
        + chunk(finish="stop") + DONE,
        errors.AnswerError, "weather", headers=SSE,
    ),
    "page of a login portal": Refused(
        "openai/openai-python", 200, b"<!DOCTYPE html><html><title>Sign in</title></html>",
        NbcodexError, "web page", headers=HTML,
    ),
    "status in the body of a 200": Refused(
        "MiniMax", 200,
        {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        errors.TransientError, "rate limit",
    ),
    "Baidu's error in a 200": Refused(
        "songquanpeng/one-api", 200,
        {"error_code": 18, "error_msg": "Open api qps request limit reached"},
        errors.TransientError, "qps request limit reached",
    ),
    "Ollama's runner failed": Refused(
        "ollama/ollama#8258", 500,
        {"error": "an error was encountered while running the model: unexpected EOF"},
        errors.ServerError, "unexpected EOF",
    ),
    "Ollama's model is missing": Refused(
        "ollama/ollama", 404,
        {"error": {"message": "model 'llama9' not found", "type": "api_error"}},
        errors.ModelError, "llama9",
    ),
    "Ollama's memory": Refused(
        "ollama/ollama", 500,
        {"error": {"message": "model requires more system memory (9.5 GiB) than is available "
                   "(7.3 GiB)", "type": "api_error"}},
        errors.ServerError, "more system memory",
    ),
    "Groq: request above the whole limit": Refused(
        "danielmiessler/Fabric#364", 429,
        {"error": {"message": "Rate limit reached for model `llama3-70b-8192` in organization "
                   "`org_1` on tokens per minute (TPM): Limit 7000, Used 0, Requested ~12903. "
                   "Please try again in 50.597142857s.", "type": "tokens",
                   "code": "rate_limit_exceeded"}},
        errors.TooLargeError, limit=7000,
    ),
    "Groq: minutes and seconds": Refused(
        "OpenHands/OpenHands#4167", 429,
        {"error": {"message": "Rate limit reached for model `m` in organization `org_1` on tokens "
                   "per minute (TPM): Limit 7000, Used 6148, Requested 5895. Please try again in "
                   "1m0.363142857s.", "type": "tokens", "code": "rate_limit_exceeded"}},
        LimitError, wait=60.363, limit=7000, resource="tokens", window=60,
    ),
    "Azure: seconds in the message": Refused(
        "Azure", 429,
        {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation "
                   "under Azure OpenAI API version 2024-02-01 have exceeded token rate limit of "
                   "your current OpenAI S0 pricing tier. Please retry after 6 seconds."}},
        LimitError, wait=6,
    ),
    "Azure: filter with its category": Refused(
        "Azure", 400,
        {"error": {"code": "content_filter", "status": 400, "param": "prompt", "message":
                   "The response was filtered due to the prompt triggering Azure OpenAI's content "
                   "management policy.", "innererror": {
                       "code": "ResponsibleAIPolicyViolation", "content_filter_result": {
                           "violence": {"filtered": True, "severity": "medium"}}}}},
        errors.RequestError, "content management policy",
    ),
    "Azure: missing deployment": Refused(
        "Azure", 404,
        {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource "
                   "does not exist. If you created the deployment within the last 5 minutes, "
                   "please wait a moment and try again."}},
        errors.ModelError, "deployment",
    ),
    "GitHub Models: per minute": Refused(
        "GitHub Models", 429,
        {"error": {"code": "RateLimitReached", "message": "Rate limit of 15 per 60s exceeded for "
                   "UserByModelByMinute. Please wait 12 seconds before retrying."}},
        LimitError, wait=12, limit=15,
    ),
    "GitHub Models: per day": Refused(
        "GitHub Models", 429,
        {"error": {"code": "RateLimitReached", "message": "Rate limit of 50 per 86400s exceeded "
                   "for UserByModelByDay. Please wait 36000 seconds before retrying."}},
        LimitError, wait=36000, limit=50, window=86_400,
    ),
    "Moonshot: requests per minute": Refused(
        "MoonshotAI/kimi-cli", 429,
        {"error": {"message": "Your account org-1<ak-2> request reached organization max RPM: 3, "
                   "please try again after 1 seconds", "type": "rate_limit_reached_error"}},
        LimitError, wait=1, limit=3, resource="requests", window=60,
    ),
    "Moonshot: concurrency": Refused(
        "MoonshotAI/kimi-cli", 429,
        {"error": {"message": "Your account org-1 request reached organization max concurrency: 1, "
                   "please try again after 1 seconds", "type": "rate_limit_reached_error"}},
        LimitError, wait=1,
    ),
    "Cohere: trial key": Refused(
        "cohere-ai/cohere-python", 429,
        {"message": "You are using a Trial key, which is limited to 10 API calls / minute. You can "
         "continue to use the Trial key for free or upgrade to a Production key."},
        LimitError, limit=10, resource="requests", window=60,
    ),
    "Together: limit of the model": Refused(
        "BerriAI/litellm", 429,
        {"error": {"message": "You have reached the rate limit specific to this model m. The "
                   "maximum rate limit for this model is 6.0 queries and 60000 tokens per minute.",
                   "type": "model_rate_limit", "code": None}},
        LimitError, "6.0 queries",
    ),
    "Hugging Face: model is loading": Refused(
        "huggingface/huggingface_hub", 503,
        {"error": "Model m is currently loading", "estimated_time": 20.0},
        errors.TransientError, "loading", wait=20,
    ),
    "Hugging Face: monthly credits": Refused(
        "huggingface/huggingface_hub", 402,
        {"error": "You have exceeded your monthly included credits for Inference Providers. "
         "Subscribe to PRO to get 20x more monthly included credits."},
        errors.QuotaError, "monthly included credits",
    ),
    "TGI: overloaded": Refused(
        "huggingface/text-generation-inference", 429,
        {"error": "Model is overloaded", "error_type": "overloaded"},
        errors.OverloadedError, "overloaded",
    ),
    "TGI: input too long": Refused(
        "huggingface/text-generation-inference", 422,
        {"error": "Input validation error: `inputs` must have less than 1000 tokens. Given: 1234",
         "error_type": "validation"},
        errors.TooLargeError, "1000 tokens",
    ),
    "vLLM: context": Refused(
        "vllm-project/vllm", 400,
        {"object": "error", "message": "This model's maximum context length is 4096 tokens. "
         "However, you requested 5000 tokens (4000 in the messages, 1000 in the completion).",
         "type": "BadRequestError", "param": None, "code": 400},
        errors.TooLargeError, "4096",
    ),
    "llama.cpp: context": Refused(
        "ggml-org/llama.cpp", 400,
        {"error": {"code": 400, "message": "the request exceeds the available context size, try "
                   "increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 5000,
                   "n_ctx": 4096}},
        errors.TooLargeError, "context size",
    ),
    "Anthropic: prompt too long": Refused(
        "Anthropic", 400,
        {"error": {"message": "prompt is too long: 210000 tokens > 200000 maximum",
                   "type": "invalid_request_error"}},
        errors.TooLargeError, "200000",
    ),
    "Anthropic: credit": Refused(
        "Anthropic", 400,
        {"error": {"message": "Your credit balance is too low to access the Anthropic API. Please "
                   "go to Plans & Billing to upgrade or purchase credits.",
                   "type": "invalid_request_error"}},
        errors.QuotaError, "credit balance",
    ),
    "Anthropic: overloaded": Refused(
        "anthropics/claude-code", 529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        errors.OverloadedError, "Overloaded",
    ),
    "DeepSeek: balance": Refused(
        "cline/cline", 402,
        {"error": {"message": "Insufficient Balance", "type": "unknown_error", "param": None,
                   "code": "invalid_request_error"}},
        errors.QuotaError, "Insufficient Balance",
    ),
    "xAI: no credits": Refused(
        "xAI", 403,
        {"code": "The caller does not have permission to execute the specified operation",
         "error": "Your newly created team doesn't have any credits yet. You can purchase credits "
         "on https://console.x.ai/team/t."},
        errors.QuotaError, "credits",
    ),
    "Mistral: capacity of the tier": Refused(
        "mistralai/client-python", 429,
        {"object": "error", "message": "Service tier capacity exceeded for this model.",
         "type": "service_tier_capacity_exceeded", "param": None, "code": "3505"},
        errors.TransientError, "capacity exceeded",
    ),
    "Vertex: exhausted without details": Refused(
        "googleapis/python-genai", 429,
        [{"error": {"code": 429, "message": "Resource exhausted. Please try again later.",
                    "status": "RESOURCE_EXHAUSTED"}}],
        LimitError, "Resource exhausted",
    ),
    "Bedrock: throttling": Refused(
        "aws-samples/bedrock-access-gateway", 429,
        {"detail": "An error occurred (ThrottlingException) when calling the ConverseStream "
         "operation: Too many tokens, please wait before trying again."},
        LimitError, "Too many tokens",
    ),
    "Cerebras: tokens per day": Refused(
        "Cerebras", 429,
        {"message": "Tokens per day limit exceeded - too many tokens processed.",
         "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"},
        LimitError, resource="tokens", window=86_400,
    ),
    "relay: no channel for the model": Refused(
        "QuantumNous/new-api", 503,
        {"error": {"message": "No available channel for model m under group default",
                   "type": "new_api_error", "code": "model_not_found"}},
        errors.ModelError, "No available channel",
    ),
    "unverified organization": Refused(
        "openai/openai-python", 400,
        {"error": {"message": "Your organization must be verified to stream this model.",
                   "type": "invalid_request_error", "param": "stream",
                   "code": "unsupported_value"}},
        errors.PermanentError, "must be verified",
    ),
    "output larger than the model's": Refused(
        "langchain-ai/langchain", 400,
        {"error": {"message": "max_tokens is too large: 100000. This model supports at most 16384 "
                   "completion tokens, whereas you provided 100000.",
                   "type": "invalid_request_error", "param": "max_tokens", "code": None}},
        errors.RequestError, "16384",
    ),
    "wrong path at FastAPI": Refused(
        "vllm-project/vllm", 404, {"detail": "Not Found"},
        errors.ModelError, "/v1",
    ),
    "FastAPI's refusal of the key": Refused(
        "ggml-org/llama.cpp", 401, {"detail": "Invalid API key"},
        errors.CredentialsError, "Invalid API key",
    ),
    "page of nginx for a body that is too large": Refused(
        "open-webui/open-webui", 413,
        b"<html><head><title>413 Request Entity Too Large</title></head></html>",
        errors.TooLargeError, headers=HTML,
    ),
    "page of Cloudflare for a timeout": Refused(
        "openai/openai-node", 524,
        b"<!DOCTYPE html><html><title>gateway.example | 524: A timeout occurred</title></html>",
        errors.ServerError, "524", headers=HTML,
    ),
    "retry-after as a date": Refused(
        "openai/openai-python", 429, {"error": {"message": "Slow."}}, LimitError, wait=30,
        headers={"retry-after": "Thu, 01 Jan 1970 00:00:30 GMT",
                 "date": "Thu, 01 Jan 1970 00:00:00 GMT", **JSON},
    ),
    "filter in the middle of Responses": Refused(
        "openai/openai-python", 200,
        event({"type": "response.output_text.delta", "delta": "Hel"})
        + event({"type": "response.incomplete", "response": {
            "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}}),
        errors.AnswerError, "filter", headers=SSE, api="responses",
    ),
    "error event of Responses without a type of its own": Refused(
        "openai/codex", 200,
        event({"type": "error", "error": {"type": "too_many_requests", "code": "too_many_requests",
                                          "message": "Too Many Requests"}}, "error"),
        LimitError, headers=SSE, api="responses",
    ),
    "limit in the middle of Responses": Refused(
        "openai/codex#506", 200,
        event({"type": "response.output_text.delta", "delta": "Hel"})
        + event({"type": "response.failed", "response": {"error": {
            "code": "rate_limit_exceeded", "message": "Rate limit reached for m in organization "
            "org-1 on tokens per min (TPM): Limit 30000, Used 22999, Requested 12528. Please try "
            "again in 11.054s."}}}),
        LimitError, wait=11.054, limit=30000, resource="tokens", window=60, headers=SSE,
        api="responses",
    ),
    "relay: no account left": Refused(
        "QuantumNous/new-api", 429,
        {"error": {"message": "The current group's upstream load is saturated, please try again "
                   "later", "type": "upstream_error", "code": "limit_burst_rate"}},
        errors.TransientError, "saturated",
    ),
    "hourly limit of Ollama's cloud": Refused(
        "ollama/ollama", 429,
        {"error": "you've reached your hourly usage limit, please upgrade to continue"},
        LimitError, "hourly",
    ),
}  # fmt: skip


@pytest.mark.parametrize("report", ANSWERS.values(), ids=ANSWERS)
def test_reported_answer_is_read(report: Answered) -> None:
    server = Server(Script(list(report.parts), 200, report.headers or SSE))
    events = play(server, chosen=settings(api=report.api))
    ending = events[-1]
    assert isinstance(ending, CompletedAnswer)
    assert text_of(events) == ending.text == report.text
    assert (ending.cut is None) == (report.cut is None)
    reasoning = "".join(each.text for each in events if isinstance(each, ReasoningDelta))
    assert reasoning.strip() == report.reasoning
    ending.text.encode()  # a lone surrogate could be neither stored nor sent to the page


def read_error(server: Server, api: str) -> Any:
    """Return the error that a request ends with: of the server, or of an unusable answer."""
    try:
        ending = play(server, chosen=settings(api=api))[-1]
        assert isinstance(ending, CompletedAnswer)
        judge(ending)
    except NbcodexError as error:
        return error
    pytest.fail("the answer was taken for a success")


@pytest.mark.parametrize("report", REFUSALS.values(), ids=REFUSALS)
def test_reported_refusal_is_classified(report: Refused) -> None:
    body = report.body if isinstance(report.body, bytes) else json.dumps(report.body).encode()
    server = Server(Script([body], report.status, report.headers or JSON))
    error = read_error(server, report.api)
    assert isinstance(error, report.error)
    assert report.words.lower() in f"{error.message} {error.advice}".lower()
    if report.wait is not None:
        assert error.wait == pytest.approx(report.wait, abs=0.01)
    if report.limit is not None:
        assert error.limit.limit == report.limit
    if report.resource is not None:
        assert error.limit.resource == report.resource
    if report.window is not None:
        assert error.limit.window == report.window
