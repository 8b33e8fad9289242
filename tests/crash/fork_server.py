"""Real kernels, forked from a process that has imported all that they need.

One starts in a tenth of a second instead of some seconds, and is an ipykernel like any other: a
process of its own, with its own sockets and threads. ``python -m tests.crash.fork_server`` is the
process that forks; it receives connection files and environments.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests.kernel_client import CellResult, Kernel, add_message


class Child(Kernel):
    """A kernel that can be killed."""

    def __init__(self, pid: int, client: BlockingKernelClient) -> None:
        super().__init__(None, client)  # type: ignore[arg-type]  # it has no kernel manager
        self.pid = pid

    def kill(self) -> None:
        """End it as the out-of-memory killer does, without a chance to clean up."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def unread_output(self) -> CellResult:
        """Return all that a dead kernel had published and that was not read yet, of any cell."""
        ran = CellResult()
        with suppress(Exception):  # queue.Empty, or a message that was cut off
            while True:
                message = self.client.get_iopub_msg(timeout=0.1)
                add_message(ran, message["msg_type"], message["content"])
        return ran


class KernelForkServer:
    """The process that forks kernels, and the kernels that run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels: list[Child] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kernel(self, **environ: str) -> Child:
        """Return a new kernel with these environment variables, ready for its first cell."""
        place = self._folder / f"k{len(self._kernels)}"
        file, _ = write_connection_file(
            str(place.with_suffix(".json")),
            transport="ipc",
            ip=str(place),
            key=secrets.token_hex().encode(),
        )
        assert self._process.stdin
        assert self._process.stdout
        order = {"file": file, "log": str(place.with_suffix(".log")), "environ": environ}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        client = BlockingKernelClient(connection_file=file)
        client.load_connection_file()
        client.start_channels()
        self._kernels.append(child := Child(pid, client))
        client.wait_for_ready(timeout=120)
        return child

    def discard(self, child: Child) -> None:
        """End a kernel, and close its sockets."""
        child.kill()
        child.client.stop_channels()

    def close(self) -> None:
        """End every kernel, and the process that forked them."""
        for child in self._kernels:
            self.discard(child)
        self._process.communicate()


@contextmanager
def fork_server(folder: Path) -> Iterator[KernelForkServer]:
    """Start the process that forks; `folder` holds sockets, so it needs a short path."""
    opened = KernelForkServer(folder)
    try:
        yield opened
    finally:
        opened.close()


def become_a_kernel(file: str, log: str, environ: dict[str, str]) -> None:
    """Be a kernel from now on, in a process that was forked for it."""
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), 1)
    os.dup2(1, 2)
    # A kernel with this variable ends when its parent does.
    os.environ.update(environ, JPY_PARENT_PID=str(os.getppid()))
    launch: Any = IPKernelApp.launch_instance
    launch(argv=["-f", file])


def main() -> None:
    """Fork a kernel for every line of input; answer with its pid."""
    import anywidget  # noqa: F401
    import ipykernel.ipkernel  # noqa: F401
    import openai.resources.responses  # noqa: F401

    import nbcodex.journal.journal
    import nbcodex.notebook.commands
    import nbcodex.notebook.extension
    import nbcodex.requests.runner  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead children are reaped at once
    while order := sys.stdin.readline():
        if (pid := os.fork()) == 0:
            become_a_kernel(**json.loads(order))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
