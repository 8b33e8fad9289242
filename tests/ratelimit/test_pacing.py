"""The rate limiter against the simulator's limits, in virtual time."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcodex.errors import TooLargeError
from nbcodex.models import Limit, LimitReading, LimitSnapshot, Usage
from nbcodex.ratelimit.charge_policy import ACTUAL_INDEX, Need, Permit
from nbcodex.ratelimit.limit_model import Refusal
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.stores import MemoryStore
from nbcodex.ratelimit.token_bucket import FOREIGN_TRUST_S
from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.kernels import fairness, keep_alive
from tests.benchmarks.kernels import run as run_kernels
from tests.benchmarks.pacing import BUCKET, TOKENS, Case, Client, PromptRun, measure
from tests.benchmarks.world import START, EventHeap, Prompt, RemoteServer, workload

pytestmark = pytest.mark.slow

POLICIES = ("kept", "refunded", "actual")


class InspectedStore(MemoryStore):
    """A store whose model a test can read."""

    def model(self) -> Any:
        return self.transaction(BUCKET, lambda shared: shared.model)


def simulated_client(
    knobs: Knobs, prompts: list[Prompt], seed: int = 0
) -> tuple[RemoteServer, Client, InspectedStore]:
    server, store = RemoteServer(EventHeap(), knobs, seed), InspectedStore()
    client = Client(server, RateLimiter(store), prompts, seed)
    return server, client, store


def finish(server: RemoteServer, client: Client) -> None:
    client.start()
    server.heap.run()


@pytest.mark.parametrize("policy", POLICIES)
def test_charge_policy_is_inferred_within_20_s(policy: Any) -> None:
    server, client, store = simulated_client(replace(TOKENS, policy=policy), workload(1500, 3))
    found: list[str] = []
    server.heap.at(START + 20, lambda: found.append(store.model().tokens.policy))
    finish(server, client)
    assert found == [policy]


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"token_bias": 1.15},
    {"token_bias": 0.85},
    {"failures": 0.01},
    {"stream_failures": 0.01},
    {"rpm": 500},
    {"hidden_window": 1.0},
    {"hidden_window": 10.0},
    {"headers": False},
    {"used_by_others": 0.3},
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_limit_is_used_within_3_percent_of_an_oracle(policy: Any, change: dict[str, Any]) -> None:
    """The oracle knows everything except the outputs. Refusals are rare."""
    rare = {"headers", "used_by_others"} & change.keys()
    figures = measure(Case("", replace(TOKENS, policy=policy, **change)), 2000, 0)
    assert figures["oracle"] >= (0.9 if rare else 0.97)
    assert figures["429%"] <= (3 if rare else 1)
    assert figures["twice"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_limit_that_is_halved_and_restored_is_followed(policy: Any) -> None:
    steps = ((40.0, {"tpm": 300_000}), (100.0, {"tpm": 600_000}))
    case = Case("", replace(TOKENS, policy=policy), steps=steps)
    figures = measure(case, 3000, 0)
    assert figures["oracle"] >= 0.97
    assert figures["429%"] <= 1


def test_end_of_a_long_job_goes_by_size() -> None:
    """Only the last requests, of four limits: before that, no prompt is overtaken."""
    server, client, _ = simulated_client(replace(TOKENS, policy="refunded"), workload(5000, 1))
    finish(server, client)
    order = sorted(server.counts.admitted_at, key=server.counts.admitted_at.__getitem__)
    sizes = [client.runs[number].prompt.tokens for number in order]
    assert all(abs(place - number) <= 50 for place, number in enumerate(order[:3100]))
    assert statistics.median(sizes[-50:]) > 3 * statistics.median(sizes[3300:3350])


@pytest.mark.parametrize("policy", POLICIES)
def test_large_prompt_among_small_ones_does_not_starve(policy: Any) -> None:
    """One of 30% of the limit among 3,000 is admitted within its fair time."""
    prompts = workload(3001, 1)
    large = replace(prompts[1500], tokens=180_000)
    prompts[1500] = large
    server, client, _ = simulated_client(replace(TOKENS, policy=policy), prompts)
    finish(server, client)
    at = server.counts.admitted_at
    waited = at[1500] - START
    before = sum(p.charge(policy) for p in prompts[:1501])
    assert waited <= 2 * (before - 600_000) / 10_000 + 20
    assert sorted(at, key=at.__getitem__)[1400:1600].count(1500) == 1


def test_prompts_are_sent_in_the_order_in_which_they_came() -> None:
    """Except for the random delays of the network."""
    server, client, _ = simulated_client(TOKENS, workload(800, 2))
    finish(server, client)
    order = sorted(server.counts.admitted_at, key=server.counts.admitted_at.__getitem__)
    assert max(abs(place - number) for place, number in enumerate(order)) <= 15


def test_first_request_is_sent_alone_until_its_headers_are_read() -> None:
    limiter = RateLimiter()
    first, second = (limiter.enqueue("b", Need(10, 90), lambda: None) for _ in range(2))
    sent = limiter.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    assert isinstance(limiter.try_acquire(second, 100.5), Wait | Cooldown)
    reading = LimitReading(limit=1000, remaining=900, full_in=6.0)
    limiter.observe(sent, LimitSnapshot(at=101.0, tokens=reading), 101.0)
    assert isinstance(limiter.try_acquire(second, 101.0), Permit)


def test_refused_request_keeps_its_place() -> None:
    """It is the first to be sent after the cooldown, and none is sent sooner."""
    limiter = RateLimiter()
    entries = [limiter.enqueue("b", Need(10, 90), lambda: None) for _ in range(3)]
    sent = limiter.try_acquire(entries[0], 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=550, requested=100)
    cooldown = limiter.refuse(sent, Refusal(105.0, limit), 100.1)
    limiter.requeue(entries[0])
    assert cooldown == Cooldown(105.0, limit)
    assert all(isinstance(limiter.try_acquire(t, 104.9), Wait | Cooldown) for t in entries)
    assert isinstance(limiter.try_acquire(entries[1], 105.6), Wait | Cooldown)
    assert isinstance(limiter.try_acquire(entries[0], 105.6), Permit)


def test_refused_probe_leaves_the_cooldown_unchanged() -> None:
    limiter = RateLimiter()
    first, other = (limiter.enqueue("b", Need(10, 90), lambda: None) for _ in range(2))
    sent = limiter.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    limiter.refuse(sent, Refusal(110.0, limit), 100.1)
    probe = limiter.probe(other, 102.0)
    assert limiter.refuse(probe, Refusal(140.0, limit), 102.1).until == 110.0


def test_refusal_by_a_daily_limit_leaves_the_minute_unknown() -> None:
    store = InspectedStore()
    limiter = RateLimiter(store)
    sent = limiter.try_acquire(limiter.enqueue(BUCKET, Need(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="requests", window=86_400.0, limit=200, used=200, requested=1)
    limiter.refuse(sent, Refusal(500.0, limit), 100.1)
    assert store.model().cooldown_until == 500.0
    assert not store.model().tokens.bucket.is_known
    assert not store.model().requests.is_known


def test_refused_request_is_not_charged() -> None:
    """If another limit refused it, the limit of the minute is not charged."""
    store = InspectedStore()
    limiter = RateLimiter(store)
    first, second = (limiter.enqueue(BUCKET, Need(10, 90), lambda: None) for _ in range(2))
    sent = limiter.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    reading = LimitReading(limit=6000, remaining=3000, full_in=30.0)
    limiter.observe(sent, LimitSnapshot(at=101.0, tokens=reading), 101.0)
    before = store.model().tokens.bucket.level_at(102.0)
    sent = limiter.try_acquire(second, 102.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=86_400.0, limit=200, used=200, requested=100)
    limiter.refuse(sent, Refusal(500.0, limit), 102.0)
    assert store.model().tokens.bucket.level_at(102.0) == pytest.approx(before)


def test_bucket_is_not_left_in_debt_where_output_is_charged_at_the_end() -> None:
    server, client, _ = simulated_client(replace(TOKENS, policy="actual"), workload(3000, 8))
    finish(server, client)
    assert server.counts.lowest_level > -0.005 * 600_000


def test_prompt_larger_than_the_limit_fails_unsent() -> None:
    limiter = RateLimiter()
    sent = limiter.try_acquire(limiter.enqueue("b", Need(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    reading = LimitReading(limit=1000, remaining=900, full_in=6.0)
    limiter.observe(sent, LimitSnapshot(at=101.0, tokens=reading), 101.0)
    with pytest.raises(TooLargeError, match="about 5,000 tokens, 4,000 more than the 1,000"):
        limiter.try_acquire(limiter.enqueue("b", Need(5000, 90), lambda: None), 101.0)


@pytest.mark.parametrize(
    ("actual_score", "is_refused"), [(1.0, True), (0.0, False)], ids=["certain", "uncertain"]
)
def test_max_output_larger_than_the_limit_fails_unsent_or_is_sent_at_once(
    actual_score: float, is_refused: bool
) -> None:
    """The server decides as long as it may charge only the output that is used."""
    limiter = RateLimiter(store := InspectedStore())
    sent = limiter.try_acquire(limiter.enqueue(BUCKET, Need(10, 900), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    reading = LimitReading(limit=1000, remaining=90, full_in=54.6)
    limiter.observe(sent, LimitSnapshot(at=101.0, tokens=reading), 101.0)
    store.model().tokens.scores[ACTUAL_INDEX] = actual_score
    entry = limiter.enqueue(BUCKET, Need(10, 1_100), lambda: None)
    if is_refused:
        with pytest.raises(TooLargeError, match=r"up to 1,100: more than the 1,000 .*max-output"):
            limiter.try_acquire(entry, 102.0)
    else:
        assert isinstance(limiter.try_acquire(entry, 102.0), Permit)
        # Of two such requests at once, the second one waits.
        entry = limiter.enqueue(BUCKET, Need(10, 1_100), lambda: None)
        assert isinstance(limiter.try_acquire(entry, 103.0), Wait)


@pytest.mark.parametrize("has_max_output", [True, False])
def test_request_without_max_output_is_not_refused_for_its_assumed_output(
    has_max_output: bool,
) -> None:
    limiter = RateLimiter(store := InspectedStore())
    sent = limiter.try_acquire(limiter.enqueue(BUCKET, Need(10, 40), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    reading = LimitReading(limit=500, remaining=500, full_in=0.0)
    limiter.observe(sent, LimitSnapshot(at=101.0, tokens=reading), 101.0)
    store.model().tokens.scores[ACTUAL_INDEX] = 1.0
    entry = limiter.enqueue(BUCKET, Need(10, 1_000, has_max_output=has_max_output), lambda: None)
    if has_max_output:
        with pytest.raises(TooLargeError):
            limiter.try_acquire(entry, 161.0)
    else:
        assert isinstance(limiter.try_acquire(entry, 161.0), Permit)


def test_limit_stated_long_ago_refuses_nothing_locally() -> None:
    """The account may have a larger one: the server decides."""
    limiter = RateLimiter()
    sent = limiter.try_acquire(limiter.enqueue("b", Need(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    limiter.observe(
        sent, LimitSnapshot(at=101.0, tokens=LimitReading(limit=1000, remaining=900)), 101.0
    )
    limiter.settle(sent, Usage(input_tokens=10, output_tokens=90), 102.0)
    answer = limiter.try_acquire(limiter.enqueue("b", Need(5000, 90), lambda: None), 4000.0)
    assert isinstance(answer, Permit)


def test_input_ratio_of_short_prompts_refuses_no_long_one() -> None:
    """A fixed charge on each prompt makes short ones count fourfold."""
    limiter, reading = RateLimiter(), LimitReading(limit=30_000, remaining=29_000, full_in=2.0)
    for second in range(100, 200):
        sent = limiter.try_acquire(limiter.enqueue("b", Need(12, 50), lambda: None), second)
        assert isinstance(sent, Permit)
        limiter.observe(sent, LimitSnapshot(at=second, tokens=reading), second)
        limiter.settle(sent, Usage(input_tokens=52, output_tokens=5), second)
    limiter.try_acquire(limiter.enqueue("b", Need(12_000, 50), lambda: None), 201.0)


def test_size_that_was_admitted_once_is_not_refused_locally() -> None:
    """A server may state a limit smaller than what it admits."""
    limiter = RateLimiter()
    for at in (100.0, 900.0):
        entry = limiter.enqueue("b", Need(5000, 90), lambda: None)
        sent = limiter.try_acquire(entry, at)
        assert isinstance(sent, Permit)
        reading = LimitReading(limit=1000, remaining=900, full_in=6.0)
        limiter.observe(sent, LimitSnapshot(at=at + 1, tokens=reading), at + 1)


numbers = st.floats(0, 1e15)
readings = st.none() | st.builds(
    LimitReading,
    limit=st.floats(1e-3, 1e15),
    remaining=numbers,
    full_in=st.none() | st.floats(0, 31 * 86_400),
)
snapshots = st.none() | st.builds(
    LimitSnapshot,
    at=st.floats(0, 1e6),
    processing=st.none() | st.floats(0, 86_400),
    tokens=readings,
    requests=readings,
)
limits = st.none() | st.builds(
    Limit,
    resource=st.sampled_from(["tokens", "requests", None]),
    window=st.sampled_from([None, 60.0, 86_400.0]),
    limit=st.none() | numbers,
    used=st.none() | numbers,
    requested=st.none() | numbers,
)


histories = st.lists(
    st.tuples(st.sampled_from(["admit", "refuse", "settle", "cancel"]), snapshots, limits),
    max_size=12,
)


def limiter_after(events: list[tuple[str, Any, Any]]) -> tuple[RateLimiter, float]:
    """Return a limiter to which all these events have happened, one every 100 s, and the time."""
    limiter, now = RateLimiter(), 1000.0
    for what, snapshot, limit in events:
        now += 100
        sent = limiter.probe(limiter.enqueue("b", Need(1, 10), lambda: None), now)
        match what:
            case "admit":
                limiter.observe(sent, snapshot, now + 1)
            case "settle":
                limiter.settle(sent, Usage(input_tokens=10**9, output_tokens=10**9), now + 1)
            case "cancel":
                limiter.release(sent, now + 1)
            case "refuse":
                sent.is_probe = False
                limiter.refuse(sent, Refusal(now + 2, limit, snapshot=snapshot), now + 1)
    return limiter, now + 100


@given(histories)
def test_any_server_statement_leaves_a_finite_wait(events: list[tuple[str, Any, Any]]) -> None:
    """No header or message makes the limiter raise, or wait for ever."""
    limiter, now = limiter_after(events)
    answer = limiter.try_acquire(limiter.enqueue("b", Need(1e-9, 10), lambda: None), now)
    assert isinstance(answer, Permit) or now < answer.until < math.inf


histories_of_a_minute = st.lists(
    st.tuples(
        st.sampled_from(["admit", "refuse", "settle", "cancel"]),
        snapshots,
        limits.filter(lambda limit: limit is None or limit.window in (None, 60.0)),
    ),
    max_size=12,
)


@given(histories_of_a_minute, st.floats(0, 1), st.floats(0, 1))
def test_true_headers_outweigh_any_earlier_statement(
    events: list[tuple[str, Any, Any]], left: float, asked: float
) -> None:
    """No request waits longer than a bucket takes to fill."""
    limiter, now = limiter_after(events)
    sent = limiter.probe(limiter.enqueue("b", Need(20, 80), lambda: None), now)
    tokens = LimitReading(limit=3_000, remaining=left * 3_000, full_in=(1 - left) * 60)
    requests = LimitReading(limit=60, remaining=30, full_in=30)
    limiter.observe(sent, LimitSnapshot(at=now, tokens=tokens, requests=requests), now)
    limiter.settle(sent, Usage(input_tokens=20, output_tokens=80), now)
    answer = limiter.try_acquire(limiter.enqueue("b", Need(0, asked * 3_000), lambda: None), now)
    assert isinstance(answer, Permit) or answer.until <= now + 60 + FOREIGN_TRUST_S


def test_first_request_is_sent_when_the_cooldown_ends() -> None:
    """Even if the projection is later; the others wait for capacity."""
    limiter = RateLimiter()
    entries = [limiter.enqueue("b", Need(10, 5_000), lambda: None) for _ in range(3)]
    sent = limiter.try_acquire(entries[0], 100.0)
    assert isinstance(sent, Permit)
    reading = LimitReading(limit=6_000, remaining=6_000)
    limiter.observe(sent, LimitSnapshot(at=100.2, tokens=reading), 100.2)
    sent = limiter.try_acquire(entries[1], 100.3)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=6_000, used=6_000, requested=5_010)
    limiter.refuse(sent, Refusal(110.0, limit), 100.4)
    limiter.requeue(entries[1])
    assert isinstance(limiter.try_acquire(entries[1], 109.9), Wait | Cooldown)
    assert isinstance(limiter.try_acquire(entries[1], 110.0), Permit)
    later = limiter.try_acquire(entries[2], 111.0)
    assert isinstance(later, Wait | Cooldown)
    assert later.until > 140.0


def test_end_of_a_cooldown_belongs_to_the_refused_kernel() -> None:
    """Others wait until there is capacity for both."""
    store = InspectedStore()
    first, other = (RateLimiter(store, process_id=name) for name in ("first", "other"))
    entry = first.enqueue(BUCKET, Need(10, 5_000), lambda: None)
    sent = first.try_acquire(entry, 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=6_000, used=6_000, requested=5_010)
    first.refuse(sent, Refusal(110.0, limit), 100.4)
    first.requeue(entry)
    first.heartbeat(108.0)
    assert isinstance(
        other.try_acquire(other.enqueue(BUCKET, Need(10, 5_000), int), 110.0), Wait | Cooldown
    )
    assert isinstance(first.try_acquire(entry, 110.0), Permit)


def refused_without_figures(limiter: RateLimiter, at: float, count: int) -> None:
    """Send requests at once, all of which are refused for ten seconds without figures."""
    entries = [limiter.enqueue(BUCKET, Need(500, 500), lambda: None) for _ in range(count)]
    sent = [limiter.probe(entry, at) for entry in entries]
    for each in sent:
        each.is_probe = False
        limiter.refuse(each, Refusal(at + 10), at)


def answered_request(
    limiter: RateLimiter, at: float, snapshot: LimitSnapshot | None = None
) -> None:
    """Send a request that is admitted, and answered at once."""
    sent = limiter.probe(limiter.enqueue(BUCKET, Need(500, 500), lambda: None), at)
    limiter.observe(sent, snapshot, at)
    limiter.settle(sent, Usage(input_tokens=500, output_tokens=500), at)


def test_rate_without_headers_grows_only_while_it_is_used() -> None:
    limiter = RateLimiter(store := InspectedStore())
    for second in range(100, 110):
        answered_request(limiter, float(second))
    refused_without_figures(limiter, 110.0, 5)
    before = store.model().tokens.bucket.rate
    for number in range(100):
        answered_request(limiter, 130.0 + 20 * number)
    assert store.model().tokens.bucket.rate == before


def test_guessed_rate_is_dropped_after_a_long_rest() -> None:
    limiter = RateLimiter(store := InspectedStore())
    answered_request(limiter, 100.0)
    refused_without_figures(limiter, 110.0, 5)
    assert store.model().tokens.bucket.is_known
    answered_request(limiter, 90_000.0)
    assert not store.model().tokens.bucket.is_known


def test_guessed_rate_is_measured_over_the_last_minutes() -> None:
    """Hours of light use do not make it small."""
    limiter = RateLimiter(store := InspectedStore())
    for number in range(500):
        answered_request(limiter, 100.0 + 50 * number)
    at = 100.0 + 50 * 500
    for number in range(100):
        answered_request(limiter, at + number / 10)
    refused_without_figures(limiter, at + 10, 5)
    assert store.model().tokens.bucket.rate > 500


def test_hidden_window_of_a_single_refusal_is_forgotten() -> None:
    limiter = RateLimiter()
    full = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    answered_request(limiter, 100.0, LimitSnapshot(at=100.0, tokens=full))
    odd = limiter.probe(limiter.enqueue(BUCKET, Need(500, 500), lambda: None), 110.0)
    odd.is_probe = False
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=0, requested=1_000)
    limiter.refuse(odd, Refusal(130.0, limit), 110.0)
    answered_request(limiter, 5_000.0, LimitSnapshot(at=5_000.0, tokens=full))
    for number in range(40):
        entry = limiter.enqueue(BUCKET, Need(500, 500), lambda: None)
        assert isinstance(limiter.try_acquire(entry, 5_001.0 + number / 100), Permit)


def test_request_limit_that_headers_cease_to_state_is_forgotten() -> None:
    limiter = RateLimiter()
    tokens = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    answered_request(
        limiter,
        100.0,
        LimitSnapshot(at=100.0, tokens=tokens, requests=LimitReading(limit=3, remaining=2)),
    )
    answered_request(limiter, 5_000.0, LimitSnapshot(at=5_000.0, tokens=tokens))
    for number in range(20):
        entry = limiter.enqueue(BUCKET, Need(10, 10), lambda: None)
        assert isinstance(limiter.try_acquire(entry, 5_001.0 + number / 100), Permit)


def test_single_refusal_without_figures_only_closes_the_model() -> None:
    """It begins a cooldown, and sets no rate."""
    store = InspectedStore()
    limiter = RateLimiter(store)
    entry = limiter.enqueue(BUCKET, Need(10, 1000), lambda: None)
    sent = limiter.try_acquire(entry, 100.0)
    assert isinstance(sent, Permit)
    limiter.refuse(sent, Refusal(101.0, Limit()), 100.1)
    limiter.requeue(entry)
    assert isinstance(limiter.try_acquire(entry, 101.0), Permit)
    assert not store.model().tokens.bucket.is_known


@pytest.mark.parametrize(
    ("answered", "refused", "interval", "is_measured"),
    [
        (1, 2, 12, True),
        (5, 2, 30, True),
        (1, 1, 12, False),  # nothing else was in flight, as with one request at a time
        (0, 2, 12, False),  # nothing was admitted
        (1, 2, 90, False),  # the refusals have nothing to do with each other
    ],
)
def test_refusals_in_every_round_set_a_rate_though_few_are_in_flight(
    answered: int, refused: int, interval: float, *, is_measured: bool
) -> None:
    limiter = RateLimiter(store := InspectedStore())
    answered_request(limiter, 100.0)
    for number in range(2):
        for _ in range(answered):
            answered_request(limiter, 100.0 + interval * number)
        assert not store.model().tokens.bucket.is_known
        refused_without_figures(limiter, 100.0 + interval * number, refused)
    assert store.model().tokens.bucket.is_known == is_measured


def test_silent_server_is_asked_again_after_ten_seconds() -> None:
    limiter = RateLimiter()
    first, second = (limiter.enqueue("b", Need(10, 90), lambda: None) for _ in range(2))
    limiter.try_acquire(first, 100.0)
    cooldown = limiter.try_acquire(second, 100.0)
    assert isinstance(cooldown, Wait | Cooldown)
    assert cooldown.until == pytest.approx(110.0)
    assert isinstance(limiter.try_acquire(second, cooldown.until), Permit)


def test_leaving_the_head_of_the_queue_wakes_the_next() -> None:
    limiter, woken = RateLimiter(), []
    first = limiter.enqueue("b", Need(10, 90), lambda: woken.append(1))
    limiter.enqueue("b", Need(10, 90), lambda: woken.append(2))
    limiter.dequeue(first)
    assert woken == [2]


def test_settling_a_permit_twice_counts_once() -> None:
    store = InspectedStore()
    limiter = RateLimiter(store)
    sent = limiter.try_acquire(limiter.enqueue(BUCKET, Need(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    limiter.settle(sent, Usage(input_tokens=10, output_tokens=5), 103.0)
    limiter.release(sent, 104.0)
    limiter.settle(sent, Usage(input_tokens=10, output_tokens=5), 105.0)
    output = store.model().output
    assert (output.ended_answers, output.in_flight, store.model().awaiting_response) == (1, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_four_kernels_get_equal_shares(policy: str) -> None:
    """Refusals are rare."""
    prompts = workload(2000, 4)
    shares = [prompts[i::4] for i in range(4)]
    server, _ = run_kernels(policy, shares, 4)
    assert fairness(server, shares, policy) >= 0.98
    assert server.counts.refused <= 0.005 * server.counts.requests


@pytest.mark.parametrize("policy", POLICIES)
def test_limit_of_a_dead_kernel_is_used_by_the_others_within_10_s(policy: Any) -> None:
    prompts, store = workload(4000, 5), InspectedStore()
    server = RemoteServer(EventHeap(), replace(TOKENS, policy=policy), 5)
    clients = [
        Client(server, RateLimiter(store, process_id=str(i)), prompts[i::4], i) for i in range(4)
    ]
    for client in clients:
        client.start()
        keep_alive(client, server)
    server.heap.at(START + 60, setattr, clients[0], "dead", True)
    server.heap.run()
    at = server.counts.admitted_at
    begin, end = START + 70, START + 110
    taken = sum(p.charge(policy) for p in prompts if begin <= at.get(p.number, 0) < end)
    assert taken >= 0.97 * 10_000 * (end - begin)


def test_light_kernel_hardly_waits_beside_a_heavy_one() -> None:
    prompts, store = workload(2050, 6), InspectedStore()
    server = RemoteServer(EventHeap(), replace(TOKENS, policy="refunded"), 6)
    heavy, light = (
        Client(server, RateLimiter(store, process_id=n), [], 0) for n in ("heavy", "light")
    )
    heavy.runs = [PromptRun(heavy, p) for p in prompts[:2000]]
    light.runs = [PromptRun(light, p) for p in prompts[2000:]]
    heavy.start()
    for client in (heavy, light):
        keep_alive(client, server)
    for number, run in enumerate(light.runs):
        server.heap.at(START + 40 + number, run.enter)
    server.heap.run()
    at = server.counts.admitted_at
    waits = [at[e.prompt.number] - e.entered_at for e in light.runs]
    # Its first one makes it known; after 17 s, the end of the heavy job spends what was kept free.
    assert max(waits[1:17]) < 0.06


def test_share_of_output_that_answers_use_is_learned() -> None:
    server, client, store = simulated_client(
        replace(TOKENS, policy="actual", token_bias=1.15), workload(1500, 7)
    )
    assert client.limiter.limit_states(START, BUCKET)[BUCKET].output_share is None
    finish(server, client)
    state = client.limiter.limit_states(server.heap.now)[BUCKET]
    assert state.tokens
    assert (state.tokens.limit, state.policy) == (600_000, "actual")
    prompts = [run.prompt for run in client.runs]
    used = sum(p.output for p in prompts) / sum(p.max_output for p in prompts)
    assert state.output_share == pytest.approx(used, rel=0.25)
    assert store.model().input_ratio == pytest.approx(1.15, rel=0.05)


def test_cooldown_that_another_kernel_ended_is_over_here() -> None:
    """Its probe was admitted: the requests that wait here try again at once."""
    store, woken = MemoryStore(), []
    first, second = (RateLimiter(store, process_id=name) for name in ("a", "b"))
    entry = first.enqueue("b", Need(10, 90), lambda: None)
    refused = first.try_acquire(entry, 100.0)
    assert isinstance(refused, Permit)
    first.refuse(refused, Refusal(3700.0, Limit()), 100.0)
    other = second.enqueue("b", Need(10, 90), lambda: woken.append(True))
    assert isinstance(second.try_acquire(other, 101.0), Wait | Cooldown)
    second.heartbeat(102.0)
    assert not woken
    first.requeue(entry)
    full = LimitSnapshot(at=110.0, tokens=LimitReading(limit=6_000, remaining=5_000))
    first.observe(first.probe(entry, 110.0), full, 110.0)
    second.heartbeat(111.0)
    assert woken
    assert isinstance(second.try_acquire(other, 111.0), Permit)


@pytest.mark.parametrize("over", [True, False])
def test_one_probe_decides_for_all_resumed_requests(*, over: bool) -> None:
    """The first asks the server, and the others wait."""
    store, woken = MemoryStore(), set[int]()
    first, second = (RateLimiter(store, process_id=name) for name in ("a", "b"))
    refused = first.try_acquire(first.enqueue("b", Need(10, 90), lambda: None), 100.0)
    assert isinstance(refused, Permit)
    first.refuse(refused, Refusal(8_000.0, Limit()), 100.0)
    places = [second.enqueue("b", Need(10, 90), lambda i=i: woken.add(i)) for i in range(3)]
    answers = [second.try_acquire(place, 3_600.0, may_probe=True) for place in places]
    assert [type(h) for h in answers] == [Cooldown, Wait, Wait]
    assert answers[0].inherited
    probe = second.probe(places[0], 3_600.0)
    next_ = second.try_acquire(places[1], 3_600.0, may_probe=True)
    assert isinstance(next_, Wait)
    woken.clear()
    if over:
        full = LimitSnapshot(at=3_601.0, tokens=LimitReading(limit=6_000, remaining=5_000))
        second.observe(probe, full, 3_601.0)
    else:
        second.refuse(probe, Refusal(8_000.0, Limit()), 3_601.0)
    assert {1, 2} <= woken
    answer = second.try_acquire(places[1], 3_601.0, may_probe=True)
    assert isinstance(answer, Permit if over else Cooldown)
    assert over or not answer.inherited


def test_interrupted_request_keeps_no_other_kernel_waiting() -> None:
    """Even if its kernel lives on."""
    store = MemoryStore()
    first, second = (RateLimiter(store, process_id=name) for name in ("a", "b"))
    for at, limiter, left in ((100.0, first, 59_000), (100.1, second, 58_000), (100.2, second, 99)):
        sent = limiter.try_acquire(limiter.enqueue("b", Need(10, 990), lambda: None), at)
        assert isinstance(sent, Permit)
        reading = LimitReading(limit=60_000, remaining=left, full_in=(60_000 - left) / 1_000)
        limiter.observe(sent, LimitSnapshot(at=at, tokens=reading), at)
    given_up = first.enqueue("b", Need(50_000, 1_000), lambda: None)
    first.try_acquire(given_up, 101.0)
    first.dequeue(given_up)
    first.heartbeat(102.0)
    waits = second.try_acquire(second.enqueue("b", Need(1_000, 1_000), lambda: None), 102.0)
    assert isinstance(waits, Wait)
    assert waits.start_at is not None
    assert waits.start_at < 120


def test_long_cooldown_is_announced_to_the_whole_queue() -> None:
    limiter, woken = RateLimiter(), []
    entries = [limiter.enqueue("b", Need(10, 90), lambda i=i: woken.append(i)) for i in range(3)]
    sent = limiter.try_acquire(entries[0], 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    limiter.refuse(sent, Refusal(110.0, limit), 100.1)
    assert {1, 2} <= set(woken)
    assert limiter.try_acquire(entries[2], 101.0) == Cooldown(110.0, limit)


def test_kernel_without_heartbeats_is_counted_out_after_its_lease() -> None:
    store = InspectedStore()
    dead, alive = RateLimiter(store, process_id="dead"), RateLimiter(store, process_id="alive")
    sent = dead.try_acquire(dead.enqueue(BUCKET, Need(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    alive.enqueue(BUCKET, Need(10, 90), lambda: None)
    alive.heartbeat(104.0)
    assert store.model().output.in_flight == 1
    alive.heartbeat(106.0)
    assert (store.model().output.in_flight, store.model().awaiting_response) == (0, 0)
