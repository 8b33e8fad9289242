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
WHOLE_ANSWER = json.dumps({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]})

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
        "AbanteAI/archive-old-cli-mentat#429, simonw/llm#294",
        [event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}), chunk("Hello"),
         chunk(finish="stop"), DONE],
        "Hello",
    ),
    "null delta": Answered(
        "BerriAI/litellm#3811",
        [event({"choices": [{"index": 0, "delta": None}]}), chunk("Hello"), chunk(finish="stop")],
        "Hello",
    ),
    "null choices": Answered(
        "pydantic/pydantic-ai#5170",
        [chunk("Hello"), chunk(finish="stop"),
         event({"choices": None, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}), DONE],
        "Hello",
    ),
    "no space after the colon": Answered(
        "openai/openai-python#498",
        raw(f"data:{delta_line('Hello')}", f"data:{FINISH}", "data:[DONE]"),
        "Hello",
    ),
    "carriage returns and comments": Answered(
        "openai/openai-go#227",
        raw(": OPENROUTER PROCESSING", f"data: {delta_line('Hello')}", f"data: {FINISH}",
            "data: [DONE]", end="\r\n\r\n"),
        "Hello",
    ),
    "byte order mark": Answered(
        "openai/openai-python#3819",
        [b"\xef\xbb\xbf", *raw(f"data: {delta_line('Hello')}", f"data: {FINISH}")],
        "Hello",
    ),
    "no end marker after a finish reason": Answered(
        "ikawrakow/ik_llama.cpp#467",
        [chunk("Hello"), chunk(finish="stop")],
        "Hello",
    ),
    "last event without a blank line": Answered(
        "openai/openai-node#2725",
        [chunk("Hello"), f"data: {FINISH}\n".encode()],
        "Hello",
    ),
    "one JSON answer where a stream was asked for": Answered(
        "continuedev/continue#1108",
        [json.dumps({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]})
         .encode()],
        "Hello",
        headers=JSON,
    ),
    "event stream with another content type": Answered(
        "microsoft/foundry-dev-tools#195",
        [chunk("Hello"), chunk(finish="stop"), DONE],
        "Hello",
        headers=JSON,
    ),
    "gzip within the event stream": Answered(
        "btubbs/sseclient#36",
        [gzip.compress(chunk("Hello") + chunk(finish="stop") + DONE)],
        "Hello",
        headers={**SSE, "content-encoding": "gzip"},
    ),
    "gzip under its old name": Answered(
        "RFC 9110, section 8.4.1.3",
        [gzip.compress(chunk("Hello") + chunk(finish="stop") + DONE)],
        "Hello",
        headers={**SSE, "content-encoding": "X-Gzip"},
    ),
    "character split over chunks of bytes": Answered(
        "api7/aisix#111",
        [part for byte in chunk("Grüße 👋", finish="stop") for part in [bytes([byte])]],
        "Grüße 👋",
    ),
    "surrogate pair split over two deltas": Answered(
        "elie222/rakazo#416",
        [*raw('data: {"choices":[{"index":0,"delta":{"content":"Hi \\ud83d"}}]}',
              'data: {"choices":[{"index":0,"delta":{"content":"\\udc4b"}}]}'),
         chunk(finish="stop")],
        "Hi 👋",
    ),
    "reasoning under the name reasoning": Answered(
        "vllm-project/vllm#27755, ahwurm/localharness#142",
        [reasoning_chunk("Hm.", "reasoning"), chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "reasoning twice under two names": Answered(
        "MoonshotAI/kimi-code#3928",
        [event({"choices": [{"delta": {"role": "assistant", "content": "", "reasoning": "Hm.",
                                       "reasoning_content": "Hm."}}]}),
         chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "text only in the done event": Answered(
        "Sophomoresty/gemini-web2api#57",
        [event({"type": "response.created", "response": {"model": "m"}}),
         event({"type": "response.output_text.done", "text": "Hello"}),
         event({"type": "response.completed", "response": {"model": "m", "status": "completed",
                "output": [{"type": "message", "content": [
                    {"type": "output_text", "text": "Hello"}]}]}})],
        "Hello",
        api="responses",
    ),
    "unknown events between known ones": Answered(
        "openai/openai-node#1964, OpenRouterTeam/python-sdk#266, diegosouzapw/OmniRoute#14330",
        [event({"type": "response.in_progress"}),
         event({"type": "response.created", "response": {"model": "m"}}),
         event({"type": "keepalive", "sequence_number": 2}),
         event({"type": "response.output_text.delta", "delta": "Hello"}),
         event({"type": "response.keep_alive"}),
         event({"type": "response.completed", "response": {"model": "m"}})],
        "Hello",
        api="responses",
    ),
    "empty object between chunks": Answered(
        "ggml-org/llama.cpp#10694",
        [chunk("Hello"), event({}), chunk(finish="stop"), DONE],
        "Hello",
    ),
    "choice without a delta after the end": Answered(
        "microsoft/autogen#6465",
        [chunk("Hello"), chunk(finish="stop"),
         event({"id": "", "model": "", "object": "", "created": 0, "choices": [
             {"index": 0, "finish_reason": None, "content_filter_offsets": {"check_offset": 3329},
              "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}]}),
         DONE],
        "Hello",
    ),
    "reasoning beside its summary": Answered(
        "OpenRouterTeam/ai-sdk-provider#122",
        [event({"choices": [{"index": 0, "delta": {
            "content": "", "reasoning": "Hm.",
            "reasoning_details": [{"type": "reasoning.summary", "summary": "Hm."}]}}]}),
         chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "comment as data before the chunks": Answered(
        "mnfst/llm-gateway#2053",
        [*raw("data: : OPENROUTER PROCESSING"), chunk("Hello"), chunk(finish="stop"), DONE],
        "Hello",
    ),
    "end marker after one JSON answer": Answered(
        "decolua/9router#3492",
        [WHOLE_ANSWER.encode() + b"\n\ndata: [DONE]\n\n"],
        "Hello",
        headers=JSON,
    ),
    "end marker after one JSON answer, without a content type": Answered(
        "decolua/9router#3492",
        [WHOLE_ANSWER.encode(), b"data: [DONE]"],
        "Hello",
        headers={},
    ),
    "end marker within the text of one JSON answer": Answered(
        "decolua/9router#3492",
        [WHOLE_ANSWER.replace("Hello", ": data: [DONE]").encode()],
        ": data: [DONE]",
        headers=JSON,
    ),
    "reasoning in its details alone": Answered(
        "BerriAI/litellm#31890, MiniMax-AI/MiniMax-M2#95",
        [event({"choices": [{"index": 0, "delta": {
            "content": "", "reasoning_details": [{"type": "reasoning.text", "text": text}]}}]})
         for text in ("H", "m.")] + [chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
    ),
    "reasoning in the summaries of its details alone": Answered(
        "OpenRouterTeam/ai-sdk-provider#122",
        [event({"choices": [{"index": 0, "delta": {"reasoning_details": [
            {"type": "reasoning.summary", "summary": "Hm."},
            {"type": "reasoning.encrypted", "data": "e30="}]}}]}),
         chunk("Hello"), chunk(finish="stop")],
        "Hello",
        reasoning="Hm.",
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
    "page of a gateway's web interface": Refused(
        "atopos31/llmio#42", 200,
        b'<!doctype html>\n<html lang="zh"><head><title>New API</title></head></html>',
        NbcodexError, "web page", headers=HTML,
    ),
    "status in the body of a 200": Refused(
        "CherryHQ/cherry-studio#11287", 200,
        {"choices": None, "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
         "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        errors.TransientError, "rate limit",
    ),
    "Baidu's error in a 200": Refused(
        "songquanpeng/one-api#1503", 200,
        {"error_code": 17, "error_msg": "Open api daily request limit reached"},
        LimitError, "daily request limit reached", resource="requests", window=86_400,
    ),
    "Ollama's runner failed": Refused(
        "ollama/ollama#8258", 500,
        {"error": "an error was encountered while running the model: unexpected EOF"},
        errors.ServerError, "unexpected EOF",
    ),
    "Ollama's model is missing": Refused(
        "netease-youdao/QAnything#555", 404,
        {"error": {"message": 'model "llama9" not found, try pulling it first',
                   "type": "api_error", "param": None, "code": None}},
        errors.ModelError, "llama9",
    ),
    "Ollama's memory": Refused(
        "continuedev/continue#12795", 500,
        {"error": {"message": "model requires more system memory (7.5 GiB) than is available "
                   "(5.2 GiB)", "type": "api_error"}},
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
        "alex-wolf-ps/dbchatprov2#2", 429,
        {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation "
                   "under Azure OpenAI API version 2024-05-01-preview have exceeded token rate "
                   "limit of your current OpenAI S0 pricing tier. Please retry after 86400 "
                   "seconds."}},
        LimitError, wait=86_400,
    ),
    "Azure: filter with its category": Refused(
        "compl-ai/compl-ai#20", 400,
        {"error": {"code": "content_filter", "status": 400, "param": "prompt", "message":
                   "The response was filtered due to the prompt triggering Azure OpenAI's content "
                   "management policy.", "innererror": {
                       "code": "ResponsibleAIPolicyViolation", "content_filter_result": {
                           "violence": {"filtered": True, "severity": "medium"}}}}},
        errors.RequestError, "content management policy",
    ),
    "Azure: missing deployment": Refused(
        "chatboxai/chatbox#861", 404,
        {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource "
                   "does not exist. If you created the deployment within the last 5 minutes, "
                   "please wait a moment and try again."}},
        errors.ModelError, "deployment",
    ),
    "OpenRouter: credits for fewer tokens": Refused(
        "QwenLM/qwen-code#73", 402,
        {"error": {"message": "This request requires more credits, or fewer max_tokens. You "
                   "requested up to 225702 tokens, but can only afford 92985.", "code": 402}},
        errors.QuotaError, "92985",
    ),
    "GitHub Models: per day": Refused(
        "Microsoft Q&A 2156697", 429,
        {"error": {"code": "RateLimitReached", "message": "Rate limit of 8 per 86400s exceeded "
                   "for UserByModelByDay. Please wait 83652 seconds before retrying."}},
        LimitError, wait=83_652, limit=8, resource="requests", window=86_400,
    ),
    "Moonshot: requests per minute": Refused(
        "MoonshotAI/Kimi-K2#34", 429,
        {"error": {"message": "Your account org-1<ak-2> request reached organization max RPM: 3, "
                   "please try again after 1 seconds", "type": "rate_limit_reached_error"}},
        LimitError, wait=1, limit=3, resource="requests", window=60,
    ),
    "Moonshot: limit without its window": Refused(
        "harry0703/MoneyPrinterTurbo#339", 429,
        {"error": {"message": "Your account org-1 request reached max request: 3, please try "
                   "again after 1 seconds", "type": "rate_limit_reached_error"}},
        LimitError, wait=1,
    ),
    "Cohere: trial key": Refused(
        "cohere-ai/cohere-python#325", 429,
        {"message": "You are using a Trial key, which is limited to 10 API calls / minute. You can "
         "continue to use the Trial key for free or upgrade to a Production key."},
        LimitError, limit=10, resource="requests", window=60,
    ),
    "Together: limit of the model": Refused(
        "xtekky/gpt4free#3032", 429,
        {"error": {"message": "You have reached the rate limit specific to this model m. The "
                   "maximum rate limit for this model is 9.0 queries per minute.",
                   "type": "model_rate_limit", "code": None}},
        LimitError, limit=9, resource="requests", window=60,
    ),
    "Hugging Face: model is loading": Refused(
        "huggingface/unity-api#18, BerriAI/litellm#1242", 503,
        {"error": "Model m is currently loading", "estimated_time": 20.0},
        errors.TransientError, "loading", wait=20,
    ),
    "Hugging Face: monthly credits": Refused(
        "huggingface/agents-course#386", 402,
        {"error": "You have exceeded your monthly included credits for Inference Providers. "
         "Subscribe to PRO to get 20x more monthly included credits."},
        errors.QuotaError, "monthly included credits",
    ),
    "TGI: overloaded": Refused(
        "huggingface/text-generation-inference#439, philschmid/easyllm#34", 429,
        {"error": "Model is overloaded", "error_type": "overloaded"},
        errors.OverloadedError, "overloaded",
    ),
    "TGI: input too long": Refused(
        "h2oai/h2ogpt#373", 422,
        {"error": "Input validation error: `inputs` must have less than 2048 tokens. Given: 2222",
         "error_type": "validation"},
        errors.TooLargeError, "2048 tokens",
    ),
    "vLLM: context": Refused(
        "ogx-ai/ogx#4534", 400,
        {"object": "error", "message": "This model's maximum context length is 6048 tokens. "
         "However, you requested 6616 tokens (568 in the messages, 6048 in the completion).",
         "type": "BadRequestError", "param": None, "code": 400},
        errors.TooLargeError, "6048",
    ),
    "llama.cpp: context": Refused(
        "oobabooga/textgen#7257", 400,
        {"error": {"code": 400, "message": "the request exceeds the available context size. try "
                   "increasing the context size or enable context shift",
                   "type": "exceed_context_size_error", "n_prompt_tokens": 14429, "n_ctx": 8192}},
        errors.TooLargeError, "context size",
    ),
    "llama.cpp: context as a fault of the server": Refused(
        "ggml-org/llama.cpp#15780", 500,
        {"error": {"code": 500, "message": "the request exceeds the available context size. try "
                   "increasing the context size or enable context shift",
                   "type": "exceed_context_size_error", "n_prompt_tokens": 1407, "n_ctx": 256}},
        errors.TooLargeError, "context size",
    ),
    "Anthropic: prompt too long": Refused(
        "earendil-works/pi#102", 400,
        {"type": "error", "error": {
            "type": "invalid_request_error",
            "message": "prompt is too long: 219898 tokens > 200000 maximum"}},
        errors.TooLargeError, "200000",
    ),
    "Anthropic: credit": Refused(
        "anthropics/claude-code#4684, continuedev/continue#5499", 400,
        {"error": {"message": "Your credit balance is too low to access the Anthropic API. Please "
                   "go to Plans & Billing to upgrade or purchase credits.",
                   "type": "invalid_request_error"}},
        errors.QuotaError, "credit balance",
    ),
    "Anthropic: overloaded": Refused(
        "anthropics/claude-code#39745", 529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded."}},
        errors.OverloadedError, "Overloaded",
    ),
    "DeepSeek: balance behind a gateway": Refused(
        "cline/cline#7854", 402,
        {"error": {"message": "Insufficient Balance", "type": "AI_APICallError", "param": {
            "error": "Insufficient Balance", "statusCode": 402, "isRetryable": False}}},
        errors.QuotaError, "Insufficient Balance",
    ),
    "xAI: no credits": Refused(
        "griptape-ai/griptape-nodes-engine#1079", 403,
        {"code": "The caller does not have permission to execute the specified operation",
         "error": "Your newly created teams doesn't have any credits yet. You can purchase credits "
         "on https://console.x.ai/team/t."},
        errors.QuotaError, "credits",
    ),
    "Mistral: capacity of the tier": Refused(
        "continuedev/continue#6185", 429,
        {"object": "error", "message": "Service tier capacity exceeded for this model.",
         "type": "invalid_request_error", "param": None, "code": None},
        errors.TransientError, "capacity exceeded",
    ),
    "Vertex: exhausted without details": Refused(
        "continuedev/continue#8967", 429,
        [{"error": {"code": 429, "message": "Resource exhausted. Please try again later.",
                    "status": "RESOURCE_EXHAUSTED"}}],
        LimitError, "Resource exhausted",
    ),
    "Bedrock: throttling": Refused(
        "strands-agents/agent-builder#31, aws-samples/bedrock-access-gateway#91", 429,
        {"detail": "An error occurred (ThrottlingException) when calling the ConverseStream "
         "operation: Too many tokens, please wait before trying again."},
        LimitError, "Too many tokens",
    ),
    "Cerebras: requests per minute": Refused(
        "nminaya/grammar-nazi-bot#958", 429,
        {"message": "Requests per minute limit exceeded - too many requests sent.",
         "type": "too_many_requests_error", "param": "quota", "code": "request_quota_exceeded"},
        LimitError, resource="requests", window=60,
    ),
    "Cerebras: tokens per minute": Refused(
        "continuedev/continue#9800", 429,
        {"message": "Tokens per minute limit exceeded - too many tokens processed.",
         "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"},
        LimitError, resource="tokens", window=60,
    ),
    "Bedrock: tokens per day": Refused(
        "minorun365/agent-book#29", 429,
        {"detail": "An error occurred (ThrottlingException) when calling the Converse operation: "
         "Too many tokens per day, please wait before trying again."},
        LimitError, resource="tokens", window=86_400,
    ),
    "relay: no channel for the model": Refused(
        "QuantumNous/new-api#6310, QuantumNous/new-api#6915", 503,
        {"error": {"message": "No available channel for model m under group default "
                   "(distributor) (request id: 1)", "type": "new_api_error",
                   "code": "model_not_found"}},
        errors.ModelError, "No available channel",
    ),
    "unverified organization": Refused(
        "continuedev/continue#8209", 400,
        {"error": {"message": "Your organization must be verified to stream this model.",
                   "type": "invalid_request_error", "param": "stream",
                   "code": "unsupported_value"}},
        errors.PermanentError, "must be verified",
    ),
    "output larger than the model's": Refused(
        "algorithmicsuperintelligence/optillm#4", 400,
        {"error": {"message": "max_tokens is too large: 8192. This model supports at most 4096 "
                   "completion tokens, whereas you provided 8192.",
                   "type": "invalid_request_error", "param": "max_tokens", "code": None}},
        errors.RequestError, "4096",
    ),
    "reason in the place of the parameter": Refused(
        "AQBot-Desktop/AQBot#93", 400,
        {"error": {"message": "Param Incorrect", "type": "upstream_error", "code": "400",
                   "param": "max_tokens is too large: 1048576. This model supports at most "
                   "131072 completion tokens, whereas you provided 1048576."}},
        errors.RequestError, "131072",
    ),
    "wrong path at FastAPI": Refused(
        "hiyouga/LlamaFactory#4868, BerriAI/litellm#9367", 404, {"detail": "Not Found"},
        errors.ModelError, "/v1",
    ),
    "llama.cpp: wrong key": Refused(
        "ggml-org/llama.cpp#14352", 401,
        {"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}},
        errors.CredentialsError, "Invalid API Key",
    ),
    "page of nginx for a body that is too large": Refused(
        "open-webui/open-webui#3273", 413,
        b"<html><head><title>413 Request Entity Too Large</title></head></html>",
        errors.TooLargeError, headers=HTML,
    ),
    "page of Cloudflare for a timeout": Refused(
        "langgenius/dify#20016", 524,
        b"<!DOCTYPE html><html><title>gateway.example | 524: A timeout occurred</title></html>",
        errors.ServerError, "524", headers=HTML,
    ),
    "retry-after as a date": Refused(
        "vellum-ai/vellum-assistant#3404", 429, {"error": {"message": "Slow."}}, LimitError,
        wait=30,
        headers={"retry-after": "Thu, 01 Jan 1970 00:00:30 GMT",
                 "date": "Thu, 01 Jan 1970 00:00:00 GMT", **JSON},
    ),
    "filter in the middle of Responses": Refused(
        "langchain4j/langchain4j#6182", 200,
        event({"type": "response.output_text.delta", "delta": "Hel"})
        + event({"type": "response.incomplete", "response": {
            "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}}),
        errors.AnswerError, "filter", headers=SSE, api="responses",
    ),
    "failure without a reason, then its reason": Refused(
        "earendil-works/pi#7983", 200,
        event({"type": "response.failed", "response": {"status": "failed", "error": None,
                                                       "incomplete_details": None}})
        + event({"type": "error", "error": {
            "type": "too_many_requests", "code": "rate_limit_exceeded",
            "message": "Your requests to the deployment have exceeded rate limit."}}),
        LimitError, "exceeded rate limit", headers=SSE, api="responses",
    ),
    "error event of Responses without a type of its own": Refused(
        "openai/codex#23006", 200,
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
    "relay: upstream saturated": Refused(
        "WEIFENG2333/VideoCaptioner#1120", 429,
        {"error": {"message": "当前分组上游负载已饱和\uff0c请稍后再试 (request id: 1)",
                   "type": "upstream_error", "param": "404", "code": "bad_response_status_code"}},
        errors.TransientError, "饱和",
    ),
    "hourly limit of Ollama's cloud": Refused(
        "continuedev/continue#9233", 429,
        {"error": "you've reached your hourly usage limit, please wait or upgrade to continue"},
        LimitError, "hourly", window=3600,
    ),
    "weekly limit of Ollama's cloud": Refused(
        "diegosouzapw/OmniRoute#3709", 429,
        {"error": "you (user) have reached your weekly usage limit, upgrade for higher limits: "
         "https://ollama.com/upgrade"},
        LimitError, "weekly", window=604_800,
    ),
    "session limit of Ollama's cloud": Refused(
        "continuedev/continue#11444", 429,
        {"error": "you (user) have reached your session usage limit, upgrade for higher limits: "
         "https://ollama.com/upgrade"},
        LimitError, "session usage limit",
    ),
    "error of a relay as a string in an error event": Refused(
        "octos-org/octos#13", 200,
        chunk("Hel") + event({"error": "Stream error: Internal Network Failure"}, "error"),
        errors.ServerError, "Internal Network Failure", headers=SSE,
    ),
    "Baidu: requests per minute": Refused(
        "PaddlePaddle/ERNIE#1031", 429,
        {"error": {"code": "rpm_rate_limit_exceeded", "message": "Rate limit reached for RPM",
                   "type": "rate_limit_exceeded"}, "id": "as-1"},
        LimitError, resource="requests", window=60,
    ),
    "OpenRouter: reason of the provider": Refused(
        "BeehiveInnovations/pal-mcp-server#134", 400,
        {"error": {"message": "Provider returned error", "code": 400, "metadata": {
            "raw": json.dumps({"error": {
                "message": "Your organization must be verified to stream this model.",
                "type": "invalid_request_error", "param": "stream",
                "code": "unsupported_value"}})}}},
        errors.PermanentError, "must be verified",
    ),
    "Gemini: no capacity": Refused(
        "google-gemini/gemini-cli#23520", 503,
        {"error": {"code": 503, "message": "No capacity available for model on the server",
                   "status": "UNAVAILABLE", "details": [
                       {"@type": "type.googleapis.com/google.rpc.ErrorInfo",
                        "reason": "MODEL_CAPACITY_EXHAUSTED"}]}},
        errors.OverloadedError, "No capacity",
    ),
    "Gemini: no capacity, as a limit": Refused(
        "google-gemini/gemini-cli#27548", 429,
        {"error": {"code": 429, "message": "No capacity available for model m on the server",
                   "status": "RESOURCE_EXHAUSTED"}},
        errors.OverloadedError, "No capacity",
    ),
    "Moonshot: overloaded": Refused(
        "MoonshotAI/kimi-cli#2209, 666ghj/BettaFish#292", 429,
        {"error": {"message": "The engine is currently overloaded, please try again later",
                   "type": "engine_overloaded_error"}},
        errors.OverloadedError, "currently overloaded",
    ),
    "Moonshot: overloaded, as a limit": Refused(
        "MoonshotAI/kimi-cli#1695", 429,
        {"type": "error", "error": {
            "type": "rate_limit_error",
            "message": "The engine is currently overloaded, please try again later"}},
        errors.OverloadedError, "currently overloaded",
    ),
    "Kimi: subscription used up": Refused(
        "NanmiCoder/cc-haha#1208, Kilo-Org/kilocode#11403", 403,
        {"type": "error", "error": {
            "type": "permission_error", "message": "You've reached your usage limit for this "
            "billing cycle. Your quota will be refreshed in the next cycle."}},
        errors.QuotaError, "billing cycle",
    ),
    "xAI: credits used up or spending limit reached": Refused(
        "continuedev/continue#10373", 429,
        {"code": "Some resource has been exhausted", "error": "Your team 1 has either used all "
         "available credits or reached its monthly spending limit. To continue making API "
         "requests, please purchase more credits or raise your spending limit."},
        errors.QuotaError, "spending limit",
    ),
    "xAI: credits or subscription": Refused(
        "Wei-Shaw/sub2api#4069", 403,
        {"code": "permission-denied", "error": "You have run out of credits or need a Grok "
         "subscription. Add credits at https://grok.example."},
        errors.QuotaError, "run out of credits",
    ),
    "Anthropic: input tokens per minute": Refused(
        "FoundationAgents/OpenManus#746", 429,
        {"error": {"code": "rate_limit_error", "message": "This request would exceed the rate "
                   "limit for your organization of 20,000 input tokens per minute. For details, "
                   "refer to: https://docs.anthropic.com/en/api/rate-limits.",
                   "type": "invalid_request_error", "param": None}},
        LimitError, limit=20_000, resource="tokens", window=60,
    ),
    "Anthropic: input tokens per minute of a named organization": Refused(
        "continuedev/continue#9623", 429,
        {"type": "rate_limit_error", "message": "This request would exceed the rate limit for "
         "your organization (c26fc127-ba09-49d3-a086-a2f26380d5e7) of 30,000 input tokens per "
         "minute. For details, refer to: https://docs.claude.com/en/api/rate-limits."},
        LimitError, limit=30_000, resource="tokens", window=60,
    ),
    "Anthropic: tokens per minute of the organization": Refused(
        "continuedev/continue#12057", 429,
        {"type": "rate_limit_error", "message": "This request would exceed your organization's "
         "rate limit of 30,000 input tokens per minute (org: 1, model: m)."},
        LimitError, limit=30_000, resource="tokens", window=60,
    ),
    "Together: queries per minute": Refused(
        "togethercomputer/MoA#27", 429,
        {"error": {"message": "You have been rate limited. Your rate limit is 60 queries per "
                   "minute. Please navigate to https://www.together.ai/forms/rate-limit-increase "
                   "to request a rate limit increase.", "type": "credit_limit"}},
        LimitError, limit=60, resource="requests", window=60,
    ),
    "OpenAI: tokens without a model": Refused(
        "stanford-crfm/helm#97", 429,
        {"error": {"message": "Rate limit reached for tokens. Limit: 150000.000000 / min. "
                   "Current: 176000.000000 / min.", "type": None, "code": None}},
        LimitError, limit=150_000, resource="tokens", window=60,
    ),
    "Azure AI Foundry: uncached input tokens per minute": Refused(
        "wording of Azure AI Foundry, from the tests of several public clients", 429,
        {"error": {"code": "RateLimitReached", "message": "Rate limit of 300000 per 60s exceeded "
                   "for UserByModelByMinuteUncachedInputTokens. Please wait 23 seconds before "
                   "retrying."}},
        LimitError, wait=23, limit=300_000, resource="tokens", window=60,
    ),
    "GitHub Copilot: wait among advice": Refused(
        "github/copilot-cli#2787", 429,
        {"error": {"message": "You've hit your global rate limit. Please upgrade your plan or "
                   "wait 6 seconds for your limit to reset.", "code": "rate_limited"}},
        LimitError, wait=6,
    ),
    "relay: no channel, in Chinese": Refused(
        "songquanpeng/one-api#2340", 503,
        {"error": {"message": "当前分组 default 下对于模型  无可用渠道 (request id: 1)",
                   "type": "one_api_error"}},
        errors.ModelError, "无可用渠道",
    ),
    "relay: no channel, without a code": Refused(
        "a37836323/-chatgpt4.0-api-key#2", 503,
        {"error": {"message": "No available channels for model  in group default "
                   "(request id: 1)", "type": "new_api_error"}},
        errors.ModelError, "No available channels",
    ),
    "vLLM: prompt larger than the context": Refused(
        "vllm-project/vllm#4667", 400,
        {"object": "error", "message": "max_tokens must be at least 1, got -186.",
         "type": "BadRequestError", "param": None, "code": 400},
        errors.TooLargeError, "-186",
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
