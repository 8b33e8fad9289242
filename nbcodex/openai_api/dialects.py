"""How servers differ: the error codes and phrases that have been seen, as data.

The literal list in OpenAI's SDK is incomplete and compatible servers have codes of their own, so
these are compared as plain lower-case strings. Sources: OpenAI's guide "Error codes", the
references of Azure, Groq, DeepSeek, llama.cpp and Anthropic's compatible endpoint, and public
issue threads.
"""

from __future__ import annotations

# Values of an error's `code` or `type`, by what they mean.

QUOTA_CODES = {
    "insufficient_quota",  # arrives as HTTP 429, but waiting does not help (openai/codex #506)
    "billing_hard_limit_reached",
    "billing_not_active",
    "insufficient_balance",  # DeepSeek, with HTTP 402
    "account_deactivated",
    "credit_balance_exhausted",  # this and the next three are OpenAI's of 2026, with any `type`
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "insufficient_credits",
    "1008",  # MiniMax: insufficient balance
    "1113",  # GLM: no balance left
}

# What happened and what to do, for the codes of OpenAI's guide "Error codes" that are not about
# credit. {reset} is the first day of the next month, when a monthly limit begins anew.
_LIMITS_PAGE = "platform.openai.com/settings/organization/limits"
QUOTA_TEXTS = {
    "organization_spend_limit_exceeded": (
        "The organization's monthly spend limit is reached",
        f"An owner can raise it at {_LIMITS_PAGE}; it resets on {{reset}}.",
    ),
    "project_spend_limit_exceeded": (
        "The project's monthly spend limit is reached",
        "Raise it in the project's limits at platform.openai.com/settings, or use another project "
        "(OPENAI_PROJECT_ID); it resets on {reset}.",
    ),
    "organization_usage_limit_exceeded": (
        "The organization's monthly usage limit is reached",
        f"Ask for a higher usage tier at {_LIMITS_PAGE}; it resets on {{reset}}.",
    ),
}
# LiteLLM's provider budgets, and a quota behind a proxy that changes code and type.
QUOTA_PHRASES = ("crossed budget", "exceeded budget", "exceeded your current quota")
# Missing credit that is refused with HTTP 400 (Anthropic) or 403 (xAI).
CREDIT_PHRASES = ["credit balance is too low", "have any credits", "insufficient balance"]
# With HTTP 429 and 403 (xAI), and for a subscription that is used up (Kimi).
CREDIT_PHRASES += ["all available credits", "out of credits", "limit for this billing cycle"]
# How messages of providers behind OpenRouter say that the failure is temporary.
TEMPORARY_PHRASES = ("rate limit", "rate-limit", "too many", "busy", "overloaded")
TOO_LARGE_CODES = {
    "context_length_exceeded",
    "exceed_context_size_error",  # llama.cpp
    "string_above_max_length",
    "request_too_large",  # Anthropic
}
MODEL_CODES = {
    "model_not_found",
    "deploymentnotfound",  # Azure
    "model_not_available",
    "unknown_model",
}
# Relays (one-api #2340, new-api #6310), and LiteLLM.
MODEL_PHRASES = ("no available channel", "无可用渠道", "invalid model name")
# OpenAI, with HTTP 429 or 503: the traffic of this account grows too fast.
GROWTH_CODE = "slow_down"
# GLM: too many requests at once.
PARALLEL_CODE = "1302"
# Parts of codes: ``server_is_overloaded``, Anthropic's ``overloaded_error`` (HTTP 529), Moonshot's
# ``engine_overloaded_error`` (429), ``service_unavailable`` and Google's ``UNAVAILABLE``, and
# ``capacity_exceeded`` of Groq's flex tier (498).
OVERLOADED_WORDS = ("overloaded", "unavailable", "capacity_exceeded")
OVERLOADED_PHRASES = ("no capacity available", "currently overloaded")  # HTTP 429: Google, Kimi
LIMIT_PHRASES = ("request limit reached", "rate limit reached")  # HTTP 200: Baidu
LIMIT_CODES = {
    "resource_exhausted",  # Google's `status`
    "1002",  # MiniMax
    PARALLEL_CODE,
    "1303",  # GLM: too many requests per minute; 1305: in all
    "1305",
    "336501",  # Baidu: requests per minute; 336502: tokens per minute
    "336502",
    "tokens",  # OpenAI's `type` names the resource
    "requests",
    "usage_limit_reached",  # ChatGPT's plans
}
# Such as ``rate_limit_exceeded``, and Anthropic's ``rate_limit_error``.
LIMIT_CODE_PREFIXES = ("rate_limit", "ratelimit", "too_many_requests", "toomanyrequests")
CREDENTIALS_CODES = {
    "invalid_api_key",
    "authentication_error",
    "permission_error",
    "permission_denied",
    "unauthenticated",  # Google's `status`
}
REQUEST_CODES = {
    "content_filter",
    "bad_request",
    "extra_forbidden",  # pydantic (Mistral, vLLM)
}
# Such as ``invalid_request_error``, and Google's ``invalid_argument``.
REQUEST_CODE_PREFIXES = ("invalid_", "unsupported_", "image_", "empty_image", "missing_")
REQUEST_CODE_SUFFIXES = ("_policy", "policy_violation")

# Codes that make an error the request's own fault even under HTTP 5xx: relays wrap a 400 of the
# provider as 500 (claude-code-router #849).
WRAPPED_REQUEST_CODES = {
    "invalid_request_error",
    "unsupported_value",
    "unsupported_parameter",
    "unknown_parameter",
    "invalid_value",
    "invalid_type",
    "missing_required_parameter",
}

# Phrases of messages whose code does not say that the request is too large.
TOO_LARGE_PHRASES = (
    "request too large",
    "maximum context length",
    "context length exceeded",
    "context window",
    "available context size",
    "prompt is too long",  # Anthropic
    "maximum prompt length",  # xAI
    "input token count",  # Gemini: "... exceeds the maximum number of tokens allowed"
    "`inputs` must have less than",  # TGI
    "`inputs` tokens + `max_new_tokens`",  # TGI
    "reduce the length of the messages",  # Groq
    "input is too long",  # Bedrock
    "tokens must be at least 1, got -",  # vLLM: what the prompt leaves of the context
)

# Phrases of a refusal that objects to a parameter as such: OpenAI ("Unsupported parameter"), Groq
# ("is not supported"), pydantic servers ("Extra inputs are not permitted", "extra_forbidden").
UNSUPPORTED_PHRASES = (
    "unsupported",
    "not support",
    "unrecognized",
    "unknown",
    "unexpected",
    "not permitted",
    "not allowed",
    "extra_forbidden",
)

# How servers say, sometimes with HTTP 200, that an address is not one of their API's: LM Studio
# (lmstudio-bug-tracker #618), Ollama, FastAPI, Express.
NO_SUCH_CALL_PHRASES = ("unexpected endpoint or method", "404 page not found", "cannot post /")

# Members of a message with its reasoning: DeepSeek and vLLM, OpenRouter and Ollama, MiniMax.
REASONING_MEMBERS = ("reasoning_content", "reasoning", "reasoning_details")
# Tags in which local reasoning models put their reasoning into the text: DeepSeek R1, Qwen and GLM
# (vllm #13375), Magistral.
REASONING_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"}

# The words of rate-limit headers. Names are split at hyphens: ``x-ratelimit-limit-tokens-minute``
# (Cerebras), ``anthropic-ratelimit-input-tokens-reset``, ``x-ratelimit-remaining-req-minute``
# (Mistral), ``x-ratelimit-reset-requests-1h``, ``ratelimit-limit`` (IETF draft, Telnyx). What is in
# none of these tables ("project", "input") distinguishes limits of one resource.
HEADER_FIGURES = {"limit", "remaining", "reset", "used"}
HEADER_RESOURCES = {"requests", "request", "req", "tokens", "token"}
WINDOWS_S = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours", "hourly"), 3600.0),
    **dict.fromkeys(("d", "day", "days", "daily"), 86_400.0),
    **dict.fromkeys(("week", "weekly"), 604_800.0),
}

# Values of `finish_reason` (Chat) and of `incomplete_details.reason` (Responses), in lower case and
# without the prefix that Google's enum has, by what they mean.
NORMAL_ENDINGS = {
    "stop",
    "eos",  # TGI, together with eos_token
    "eos_token",
    "end",
    "end_turn",  # Anthropic
    "stop_sequence",
    "complete",  # Cohere
    "completed",
}
MAX_OUTPUT_ENDINGS = {
    "length",
    "max_tokens",  # Anthropic, Gemini
    "max_output_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "model_length",  # Mistral: the context window is full
    "token_limit",
}
FILTER_ENDINGS = {
    "content_filter",
    "content_filtered",
    "safety",  # this and the next four are Gemini's
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "sensitive",  # GLM
}
TOOL_ENDINGS = {"tool_calls", "tool_call", "tool_use", "function_call"}
FAILED_ENDINGS = {
    "error",  # OpenRouter, in mid-answer with HTTP 200 (CherryHQ/cherry-studio #16079)
    "abort",  # vLLM and SGLang, when the request is evicted
    "aborted",
    "cancelled",
    "canceled",
    "failed",
    "insufficient_system_resource",  # DeepSeek
    "network_error",  # GLM
    "timeout",
}
