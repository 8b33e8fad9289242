"""The user's own caps: checked before sending, counted by what was used, with early warnings."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nbcodex.client import Client
from nbcodex.errors import BudgetError, ConfigurationError, LimitError, RequestError, TransportError
from nbcodex.events import Failed, Finished, Parked
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Limit, Reply, Request, StreamPosition, Usage
from nbcodex.openai_api.answers import CompletedAnswer, TextDelta
from nbcodex.requests.budget import Budget, SpendingCap, parse_cap
from nbcodex.requests.runner import RequestRunner
from nbcodex.runtime.clock import BootClock
from nbcodex.settings import Secret, Settings
from tests.scripted import SETTINGS, STARTED, Attempt, ScriptedServices, answer, ending
from tests.virtual import run_virtual

OPENAI, LOCAL = "https://api.openai.com/v1", "http://127.0.0.1:8000/v1"
USED = Reply(id="a", usage=Usage(input_tokens=60, output_tokens=40), cost=0.25)


@pytest.mark.parametrize(
    ("text", "cap"),
    [
        ("200k", SpendingCap(amount=200_000, unit="tokens")),
        ("1.5M / day", SpendingCap(amount=1_500_000, unit="tokens", period="day")),
        ("200,000 tokens", SpendingCap(amount=200_000, unit="tokens")),
        ("$5", SpendingCap(amount=5, unit="dollars")),
        ("$0.50/day", SpendingCap(amount=0.5, unit="dollars", period="day")),
        ("20 USD per month", SpendingCap(amount=20, unit="dollars", period="month")),
    ],
)
def test_cap_is_parsed_as_users_write_it(text: str, cap: SpendingCap) -> None:
    assert parse_cap(text) == cap
    assert parse_cap(cap.source_text) == cap


@pytest.mark.parametrize("text", ["", "much", "-5", "0", "$0", "$5 tokens", "5/week", "1e5", "k"])
def test_invalid_cap_error_shows_examples(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"200k.*\$5.*off"):
        parse_cap(text)


def endings_under_cap(
    *attempts: Attempt, cap: str, request: Request | None = None
) -> tuple[list[Any], ScriptedServices]:
    """Run one request per attempt under a cap; return the endings and the services."""

    async def main() -> tuple[list[Any], ScriptedServices]:
        scripted = ScriptedServices(*attempts)
        endings = []
        for _ in attempts:
            asked = replace(request or Request(prompt="hello"), id=f"r{len(endings)}")
            received: list[Any] = []
            run = RequestRunner(
                scripted.services, asked, replace(SETTINGS, budgets=(cap,)), received.append
            ).start()
            await asyncio.wait([run.task])
            endings.append(ending(received))
        return endings, scripted

    return run_virtual(main())


def test_request_that_would_pass_the_cap_is_parked_unsent() -> None:
    small = Request(prompt="hello", max_output=50)
    endings, scripted = endings_under_cap(answer("hi"), answer("hi"), cap="70", request=small)
    assert [type(e) for e in endings] == [Finished, Parked]
    assert len(scripted.api_client.seen) == 1
    reported = str(endings[1].error)
    assert isinstance(endings[1].error, BudgetError)
    assert "70 tokens for this session: 15 are used" in reported
    assert "it needs up to 59" in reported
    assert "%codex resume r1" in reported


@pytest.mark.parametrize(
    ("cap", "warned"),
    [("10k", []), ("20k", ["15,000 of 20,000 tokens for this session used (75%)"])],
)
def test_reply_warns_at_75_90_and_95_percent(cap: str, warned: list[str]) -> None:
    usage = Usage(input_tokens=14_000, output_tokens=1_000)
    done = CompletedAnswer(text="hi", usage=usage, model="m", cut=None, response_id=None)
    (only,), _ = endings_under_cap([STARTED, TextDelta("hi"), done], cap=cap)
    if warned:
        assert list(only.reply.notes) == warned
    else:
        assert "(150%)" in only.reply.notes[0]


async def budget_after(
    *replies: Reply, caps: list[str], base_url: str = OPENAI, model: str = "gpt-4o"
) -> tuple[Budget, list[tuple[str, ...]]]:
    """Return a budget that has counted one request per reply, and its warnings."""
    own, journal = Budget(BootClock()), Journal(None)
    reported = []
    try:
        for number, reply in enumerate(replies):
            request = Request(prompt="hello", id=f"r{number}", max_output=10)
            await own.reserve(
                request,
                caps=caps,
                journal=journal,
                model=model,
                base_url=base_url,
            )
            reported.append(own.commit(request.id, reply))
    finally:
        journal.close()
    return own, reported


def test_each_warning_appears_once() -> None:
    _, reported = asyncio.run(budget_after(*[USED] * 4, caps=["500"]))
    # 100, 200, 300, 400 of 500
    assert [len(t) for t in reported] == [0, 0, 0, 1]


def test_running_requests_reserve_their_estimates() -> None:
    async def main() -> None:
        own, journal = Budget(BootClock()), Journal(None)
        where: dict[str, Any] = {"journal": journal, "model": "m", "base_url": LOCAL}
        try:
            for _ in range(2):
                request = Request(prompt="hello", max_output=40)
                await own.reserve(request, caps=["120"], **where)
            words = r"exceed your budget of 120 tokens .* are used or reserved, and it needs up to"
            with pytest.raises(BudgetError, match=words):
                await own.reserve(Request(prompt="hello", max_output=40), caps=["120"], **where)
        finally:
            journal.close()

    asyncio.run(main())


def test_unknown_price_is_refused_under_a_dollar_cap() -> None:
    with pytest.raises(BudgetError, match=r"No price is known.*budget 200k"):
        asyncio.run(budget_after(USED, caps=["$5"], base_url="https://gateway.example.org/v1"))


def test_local_server_passes_a_dollar_cap() -> None:
    own, _ = asyncio.run(budget_after(replace(USED, cost=None), caps=["$5"], base_url=LOCAL))
    assert own.usage_lines(["$5"]) == ["$0.00 of $5.00 for this session used (0%)"]


def test_reused_answer_uses_nothing_of_the_cap() -> None:
    own, _ = asyncio.run(budget_after(replace(USED, reused=True, attempts=0), caps=["500"]))
    assert own.usage_lines(["500"]) == ["0 of 500 tokens for this session used (0%)"]


def test_answer_without_usage_counts_as_reserved() -> None:
    own, _ = asyncio.run(budget_after(replace(USED, usage=Usage()), caps=["500"]))
    assert own.usage_lines(["500"]) == ["19 of 500 tokens for this session used (4%)"]


def test_refused_request_releases_its_reservation() -> None:
    limit = Limit(resource="tokens", window=60.0, limit=30_000)
    refused = LimitError("Rate limit reached.", limit=limit, wait=3600.0)
    small = Request(prompt="hello", max_output=50)
    endings, _ = endings_under_cap([refused], answer("hi"), cap="70", request=small)
    assert [type(e) for e in endings] == [Parked, Finished]


def test_answer_that_continues_at_the_server_counts_when_resumed() -> None:
    lost = [
        STARTED,
        StreamPosition("resp_1", 1),
        TextDelta("hi"),
        RequestError("It makes no sense."),
    ]
    durable = Request(prompt="hello", max_output=50, durable=True)
    endings, _ = endings_under_cap(lost, answer("hi"), cap="70", request=durable)
    assert [type(e) for e in endings] == [Failed, Finished]


def test_broken_attempts_count_against_the_cap() -> None:
    broken = [STARTED, TextDelta("word " * 40), TransportError("It broke.")]
    small = Request(prompt="hello", max_output=50)
    endings, scripted = endings_under_cap(*[broken] * 5, cap="200", request=small)
    assert all(isinstance(each.error, BudgetError) for each in endings)
    assert 150 < endings[0].reply.usage.total_tokens <= 200
    assert len(scripted.api_client.seen) == 3


def test_shared_cap_applies_in_every_kernel() -> None:
    async def main() -> None:
        journal = Journal(None)
        try:
            await Budget(BootClock()).set_shared_cap(journal, parse_cap("1k/day"))
            await journal.insert(Request(prompt="x", id="other"))
            await journal.finish(
                replace(USED, id="other", usage=Usage(input_tokens=900, output_tokens=80))
            )
            mine = Budget(BootClock())
            with pytest.raises(BudgetError, match=r"1,000 tokens for today: 980 .*resets in"):
                await mine.reserve(
                    Request(prompt="hello", max_output=40),
                    caps=[],
                    journal=journal,
                    model="m",
                    base_url=LOCAL,
                )
        finally:
            journal.close()

    asyncio.run(main())


async def admitted(budget: Budget, journal: Journal, id_: str) -> bool:
    """Return whether a cap lets a request of about 50 tokens through."""
    request = Request(prompt="hello", id=id_, max_output=41)
    try:
        await budget.reserve(request, caps=[], journal=journal, model="m", base_url=LOCAL)
    except BudgetError:
        return False
    return True


def test_reservations_of_other_kernels_count(tmp_path: Path) -> None:
    async def main() -> None:
        journals = [Journal(tmp_path) for _ in range(2)]
        budgets = [Budget(BootClock()) for _ in journals]
        try:
            await budgets[0].set_shared_cap(journals[0], parse_cap("260/day"))
            asked = [admitted(budgets[n % 2], journals[n % 2], f"{n}") for n in range(12)]
            assert sum(await asyncio.gather(*asked)) == 5
            done = Reply(id="0", usage=Usage(input_tokens=2, output_tokens=1))
            for number in range(12):
                journal, budget = journals[number % 2], budgets[number % 2]
                reply = replace(done, id=f"{number}")
                budget.commit(reply.id, reply)
                await journal.finish(reply)
            # 36 tokens are used by now, and nothing is reserved.
            assert (
                sum([await admitted(budgets[n % 2], journals[n % 2], f"x{n}") for n in range(12)])
                == 4
            )
        finally:
            for journal in journals:
                journal.close()

    asyncio.run(main())


def test_reservations_of_dead_kernel_are_released(tmp_path: Path) -> None:
    async def main() -> None:
        here, gone = Journal(tmp_path), Journal(tmp_path)
        budget = Budget(BootClock())
        try:
            await budget.set_shared_cap(here, parse_cap("60/day"))
            assert await admitted(Budget(BootClock()), gone, "theirs")
            assert not await admitted(budget, here, "ours")
            gone.close()
            assert await admitted(budget, here, "ours")
        finally:
            here.close()
            gone.close()

    asyncio.run(main())


def test_day_and_session_count_the_same() -> None:
    async def main() -> None:
        journal, own = Journal(None), Budget(BootClock())
        reply = Reply(id="a", attempts=1, status="cancelled")
        request = Request(prompt="hello", id="a", max_output=41)
        try:
            await own.reserve(request, caps=["9k"], journal=journal, model="m", base_url=LOCAL)
            await journal.insert(request)
            reserved = own.reserved_for("a")
            own.commit("a", reply)
            await journal.finish(reply, spent_if_unknown=reserved)
            seen = await journal.read_spending(date.today().isoformat())
            assert seen.day == reserved == SpendAmount(tokens=50)
            assert own.usage_lines(["9k"]) == ["50 of 9,000 tokens for this session used (1%)"]
        finally:
            journal.close()

    asyncio.run(main())


def test_fifty_waiting_requests_share_one_read() -> None:
    async def main() -> None:
        journal, budget = Journal(None), Budget(BootClock())
        ask = partial(budget.reserve, caps=[], journal=journal, model="m", base_url=LOCAL)
        try:
            those = [asyncio.create_task(ask(Request(prompt="hello"))) for _ in range(50)]
            await asyncio.wait(those, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
            assert all(one.done() for one in those)
        finally:
            journal.close()

    asyncio.run(main())


def test_monthly_cap_resets_on_the_first() -> None:
    now = datetime(2027, 1, 31, 9, 30).timestamp()
    reset = parse_cap("$1/month").resets_at(now)
    assert reset is not None
    moment = datetime.fromtimestamp(reset)
    assert (moment.day, moment.hour) == (1, 0)
    assert 0 < reset - now <= 31 * 86_400


def test_amounts_add_up_in_each_unit() -> None:
    total = SpendAmount(tokens=1, dollars=2.0) + SpendAmount(tokens=3, dollars=4.0)
    assert total == SpendAmount(tokens=4, dollars=6.0)


def _answer_of_100_tokens(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(
        200,
        json={
            "id": "c1",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "hi"},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100},
        },
    )


def _client_of_one_kernel() -> Client:
    return Client(transport=httpx2.MockTransport(_answer_of_100_tokens))


@pytest.mark.parametrize("journal", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("set_by", ["user", "site"])
def test_daily_cap_counts_on_disk_while_the_journal_is_off(
    tmp_path: Path, journal: tuple[bool, bool], set_by: str
) -> None:
    """The cap holds without a journal of prompts, and in other kernels."""
    settings = Settings(
        api_key=Secret("sk-0123456789"),
        base_url="https://gw.example/v1",
        home=tmp_path,
        api="chat",
        model="m",
        budgets=("200/day",) if set_by == "site" else (),
    )

    async def main() -> list[Any]:
        clients = [_client_of_one_kernel(), _client_of_one_kernel()]
        here = [replace(settings, journal=is_on) for is_on in journal]
        request = Request(prompt="hello", max_output=100)
        try:
            if set_by == "user":
                counters = clients[0].spending_journal(here[0], create=True)
                await clients[0].services().budget.set_shared_cap(counters, parse_cap("200/day"))
            first = (
                await clients[0].create_handle(replace(request, id="a1"), here[0]).follow_async()
            )
            second = (
                await clients[1].create_handle(replace(request, id="a2"), here[1]).follow_async()
            )
            await clients[1].services().budget.reset(clients[1].spending_journal(here[1]))
            return [
                first,
                second,
                await clients[1].create_handle(replace(request, id="a3"), here[1]).follow_async(),
            ]
        finally:
            for client in clients:
                client.close()

    first, second, third = asyncio.run(main())
    assert isinstance(first, Finished)
    assert isinstance(second.error, BudgetError)
    assert "100 are used" in str(second.error)
    assert isinstance(third, Finished)
    if not any(journal):
        assert b"hello" not in b"".join(f.read_bytes() for f in tmp_path.glob("journal*"))
