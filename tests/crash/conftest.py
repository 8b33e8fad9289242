"""The 200 kills take minutes: they run where benchmarks were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out this folder's benchmarks, unless ``-m benchmark`` names them."""
    if "benchmark" in config.option.markexpr:
        return
    late = [i for i in items if i.get_closest_marker("benchmark") and HERE in i.path.parents]
    config.hook.pytest_deselected(items=late)
    items[:] = [item for item in items if item not in late]
