"""A map as a Jupyter widget: one button, and its place in the cell's output.

Imports anywidget, and is therefore imported only when a widget is to be shown.
"""

from __future__ import annotations

import _thread
import uuid
from typing import Any

from IPython.display import display, update_display

from nbcodex.notebook import widget_base
from nbcodex.notebook.display.map import MapState, view
from nbcodex.notebook.widget_base import Meter


class MeterPlace:
    """A `Meter` in a cell's output, replaced by what stays."""

    def __init__(self) -> None:
        self._display_id = uuid.uuid4().hex
        self._meter: Meter | None = None
        self._shown = False

    def paint(self, state: MapState, wall: float) -> None:
        """Send what has changed."""
        if self._meter is not None:
            self._meter.view = view(state, wall)
            return
        self._meter = Meter(
            view=view(state, wall), kernel_id=widget_base.kernel_id(), layout=widget_base.layout()
        )
        self._meter.hear_while_blocked()
        self._meter.on_msg(self._hear)
        display(self._meter, display_id=self._display_id)  # type: ignore[no-untyped-call]
        self._shown = True

    def close(self, bundle: dict[str, Any]) -> None:
        """Put what stays in the widget's place, and let go of the widget."""
        try:
            # Only a display that is there can be updated.
            show = update_display if self._shown else display
            show(bundle, raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]
        finally:
            if self._meter is not None:
                self._meter.close()
                self._meter = None

    def _hear(self, meter: Meter, content: object, _buffers: object) -> None:
        """Take a click on Stop, in whatever thread the kernel has for it."""
        match content:
            case {"type": "stop", "id": int(number)}:
                meter.send({"type": "heard", "id": number})
                _thread.interrupt_main()
