"""Settings of every test: one thread, nothing downloaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from op_table import EXAMINED, summary

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops", action="store_true", help="sharding rules over all of PyTorch's samples, not a tenth of them")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one model run in one process, which captures it once and differentiates its blocks once."""
    for item in items:
        call: Any = getattr(item, "callspec", None)
        model = call.params.get("model") if call is not None else None
        if isinstance(model, str):
            item.add_marker(pytest.mark.xdist_group(model))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--ops"):
        return
    reports = [r for kind in ("passed", "failed", "skipped") for r in terminalreporter.getreports(kind) if r.when == "call"]
    told = [dict(r.user_properties) for r in reports]
    terminalreporter.section("sharding rules by family")
    for line in summary([one[EXAMINED] for one in told if EXAMINED in one]):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def keep_collections_short() -> Iterator[None]:
    """What tests leave in caches is out of the collector's way: planning collects, and would go through all of it each time."""
    yield
    gc.collect()
    gc.freeze()
