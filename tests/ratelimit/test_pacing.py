"""The observed bucket against the simulator's limits, in virtual time: it is told nothing."""

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
from nbcodex.ratelimit.charge_policy import Cost, Permit
from nbcodex.ratelimit.rate_limiter import Cooldown, RateLimiter, Wait
from nbcodex.ratelimit.stores import MemoryStore
from nbcodex.ratelimit.token_bucket import DRAIN_TRUST_S
from nbcodex.simulator.knobs import Knobs
from tests.benchmarks.kernels import beat, fairness
from tests.benchmarks.kernels import run as run_kernels
from tests.benchmarks.pacing import BUCKET, TOKENS, Case, Client, Errand, begin_with, measure
from tests.benchmarks.world import START, Heap, Prompt, World, workload

pytestmark = pytest.mark.slow

POLICIES = ("kept", "refunded", "actual")


class Watched(MemoryStore):
    """A store that lets a test look in."""

    def bucket(self) -> Any:
        return self.transaction(BUCKET, lambda shared: shared.model)


def crowd(knobs: Knobs, prompts: list[Prompt], seed: int = 0) -> tuple[World, Client, Watched]:
    world, store = World(Heap(), knobs, seed), Watched()
    client = Client(world, RateLimiter(store), prompts, seed)
    return world, client, store


def finish(world: World, client: Client) -> None:
    client.start()
    world.heap.run()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_found_out(policy: Any) -> None:
    """After 20 s of a busy bucket, what the server charges is known."""
    world, client, store = crowd(replace(TOKENS, policy=policy), workload(1500, 3))
    found: list[str] = []
    world.heap.at(START + 20, lambda: found.append(store.bucket().tokens.policy))
    finish(world, client)
    assert found == [policy]


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"bias": 1.15},
    {"bias": 0.85},
    {"failures": 0.01},
    {"breaks": 0.01},
    {"rpm": 500},
    {"burst": 1.0},
    {"burst": 10.0},
    {"headers": False},
    {"stranger": 0.3},
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_limit_is_used_fully(policy: Any, change: dict[str, Any]) -> None:
    """Within 0.97 of an oracle that knows all but the outputs, and hardly ever refused."""
    rare = {"headers", "stranger"} & change.keys()
    figures = measure(Case("", replace(TOKENS, policy=policy, **change)), 2000, 0)
    assert figures["oracle"] >= (0.9 if rare else 0.97)
    assert figures["429%"] <= (3 if rare else 1)
    assert figures["twice"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_limit_that_changes_is_followed(policy: Any) -> None:
    """A limit halved and restored costs nothing but what it takes away."""
    steps = ((40.0, {"tpm": 300_000}), (100.0, {"tpm": 600_000}))
    case = Case("", replace(TOKENS, policy=policy), steps=steps)
    figures = measure(case, 3000, 0)
    assert figures["oracle"] >= 0.97
    assert figures["429%"] <= 1


def test_the_end_of_a_long_job_goes_by_size() -> None:
    """Of the last four buckets' worth, small prompts go first; before that, nobody is passed."""
    world, client, _ = crowd(replace(TOKENS, policy="refunded"), workload(5000, 1))
    finish(world, client)
    order = sorted(world.tally.admitted_at, key=world.tally.admitted_at.__getitem__)
    sizes = [client.errands[number].prompt.tokens for number in order]
    assert all(abs(place - number) <= 50 for place, number in enumerate(order[:3100]))
    assert statistics.median(sizes[-50:]) > 3 * statistics.median(sizes[3300:3350])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_one_does_not_starve(policy: Any) -> None:
    """A prompt of 30% of the bucket among 3,000 small ones is let in within its fair time."""
    prompts = workload(3001, 1)
    large = replace(prompts[1500], tokens=180_000)
    prompts[1500] = large
    world, client, _ = crowd(replace(TOKENS, policy=policy), prompts)
    finish(world, client)
    at = world.tally.admitted_at
    waited = at[1500] - START
    before = sum(p.charge(policy) for p in prompts[:1501])
    assert waited <= 2 * (before - 600_000) / 10_000 + 20
    assert sorted(at, key=at.__getitem__)[1400:1600].count(1500) == 1


def test_first_come_first_served() -> None:
    """But for the network, the server sees them in the order in which they came."""
    world, client, _ = crowd(TOKENS, workload(800, 2))
    finish(world, client)
    order = sorted(world.tally.admitted_at, key=world.tally.admitted_at.__getitem__)
    assert max(abs(place - number) for place, number in enumerate(order)) <= 15


def test_the_first_goes_alone() -> None:
    """Nobody follows the first request before its headers are read."""
    ledger = RateLimiter()
    first, second = (ledger.enqueue("b", Cost(10, 90), lambda: None) for _ in range(2))
    sent = ledger.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    assert isinstance(ledger.try_acquire(second, 100.5), Wait | Cooldown)
    gauge = LimitReading(limit=1000, remaining=900, full_in=6.0)
    ledger.observe(sent, LimitSnapshot(at=101.0, tokens=gauge), 101.0)
    assert isinstance(ledger.try_acquire(second, 101.0), Permit)


def test_a_refused_one_keeps_its_place() -> None:
    """The refused request is the first to go after the hold, and nobody goes sooner."""
    ledger = RateLimiter()
    tickets = [ledger.enqueue("b", Cost(10, 90), lambda: None) for _ in range(3)]
    sent = ledger.try_acquire(tickets[0], 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=550, requested=100)
    hold = ledger.refuse(sent, until=105.0, limit=limit, snapshot=None, now=100.1)
    ledger.requeue(tickets[0])
    assert hold == Cooldown(105.0, limit)
    assert all(isinstance(ledger.try_acquire(t, 104.9), Wait | Cooldown) for t in tickets)
    assert isinstance(ledger.try_acquire(tickets[1], 105.6), Wait | Cooldown)
    assert isinstance(ledger.try_acquire(tickets[0], 105.6), Permit)


def test_a_probe_that_is_refused_changes_nothing() -> None:
    """Retry now goes through the hold; its refusal leaves the hold as it was."""
    ledger = RateLimiter()
    first, other = (ledger.enqueue("b", Cost(10, 90), lambda: None) for _ in range(2))
    sent = ledger.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    ledger.refuse(sent, until=110.0, limit=limit, snapshot=None, now=100.1)
    probe = ledger.probe(other, 102.0)
    assert ledger.refuse(probe, until=140.0, limit=limit, snapshot=None, now=102.1).until == 110.0


def test_a_day_s_limit_only_closes() -> None:
    """A refusal of the day's limit teaches nothing about the minute's."""
    store = Watched()
    ledger = RateLimiter(store)
    sent = ledger.try_acquire(ledger.enqueue(BUCKET, Cost(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="requests", window=86_400.0, limit=200, used=200, requested=1)
    ledger.refuse(sent, until=500.0, limit=limit, snapshot=None, now=100.1)
    assert store.bucket().closed_until == 500.0
    assert not store.bucket().tokens.bucket.is_known
    assert not store.bucket().requests.is_known


def test_what_is_refused_is_not_charged() -> None:
    """A request that another limit refused gives back what it took from the minute's."""
    store = Watched()
    ledger = RateLimiter(store)
    first, second = (ledger.enqueue(BUCKET, Cost(10, 90), lambda: None) for _ in range(2))
    sent = ledger.try_acquire(first, 100.0)
    assert isinstance(sent, Permit)
    gauge = LimitReading(limit=6000, remaining=3000, full_in=30.0)
    ledger.observe(sent, LimitSnapshot(at=101.0, tokens=gauge), 101.0)
    before = store.bucket().tokens.bucket.level_at(102.0)
    sent = ledger.try_acquire(second, 102.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=86_400.0, limit=200, used=200, requested=100)
    ledger.refuse(sent, until=500.0, limit=limit, snapshot=None, now=102.0)
    assert store.bucket().tokens.bucket.level_at(102.0) == pytest.approx(before)


def test_a_bucket_is_not_left_in_debt() -> None:
    """Where outputs are charged at the end, room is kept for those under way."""
    world, client, _ = crowd(replace(TOKENS, policy="actual"), workload(3000, 8))
    finish(world, client)
    assert world.tally.lowest > -0.005 * 600_000


def test_what_can_never_fit_is_refused_at_once() -> None:
    """A prompt larger than the limit fails with the figures, and is not sent."""
    ledger = RateLimiter()
    sent = ledger.try_acquire(ledger.enqueue("b", Cost(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    gauge = LimitReading(limit=1000, remaining=900, full_in=6.0)
    ledger.observe(sent, LimitSnapshot(at=101.0, tokens=gauge), 101.0)
    with pytest.raises(TooLargeError, match="about 5,000 tokens, 4,000 more than the 1,000"):
        ledger.try_acquire(ledger.enqueue("b", Cost(5000, 90), lambda: None), 101.0)


def test_a_limit_told_long_ago_refuses_nothing_here() -> None:
    """The account may have been given a larger limit meanwhile: the server decides."""
    ledger = RateLimiter()
    sent = ledger.try_acquire(ledger.enqueue("b", Cost(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    ledger.observe(
        sent, LimitSnapshot(at=101.0, tokens=LimitReading(limit=1000, remaining=900)), 101.0
    )
    ledger.settle(sent, Usage(input_tokens=10, output_tokens=90), 102.0)
    leave = ledger.try_acquire(ledger.enqueue("b", Cost(5000, 90), lambda: None), 4000.0)
    assert isinstance(leave, Permit)


def test_what_short_prompts_count_for_refuses_no_long_one() -> None:
    """A fixed charge on each prompt makes short ones count fourfold, and a long one hardly more."""
    ledger, gauge = RateLimiter(), LimitReading(limit=30_000, remaining=29_000, full_in=2.0)
    for second in range(100, 200):
        sent = ledger.try_acquire(ledger.enqueue("b", Cost(12, 50), lambda: None), second)
        assert isinstance(sent, Permit)
        ledger.observe(sent, LimitSnapshot(at=second, tokens=gauge), second)
        ledger.settle(sent, Usage(input_tokens=52, output_tokens=5), second)
    ledger.try_acquire(ledger.enqueue("b", Cost(12_000, 50), lambda: None), 201.0)


def test_what_was_let_in_once_is_not_refused_here() -> None:
    """A server that states a limit smaller than what it lets in is not believed."""
    ledger = RateLimiter()
    for at in (100.0, 900.0):
        ticket = ledger.enqueue("b", Cost(5000, 90), lambda: None)
        sent = ledger.try_acquire(ticket, at)
        assert isinstance(sent, Permit)
        gauge = LimitReading(limit=1000, remaining=900, full_in=6.0)
        ledger.observe(sent, LimitSnapshot(at=at + 1, tokens=gauge), at + 1)


numbers = st.floats(0, 1e15)
gauges = st.none() | st.builds(
    LimitReading,
    limit=st.floats(1e-3, 1e15),
    remaining=numbers,
    full_in=st.none() | st.floats(0, 31 * 86_400),
)
snapshots = st.none() | st.builds(
    LimitSnapshot,
    at=st.floats(0, 1e6),
    processing=st.none() | st.floats(0, 86_400),
    tokens=gauges,
    requests=gauges,
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


def lived_through(says: list[tuple[str, Any, Any]]) -> tuple[RateLimiter, float]:
    """Return a ledger that was told all this, one thing every 100 s, and the time."""
    ledger, now = RateLimiter(), 1000.0
    for what, snapshot, limit in says:
        now += 100
        sent = ledger.probe(ledger.enqueue("b", Cost(1, 10), lambda: None), now)
        match what:
            case "admit":
                ledger.observe(sent, snapshot, now + 1)
            case "settle":
                ledger.settle(sent, Usage(input_tokens=10**9, output_tokens=10**9), now + 1)
            case "cancel":
                ledger.release(sent, now + 1)
            case "refuse":
                sent.is_probe = False
                ledger.refuse(sent, until=now + 2, limit=limit, snapshot=snapshot, now=now + 1)
    return ledger, now + 100


@given(histories)
def test_whatever_a_server_says_there_is_a_moment(says: list[tuple[str, Any, Any]]) -> None:
    """No header and no message makes the ledger raise, or wait for ever."""
    ledger, now = lived_through(says)
    leave = ledger.try_acquire(ledger.enqueue("b", Cost(1e-9, 10), lambda: None), now)
    assert isinstance(leave, Permit) or now < leave.until < math.inf


of_a_minute = st.lists(
    st.tuples(
        st.sampled_from(["admit", "refuse", "settle", "cancel"]),
        snapshots,
        limits.filter(lambda limit: limit is None or limit.window in (None, 60.0)),
    ),
    max_size=12,
)


@given(of_a_minute, st.floats(0, 1), st.floats(0, 1))
def test_whatever_a_server_has_said_the_truth_outweighs_it(
    says: list[tuple[str, Any, Any]], left: float, asked: float
) -> None:
    """Headers that tell the truth are believed: nobody waits longer than a bucket takes to fill."""
    ledger, now = lived_through(says)
    sent = ledger.probe(ledger.enqueue("b", Cost(20, 80), lambda: None), now)
    tokens = LimitReading(limit=3_000, remaining=left * 3_000, full_in=(1 - left) * 60)
    requests = LimitReading(limit=60, remaining=30, full_in=30)
    ledger.observe(sent, LimitSnapshot(at=now, tokens=tokens, requests=requests), now)
    ledger.settle(sent, Usage(input_tokens=20, output_tokens=80), now)
    leave = ledger.try_acquire(ledger.enqueue("b", Cost(0, asked * 3_000), lambda: None), now)
    assert isinstance(leave, Permit) or leave.until <= now + 60 + DRAIN_TRUST_S


def test_one_goes_when_the_server_said() -> None:
    """After a hold the first goes at its end, whatever is reckoned; others when there is room."""
    ledger = RateLimiter()
    tickets = [ledger.enqueue("b", Cost(10, 5_000), lambda: None) for _ in range(3)]
    sent = ledger.try_acquire(tickets[0], 100.0)
    assert isinstance(sent, Permit)
    gauge = LimitReading(limit=6_000, remaining=6_000)
    ledger.observe(sent, LimitSnapshot(at=100.2, tokens=gauge), 100.2)
    sent = ledger.try_acquire(tickets[1], 100.3)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=6_000, used=6_000, requested=5_010)
    ledger.refuse(sent, until=110.0, limit=limit, snapshot=None, now=100.4)
    ledger.requeue(tickets[1])
    assert isinstance(ledger.try_acquire(tickets[1], 109.9), Wait | Cooldown)
    assert isinstance(ledger.try_acquire(tickets[1], 110.0), Permit)
    later = ledger.try_acquire(tickets[2], 111.0)
    assert isinstance(later, Wait | Cooldown)
    assert later.until > 140.0


@pytest.mark.parametrize(("output", "goes"), [(5_000, True), (5_001, False)])
def test_what_was_promised_to_a_dead_kernel_is_the_next_one_s(output: float, goes: bool) -> None:
    """At a hold's end the server has room for what it refused, whoever asks for that now."""
    store = Watched()
    dead, alive = (RateLimiter(store, holder=name) for name in ("dead", "alive"))
    sent = dead.try_acquire(dead.enqueue(BUCKET, Cost(10, 5_000), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    dead.observe(
        sent, LimitSnapshot(at=100.2, tokens=LimitReading(limit=6_000, remaining=6_000)), 100.2
    )
    sent = dead.try_acquire(dead.enqueue(BUCKET, Cost(10, 5_000), lambda: None), 100.3)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=6_000, used=6_000, requested=5_010)
    dead.refuse(sent, until=110.0, limit=limit, snapshot=None, now=100.4)
    ticket = alive.enqueue(BUCKET, Cost(10, output), lambda: None)
    assert isinstance(alive.try_acquire(ticket, 103.0), Wait | Cooldown)
    assert isinstance(alive.try_acquire(ticket, 110.0), Permit if goes else Wait | Cooldown)


def test_a_promise_is_kept_to_whom_it_was_made() -> None:
    """As long as that one lives, others wait until there is room for both."""
    store = Watched()
    first, other = (RateLimiter(store, holder=name) for name in ("first", "other"))
    ticket = first.enqueue(BUCKET, Cost(10, 5_000), lambda: None)
    sent = first.try_acquire(ticket, 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=6_000, used=6_000, requested=5_010)
    first.refuse(sent, until=110.0, limit=limit, snapshot=None, now=100.4)
    first.requeue(ticket)
    first.heartbeat(108.0)
    assert isinstance(
        other.try_acquire(other.enqueue(BUCKET, Cost(10, 5_000), int), 110.0), Wait | Cooldown
    )
    assert isinstance(first.try_acquire(ticket, 110.0), Permit)


def refused_without_figures(ledger: RateLimiter, at: float, count: int) -> None:
    """Send some at once, all of which are refused for ten seconds by a server without a word."""
    tickets = [ledger.enqueue(BUCKET, Cost(500, 500), lambda: None) for _ in range(count)]
    sent = [ledger.probe(ticket, at) for ticket in tickets]
    for each in sent:
        each.is_probe = False
        ledger.refuse(each, until=at + 10, limit=None, snapshot=None, now=at)


def let_in(ledger: RateLimiter, at: float, snapshot: LimitSnapshot | None = None) -> None:
    """Send one that is let in, and answered at once."""
    sent = ledger.probe(ledger.enqueue(BUCKET, Cost(500, 500), lambda: None), at)
    ledger.observe(sent, snapshot, at)
    ledger.settle(sent, Usage(input_tokens=500, output_tokens=500), at)


def test_a_pace_that_is_not_used_does_not_grow() -> None:
    """A server without headers: what now and then one request bears out is tried out by nobody."""
    ledger = RateLimiter(store := Watched())
    for second in range(100, 110):
        let_in(ledger, float(second))
    refused_without_figures(ledger, 110.0, 5)
    before = store.bucket().tokens.bucket.rate
    for number in range(100):
        let_in(ledger, 130.0 + 20 * number)
    assert store.bucket().tokens.bucket.rate == before


def test_a_guess_is_not_kept_over_a_long_rest() -> None:
    """What was guessed in a bad hour slows nobody down the next day."""
    ledger = RateLimiter(store := Watched())
    let_in(ledger, 100.0)
    refused_without_figures(ledger, 110.0, 5)
    assert store.bucket().tokens.bucket.is_known
    let_in(ledger, 90_000.0)
    assert not store.bucket().tokens.bucket.is_known


def test_a_guess_is_made_from_the_last_minutes() -> None:
    """Hours of light use do not make the pace small that a burst then shows."""
    ledger = RateLimiter(store := Watched())
    for number in range(500):
        let_in(ledger, 100.0 + 50 * number)
    at = 100.0 + 50 * 500
    for number in range(100):
        let_in(ledger, at + number / 10)
    refused_without_figures(ledger, at + 10, 5)
    assert store.bucket().tokens.bucket.rate > 500


def test_an_odd_refusal_is_forgotten() -> None:
    """A full bucket that has refused once is used fully again when some time has passed."""
    ledger = RateLimiter()
    full = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    let_in(ledger, 100.0, LimitSnapshot(at=100.0, tokens=full))
    odd = ledger.probe(ledger.enqueue(BUCKET, Cost(500, 500), lambda: None), 110.0)
    odd.is_probe = False
    limit = Limit(resource="tokens", window=60.0, limit=60_000, used=0, requested=1_000)
    ledger.refuse(odd, until=130.0, limit=limit, snapshot=None, now=110.0)
    let_in(ledger, 5_000.0, LimitSnapshot(at=5_000.0, tokens=full))
    for number in range(40):
        ticket = ledger.enqueue(BUCKET, Cost(500, 500), lambda: None)
        assert isinstance(ledger.try_acquire(ticket, 5_001.0 + number / 100), Permit)


def test_a_limit_that_headers_tell_no_more_is_forgotten() -> None:
    """Requests a minute were told once; now only tokens are, and nothing else bounds a job."""
    ledger = RateLimiter()
    tokens = LimitReading(limit=60_000, remaining=59_000, full_in=1.0)
    let_in(
        ledger,
        100.0,
        LimitSnapshot(at=100.0, tokens=tokens, requests=LimitReading(limit=3, remaining=2)),
    )
    let_in(ledger, 5_000.0, LimitSnapshot(at=5_000.0, tokens=tokens))
    for number in range(20):
        ticket = ledger.enqueue(BUCKET, Cost(10, 10), lambda: None)
        assert isinstance(ledger.try_acquire(ticket, 5_001.0 + number / 100), Permit)


def test_a_lonely_refusal_without_figures_only_closes() -> None:
    """One request that a gateway refuses waits for the hold, and not for a pace made up from it."""
    store = Watched()
    ledger = RateLimiter(store)
    ticket = ledger.enqueue(BUCKET, Cost(10, 1000), lambda: None)
    sent = ledger.try_acquire(ticket, 100.0)
    assert isinstance(sent, Permit)
    ledger.refuse(sent, until=101.0, limit=Limit(), snapshot=None, now=100.1)
    ledger.requeue(ticket)
    assert isinstance(ledger.try_acquire(ticket, 101.0), Permit)
    assert not store.bucket().tokens.bucket.is_known


def test_a_silent_server_is_asked_again() -> None:
    """A first request that is never heard of does not keep the others for ever."""
    ledger = RateLimiter()
    first, second = (ledger.enqueue("b", Cost(10, 90), lambda: None) for _ in range(2))
    ledger.try_acquire(first, 100.0)
    hold = ledger.try_acquire(second, 100.0)
    assert isinstance(hold, Wait | Cooldown)
    assert hold.until == pytest.approx(110.0)
    assert isinstance(ledger.try_acquire(second, hold.until), Permit)


def test_a_place_given_up_is_the_next_one_s() -> None:
    """Who leaves the head of the row wakes the next."""
    ledger, woken = RateLimiter(), []
    first = ledger.enqueue("b", Cost(10, 90), lambda: woken.append(1))
    ledger.enqueue("b", Cost(10, 90), lambda: woken.append(2))
    ledger.dequeue(first)
    assert woken == [2]


def test_settling_twice_counts_once() -> None:
    """A reservation is settled or cancelled once, whatever is said of it later."""
    store = Watched()
    ledger = RateLimiter(store)
    sent = ledger.try_acquire(ledger.enqueue(BUCKET, Cost(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    ledger.settle(sent, Usage(input_tokens=10, output_tokens=5), 103.0)
    ledger.release(sent, 104.0)
    ledger.settle(sent, Usage(input_tokens=10, output_tokens=5), 105.0)
    output = store.bucket().output
    assert (output.ended, output.in_flight, store.bucket().unanswered) == (1, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_share_fairly(policy: str) -> None:
    """Four kernels on one store get equal parts, and are refused hardly ever."""
    prompts = workload(2000, 4)
    shares = [prompts[i::4] for i in range(4)]
    world, _ = run_kernels(policy, shares, 4)
    assert fairness(world, shares, policy) >= 0.98
    assert world.tally.refused <= 0.005 * world.tally.requests


@pytest.mark.parametrize("policy", POLICIES)
def test_the_others_take_what_a_dead_kernel_leaves(policy: Any) -> None:
    """Ten seconds after one of four kernels has died, the others use the whole limit."""
    prompts, store = workload(4000, 5), Watched()
    world = World(Heap(), replace(TOKENS, policy=policy), 5)
    clients = [Client(world, RateLimiter(store, holder=str(i)), prompts[i::4], i) for i in range(4)]
    for client in clients:
        client.start()
        beat(client, world)
    world.heap.at(START + 60, setattr, clients[0], "dead", True)
    world.heap.run()
    at = world.tally.admitted_at
    begin, end = START + 70, START + 110
    taken = sum(p.charge(policy) for p in prompts if begin <= at.get(p.number, 0) < end)
    assert taken >= 0.97 * 10_000 * (end - begin)


def test_light_ones_do_not_wait_for_a_heavy_one() -> None:
    """Beside a kernel with thousands of prompts, one with a few hardly waits, once known."""
    prompts, store = workload(2050, 6), Watched()
    world = World(Heap(), replace(TOKENS, policy="refunded"), 6)
    heavy, light = (Client(world, RateLimiter(store, holder=n), [], 0) for n in ("heavy", "light"))
    heavy.errands = [Errand(heavy, p) for p in prompts[:2000]]
    light.errands = [Errand(light, p) for p in prompts[2000:]]
    heavy.start()
    for client in (heavy, light):
        beat(client, world)
    for number, errand in enumerate(light.errands):
        world.heap.at(START + 40 + number, errand.enter)
    world.heap.run()
    at = world.tally.admitted_at
    waits = [at[e.prompt.number] - e.entered_at for e in light.errands]
    # Its first one makes it known; after 17 s, the end of the heavy job spends what was kept free.
    assert max(waits[1:17]) < 0.06


def test_what_was_learnt_outlives_the_bucket() -> None:
    """Policy, share of output and fit of one job are where the next one begins."""
    world, client, _ = crowd(replace(TOKENS, policy="actual", bias=1.15), workload(1500, 7))
    finish(world, client)
    told = client.ledger.limit_states(world.heap.now)[BUCKET]
    assert told.history
    assert told.tokens
    assert told.tokens.limit == 600_000
    later = Watched()
    begin_with(later, told.history)
    bucket = later.bucket()
    assert bucket.tokens.policy == "actual"
    assert bucket.output.share(0.0) == pytest.approx(told.history.output_share, rel=0.5)
    assert bucket.input_ratio == pytest.approx(1.15, rel=0.05)


def test_a_hold_that_another_kernel_found_over_is_over() -> None:
    """Its probe was let in: whoever waits for the hold's end elsewhere looks again at once."""
    store, woken = MemoryStore(), []
    first, second = (RateLimiter(store, holder=name) for name in ("a", "b"))
    ticket = first.enqueue("b", Cost(10, 90), lambda: None)
    refused = first.try_acquire(ticket, 100.0)
    assert isinstance(refused, Permit)
    first.refuse(refused, until=3700.0, limit=Limit(), snapshot=None, now=100.0)
    other = second.enqueue("b", Cost(10, 90), lambda: woken.append(True))
    assert isinstance(second.try_acquire(other, 101.0), Wait | Cooldown)
    second.heartbeat(102.0)
    assert not woken
    first.requeue(ticket)
    full = LimitSnapshot(at=110.0, tokens=LimitReading(limit=6_000, remaining=5_000))
    first.observe(first.probe(ticket, 110.0), full, 110.0)
    second.heartbeat(111.0)
    assert woken
    assert isinstance(second.try_acquire(other, 111.0), Permit)


@pytest.mark.parametrize("over", [True, False])
def test_one_finds_out_for_all_whether_a_hold_is_over(*, over: bool) -> None:
    """Of those taken up again in another kernel, the first asks the server, and the others wait."""
    store, woken = MemoryStore(), set[int]()
    first, second = (RateLimiter(store, holder=name) for name in ("a", "b"))
    refused = first.try_acquire(first.enqueue("b", Cost(10, 90), lambda: None), 100.0)
    assert isinstance(refused, Permit)
    first.refuse(refused, until=8_000.0, limit=Limit(), snapshot=None, now=100.0)
    places = [second.enqueue("b", Cost(10, 90), lambda i=i: woken.add(i)) for i in range(3)]
    holds = [second.try_acquire(place, 3_600.0, may_probe=True) for place in places]
    assert [type(h) for h in holds] == [Cooldown, Wait, Wait]
    assert holds[0].inherited
    probe = second.probe(places[0], 3_600.0)
    next_ = second.try_acquire(places[1], 3_600.0, may_probe=True)
    assert isinstance(next_, Wait)
    woken.clear()
    if over:
        full = LimitSnapshot(at=3_601.0, tokens=LimitReading(limit=6_000, remaining=5_000))
        second.observe(probe, full, 3_601.0)
    else:
        second.refuse(probe, until=8_000.0, limit=Limit(), snapshot=None, now=3_601.0)
    assert {1, 2} <= woken
    leave = second.try_acquire(places[1], 3_601.0, may_probe=True)
    assert isinstance(leave, Permit if over else Cooldown)
    assert over or not leave.inherited


def test_who_gives_up_its_place_keeps_no_other_kernel_waiting() -> None:
    """What an interrupted request asked for is nobody's claim, also if its kernel lives on."""
    store = MemoryStore()
    first, second = (RateLimiter(store, holder=name) for name in ("a", "b"))
    for at, ledger, left in ((100.0, first, 59_000), (100.1, second, 58_000), (100.2, second, 99)):
        sent = ledger.try_acquire(ledger.enqueue("b", Cost(10, 990), lambda: None), at)
        assert isinstance(sent, Permit)
        gauge = LimitReading(limit=60_000, remaining=left, full_in=(60_000 - left) / 1_000)
        ledger.observe(sent, LimitSnapshot(at=at, tokens=gauge), at)
    given_up = first.enqueue("b", Cost(50_000, 1_000), lambda: None)
    first.try_acquire(given_up, 101.0)
    first.dequeue(given_up)
    first.heartbeat(102.0)
    waits = second.try_acquire(second.enqueue("b", Cost(1_000, 1_000), lambda: None), 102.0)
    assert isinstance(waits, Wait)
    assert waits.due_at is not None
    assert waits.due_at < 120


def test_those_far_back_hear_of_a_hold() -> None:
    """A bucket that closes for long tells everybody who waits, and each learns until when."""
    ledger, woken = RateLimiter(), []
    tickets = [ledger.enqueue("b", Cost(10, 90), lambda i=i: woken.append(i)) for i in range(3)]
    sent = ledger.try_acquire(tickets[0], 100.0)
    assert isinstance(sent, Permit)
    limit = Limit(resource="tokens", window=60.0, limit=600, used=600, requested=100)
    ledger.refuse(sent, until=110.0, limit=limit, snapshot=None, now=100.1)
    assert {1, 2} <= set(woken)
    assert ledger.try_acquire(tickets[2], 101.0) == Cooldown(110.0, limit)


def test_a_dead_kernel_is_buried() -> None:
    """What a kernel held that gives no sign of life is free again within the lease."""
    store = Watched()
    dead, alive = RateLimiter(store, holder="dead"), RateLimiter(store, holder="alive")
    sent = dead.try_acquire(dead.enqueue(BUCKET, Cost(10, 90), lambda: None), 100.0)
    assert isinstance(sent, Permit)
    alive.enqueue(BUCKET, Cost(10, 90), lambda: None)
    alive.heartbeat(104.0)
    assert store.bucket().output.in_flight == 1
    alive.heartbeat(106.0)
    assert (store.bucket().output.in_flight, store.bucket().unanswered) == (0, 0)
