"""Who may send, and when.

Two ledgers: `ledger` closes a model to everyone after a refusal, and is the one that the engine
asks; `observed` sends by what the server's headers tell of its buckets, and is measured against an
oracle by `tests.benchmarks.pacing`.
"""
