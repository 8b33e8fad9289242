"""Server-sent events from bytes, however they are split."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.errors import ServerError
from nbcodex.openai_api import stream
from nbcodex.openai_api.stream import SseDecoder


def fed(*chunks: bytes) -> list[tuple[str, str]]:
    decoder = SseDecoder()
    return [e for chunk in chunks for e in decoder.feed(chunk)] + decoder.flush()


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [("", "a")]),
        (b"data: a\r\n\r\n", [("", "a")]),
        (b"data: a\r\r", [("", "a")]),
        (b"data: a\r\ndata: b\r\n\r\n", [("", "a\nb")]),
        (b"event: e\ndata: a\n\n", [("e", "a")]),
        (b"data: a\ndata: b\n\n", [("", "a\nb")]),
        (b"data:a\n\n", [("", "a")]),
        (b"data:  a\n\n", [("", " a")]),
        (b"data\n\n", [("", "")]),
        (b": comment\n\n: more\n\ndata: a\n\n", [("", "a")]),
        (b"event: lonely\n\ndata: a\n\n", [("", "a")]),
        (b"id: 1\nretry: 5\nwhatever: x\ndata: a\n\n", [("", "a")]),
        (b"data: [DONE]\n\n", [("", "[DONE]")]),
        (b'data: {"a":\n data\n\n', [("", '{"a":')]),
        ("data: é€😀\n\n".encode(), [("", "é€😀")]),
        (b"data: \xff\n\n", [("", "\ufffd")]),
        ("data: a\u2028b\x0bc\n\n".encode(), [("", "a\u2028b\x0bc")]),
        (b"data: unfinished", [("", "unfinished")]),
        (b"data: a\n\n\n\n", [("", "a")]),
    ],
)
def test_events_are_the_same_for_every_split(stream: bytes, events: list[tuple[str, str]]) -> None:
    assert fed(stream) == events
    assert fed(*(stream[i : i + 1] for i in range(len(stream)))) == events
    for cut in range(len(stream)):
        assert fed(stream[:cut], stream[cut:]) == events


@given(
    st.lists(
        st.sampled_from(
            [b"data", b": ", b":", b"\r", b"\n", b"a", b"event", b"\xc3", b"\xef\xbb\xbf"]
        )
    ),
    st.integers(1, 5),
)
def test_random_bytes_decode_the_same_in_any_chunks(parts: list[bytes], size: int) -> None:
    stream = b"".join(parts)
    assert fed(*(stream[i : i + size] for i in range(0, len(stream), size))) == fed(stream)


def test_long_line_in_small_chunks_takes_linear_time() -> None:
    decoder = SseDecoder()
    before = time.process_time()
    decoder.feed(b"data: ")
    for _ in range(10_000_000 // 64):
        assert not decoder.feed(b"x" * 64)
    [(_, data)] = decoder.feed(b"\n\n")
    assert len(data) == 10_000_000 // 64 * 64
    # In quadratic time it would be minutes.
    assert time.process_time() - before < 10.0


@pytest.mark.parametrize("line", [b"x" * 100, b"data: " + b"x" * 90 + b"\n", b": " + b"x" * 90])
def test_event_above_the_bound_is_an_error(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BODY_BYTES", 1000)
    decoder = SseDecoder()

    def endless() -> None:
        for _ in range(100):
            decoder.feed(line)

    with pytest.raises(ServerError, match="event of over"):
        endless()


def test_comments_do_not_count_as_pending_data() -> None:
    decoder = SseDecoder()
    decoder.feed(b": comment that has not end")
    assert decoder.pending_bytes == 0
    decoder.feed(b"ed\ndata: abc")
    assert decoder.pending_bytes > 0
