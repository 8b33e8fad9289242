"""Who may send, and when.

`desk` is where an event loop asks, `ledger` decides by what `bucket` knows of a limit, and `stores`
keep that: in memory, for a machine, for several hosts. Pure arithmetic but for the desk's thread.
"""
