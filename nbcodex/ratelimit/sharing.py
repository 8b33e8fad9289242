"""One `LimitModel` shared by several processes, of one or more machines: fair by tokens.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each process's next request is scheduled
after those of the processes that have been served fewer tokens, so none has to poll. A process has
a lease, which its operations and heartbeats renew. `stores` keeps the numbers.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nbcodex.models import DAY, Limit, LimitReading
from nbcodex.ratelimit.charge_policy import ChargePolicy, Need, OutputEstimator, Permit
from nbcodex.ratelimit.limit_model import LimitModel, describe_limit
from nbcodex.ratelimit.schedule import earliest_start
from nbcodex.ratelimit.token_bucket import TokenBucket

TURN_GRACE_S = 0.3  # a process that sends nothing for so long after its turn is passed over
# After this time a process is idle, and gets no tokens for the time in which it did not ask. Not
# sooner: on a busy machine all processes are late now and then, and the punctual ones would keep
# their turns for good (four busy machines: Jain's index 0.655 without, 0.999 with these 3 s).
IDLE_AFTER_S = 3.0
LEASE_S = 5.0  # a process that has not renewed its lease for so long counts as dead
# A long queue leaves capacity for so many typical requests while other processes are idle. It takes
# that much longer, but the first request of another process is sent 0.1 to 0.4 s sooner.
IDLE_RESERVE_REQUESTS = 4
MAX_AHEAD_S = 60.0  # no instant but the end of a cooldown lies further in the future
MAX_COOLDOWN_S = 367 * DAY  # waits that servers state are cut to 366 days
MIN_ANSWERS_SHOWN = 50  # the share of output that answers use is shown after so many
NEVER_DUE = -1e18  # `ProcessShare.due_at` of a process without waiting requests
_new_id = partial(secrets.randbits, 53)  # exact in a JSON number


@dataclass(slots=True)
class ProcessShare:
    """One process's share of a model. Stores keep the fields in this order."""

    renewed_at: float = 0.0  # the last renewal of its lease
    # Tokens granted so far: its virtual time, comparable between processes.
    served_tokens: float = 0.0
    due_at: float = NEVER_DUE  # the instant at which its next request may be sent: its turn
    input_tokens: float = 0.0  # of that request, like `max_output`
    max_output: float = 0.0
    waiting_tokens: float = 0.0  # the sum over all its waiting requests
    in_flight: int = 0
    awaiting_response: int = 0
    requested_in_flight: float = 0.0
    start_times_sum: float = 0.0
    # Differs from that of the share which the process had under an expired lease.
    share_id: int = field(default_factory=_new_id)

    def count_in_flight(self, permit: Permit, *, sign: int = 1) -> None:
        """Add a permit to those in flight; with `sign=-1`, remove it."""
        self.in_flight += sign
        self.requested_in_flight += sign * permit.need.max_output
        self.start_times_sum += sign * permit.issued_at


@dataclass(slots=True)
class SharedModel:
    """A limit model and its processes. Stores keep the fields in this order."""

    model: LimitModel = field(default_factory=LimitModel)
    processes: dict[str, ProcessShare] = field(default_factory=dict)  # by id: `process` below
    model_id: int = field(default_factory=_new_id)  # differs from that of a model that was lost
    # The greatest `served_tokens` at which a request was sent: one that was idle begins there.
    virtual_time: float = 0.0

    def renew_lease(self, process: str, now: float) -> ProcessShare:
        """Renew a process's lease, and return its share; remove those whose lease has expired."""
        if not self.is_plausible(now):
            self.model, self.model_id = model_after_reboot(self.model), _new_id()
            self.processes = {}
        for name in [n for n, share in self.processes.items() if share.renewed_at + LEASE_S < now]:
            self.remove_process(name)
        share = self.processes.setdefault(process, ProcessShare())
        share.renewed_at = now
        return share

    def is_plausible(self, now: float) -> bool:
        """Return whether the numbers can be ours; another program may have written them."""
        # A cooldown of years, for example, would stop all processes. An instant in the future was
        # stored before the machine was rebooted.
        model, shares = self.model, self.processes.values()
        buckets = (*model.tokens.buckets, model.requests, *(e.bucket for e in model.undeclared))
        latest = max(model.last_sent_at, *(each.updated_at for each in buckets))
        latest = max(latest, *(share.renewed_at for share in shares), model.parallel.learned_at)
        return (
            latest <= now + MAX_AHEAD_S
            and model.cooldown_until <= now + MAX_COOLDOWN_S
            and all(each.is_plausible for each in buckets)
            and model.output.in_flight <= sum(share.in_flight for share in shares)
            and model.parallel.trial_interval > 0 < model.slow_down_rate
        )

    def heartbeat(self, process: str, now: float, *, is_waiting: bool) -> float:
        """Renew a process's lease; return the end of the model's cooldown."""
        share = self.renew_lease(process, now)
        if not is_waiting:  # a request that was cancelled must not delay other processes
            share.due_at, share.waiting_tokens = NEVER_DUE, 0.0
        return self.model.cooldown_until

    def schedule_next(self, process: str, need: Need, waiting_tokens: float, now: float) -> float:
        """Return when the process's next request may be sent, and reserve that turn for it."""
        share = self.renew_lease(process, now)
        others = [s for n, s in self.processes.items() if n != process]
        waiting = [s for s in others if s.due_at + TURN_GRACE_S >= now]
        if share.due_at + IDLE_AFTER_S < now:
            share.served_tokens = max(share.served_tokens, self.virtual_time)
        ahead = [s for s in waiting if s.served_tokens < share.served_tokens]
        leaves_room = len(waiting) < len(others) and waiting_tokens > need.total_tokens
        share.due_at = earliest_start(
            self.model,
            need,
            now,
            waiting_tokens=waiting_tokens + sum(s.waiting_tokens for s in waiting),
            before=[Need(s.input_tokens, s.max_output) for s in ahead],
            spare_requests=IDLE_RESERVE_REQUESTS if leaves_room else 0,
        )
        share.input_tokens, share.max_output = need.input_tokens, need.max_output
        share.waiting_tokens = waiting_tokens
        return share.due_at

    def issue_permit(
        self, limits_id: str, process: str, need: Need, now: float, *, is_probe: bool = False
    ) -> Permit:
        """Charge a request of the process that is about to be sent."""
        share = self.renew_lease(process, now)
        self.virtual_time = max(self.virtual_time, share.served_tokens)
        share.served_tokens += need.total_tokens
        share.waiting_tokens = max(0.0, share.waiting_tokens - need.total_tokens)
        if not share.waiting_tokens:
            share.due_at = NEVER_DUE
        permit = self.model.issue_permit(limits_id, need, now, is_probe=is_probe)
        permit.model_id, permit.share_id = self.model_id, share.share_id
        share.count_in_flight(permit)
        share.awaiting_response += 1
        return permit

    def recount_after_expiry(self, process: str, permit: Permit, now: float) -> None:
        """Count a permit in the process's present share if the one that counted it has expired."""
        share = self.renew_lease(process, now)
        if permit.share_id == share.share_id or permit.has_ended:
            return
        permit.share_id, permit.charge_is_lost = share.share_id, permit.model_id != self.model_id
        self.model.output.count_in_flight(permit.need.max_output, permit.issued_at)
        share.count_in_flight(permit)
        if not permit.has_response:
            share.awaiting_response += 1
            self.model.awaiting_response += 1

    def update_counts(self, process: str, permit: Permit, *, before: Permit) -> None:
        """Apply to the process's share how a permit has changed since it was like `before`."""
        if (share := self.processes.get(process)) is not None:
            share.awaiting_response -= permit.has_response and not before.has_response
            if permit.has_ended and not before.has_ended:
                share.count_in_flight(permit, sign=-1)

    def remove_process(self, process: str) -> None:
        """Remove a process that has ended, with its requests in flight."""
        if (share := self.processes.pop(process, None)) is not None:
            output = self.model.output
            self.model.awaiting_response -= share.awaiting_response
            output.in_flight -= share.in_flight
            output.requested_in_flight -= share.requested_in_flight
            output.start_times_sum -= share.start_times_sum


def move_instants(stored: Any, seconds: float) -> None:
    """Add seconds to all fields of a `SharedModel` whose names end in `_at` or `_until`."""
    for each in stored.values() if isinstance(stored, dict) else ():
        move_instants(each, seconds)
    for each in stored if isinstance(stored, list) else ():
        move_instants(each, seconds)
    for name in getattr(stored, "__slots__", ()):
        value = getattr(stored, name)
        if not name.endswith(("_at", "_until")):
            move_instants(value, seconds)
        elif value is not None:
            setattr(stored, name, value + seconds)
    if isinstance(stored, OutputEstimator | ProcessShare):
        stored.start_times_sum += seconds * stored.in_flight


def model_after_reboot(model: LimitModel) -> LimitModel:
    """Return the model to begin with after a reboot, when older instants mean nothing."""
    limit, is_stated = model.tokens.bucket.limit, not model.limit_is_guessed
    known = limit if limit < math.inf and is_stated else model.limit_before_reboot
    return LimitModel(limit_before_reboot=known)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """What is known of one model's limits at an instant, for display."""

    tokens: LimitReading | None  # as projected; None while the limit is unknown
    requests: LimitReading | None
    undeclared: tuple[Limit, ...]  # limits that only refusals state, as projected
    policy: ChargePolicy
    output_share: float | None  # of `max_output` that answers use; None before enough answers
    has_limit_headers: bool  # whether the server's headers state limits
    burst_tokens: float | None  # most that a hidden window admits at once; None without one
    foreign_rate: float  # tokens per second that others on the same key take
    margin: float  # share of the limit that is kept free
    max_parallel: float  # requests in flight; infinite while no limit on them is known
    slow_down_rate: float  # tokens per second after `slow_down`; infinite while there was none
    other_processes: int  # with a lease
    was_used: bool  # a request was sent
    cooldown_until: float | None
    cooldown_limit: Limit | None  # the cause of the last cooldown
    limit_before_reboot: float | None = None  # tokens per minute, until a new limit is stated
    waiting: int = 0  # requests of this process, and the tokens that they ask for
    waiting_tokens: float = 0.0


def limit_state(shared: SharedModel, process: str, now: float) -> LimitState:
    """Return what is known of a model's limits, without what waits in this process."""
    model = (shared if shared.is_plausible(now) else SharedModel()).model
    tokens, old_limit = model.tokens.bucket, model.limit_before_reboot
    alive = {name for name, share in shared.processes.items() if share.renewed_at + LEASE_S >= now}
    has_answers = model.output.ended_answers >= MIN_ANSWERS_SHOWN
    return LimitState(
        tokens=_reading(tokens, now),
        requests=_reading(model.requests, now),
        undeclared=tuple(describe_limit(e.resource, e.bucket, now) for e in model.undeclared),
        policy=model.tokens.policy,
        output_share=model.output.used_share(now) if has_answers else None,
        has_limit_headers=tokens.is_known and not model.is_headerless,
        burst_tokens=tokens.burst_capacity if tokens.hidden_floor else None,
        foreign_rate=tokens.foreign_rate,
        margin=model.margin,
        max_parallel=model.parallel.max_in_flight_at(now),
        slow_down_rate=model.slow_down_rate_at(now),
        other_processes=len(alive - {process}),
        was_used=model.permit_count > 0,
        cooldown_until=model.cooldown_until if model.cooldown_until > now else None,
        cooldown_limit=model.cooldown_limit,
        limit_before_reboot=None if tokens.is_known or old_limit == math.inf else old_limit,
    )


def _reading(bucket: TokenBucket, now: float) -> LimitReading | None:
    if not bucket.is_known:
        return None
    level = bucket.level_at(now)
    full_in = (bucket.limit - level) / bucket.rate
    return LimitReading(limit=bucket.limit, remaining=level, full_in=full_in)
