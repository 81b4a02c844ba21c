"""From a captured graph to the one that plans are made for: normalized, blocks found, gradients only where the loss needs them."""

from __future__ import annotations

from torch import fx

from ..passes.blocks import mark_blocks
from ..passes.graph_tools import named_results
from ..passes.normalize import normalize
from ..passes.normalize.promote import promote_casts, widen
from ..passes.normalize.random import own_generator
from .capture import Captured
from .capture_error import CaptureError


def prepare(captured: Captured, *, float64: bool = False) -> fx.GraphModule:
    """The normalized graph. `float64`: the casts to float32 in it are promoted, for checks.

    gm.meta["outputs"] are the output keys; gm.meta["twins"] maps the name of each node in a repeated block to the name of the
    node at its place in the first block of its run.
    """
    gm = normalize(captured.graph)
    refuse_generators(gm)
    if float64:
        gm = promote_casts(gm)
    gm.meta["outputs"] = captured.outputs
    keep_gradients(gm, captured.loss)
    mark_twins(gm)
    return gm


def refuse_generators(gm: fx.GraphModule) -> None:
    """Raises CaptureError for random ops that draw otherwise than by position: ranks would compute with different numbers."""
    node = next((n for n in gm.graph.nodes if own_generator(n)), None)
    if node is not None:
        raise CaptureError(
            f"{node.target} draws from torch's generator, whose numbers are others on every rank",
            node.meta.get("source"),
            "draw with dropout, torch.rand, randn, randint, normal, bernoulli or their _like forms: these are alike on every mesh",
        )


def in_float64(gm: fx.GraphModule, loss: str | None) -> fx.GraphModule:
    """A prepared graph in float64: parameters, inputs and casts."""
    wide = widen(gm)
    wide.meta["outputs"] = gm.meta["outputs"]
    keep_gradients(wide, loss)
    mark_twins(wide)
    return wide


def keep_gradients(gm: fx.GraphModule, loss: str | None) -> None:
    """meta["grad"] stays on what the loss depends on: other outputs carry no gradient."""
    reached: set[fx.Node] = set()
    stack = [n for key, n in named_results(gm) if key == loss]
    while stack:
        node = stack.pop()
        if node not in reached and node.meta.get("grad"):
            reached.add(node)
            stack.extend(node.all_input_nodes)
    for node in gm.graph.nodes:
        node.meta["grad"] = node in reached


def mark_twins(gm: fx.GraphModule) -> None:
    """Find repeated blocks; set meta["block"] and gm.meta["twins"]."""
    blocks = mark_blocks(gm)
    twins: dict[str, str] = {}
    for run in blocks.runs:
        for nodes, leaves in zip(run.instances, run.leaves, strict=True):
            for own, first in (*zip(nodes, run.instances[0], strict=True), *zip(leaves, run.leaves[0], strict=True)):
                if own is not first:
                    twins.setdefault(own.name, first.name)
    gm.meta["twins"] = twins
