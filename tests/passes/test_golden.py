"""Golden text of emitted graphs: what a reader of a program sees, and what a change of a pass changes.

`UPDATE_GOLDEN=1 pytest tests/passes/test_golden.py` writes tests/passes/golden/ anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from programs import case, plan, program

from shardwright.passes.ops.collectives import ops
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


def test_attention_takes_shared_key_and_value_heads_as_they_are() -> None:
    """Llama's 4 query heads share 2 key and value heads: on each of two ranks 2 share 1, and none is repeated in memory."""
    graph = program(case("llama", layers=1), plan(tp=2)).graphs["forward"].graph.graph
    (attention,) = (n for n in graph.nodes if n.target is ops.attention.default)
    assert [n.meta["val"].shape[1] for n in attention.args[:3]] == [2, 1, 1]
