"""Settings of every test: one thread, nothing downloaded; what is marked `slow` runs only with --slow."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what is marked slow: every model under every strategy")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out without --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    left = [item for item in items if item.get_closest_marker("slow")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def keep_collections_short() -> Iterator[None]:
    """What tests leave in caches is out of the collector's way: planning collects, and would go through all of it each time."""
    yield
    gc.collect()
    gc.freeze()
