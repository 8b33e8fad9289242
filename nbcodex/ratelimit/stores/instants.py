"""Moves a bucket from one clock to another: hosts have a time of their own each.

Knows which of a bucket's numbers are instants, and nothing else of them.
"""

from __future__ import annotations

from nbcodex.ratelimit.shares import Shared


def move(shared: Shared, by: float) -> None:
    """Add `by` seconds to every instant in a bucket; what is relative to them stays."""
    bucket = shared.bucket
    windows = [*bucket.windows]
    for tank in (*bucket.tokens.tanks, bucket.requests, *(w.tank for w in windows)):
        tank.at += by
        tank.seen_at += by
        tank.hid_at += by
    for window in windows:
        window.met_at += by
    if bucket.tokens.since is not None:
        bucket.tokens.since += by
    bucket.until += by
    bucket.sent_at += by
    bucket.first_at += by
    bucket.later_at += by
    bucket.output.starts += by * bucket.output.under_way
    for share in shared.holders.values():
        share.seen_at += by
        share.due_at += by
        share.starts += by * share.under_way
