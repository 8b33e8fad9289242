"""One limit model shared by several holders (kernels, hosts), fair between them by tokens.

Each holder that waits leaves what its first request asks for. The one that has been served least
goes first; the others get the instant at which there is enough for those before them, too, so
none of them polls. Also a model's history. Pure; must not know where the numbers are stored.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

from nbcodex.models import Limit, LimitReading
from nbcodex.ratelimit.charge_policy import CHARGE_POLICIES, ChargePolicy, Cost, Permit
from nbcodex.ratelimit.limit_model import (
    MAX_INPUT_RATIO,
    MIN_INPUT_RATIO,
    LimitModel,
    describe_limit,
)
from nbcodex.ratelimit.schedule import earliest_start
from nbcodex.ratelimit.token_bucket import TokenBucket

# A holder that has not come by then after its instant loses its turn,
TURN_GRACE_S = 0.3
# and by then its claim to what it missed. Not sooner: on a busy machine all are late now and then,
# and the punctual ones would take their turns for good (four busy hosts: Jain index 0.655 without,
# 0.999 with these three seconds).
IDLE_AFTER_S = 3.0
# Without a sign of life for so long, a holder counts as dead.
LEASE_S = 5.0
# Room that is left for holders which ask for nothing at present, in typical requests: it costs a
# long job a moment, once, and lets short jobs of others go at once (0.1 to 0.4 s sooner).
IDLE_RESERVE_REQUESTS = 4
# No instant lies further ahead, unless it is of another boot of the machine.
MAX_AHEAD_S = 60.0
# A history counts as much as so many answers of the model's own.
HISTORY_ANSWERS = 50
NEVER_DUE = -1e18


def _new_id() -> int:
    return secrets.randbits(53)  # exact in a JSON number


@dataclass(slots=True)
class HolderShare:
    """One holder's part. The fields' order is their form in stores."""

    seen_at: float = 0.0  # its last sign of life
    served: float = 0.0  # tokens granted so far, on the scale that all holders share
    due_at: float = NEVER_DUE  # when its first request may be sent
    input_tokens: float = 0.0  # what that request asks for
    max_output: float = 0.0
    waiting_tokens: float = 0.0  # what all its waiting requests ask for
    in_flight: int = 0
    unanswered: int = 0
    requested_in_flight: float = 0.0
    start_sum: float = 0.0
    share_id: int = field(default_factory=_new_id)  # differs from an earlier share's of the holder

    def count_in_flight(self, permit: Permit, *, sign: int = 1) -> None:
        """Add a permit to those in flight; with `sign=-1`, remove it."""
        self.in_flight += sign
        self.requested_in_flight += sign * permit.cost.max_output
        self.start_sum += sign * permit.issued_at


@dataclass(slots=True)
class SharedModel:
    """A limit model and its holders. The fields' order is their form in stores."""

    model: LimitModel = field(default_factory=LimitModel)
    holders: dict[str, HolderShare] = field(default_factory=dict)
    model_id: int = field(default_factory=_new_id)  # differs from a model's that was lost
    # The most that one of those that went had been given before: where a newcomer begins.
    virtual_time: float = 0.0
    # When a cooldown ends, the server lets this much in: of the holder that was refused, or of the
    # next one if that is gone by then. Without this, the next one would wait as long again.
    granted_tokens: float = 0.0
    granted_to: str = ""

    def renew_lease(self, holder: str, now: float) -> HolderShare:
        """Return a holder's part, which is a sign of its life; remove the parts of the dead."""
        if self.model.last_sent_at > now + MAX_AHEAD_S:
            self.model, self.holders, self.model_id = model_after_reboot(self.model), {}, _new_id()
        for name in [n for n, share in self.holders.items() if share.seen_at + LEASE_S < now]:
            self.remove_holder(name)
        if (share := self.holders.get(holder)) is None:
            share = self.holders[holder] = HolderShare()
        share.seen_at = now
        return share

    def heartbeat(self, holder: str, now: float, *, is_waiting: bool) -> float:
        """Enter a holder's sign of life; return until when the model is closed."""
        share = self.renew_lease(holder, now)
        if not is_waiting:  # a request that has left must keep no other holder waiting
            share.due_at, share.waiting_tokens = NEVER_DUE, 0.0
        return self.model.closed_until

    def earliest_start(
        self, holder: str, cost: Cost, now: float, *, waiting_tokens: float
    ) -> float:
        """Return when the holder's first request may go, and keep its turn until then."""
        share = self.renew_lease(holder, now)
        others = [
            s for n, s in self.holders.items() if n != holder and s.due_at + TURN_GRACE_S >= now
        ]
        if share.due_at + IDLE_AFTER_S < now:
            # It has no claim on what it did not ask for.
            share.served = max(share.served, self.virtual_time)
        has_many = waiting_tokens > cost.total
        some_are_idle = len(self.holders) - 1 > len(others)
        share.due_at = earliest_start(
            self.model,
            cost,
            now,
            waiting_tokens=waiting_tokens + sum(s.waiting_tokens for s in others),
            before=[Cost(s.input_tokens, s.max_output) for s in others if s.served < share.served],
            spare_requests=IDLE_RESERVE_REQUESTS if has_many and some_are_idle else 0,
        )
        share.input_tokens, share.max_output, share.waiting_tokens = (
            cost.input_tokens,
            cost.max_output,
            waiting_tokens,
        )
        return share.due_at

    def inherits_grant(self, holder: str, cost: Cost) -> bool:
        """Return whether room for a request was granted to a holder that is gone by now."""
        is_gone = self.granted_to not in {*self.holders} - {holder}
        return is_gone and cost.total <= self.granted_tokens

    def issue_permit(
        self, name: str, holder: str, cost: Cost, now: float, *, is_probe: bool = False
    ) -> Permit:
        """Let the holder's request go."""
        share = self.renew_lease(holder, now)
        self.virtual_time = max(self.virtual_time, share.served)
        share.served += cost.total
        share.waiting_tokens = max(0.0, share.waiting_tokens - cost.total)
        if not share.waiting_tokens:
            share.due_at = NEVER_DUE
        if holder == self.granted_to or self.inherits_grant(holder, cost):
            self.granted_tokens, self.granted_to = 0.0, ""
        permit = self.model.issue_permit(name, cost, now, is_probe=is_probe)
        permit.model_id, permit.share_id = self.model_id, share.share_id
        share.count_in_flight(permit)
        share.unanswered += 1
        return permit

    def reattach(self, holder: str, permit: Permit, now: float) -> None:
        """Count a permit again if it was removed because its holder seemed dead, or was lost."""
        share = self.renew_lease(holder, now)
        if permit.share_id == share.share_id or permit.is_closed:
            return
        permit.share_id, permit.is_orphaned = share.share_id, permit.model_id != self.model_id
        self.model.output.count_started(permit.cost.max_output, permit.issued_at)
        share.count_in_flight(permit)
        if not permit.is_answered:
            share.unanswered += 1
            self.model.unanswered += 1

    def update_counts(self, holder: str, permit: Permit, *, before: Permit) -> None:
        """Enter in the holder's part what has become of a permit that was like `before`."""
        if (share := self.holders.get(holder)) is not None:
            share.unanswered -= permit.is_answered and not before.is_answered
            if permit.is_closed and not before.is_closed:
                share.count_in_flight(permit, sign=-1)

    def remove_holder(self, holder: str) -> None:
        """Remove a holder that ended or died, and its requests in flight."""
        if (share := self.holders.pop(holder, None)) is not None:
            output = self.model.output
            self.model.unanswered -= share.unanswered
            output.in_flight -= share.in_flight
            output.requested_in_flight -= share.requested_in_flight
            output.start_sum -= share.start_sum

    def move_clock(self, seconds: float) -> None:
        """Add seconds to every instant: hosts have a clock of their own each."""
        model, undeclared = self.model, list(self.model.undeclared)
        buckets = (*model.tokens.buckets, model.requests, *(each.bucket for each in undeclared))
        for bucket in buckets:
            bucket.updated_at += seconds
            bucket.observed_at += seconds
            bucket.hidden_refusal_at += seconds
        for each in undeclared:
            each.refused_at += seconds
        if model.tokens.window_start_at is not None:
            model.tokens.window_start_at += seconds
        model.closed_until += seconds
        model.last_sent_at += seconds
        model.pace_start_at += seconds
        model.pace_middle_at += seconds
        model.output.start_sum += seconds * model.output.in_flight
        for share in self.holders.values():
            share.seen_at += seconds
            share.due_at += seconds
            share.start_sum += seconds * share.in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitHistory:
    """What was learned of a model. Limits are no part of it: the first answer states them."""

    policy: ChargePolicy
    output_share: float  # how much of the output that requests ask for they use, on average
    input_ratio: float  # what the server counts for each token that we estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """What is known of one model's limits at an instant, for display."""

    tokens: LimitReading | None  # as projected; None while the limit is unknown
    requests: LimitReading | None
    undeclared: tuple[Limit, ...]  # limits that only refusals state, as projected
    policy: ChargePolicy
    declared: bool  # the server's headers state limits
    burst_tokens: float | None  # most that a shorter window, stated by no header, admits
    foreign_rate: float  # tokens a second that others on the same key take
    margin: float  # share of the limit that is kept back
    other_processes: int  # that are active on it
    was_used: bool  # a request was sent
    closed_until: float | None
    limit: Limit | None  # that closed the model last
    history: LimitHistory | None  # what the next job can begin with
    limit_before_reboot: float | None = None  # on tokens, until a new one is stated
    waiting: int = 0  # requests of this process, and the tokens that they may use
    waiting_tokens: float = 0.0


def limit_state(shared: SharedModel, holder: str, now: float) -> LimitState:
    """Return what is known of a model's limits."""
    model = shared.model
    tokens, before = model.tokens.bucket, model.limit_before_reboot
    alive = {name for name, share in shared.holders.items() if share.seen_at + LEASE_S >= now}
    return LimitState(
        tokens=_reading(tokens, now),
        requests=_reading(model.requests, now),
        undeclared=tuple(describe_limit(e.resource, e.bucket, now) for e in model.undeclared),
        policy=model.tokens.policy,
        declared=tokens.is_known and not model.is_headerless,
        burst_tokens=tokens.burst_capacity if tokens.hidden_floor else None,
        foreign_rate=tokens.foreign_rate,
        margin=model.margin,
        other_processes=len(alive - {holder}),
        was_used=model.sent > 0,
        closed_until=model.closed_until if model.closed_until > now else None,
        limit=model.closing_limit,
        history=history_of(model, now),
        limit_before_reboot=None if tokens.is_known or before == math.inf else before,
    )


def _reading(bucket: TokenBucket, now: float) -> LimitReading | None:
    if not bucket.is_known:
        return None
    level = bucket.level_at(now)
    full_in = (bucket.limit - level) / bucket.rate
    return LimitReading(limit=bucket.limit, remaining=level, full_in=full_in)


def history_of(model: LimitModel, now: float) -> LimitHistory | None:
    """Return what a model has learned; None before it has seen enough answers."""
    if model.output.ended < HISTORY_ANSWERS:
        return None
    share, ratio = model.output.share(now), model.input_ratio
    return LimitHistory(policy=model.tokens.policy, output_share=share, input_ratio=ratio)


def model_with_history(history: LimitHistory) -> LimitModel:
    """Return a model that begins where an earlier one ended; evidence changes its mind."""
    ratio = min(MAX_INPUT_RATIO, max(MIN_INPUT_RATIO, history.input_ratio))
    model = LimitModel(input_ratio=ratio)
    model.tokens.chosen = CHARGE_POLICIES.index(history.policy)
    output = model.output
    output.requested = output.seconds = float(HISTORY_ANSWERS)
    output.used = HISTORY_ANSWERS * min(1.0, max(0.0, history.output_share))
    output.ended = HISTORY_ANSWERS
    return model


def model_after_reboot(model: LimitModel) -> LimitModel:
    """Return what outlives a model when the boot clock starts anew and nothing is in flight."""
    idle = replace(model.output, in_flight=0, requested_in_flight=0.0, start_sum=0.0)
    history = history_of(replace(model, output=idle), 0.0)
    new = LimitModel() if history is None else model_with_history(history)
    limit = model.tokens.bucket.limit
    is_stated = limit < math.inf and not model.is_guessed
    new.limit_before_reboot = limit if is_stated else model.limit_before_reboot
    return new
