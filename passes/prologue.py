"""Split off what is computed once a step from the whole batch, before any micro-batch.

Requires  a graph lowered along the time axis "mb": what is Invariant on it is the same for all micro-batches.
Ensures   (prologue, body): the prologue's outputs are `prologue.NAME`, which the body takes as placeholders; slices of them
          (convert I -> V over mb) stay in the body, where the micro-batch is known.
"""

from __future__ import annotations

from torch import fx

from .graph_tools import extract, named_results
from .types import Invariant

TIME = "mb"


def split_prologue(gm: fx.GraphModule) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """No prologue (None) where nothing is common to micro-batches."""
    early = {
        n
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.meta["types"].get(TIME), Invariant) and not n.meta.get("parameter")
    }
    results = [n for n in gm.graph.nodes if n in early and any(u not in early for u in n.users)]
    if not results:
        return None, gm
    keys = {n: f"prologue.{n.name}" for n in results}
    return extract(gm, [(key, n) for n, key in keys.items()], {}), extract(gm, named_results(gm), keys)
