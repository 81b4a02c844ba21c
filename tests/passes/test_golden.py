"""Golden text of emitted graphs: what a reader of a program sees, and what a change of a pass changes.

`UPDATE_GOLDEN=1 pytest tests/passes/test_golden.py` writes tests/passes/golden/ anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from programs import case, plan, program

from shardwright.runtime.emit_python import graph_text

GOLDEN = Path(__file__).parent / "golden"


def body(text: str) -> str:
    """The function alone, with source lines named by file only: tests/zoo.py may grow."""
    return re.sub(r"# \S*?([\w-]+\.py):\d+:", r"# \1:", text[text.index("def forward") :])


@pytest.mark.parametrize("graph", ["forward", "backward"])
@pytest.mark.parametrize("name, options", [("mlp_tp2", {"tp": 2}), ("mlp_zero3", {"dp_shard": 2, "zero": 3})])
def test_golden(name: str, options: dict[str, int], graph: str) -> None:
    found = body(graph_text(program(case("mlp", layers=2), plan(**options)).graphs[graph], graph))
    path = GOLDEN / f"{name}_{graph}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text(), f"differs from {path.name}; see the head of {Path(__file__).name}"
