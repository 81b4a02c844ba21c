"""Run typed graphs as they are, conversions included, on all ranks of their axis, and differentiate them by autograd.

What it gives must be what one device computes (`harness.Case`), so it is the numerical check of a sharded graph that does not
depend on how passes/differentiate.py makes the backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case
from programs import lowered, shares
from torch import Tensor, fx

from shardwright.compiler.check_rule import deal, differentiable, join
from shardwright.compiler.plan import Plan
from shardwright.passes.convert import convert
from shardwright.passes.graph_tools import Values, named_results
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.rules.base import Axis
from shardwright.passes.shard import shard
from shardwright.passes.types import Type, gradient_type
from shardwright.passes.zero import gather_parameters, zero_cut
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh


@dataclass(frozen=True)
class Typed:
    """A model's typed graph at every index of one axis, and the types that its placeholders really have."""

    case: Case
    axis: Axis
    graphs: Sequence[fx.GraphModule]
    placeholders: Mapping[str, Type]


def typed(case: Case, plan: Plan) -> Typed:
    """The typed graphs of a plan over a single axis, ZeRO-3's gathers included."""
    problem, plan, rank0 = lowered(case, plan)
    assert len(plan.mesh.axes) == 1 and sum(shares(case, plan)) == case.batch
    (name,), (size,) = plan.mesh.axes, plan.mesh.sizes
    axis, placement, values = Axis(name, size), rank0.placements[name], Values()
    graphs = []
    for index in range(size):
        with use_communicator(StaticCommunicator({name: size}, {name: index})):
            gm = shard(problem.graph, axis, index, placement.choice, placement.placeholders, placement.outputs, values)
            if plan.zero == 3:
                shapes = {k: tuple(v.shape) for k, v in case.state.items() if k.startswith("param.")}
                cuts = {key: cut for key, shape in shapes.items() if (cut := zero_cut(shape, size)) is not None}
                gm = gather_parameters(gm, axis, index, cuts, values)
            graphs.append(gm)
    found = {n.meta["key"]: n.meta["types"][name] for n in graphs[0].graph.nodes if n.op == "placeholder"}
    return Typed(case, axis, graphs, found)


class Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is convert and args[0].is_floating_point():
            target = differentiable
        return target(*args, **kwargs)


def error_of(model: Typed, graphs: Sequence[fx.GraphModule]) -> float:
    """How far `graphs`, one for each rank, are from one device in loss and gradients: the largest difference by design section 8.

    1.0 or more breaks the promise. Whatever the ranks raise is raised.
    """
    n, generator = model.axis.size, torch.Generator().manual_seed(3)
    held = {}
    for key, type_ in model.placeholders.items():
        whole = model.case.inputs[key] if key in model.case.inputs else model.case.state[key]
        held[key] = deal(whole, type_, n, generator)

    def body(rank: int, world: Any) -> tuple[Tensor, dict[str, Tensor]]:
        gm = graphs[rank]
        with use_communicator(world.communicator(Mesh((model.axis.name,), (n,)), rank)):
            nodes = [p for p in gm.graph.nodes if p.op == "placeholder"]
            args = [held[p.meta["key"]][rank].clone().requires_grad_(bool(p.meta.get("grad"))) for p in nodes]
            results = dict(zip(gm.meta["outputs"], Interpreter(gm).run(*args), strict=True))
            loss = results[model.case.captured.loss]
            leaves = {p.meta["key"]: a for p, a in zip(nodes, args, strict=True) if a.requires_grad}
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            return loss.detach(), dict(zip(leaves, found, strict=True))

    ranks = run_ranks(n, body)
    loss_type = next(
        node.meta["types"][model.axis.name] for key, node in named_results(graphs[0]) if key == model.case.captured.loss
    )
    worst = _error(join([loss for loss, _ in ranks], loss_type), model.case.loss, 1.0)
    largest = max(float(g.abs().max()) for g in model.case.gradients.values())
    for key, expected in model.case.gradients.items():
        got = join([gradients[key] for _, gradients in ranks], gradient_type(model.placeholders[key]))
        worst = max(worst, _error(got, expected, largest))
    return worst


def _error(got: Tensor, expected: Tensor, largest: float) -> float:
    bound = max(1e-9 * float(expected.abs().max()), 1e-12 * largest)
    return float((got - expected).abs().max()) / bound if got.shape == expected.shape else float("inf")
