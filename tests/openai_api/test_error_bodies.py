"""The words of an error are read from the bodies of any gateway, and the advice fits the cause."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from nbcodex import errors
from nbcodex.openai_api import api_errors
from tests.openai_api.scripted import DONE, Script, Server, play, settings

WALL = 1_800_000_000.0
BODIES: dict[str, Any] = {
    "Apigee": {"fault": {"faultstring": "the words", "detail": {"errorcode": "a.B"}}},
    "AWS": {"message": "the words"},
    "AWS, capital letter": {"Message": "the words"},
    "AWS, with a type": {"__type": "ThrottlingException", "message": "the words"},
    "Kong": {"message": "the words", "request_id": "1"},
    "Cloudflare": {"success": False, "errors": [{"code": 1, "message": "the words"}]},
    "Cloudflare, page": "<!DOCTYPE html><html><head><title>x | 502: the words</title></head>",
    "Azure API Management": {"statusCode": 429, "message": "the words"},
    "nginx": "<html>\r\n<head><title>413 the words</title></head><hr>nginx</html>",
    "Envoy": "upstream connect error: the words",
    "FastAPI": {"detail": "the words"},
    "FastAPI, list": {"detail": [{"loc": ["body", "x"], "msg": "the words"}]},
    "FastAPI, object": {"detail": {"error": {"message": "the words", "code": "c"}}},
    "Spring": {"status": 500, "error": "Server Error", "message": "the words", "path": "/v1"},
    "RFC 9457": {"type": "about:blank", "title": "the words"},
    "RFC 9457, detail": {"title": "Bad", "detail": "the words", "status": 400},
    "ASP.NET": {"title": "Bad", "status": 400, "errors": {"x": ["the words"]}},
    "GraphQL": {"errors": [{"message": "the words", "extensions": {"code": "X"}}]},
    "list of texts": {"errors": ["the words"]},
    "Google": [{"error": {"code": 429, "message": "the words", "status": "ABORTED"}}],
    "OAuth": {"error": "invalid_token", "error_description": "the words"},
    "S3": "<?xml version='1.0'?><Error><Code>Denied</Code><Message>the words</Message></Error>",
    "Volcengine": {"ResponseMetadata": {"Error": {"Code": "X", "Message": "the words"}}},
    "unknown": {"foo": "the words"},
    "bytes as Python shows them": 'b\'{"error": "the words"}\'',
    "OpenRouter, wrapped": {
        "error": {
            "message": "Provider returned error",
            "metadata": {
                "raw": {"__kind": "OK", "data": '{"error": {"message": "the words"}}'},
                "provider_name": "P",
            },
        }
    },
    "OpenRouter, unknown": {"error": {"message": "the words", "metadata": {"raw": {"x": "y"}}}},
}


def read(status: int, body: object) -> errors.NbcodexError:
    text = body if isinstance(body, str) else json.dumps(body)
    return api_errors.from_status(status, {}, text, wall_time=WALL)


@pytest.mark.parametrize("status", [400, 403, 429, 500, 503])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_words_of_any_body_are_shown(body: object, status: int) -> None:
    assert "the words" in read(status, body).message


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"error": {"code": "unsupported_country_region_territory", "message": "Country"}}),
        (403, {"error": {"message": "Country, region, or territory not supported"}}),
        (400, {"error": {"message": "User location is not supported for the API use."}}),
    ],
)
def test_unserved_country_is_not_blamed_on_the_key(status: int, body: object) -> None:
    error = read(status, body)
    assert isinstance(error, errors.NetworkRefusedError)
    assert isinstance(error, errors.RequestError)
    assert "VPN" in error.advice
    assert "country" in error.message
    assert "key" not in str(error)


@pytest.mark.parametrize("code", ["insufficient_quota", None])
@pytest.mark.parametrize(
    "words",
    ["当前分组上游负载已饱和 (request id: 1)", "Upstream load is saturated, try again later"],
)
def test_saturated_upstream_is_not_missing_credit(words: str, code: str | None) -> None:
    error = read(429, {"error": {"message": words, "type": code or "", "code": code}})
    assert isinstance(error, errors.OverloadedError)
    assert "credit" not in str(error)


@pytest.mark.parametrize(
    "body",
    [
        "Client sent an HTTP request to an HTTPS server.",
        "<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>",
    ],
)
def test_https_server_that_was_called_with_http_advises_https(body: str) -> None:
    assert "https://" in read(400, body).advice


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", "SSL_CERT_FILE"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "http://"),
        ("[SSL: RECORD_LAYER_FAILURE] record layer failure", "http://"),
        ("407 Proxy Authentication Required", "USER:PASSWORD"),
    ],
)
def test_wrong_connection_setting_is_final_with_the_thing_to_change(
    reason: str, advice: str
) -> None:
    failure = openai.APIConnectionError(request=httpx2.Request("POST", "https://x"))
    failure.__cause__ = httpx2.ConnectError(reason)
    error = api_errors.from_exception(failure, wall_time=WALL)
    assert isinstance(error, errors.ConnectionSettingsError)
    assert error.is_unbilled  # else a map that it ends would show the cost as unknown
    assert reason in error.message
    assert advice in error.advice


@pytest.mark.parametrize(
    "words",
    [
        "403 Forbidden",
        "404 X",
        "Proxy Server could not connect: Connection not allowed by ruleset.",
    ],
)
def test_server_that_a_proxy_refuses_is_a_wrong_setting_of_the_proxy(words: str) -> None:
    failure = openai.APIConnectionError(request=httpx2.Request("POST", "https://x"))
    failure.__cause__ = httpx2.ProxyError(words)
    error = api_errors.from_exception(failure, wall_time=WALL)
    assert isinstance(error, errors.ConnectionSettingsError)
    assert "proxy (HTTPS_PROXY" in error.message
    assert words.rstrip(".") in error.message
    assert "NO_PROXY" in error.advice


@pytest.mark.parametrize("words", ["503 Service Unavailable", "429 Too Many Requests", "408 X"])
def test_temporary_fault_of_a_proxy_is_retried_and_names_the_proxy(words: str) -> None:
    error = api_errors.from_exception(httpx2.ProxyError(words), wall_time=WALL)
    assert isinstance(error, errors.TransportError)
    assert "proxy (HTTPS_PROXY" in error.message


@pytest.mark.parametrize(
    ("location", "advice"),
    [
        ("https://x.example/v1/chat/completions", "https://x.example/v1"),
        ("/api/v1/chat/completions", "http://x.example/api/v1"),
        ("/v1/chat/completions/", "slash"),
    ],
)
def test_redirect_says_what_to_change(location: str, advice: str) -> None:
    request = httpx2.Request("POST", "http://x.example/v1/chat/completions")
    response = httpx2.Response(308, headers={"location": location}, request=request)
    failure = openai.APIStatusError("", response=response, body=None)
    error = api_errors.from_exception(failure, wall_time=WALL)
    assert error.advice.endswith(advice) or advice in error.advice.split()


@pytest.mark.parametrize(
    ("message", "options", "advice"),
    [
        ('think value "medium" is not supported for this model', {"effort": "medium"}, "--effort"),
        ('"llama3.2" does not support thinking', {"effort": "low"}, "--effort"),
        ("`max_tokens` must be less than or equal to `16384`", {"max_output": 32768}, "--max-out"),
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_refused_option_is_named(
    message: str, options: dict[str, Any], advice: str, api: str
) -> None:
    server = Server(Script([json.dumps({"error": {"message": message}}).encode()], 400))
    with pytest.raises(errors.RequestError) as caught:
        play(server, chosen=settings(api=api), **options)
    assert advice in caught.value.advice


@pytest.mark.parametrize("quote", ["'", '"'])
def test_error_in_the_form_of_python_bytes_is_read_from_a_stream(quote: str) -> None:
    body = "{'error': 1}" if quote == '"' else '{"error": "Input validation error"}'
    server = Server(Script([f"data: b{quote}{body}{quote}\n\n".encode(), DONE]))
    with pytest.raises(errors.NbcodexError, match="error"):
        play(server, chosen=settings(api="chat"))
