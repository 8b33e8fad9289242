"""A rate-limited look-alike of OpenAI's API for the demo, the tests and the benchmarks.

`Simulator` has no sockets and reads the time from its clock only; `server` serves it over HTTP,
also as ``python -m nbcodex.simulator``. `Knobs` are its settings, and `Fault` is a failure that it
can produce. Prompts can contain directives, see `generated_answers`. A server's log, faults and
settings are at ``/_simulator/SECRET/log``, ``script`` and ``knobs``; SECRET: `control_secret`.
"""

from nbcodex.simulator.admission import RequestRecord
from nbcodex.simulator.http_messages import HttpRequest, HttpResponse
from nbcodex.simulator.knobs import Dropped, Fault, Knobs
from nbcodex.simulator.service import Simulator

__all__ = ["Dropped", "Fault", "HttpRequest", "HttpResponse", "Knobs", "RequestRecord", "Simulator"]
