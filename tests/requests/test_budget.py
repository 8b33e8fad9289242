"""The user's own caps: refused before sending, counted by what was used, warned of in time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbcodex.errors import BudgetError, ConfigurationError, LimitError, RequestError, TransportError
from nbcodex.events import Failed, Finished, Parked
from nbcodex.journal.journal import Journal
from nbcodex.journal.spending import SpendAmount
from nbcodex.models import Limit, Reply, Request, StreamPosition, Usage
from nbcodex.openai_api.answers import CompletedAnswer, TextDelta
from nbcodex.requests import budget
from nbcodex.requests.budget import Budget, SpendingCap, parse_cap
from nbcodex.requests.runner import RequestRunner
from nbcodex.runtime.clock import BootClock
from tests.scripted import OPENED, SETTINGS, Act, Stage, answer, ending
from tests.virtual import LoopClock, run_virtual

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
def test_a_cap_is_read_as_people_write_it(text: str, cap: SpendingCap) -> None:
    """Tokens and dollars, for a session, a day or a month; what is kept reads the same."""
    assert parse_cap(text) == cap
    assert parse_cap(cap.text) == cap


@pytest.mark.parametrize("text", ["", "much", "-5", "0", "$0", "$5 tokens", "5/week", "1e5", "k"])
def test_what_is_no_cap_says_how_to_write_one(text: str) -> None:
    """Nonsense is refused with examples."""
    with pytest.raises(ConfigurationError, match=r"200k.*\$5.*off"):
        parse_cap(text)


def played(*acts: Act, cap: str, request: Request | None = None) -> tuple[list[Any], Stage]:
    """Ask until the acts are over, under a cap; return the endings and the stage."""

    async def main() -> tuple[list[Any], Stage]:
        stage = Stage(*acts)
        endings = []
        for _ in acts:
            asked = replace(request or Request(prompt="hello"), id=f"r{len(endings)}")
            heard: list[Any] = []
            run = RequestRunner(
                stage.services, asked, replace(SETTINGS, budgets=(cap,)), heard.append
            ).start()
            await asyncio.wait([run.task])
            endings.append(ending(heard))
        return endings, stage

    return run_virtual(main())


def test_what_would_pass_the_cap_is_not_sent() -> None:
    """The refusal tells the estimate and what is used; the request is kept, not lost."""
    small = Request(prompt="hello", max_output=50)
    endings, stage = played(answer("hi"), answer("hi"), cap="70", request=small)
    assert [type(e) for e in endings] == [Finished, Parked]
    assert len(stage.api_client.seen) == 1
    told = str(endings[1].error)
    assert isinstance(endings[1].error, BudgetError)
    assert "70 tokens for this session: 15 tokens are used" in told
    assert "at most 50 out" in told
    assert "%codex resume r1" in told


@pytest.mark.parametrize(
    ("cap", "warned"),
    [("10k", []), ("20k", ["15,000 tokens of 20,000 tokens for this session used (75%)"])],
)
def test_a_warning_comes_with_the_answer(cap: str, warned: list[str]) -> None:
    """At 75, 90 and 95 per cent the figures line says how far the cap is used up."""
    usage = Usage(input_tokens=14_000, output_tokens=1_000)
    done = CompletedAnswer(text="hi", usage=usage, model="m", cut=None, response_id=None)
    (only,), _ = played([OPENED, TextDelta("hi"), done], cap=cap)
    if warned:
        assert list(only.reply.notes) == warned
    else:
        assert "(150%)" in only.reply.notes[0]


async def standing(
    *replies: Reply, caps: list[str], base_url: str = OPENAI, model: str = "gpt-4o"
) -> tuple[Budget, list[tuple[str, ...]]]:
    """Return a budget that has seen replies to one request each, and the warnings."""
    own, journal = Budget(BootClock()), Journal(None)
    told = []
    try:
        for number, reply in enumerate(replies):
            request = Request(prompt="hello", id=f"r{number}", max_output=10)
            await own.reserve(
                request,
                caps=map(parse_cap, caps),
                journal=journal,
                model=model,
                base_url=base_url,
            )
            told.append(own.commit(request.id, reply))
    finally:
        journal.close()
    return own, told


def test_each_warning_is_said_once() -> None:
    """Between two thresholds nothing is said again."""
    _, told = asyncio.run(standing(*[USED] * 4, caps=["500"]))
    # 100, 200, 300, 400 of 500
    assert [len(t) for t in told] == [0, 0, 0, 1]


def test_estimates_in_flight_are_set_aside() -> None:
    """Requests that are under way count, so many at once cannot pass the cap together."""

    async def main() -> None:
        own, journal = Budget(BootClock()), Journal(None)
        where: dict[str, Any] = {"journal": journal, "model": "m", "base_url": LOCAL}
        try:
            for _ in range(2):
                request = Request(prompt="hello", max_output=40)
                await own.reserve(request, caps=[parse_cap("120")], **where)
            with pytest.raises(BudgetError, match="are used or reserved"):
                await own.reserve(
                    Request(prompt="hello", max_output=40), caps=[parse_cap("120")], **where
                )
        finally:
            journal.close()

    asyncio.run(main())


def test_an_unknown_price_is_never_zero() -> None:
    """Under a cap in dollars, a model without a price is refused, with the way out."""
    with pytest.raises(BudgetError, match=r"No price is known.*budget 200k"):
        asyncio.run(standing(USED, caps=["$5"], base_url="https://gateway.example.org/v1"))


def test_this_machines_own_server_sends_no_bill() -> None:
    """A local server is let through a cap in dollars, though its price is unknown."""
    own, _ = asyncio.run(standing(replace(USED, cost=None), caps=["$5"], base_url=LOCAL))
    assert own.cap_usages([parse_cap("$5")])[0].used == 0


def test_what_is_reused_costs_nothing() -> None:
    """An answer from the journal uses nothing of the cap."""
    own, _ = asyncio.run(standing(replace(USED, reused=True, attempts=0), caps=["500"]))
    assert own.cap_usages([parse_cap("500")])[0].used == 0


def test_an_answer_without_figures_counts_as_estimated() -> None:
    """Where the server tells no usage, what was set aside is taken as used."""
    own, _ = asyncio.run(standing(replace(USED, usage=Usage()), caps=["500"]))
    assert own.cap_usages([parse_cap("500")])[0].used > 10


def test_what_a_limit_refused_is_not_used() -> None:
    """A request that was refused at the door and parked leaves the cap to the others."""
    limit = Limit(resource="tokens", window=60.0, limit=30_000)
    refused = LimitError("Rate limit reached.", limit=limit, wait=3600.0)
    small = Request(prompt="hello", max_output=50)
    endings, _ = played([refused], answer("hi"), cap="70", request=small)
    assert [type(e) for e in endings] == [Parked, Finished]


def test_what_goes_on_at_the_server_counts_when_it_is_picked_up() -> None:
    """A durable answer that failed on the way leaves the cap to the others until then."""
    lost = [
        OPENED,
        StreamPosition("resp_1", 1),
        TextDelta("hi"),
        RequestError("It makes no sense."),
    ]
    durable = Request(prompt="hello", max_output=50, durable=True)
    endings, _ = played(lost, answer("hi"), cap="70", request=durable)
    assert [type(e) for e in endings] == [Failed, Finished]


def test_attempts_that_broke_off_count_against_the_cap() -> None:
    """A request whose streams break again and again is parked before it passes the cap."""
    broken = [OPENED, TextDelta("word " * 40), TransportError("It broke.")]
    small = Request(prompt="hello", max_output=50)
    endings, stage = played(*[broken] * 5, cap="200", request=small)
    assert all(isinstance(each.error, BudgetError) for each in endings)
    assert 150 < endings[0].reply.usage.total_tokens <= 200
    assert len(stage.api_client.seen) == 3


def test_a_kept_cap_holds_in_every_kernel() -> None:
    """A cap for the day lies in the journal, and counts what other kernels have used."""

    async def main() -> None:
        journal = Journal(None)
        try:
            await Budget(BootClock()).set_shared_cap(journal, parse_cap("1k/day"))
            await journal.insert(Request(prompt="x", id="other"))
            await journal.finish(
                "other", replace(USED, id="other", usage=Usage(input_tokens=900, output_tokens=80))
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


def test_what_other_kernels_have_under_way_is_set_aside(tmp_path: Path) -> None:
    """Two kernels that ask at the same moment do not pass a day's cap together."""

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
                await journal.finish(reply.id, reply)
            # 36 tokens are used by now, and nothing is set aside.
            assert (
                sum([await admitted(budgets[n % 2], journals[n % 2], f"x{n}") for n in range(12)])
                == 4
            )
        finally:
            for journal in journals:
                journal.close()

    asyncio.run(main())


def test_what_a_kernel_that_is_gone_had_set_aside_is_free(tmp_path: Path) -> None:
    """A kernel that ends leaves the cap to the others."""

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


def test_a_day_counts_what_the_session_counts() -> None:
    """Where nobody knows what was used, both take what was set aside."""

    async def main() -> None:
        journal, own = Journal(None), Budget(BootClock())
        reply = Reply(id="a", attempts=1, status="cancelled")
        request = Request(prompt="hello", id="a", max_output=41)
        try:
            await own.reserve(
                request, caps=[parse_cap("9k")], journal=journal, model="m", base_url=LOCAL
            )
            await journal.insert(request)
            aside = own.reserved_for("a")
            own.commit("a", reply)
            await journal.finish("a", reply, assumed=aside)
            seen = await journal.read_spending(date.today().isoformat())
            assert seen.day == aside == SpendAmount(tokens=50)
            assert own.cap_usages([parse_cap("9k")])[0].used == 50
        finally:
            journal.close()

    asyncio.run(main())


def test_those_who_wait_for_the_journal_go_on_together() -> None:
    """Fifty who come at once need one reading, and are not let through one by one."""

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


def test_a_months_end_is_the_calendars() -> None:
    """A cap for the month starts anew on the first of the next one."""

    async def main() -> tuple[float, float]:
        own = Budget(clock := LoopClock())
        reset = own._resets_at(parse_cap("$1/month"))
        assert reset is not None
        return reset, clock.wall()

    reset, now = run_virtual(main())
    moment = budget.datetime.fromtimestamp(reset)
    assert (moment.day, moment.hour) == (1, 0)
    assert 0 < reset - now <= 31 * 86_400


def test_spent_adds_up() -> None:
    """Two amounts together are their sum in each unit."""
    assert SpendAmount(tokens=1, dollars=2.0).plus(
        SpendAmount(tokens=3, dollars=4.0)
    ) == SpendAmount(tokens=4, dollars=6.0)
