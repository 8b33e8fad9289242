"""A rate-limited look-alike of OpenAI's API for the demo, the tests and the benchmarks.

The core (`Simulator`) has no sockets and reads time only from its clock; an HTTP server
(`nbcodex.simulator.server`, ``python -m nbcodex.simulator``) gives access to it. `Knobs` are its
settings, `Fault` the failures it can produce. A prompt can contain directives (``[[tokens=800]]``,
``[[echo: text]]``, ``[[fault=stalled]]``, see `generated_answers`), and ``/_simulator/script``,
``/log`` and ``/knobs`` control a server over HTTP.
"""

from __future__ import annotations

from nbcodex.simulator.admission import RequestRecord
from nbcodex.simulator.http_messages import HttpRequest, HttpResponse
from nbcodex.simulator.knobs import Dropped, Fault, Knobs
from nbcodex.simulator.service import Simulator

__all__ = ["Dropped", "Fault", "HttpRequest", "HttpResponse", "Knobs", "RequestRecord", "Simulator"]
