"""What ops and conversions cost: FLOP and bytes from shapes alone, seconds from a topology.

Compute follows the roofline (Williams, Waterman, Patterson 2009): an op takes the longer of its arithmetic at the device's
achieved rate and its memory traffic at the achieved bandwidth, plus a launch. Collectives are in compiler/topology.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import fx

from ..passes.convert import convert, exists, is_free, traffic
from ..passes.graph_tools import map_operands
from ..passes.ops.collectives import COMMUNICATION
from ..passes.reshard import Ways, steps, ways_by_price
from ..passes.rules.base import Axis, OpCall, Operand, Strategy, TensorMeta, has_derivatives, largest_shard, unsharded
from ..passes.types import R, Type
from ..runtime.program import Mesh
from .topology import CollectiveKind, Device, Span, Topology, collective_bytes, collective_seconds

_VIEWS = """view _unsafe_view reshape t transpose permute expand unsqueeze squeeze slice select narrow detach alias as_strided split
    split_with_sizes unbind chunk unflatten flatten movedim diagonal"""
FREE = frozenset(f"{_VIEWS} sym_size lift_fresh getitem convert _assert_tensor_metadata shard_index wait".split())
"""Ops that move nothing, by name."""

_LOOKUPS = "embedding embedding_shard index index_select gather gather_shard pick pick_shard"
READS_RESULT = frozenset(_LOOKUPS.split())
"""Ops that read of their first operand as much as they give."""

ATTENTION_BACKWARD = 2.5
"""FLOP of fused attention's backward per FLOP of its forward: five products for two (Dao 2023, FlashAttention-2, section 4.1)."""


@cache
def op_name(target: object) -> str:
    """`linear` for aten.linear.default; the plain name of a function."""
    name = getattr(target, "name", None)  # a method of torch's overloads
    return str(name()).split("::")[-1].split(".")[0] if callable(name) else getattr(target, "__name__", str(target))


def size_of(meta: TensorMeta) -> int:
    """Bytes of a value."""
    return math.prod(meta.shape) * meta.dtype.itemsize


def op_flops(call: OpCall) -> float:
    """FLOP of one call of a product (a multiply and an add are two); 0 for every other op."""
    shapes = [o.shape for o in call.operands]
    result = math.prod(call.results[0].shape) if call.results else 0
    match op_name(call.target):
        case "mm" | "bmm" | "matmul" | "linear" | "mv" | "dot":
            return 2.0 * result * shapes[0][-1]
        case "addmm" | "baddbmm":
            return 2.0 * result * shapes[1][-1]
        case "grouped_linear":
            return 2.0 * result * shapes[0][-1]
        case "grouped_linear_grad_x" | "grouped_linear_grad_w":
            return 2.0 * math.prod(shapes[0]) * (shapes[1][-1])
        # The rows of the experts that a rank holds: on average its share of all.
        case "grouped_linear_shard":
            return 2.0 * result * shapes[0][-1] * shapes[1][0] / sum(call.arg(4, "sizes"))
        case "grouped_linear_shard_grad_x":
            return 2.0 * math.prod(shapes[0]) * shapes[1][-1] * shapes[1][0] / sum(call.arg(4, "sizes"))
        case "grouped_linear_shard_grad_w":
            return 2.0 * math.prod(shapes[0]) * shapes[1][-1] * call.arg(3, "experts") / sum(call.arg(5, "sizes"))
        case "conv1d" | "conv2d" | "conv3d" | "convolution":
            transposed = op_name(call.target) == "convolution" and call.arg(6, "transposed", False)
            return 2.0 * (math.prod(shapes[0]) if transposed else result) * math.prod(shapes[1][1:])
        case "convolution_backward":  # (grad, input, weight): the gradients of input and weight, each like the forward
            gradients = [r for r in call.results if len(r.shape) > 1]
            return 2.0 * math.prod(shapes[0]) * math.prod(shapes[2][1:]) * len(gradients)
        case "attention" | "scaled_dot_product_attention":
            return _attention_flops(shapes[0], shapes[1], shapes[2], _causal(call, 4))
        case "attention_backward":
            return ATTENTION_BACKWARD * _attention_flops(shapes[1], shapes[2], shapes[3], _causal(call, 7))
        case "chunked_attention":
            return _attention_flops(shapes[0], shapes[1], shapes[2], _causal(call, 6))
        case "chunked_attention_backward":
            return ATTENTION_BACKWARD * _attention_flops(shapes[4], shapes[5], shapes[6], _causal(call, 10))
    return 0.0


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], causal: bool) -> float:
    """q [..., H, Sq, D], k [..., Sk, D], v [..., Sk, Dv]: two products of Sq x Sk; half of each where causal."""
    return 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) * (0.5 if causal else 1.0)


def _causal(call: OpCall, position: int) -> bool:
    name = "is_causal" if op_name(call.target).startswith("scaled") else "causal"
    return bool(call.arg(position + (name == "is_causal"), name, False))


def op_bytes(call: OpCall) -> float:
    """Bytes read and written by one call."""
    name = op_name(call.target)
    if name in FREE:
        return 0.0
    written = float(sum(map(size_of, call.results)))
    operands = [o for o in call.operands if o is not None]
    if name in READS_RESULT:
        return 2 * written + sum(map(size_of, operands[1:]))
    return written + sum(map(size_of, operands))


def op_seconds(call: OpCall, device: Device) -> float:
    """Seconds of one call on one device, collectives excepted (see `node_seconds`)."""
    moved = op_bytes(call)
    if moved == 0.0:
        return 0.0
    flops, seconds = op_flops(call), moved / (device.bandwidth * device.memory_efficiency)
    if flops:
        fused = op_name(call.target).startswith(("attention", "scaled_dot"))
        rate = device.attention_efficiency if fused else device.matmul_efficiency
        seconds = max(seconds, flops / (device.peak(str(call.operands[0].dtype).removeprefix("torch.")) * rate))
    return seconds + device.launch


def backward_seconds(call: OpCall, device: Device) -> float:
    """Seconds of the backward of one call before it is traced: once the forward for each operand that takes a gradient."""
    gradients = sum(o is not None and o.grad for o in call.operands)
    if not gradients:
        return 0.0
    if op_name(call.target).startswith(("attention", "chunked_attention", "scaled_dot")):
        return ATTENTION_BACKWARD * op_seconds(call, device)
    return op_seconds(call, device) * (gradients if op_flops(call) else 1)


EXCHANGES: dict[str, tuple[tuple[CollectiveKind, ...], tuple[CollectiveKind, ...]]] = {
    "logsumexp_shard": (("all_gather",), ()),
    "softmax_shard": (("all_gather",), ("all_reduce",)),
    "log_softmax_shard": (("all_gather",), ("all_reduce",)),
}
"""Collectives inside of ops whose rows are sharded over an axis, their last argument: forward and backward, a value of each row."""


def row_bytes(call: OpCall) -> float:
    """Bytes of one value of each row of such an op, which has no fewer than four."""
    (result,) = call.results
    length = 1 if op_name(call.target) == "logsumexp_shard" else max(1, result.shape[call.arg(1, "dim")])
    return math.prod(result.shape) / length * max(4, result.dtype.itemsize)


@dataclass(frozen=True)
class ConversionCost:
    """Seconds, or bytes received per rank, of a typed conversion in each direction."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def conversion_bytes(src: Type, dst: Type, size: float, n: int, grad: bool) -> ConversionCost:
    """Bytes that each of the n ranks of the axis receives when a value of `size` bytes in whole changes its type.

    Both inf where there is no such conversion. The collectives are those of passes/convert.py.
    """
    local = ("shard", "unshard", "keep_first")

    def received(kind: str) -> float:
        if kind in local:
            return 0.0
        return collective_bytes(cast(CollectiveKind, kind), size / n if kind == "all_to_all" else size, n)

    return _conversion(src, dst, grad, received)


def conversion_seconds(src: Type, dst: Type, size: float, span: Span, device: Device, grad: bool) -> ConversionCost:
    """Seconds that a value of `size` bytes in whole takes to change its type over an axis that lies on `span`.

    Local copies count too: slices and zero-padding read and write what they keep.
    """
    n = math.prod(hop.fan_out for hop in span)
    copied = size / (device.bandwidth * device.memory_efficiency)

    def seconds(kind: str) -> float:
        if kind in ("shard", "unshard", "keep_first"):
            return device.launch + copied * (2 / n if kind == "shard" else 1 + 1 / n)
        return device.launch + collective_seconds(cast(CollectiveKind, kind), size / n if kind == "all_to_all" else size, span)

    return _conversion(src, dst, grad, seconds)


def _conversion(src: Type, dst: Type, grad: bool, price: Callable[[str], float]) -> ConversionCost:
    if is_free(src, dst, grad):
        return ConversionCost(0.0, 0.0)
    try:
        steps = traffic(src, dst, grad)
    except ValueError:
        return ConversionCost(math.inf, math.inf)
    return ConversionCost(sum(map(price, steps.forward)), sum(map(price, steps.backward)))


@dataclass(frozen=True)
class Timing:
    """Seconds: `fixed` by launches and latencies, whatever the size of a value, and `work` in proportion to it."""

    fixed: float
    work: float

    @property
    def once(self) -> float:
        return self.fixed + self.work

    def of_step(self, runs: float, share: float) -> float:
        return self.fixed * runs + self.work * share


@dataclass
class _Known:
    """What loads on one mesh have in common: timings of ops, of conversions and of ways, and these. (Calls and strategies are
    looked up by identity, and kept, so that none takes another's place.)"""

    nodes: dict[tuple[int, int], tuple[OpCall, Strategy, Timing]] = field(default_factory=dict)
    conversions: dict[tuple[Type, Type, TensorMeta, str], Timing] = field(default_factory=dict)
    ways: dict[tuple[Type, Type, TensorMeta, str, float], Timing] = field(default_factory=dict)
    found: dict[tuple[Axis, float], Ways] = field(default_factory=dict)


class Seconds:
    """Prices of the placement search (compiler/prices.py) in seconds of one device on an axis of a mesh, both directions.

    mesh       the whole mesh; `axis` passed to the methods must be one of its axes
    share      of the batch that the graph was captured with, what a step sees: so much of an op's work is done, and so much of a
               value that is no parameter is moved
    runs       micro-batches of a step, in each of which parameters are moved and ops launched
    sums       what a second in which gradients are summed counts, once a step, against one of the micro-batches
    compute    what a second of compute counts: less than 1 where it hides traffic over other axes
    """

    def __init__(
        self, topology: Topology, mesh: Mesh, share: float = 1.0, runs: int = 1, sums: float = 1.0, compute: float = 1.0
    ) -> None:
        self.topology, self.mesh, self.share, self.runs, self.sums = topology, mesh, share, runs, sums
        self.compute = compute
        self._at_once = replace(topology.device, launch=0.0)
        self._known = _Known()

    def at(self, share: float, runs: int, sums: float, compute: float = 1.0) -> Seconds:
        """The prices of another load on the same mesh."""
        found = Seconds(self.topology, self.mesh, share, runs, sums, compute)
        found._known = self._known
        return found

    def _span(self, axis: Axis) -> Span:
        return self.topology.span(self.mesh, axis.name)

    def node(self, call: OpCall, strategy: Strategy, axis: Axis, from_parameters: tuple[bool, ...]) -> float:
        timing = self.node_timing(call, strategy)
        if from_parameters and all(from_parameters):  # a cast of a parameter: as much work for any batch
            return timing.of_step(self.runs, self.runs)
        return timing.of_step(self.runs, self.share * (1.0 if call.target is convert else self.compute))

    def node_timing(self, call: OpCall, strategy: Strategy) -> Timing:
        key = id(call), id(strategy)
        if key not in self._known.nodes:
            self._known.nodes[key] = call, strategy, self._node_timing(call, strategy)
        return self._known.nodes[key][-1]

    def _node_timing(self, call: OpCall, strategy: Strategy) -> Timing:
        operands = tuple(m if m is None else largest_shard(m, t) for m, t in zip(call.operands, strategy.ins, strict=True))
        results = tuple(largest_shard(m, t) for m, t in zip(call.results, strategy.outs, strict=True))
        local = replace(call, operands=operands, results=results)
        if strategy.target is not None:
            local = replace(local, target=strategy.target, args=strategy.args or (), kwargs=strategy.kwargs or {})
        if call.target is convert:
            return self._other_axis(local)
        whole, work = (op_seconds(local, d) + backward_seconds(local, d) for d in (self.topology.device, self._at_once))
        inside = self._inside(local)
        return Timing(whole - work + inside.fixed, work + inside.work)

    def _inside(self, call: OpCall) -> Timing:
        """Of the collectives of `EXCHANGES`."""
        forward, backward = EXCHANGES.get(op_name(call.target), ((), ()))
        if not forward:
            return Timing(0.0, 0.0)
        (operand,), axis = call.operands, call.args[-1]
        fixed = work = 0.0
        for kind in (*forward, *backward) if operand is not None and operand.grad else forward:
            taken = self.topology.collective(kind, self.mesh, axis)
            fixed += self.topology.device.launch + taken.latency
            work += taken.rate * row_bytes(call) * (self.mesh.size(axis) if kind == "all_gather" else 1)
        return Timing(fixed, work)

    def _other_axis(self, call: OpCall) -> Timing:
        """Of a conversion over an axis that the graph was lowered along before, of what this axis leaves of the value: so
        the search finds in which order a value best changes its types over two axes."""
        _, name, src, dst = call.args
        if self.mesh.size(name) == 1:  # micro-batches
            return Timing(0.0, 0.0)
        return self.conversion_timing(src, dst, unsharded(call.operands[0], src), Axis(name, self.mesh.size(name)))

    def of_conversion(self, name: str, src: Type, dst: Type, meta: TensorMeta) -> float:
        """Of one conversion over an axis, or several joined by "+", of a value that is `meta` before it is sharded over these."""
        return self.conversion_timing(src, dst, meta, Axis(name, self.mesh.size(name))).once

    def placeholder(self, type_: Type, meta: TensorMeta, axis: Axis) -> float:
        """A Replicate parameter's gradient is summed once a step."""
        return self.sums * self.gradient_sum(meta, axis) if type_ == R and meta.grad else 0.0

    def gradient_sum(self, meta: TensorMeta, axis: Axis) -> float:
        """In a bucket, where latency does not count."""
        return self.topology.collective("all_reduce", self.mesh, axis.name).rate * size_of(meta)

    def conversion(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis, of_parameter: bool = False) -> float:
        """Of the cheapest way. inf where no conversion leads there by itself."""
        if not (is_free(src, dst, meta.grad) or exists(src, dst, meta.grad)):
            return math.inf
        return self.way_timing(src, dst, meta, axis).of_step(self.runs, self.runs if of_parameter else self.share)

    def way_timing(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis) -> Timing:
        """Of the conversions on the cheapest way."""
        key = (src, dst, meta, axis.name, self._size)
        if key not in self._known.ways:
            found = [self.conversion_timing(a, b, meta, axis) for a, b in steps(src, dst, meta, self.ways(axis))]
            self._known.ways[key] = Timing(sum(t.fixed for t in found), sum(t.work for t in found))
        return self._known.ways[key]

    def conversion_timing(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis) -> Timing:
        """Of one conversion."""
        key = (src, dst, meta, axis.name)
        if key not in self._known.conversions:
            whole, fixed = (
                conversion_seconds(src, dst, size, self._span(axis), self.topology.device, meta.grad).total
                for size in (size_of(meta), 0.0)
            )
            self._known.conversions[key] = Timing(fixed, 0.0 if math.isinf(fixed) else whole - fixed)
        return self._known.conversions[key]

    def ways(self, axis: Axis) -> Ways:
        """How values change their types over the axis in the least time."""
        key = axis, self._size
        if key not in self._known.found:
            size = self._size

            def price(src: Type, dst: Type, meta: TensorMeta) -> float:
                if not (is_free(src, dst, meta.grad) or exists(src, dst, meta.grad)):
                    return math.inf
                return self.conversion_timing(src, dst, meta, axis).of_step(1, size)

            self._known.found[key] = ways_by_price(axis, price)
        return self._known.found[key]

    @cached_property
    def _size(self) -> float:
        """Of a value, against its captured size, in a micro-batch: to a power of two, so that ways are found for few."""
        return power_of_two(self.share / self.runs)


def power_of_two(x: float) -> float:
    """The nearest."""
    return 2.0 ** round(math.log2(x))


@dataclass(frozen=True)
class GraphCost:
    """What one run of an emitted graph costs one rank: seconds of compute, FLOP, and per axis seconds and bytes received."""

    compute: float
    flops: float
    communication: Mapping[str, float]
    received: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """With nothing overlapped."""
        return self.compute + sum(self.communication.values())


def graph_cost(gm: fx.GraphModule, topology: Topology, mesh: Mesh) -> GraphCost:
    """The cost of an emitted graph, its collectives included. Requires `meta["val"]` on every node."""
    compute = flops = 0.0
    communication: defaultdict[str, float] = defaultdict(float)
    received: defaultdict[str, float] = defaultdict(float)
    known: dict[Any, tuple[float, float]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or op_name(node.target) in FREE:
            continue
        if node.target in COMMUNICATION:
            axis, kind, size = communication_of(node)
            communication[axis] += topology.device.launch + topology.collective(kind, mesh, axis).of(size)
            received[axis] += collective_bytes(kind, size, mesh.size(axis))
            continue
        call = call_of(node)
        key = (call.target, call.operands, call.results, op_flops(call))
        if key not in known:
            known[key] = (op_seconds(call, topology.device), key[-1])
        compute, flops = compute + known[key][0], flops + known[key][1]
    return GraphCost(compute, flops, dict(communication), dict(received))


def communication_of(node: fx.Node) -> tuple[str, CollectiveKind, float]:
    """(axis, kind, bytes as `collective_seconds` counts them) of a communication op."""
    kind = op_name(node.target).removesuffix("_bucket").removeprefix("start_")
    value = node.meta["val"] if kind == "all_gather" else map_operands(node.args[0], lambda n: n.meta["val"])
    size = sum(t.numel() * t.element_size() for t in _tensors(value))
    return str(node.args[1]), cast(CollectiveKind, kind), float(size)


def call_of(node: fx.Node) -> OpCall:
    """A call_function node as the cost functions take it; results that are None are left out."""
    operands: list[TensorMeta] = []

    def visit(source: fx.Node) -> Operand:
        found = [_meta(t, source) for t in _tensors(source.meta.get("val"))]
        operands.append(found[0] if found else TensorMeta((), torch.int64))
        return Operand(len(operands) - 1)

    args, kwargs = map_operands(tuple(node.args), visit), map_operands(dict(node.kwargs), visit)
    results = tuple(_meta(t, node) for t in _tensors(node.meta.get("val")))
    return OpCall(node.target, args, kwargs, tuple(operands), results)


def _meta(tensor: torch.Tensor, node: fx.Node) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), tensor.dtype, bool(node.meta.get("grad")) and has_derivatives(tensor.dtype))


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [t for t in items if isinstance(t, torch.Tensor)]
