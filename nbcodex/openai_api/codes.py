"""The codes and types that servers put on failures, in lower case, and what a user can do. Data.

OpenAI's own list in the SDK is incomplete, and compatible servers have theirs: these are strings
that were seen, compared as strings.
"""

from __future__ import annotations

from nbcodex.errors import (
    CredentialsError,
    LimitError,
    ModelError,
    NbcodexError,
    OverloadedError,
    QuotaError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
)

QUOTA = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "insufficient_balance",
    "account_deactivated",
}
TOO_LARGE = {
    "context_length_exceeded",
    "exceed_context_size_error",
    "string_above_max_length",
    "request_too_large",
}
MODEL = {"model_not_found", "deploymentnotfound", "model_not_available", "unknown_model"}
OVERLOADED = {
    "server_is_overloaded",
    "slow_down",
    "overloaded",
    "overloaded_error",
    "engine_overloaded",
    "service_unavailable",
    "service_unavailable_error",
}
LIMIT = {
    "rate_limit_exceeded",
    "rate_limit_error",
    "rate_limit_reached",
    "ratelimitreached",
    "too_many_requests",
    "toomanyrequests",
    "tokens",
    "requests",
}
CREDENTIALS = {"invalid_api_key", "authentication_error", "permission_error", "permission_denied"}
REQUEST = {"invalid_request_error", "invalid_prompt", "content_filter", "bad_request"}
REQUEST_STARTS = ("invalid_", "unsupported_", "image_", "empty_image", "missing_")
TOO_LARGE_WORDS = (
    "request too large",
    "maximum context length",
    "context length exceeded",
    "context window",
    "available context size",
)

ADVICE: dict[type[NbcodexError], str] = {
    LimitError: "It is sent again by itself; a lower --max-output needs less of the limit.",
    OverloadedError: "It is tried again by itself; another model may be less busy.",
    ServerError: "It is tried again by itself; if it stays so, see the provider's status page.",
    TransportError: "It is tried again by itself; check the network, the VPN or the proxy.",
    QuotaError: "Waiting does not help: add credit, or raise the budget, at the provider.",
    TooLargeError: "Shorten the prompt, lower --max-output, or take a model with a larger limit.",
    CredentialsError: "`%codex login` takes another key; it may also lack the right to this model.",
    ModelError: "`%codex models` lists what the key can use; check the base URL, too.",
    RequestError: "Change the prompt or the options; as it is, it can never succeed.",
}
