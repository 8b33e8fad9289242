"""An nginx proxy before a server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.processes import free_port, running

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    limit_req_zone $server_port zone=all:64k rate={rate};
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {upstream};
            {directives}
        }}
    }}
}}
"""


def program() -> str:
    """Return the path of nginx; without nginx the test is skipped, and fails in CI."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("nginx is not installed")
    return found


@contextmanager
def gateway(
    folder: Path, *, upstream: str, directives: str = "", rate: str = "1r/s"
) -> Iterator[str]:
    """Start an nginx before the server `upstream` and yield its URL; stop it afterwards."""
    command, port, config = program(), free_port(), folder / "nginx.conf"
    places = {"folder": folder, "port": port, "upstream": upstream}
    config.write_text(CONFIG.format(**places, directives=directives, rate=rate))
    options = ["-p", str(folder), "-c", str(config), "-e", f"{folder}/error.log"]
    with running([command, *options], port=port, log=folder / "nginx.log"):
        yield f"http://127.0.0.1:{port}"
