"""A rate-limited look-alike of OpenAI's API, for the demo, the tests and the benchmark.

The core (`Simulator`) knows no sockets and no time but its clock's. Two thin doors lead to it: an
`httpx2` transport (`nbcodex.simulator.transport`) and an HTTP server (`nbcodex.simulator.server`,
``python -m nbcodex.simulator``). What can be set is in `Knobs`, what can go wrong in `Fault`, what
a prompt can ask for (``[[tokens=800]]``, ``[[echo: text]]``, ``[[fault=stalled]]``) in `answers`,
and what can be done over HTTP (``/_simulator/script``, ``/log``, ``/knobs``) in `control`.
"""

from __future__ import annotations

from nbcodex.simulator.faults import Dropped, Fault
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.record import Seen
from nbcodex.simulator.replies import Answer
from nbcodex.simulator.routes import Call
from nbcodex.simulator.service import Simulator

__all__ = ["Answer", "Call", "Dropped", "Fault", "Knobs", "Seen", "Simulator"]
