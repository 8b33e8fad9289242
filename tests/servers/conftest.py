"""A kernel that uses servers of other projects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.kernel_client import Kernel
from tests.servers.mock import Mock, mocked

Connect = Callable[[Mapping[str, str]], Kernel]


@pytest.fixture(scope="session")
def llmock_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mock]:
    """An llmock in another process."""
    with mocked(tmp_path_factory.mktemp("llmock")) as running:
        yield running


@pytest.fixture
def connect(shared_kernel: Kernel, tmp_path: Path) -> Iterator[Connect]:
    """Return a function that connects a kernel to the server that an environment names."""

    def connected(environ: Mapping[str, str]) -> Kernel:
        ran = shared_kernel.run(
            f"import os\nos.environ.update({dict(environ)!r})\n"
            f"os.environ['NBCODEX_HOME'] = {str(tmp_path / 'kernel')!r}\n"
            "%reload_ext nbcodex\n"
            "%config Codex.idle_timeout = '60s'\n"
            # A new session knows nothing of a server that failed in the last one.
            "from nbcodex import client; client._current = None"
        )
        assert ran.status == "ok", ran.shown_error
        return shared_kernel

    yield connected
    shared_kernel.run("%reset -f")
