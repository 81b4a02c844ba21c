"""Train an unmodified PyTorch model in parallel: `auto_parallelize(model, mesh)`.

Names are imported on first use, so that `import shardwright` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.api import PlannedModel, auto_parallelize, emit, plan, verify
    from .compiler.check_rule import check_rule
    from .compiler.plan import Plan
    from .compiler.strategy import Strategy, StrategyError
    from .compiler.topology import Topology
    from .compiler.user_rules import register_rule
    from .runtime.errors import ShardwrightError
    from .runtime.module import ParallelModule
    from .runtime.program import RankProgram

try:
    __version__ = version("shardwright")
except PackageNotFoundError:  # imported from a clone that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "auto_parallelize": "compiler.api",
    "plan": "compiler.api",
    "emit": "compiler.api",
    "verify": "compiler.api",
    "PlannedModel": "compiler.api",
    "check_rule": "compiler.check_rule",
    "register_rule": "compiler.user_rules",
    "Plan": "compiler.plan",
    "Strategy": "compiler.strategy",
    "StrategyError": "compiler.strategy",
    "Topology": "compiler.topology",
    "ParallelModule": "runtime.module",
    "RankProgram": "runtime.program",
    "ShardwrightError": "runtime.errors",
}

__all__ = [
    "Plan",
    "PlannedModel",
    "ParallelModule",
    "RankProgram",
    "ShardwrightError",
    "Strategy",
    "StrategyError",
    "Topology",
    "__version__",
    "auto_parallelize",
    "check_rule",
    "emit",
    "plan",
    "register_rule",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
