"""What only a notebook can tell a doctor: kernel, front end, widgets and which notebook it is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nbcodex.doctor import Finding
from nbcodex.notebook import identity
from nbcodex.notebook.display.cell_output import shows_widgets

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbcodex.settings import Settings

_ELSEWHERE = (
    "Whether the server has anywidget's browser side cannot be seen from the kernel: where a cell "
    "only says `Loading widget`, install anywidget beside JupyterLab, or set Codex.display='text'."
)


def report(shell: InteractiveShell, settings: Settings) -> Iterator[Finding]:
    """Yield the findings."""
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        yield Finding("kernel", "none: a terminal, whose lines count down")
    else:
        yield _clicks(kernel)
        yield _widgets(shell, settings)
    path = identity.notebook_id(shell)
    unknown = kernel is not None and path.startswith("kernel ")
    advice = "The front end does not tell: `%codex resume` sees this kernel's requests only."
    yield Finding("notebook", path, advice if unknown else "")


def _clicks(kernel: object) -> Finding:
    named = f"ipykernel {_version('ipykernel')}"
    if getattr(kernel, "_supports_kernel_subshells", False):
        return Finding("kernel", f"{named}: buttons work while a cell runs")
    advice = "Cancel interrupts the kernel; Retry now and Park need ipykernel 7."
    return Finding("kernel", f"{named}: clicks arrive only between cells", advice)


def _widgets(shell: InteractiveShell, settings: Settings) -> Finding:
    if settings.display == "text":
        return Finding("display", "text, as set")
    if not shows_widgets(shell, settings.display):
        return Finding("display", "text: nothing tells a front end that shows widgets")
    try:
        return Finding("display", f"widget, by anywidget {version('anywidget')}", _ELSEWHERE)
    except PackageNotFoundError:
        return Finding("display", "anywidget is missing: text it is", "pip install anywidget")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
