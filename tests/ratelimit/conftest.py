"""A Redis for the tests that use its fixture: started once, emptied for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, redis_server
from tests.servers.processes import free_port


@pytest.fixture(scope="session")
def started_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server that tests leave running; a cluster of one node, so that slots are checked."""
    folder = tmp_path_factory.mktemp("redis")
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with redis_server(folder, *options) as server:
        server.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while b"cluster_state:ok" not in server.ask("CLUSTER", "INFO"):
            assert server.process is not None
            assert server.process.poll() is None
        yield server


@pytest.fixture
def redis(started_redis: RedisServer) -> RedisServer:
    """An empty Redis."""
    started_redis.ask("FLUSHALL")
    return started_redis
