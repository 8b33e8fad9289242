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
}
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
OVERLOADED_CODES = {
    "server_is_overloaded",
    "slow_down",
    "overloaded",
    "overloaded_error",  # Anthropic, with HTTP 529
    "engine_overloaded",
    "service_unavailable",
    "service_unavailable_error",
}
LIMIT_CODES = {
    "rate_limit_exceeded",
    "rate_limit_error",  # Anthropic
    "rate_limit_reached",
    "ratelimitreached",
    "too_many_requests",
    "toomanyrequests",
    "tokens",  # OpenAI's `type` names the resource
    "requests",
}
CREDENTIALS_CODES = {
    "invalid_api_key",
    "authentication_error",
    "permission_error",
    "permission_denied",
}
REQUEST_CODES = {"invalid_request_error", "invalid_prompt", "content_filter", "bad_request"}
REQUEST_CODE_PREFIXES = ("invalid_", "unsupported_", "image_", "empty_image", "missing_")
REQUEST_CODE_SUFFIXES = ("_policy", "policy_violation")

# Phrases of messages whose code does not say that the request is too large.
TOO_LARGE_PHRASES = (
    "request too large",
    "maximum context length",
    "context length exceeded",
    "context window",
    "available context size",
)

# Phrases of a refusal that objects to a parameter as such: OpenAI ("Unsupported parameter"), Groq
# ("is not supported"), pydantic servers ("Extra inputs are not permitted", "extra_forbidden").
UNSUPPORTED_PHRASES = (
    "unsupported",
    "not supported",
    "not support",
    "unrecognized",
    "unknown",
    "unexpected",
    "not permitted",
    "not allowed",
    "extra_forbidden",
)
