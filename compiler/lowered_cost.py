"""What a lowered graph takes of a step on the rank it was lowered for, op by op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from torch import fx

from ..passes.convert import convert, makes_whole
from ..passes.graph_tools import is_parameter, op_calls
from ..passes.rules.base import OpCall, replicated
from ..passes.types import I
from .cost import Seconds, conversion_bytes
from .needs import read_again
from .plan import Plan
from .prices import whole_size
from .topology import Topology


class LoweredCost:
    """Of the graph of one micro-batch, forward and backward: of ops the roofline, of conversions the collectives."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, topology: Topology) -> None:
        self.plan = plan
        self.calls = op_calls(gm)
        self._nodes = {node.name: node for node in self.calls}
        self._seconds = Seconds(topology, plan.mesh)

    @cached_property
    def step(self) -> float:
        """Seconds of a step of all ops, sums of gradients aside; of a pipeline's stages their mean."""
        return sum(map(self._run, self.calls)) * self.plan.microbatches / self.plan.stages

    @cached_property
    def received(self) -> float:
        """Bytes of a step that conversions receive; of a pipeline's stages their mean."""
        return sum(map(self._received, self.calls)) * self.plan.microbatches / self.plan.stages

    def of(self, node: fx.Node) -> float:
        """Seconds of a step of an op of the captured graph, with the conversions that its operands go through for it alone or
        first; nothing, where another op has taken its place."""
        if node.name not in self._nodes:
            return 0.0
        node = self._nodes[node.name]
        total, waiting = self._run(node), [(operand, node) for operand in node.all_input_nodes]
        while waiting:
            value, user = waiting.pop()
            if value.target is convert and next(iter(value.users)) is user:
                total += self._run(value)
                waiting.extend((operand, value) for operand in value.all_input_nodes)
        return total * self.plan.microbatches

    def _run(self, node: fx.Node) -> float:
        """Seconds of one micro-batch."""
        return sum(self._seconds.node_timing(call, replicated(call)).once for call in self._made(node))

    def _received(self, node: fx.Node) -> float:
        found = 0.0
        for call in self._made(node):
            if call.target is convert:
                _, axis, src, dst = call.args
                (meta,) = call.operands
                found += conversion_bytes(src, dst, whole_size(meta, src), self.plan.mesh.size(axis), meta.grad).total
        return found

    def _made(self, node: fx.Node) -> Iterator[OpCall]:
        """The call of a node, and that which gathers a parameter once more for its backward."""
        if node not in self.calls:
            return
        call, sources = self.calls[node]
        yield call
        if call.target is convert and makes_whole(*call.args[2:]) and is_parameter(sources[0], {convert}):
            x, axis, src, _ = call.args
            if read_again(node, self.calls):
                yield replace(call, args=(x, axis, src, I), operands=(replace(call.operands[0], grad=False),))
