"""The simulator's own door, ``/_simulator/``, for tests that drive it from another process.

``POST /_simulator/script`` takes a list of faults (null, a name, or an object with the fields of
`Fault`); ``POST /_simulator/knobs`` takes knobs to change; ``GET /_simulator/log?since=N`` tells
the requests seen after number N.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from nbcodex.simulator.faults import read_fault
from nbcodex.simulator.knobs import Knobs
from nbcodex.simulator.refusals import Failure

if TYPE_CHECKING:
    from nbcodex.simulator.service import Simulator

_FIELDS = {field.name: field for field in fields(Knobs)}


def control(simulator: Simulator, what: str, *, query: Mapping[str, str], body: bytes) -> Any:
    """Do `what` to `simulator`, and return what there is to tell.

    Raises
    ------
    Failure
        400, if `body` makes no sense.
    """
    try:
        if what == "log":
            return [asdict(seen) for seen in simulator.log[int(query.get("since", "0")) :]]
        data = json.loads(body)
        if what == "script":
            simulator.script([read_fault(fault) for fault in data])
            return {"scripted": len(data)}
        simulator.change(**read_knobs(data))
    except (TypeError, ValueError, AttributeError) as exc:
        raise Failure(400, f"This makes no sense to the simulator: {exc}") from exc
    return asdict(simulator.knobs)


def read_knobs(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return knobs as JSON tells them.

    Raises
    ------
    ValueError
        If there is no such knob.
    """
    if unknown := data.keys() - _FIELDS.keys():
        raise ValueError(f"no such knob: {', '.join(sorted(unknown))}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
