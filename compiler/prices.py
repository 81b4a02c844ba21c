"""What the placement search pays: for running a node under a strategy, and for converting a value between types.

Two price lists. `Volume` counts bytes and has no machine in it: it prefers sharded parameters and sharded products above all,
and among those placements the least traffic; it is used where the user (or the outer search) has already decided that an axis
shards the data, time or tensors. Costs of whole plans, in seconds on a topology, are in compiler/cost.py.
"""

from __future__ import annotations

from typing import Protocol

from ..passes.convert import convert
from ..passes.rules.base import Axis, OpCall, Strategy, TensorMeta
from ..passes.types import I, Partial, R, Replicate, Type, Varying
from .torch_compat import OpOverload


class Prices(Protocol):
    def node(self, call: OpCall, strategy: Strategy, axis: Axis, from_parameters: tuple[bool, ...]) -> float: ...
    def placeholder(self, type_: Type, meta: TensorMeta, axis: Axis) -> float: ...
    def conversion(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis, of_parameter: bool = False) -> float: ...


def size_of(meta: TensorMeta) -> int:
    """Bytes of a whole value."""
    n = meta.dtype.itemsize
    for s in meta.shape:
        n *= s
    return n


def whole_size(meta: TensorMeta, type_: Type) -> float:
    """Bytes of a value of which a rank holds `meta`, over an axis that it is lowered along."""
    return size_of(meta) * (type_.global_size / meta.shape[type_.dim] if isinstance(type_, Varying) else 1.0)


def held(type_: Type, axis: Axis) -> float:
    """The largest share of a value that one rank of the axis holds."""
    if not isinstance(type_, Varying):
        return 1.0
    return type_.largest_size / max(1, type_.global_size)


COLLECTIVE_VOLUME = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.5, "slice": 0.02, "free": 0.001}
"""Bytes on the wire per byte of the whole value, in the limit of many ranks (Thakur et al. 2005, section 4, ring algorithms); a
slice costs its copy. "free" keeps the search from inserting conversions that change nothing."""


def conversion_kinds(src: Type, dst: Type, grad: bool) -> tuple[str, str]:
    """(forward, backward) collectives of a conversion, by name in COLLECTIVE_VOLUME."""
    whole = (type(I), Replicate)
    if isinstance(src, Partial):
        forward = "reduce_scatter" if isinstance(dst, Varying) else "all_reduce"
        backward = {type(I): "free", Replicate: "all_reduce", Varying: "all_gather"}[type(dst)]
    elif isinstance(src, Varying):
        forward = "all_to_all" if isinstance(dst, Varying) else "all_gather"
        backward = {type(I): "slice", Replicate: "reduce_scatter", Varying: "all_to_all"}[type(dst)]
        if isinstance(dst, Varying) and dst.dim == src.dim:
            forward = backward = "all_gather"
    elif isinstance(dst, Varying):
        forward, backward = "slice", "all_gather" if src == I else "slice"
    elif isinstance(dst, Partial):
        forward, backward = "slice", "slice"
    else:
        assert isinstance(src, whole)
        forward, backward = "free", "all_reduce" if (src, dst) == (I, R) else "free"
    return forward, backward if grad else "free"


PRODUCTS = frozenset("mm bmm linear matmul grouped_linear convolution attention chunked_attention addmm baddbmm".split())


def megatron_prices(sequence: bool) -> Volume:
    """For a tensor axis; `sequence`: activations are sharded by their tokens where that is possible."""
    return Volume(parameters=True, activations=0.05 if sequence else 0.0)


class Volume:
    """Bytes moved, with replicated work and replicated parameters of products priced far above any traffic."""

    REPLICATED = 1000.0
    ELEMENTWISE = 0.01

    def __init__(self, *, parameters: bool = False, activations: float = 0.0) -> None:
        """parameters     whether the axis is there to shard parameters (a tensor axis) or the batch alone
        activations    price per byte of a replicated elementwise result (sequence parallelism saves these)"""
        self.parameters, self.activations = parameters, activations

    def node(self, call: OpCall, strategy: Strategy, axis: Axis, from_parameters: tuple[bool, ...]) -> float:
        name = call.target.name().split("::")[-1].split(".")[0] if isinstance(call.target, OpOverload) else ""
        share = min((self.share(t, axis) for t in (*strategy.ins, *strategy.outs)), default=1.0)
        total = float(sum(size_of(m) for m in (*call.operands, *call.results)))
        if name in PRODUCTS:
            whole = float(share == 1.0)
            if self.parameters:
                whole += any(p and not isinstance(t, Varying) for t, p in zip(strategy.ins, from_parameters, strict=True))
            return self.REPLICATED * total * whole + total * share
        if name == "embedding" and self.parameters:
            # Cut by rows (the vocabulary), as the loss wants a tied table; by columns would save half the traffic of one lookup.
            by_columns = 2.0 * size_of(call.results[0]) if isinstance(strategy.outs[0], Varying) else 0.0
            return self.REPLICATED * size_of(call.operands[0]) * float(held(strategy.ins[0], axis) == 1.0) + by_columns
        if call.target is convert:
            return self.ELEMENTWISE * total * share + self._earlier(call, strategy, axis)
        kept = sum(size_of(m) * held(t, axis) for m, t in zip(call.results, strategy.outs, strict=True) if m.grad)
        return self.ELEMENTWISE * total * share + self.activations * kept

    def _earlier(self, call: OpCall, strategy: Strategy, axis: Axis) -> float:
        """What a conversion over an axis before this one moves, of what this one leaves of the value, or one over both at once. Of
        as many bytes a sum over both saves the latency of a tree, and other exchanges have those of a ring all around."""
        _, name, src, dst = strategy.args or call.args
        if not set(call.args[1].split("+")) <= set(axis.joins):
            return 0.0
        (meta,), (type_,) = call.operands, strategy.ins
        kinds = conversion_kinds(src, dst, meta.grad)
        volume = sum(COLLECTIVE_VOLUME[kind] for kind in kinds) * whole_size(meta, src)
        if name == call.args[1]:
            return volume * held(type_, axis)
        return volume * (0.99 if "all_reduce" in kinds else 1.01)

    def share(self, type_: Type, axis: Axis) -> float:
        """The share of a value that a rank works on. Of the batch, the mean: how it lies on the ranks is not ours to even out."""
        return held(type_, axis) if self.parameters or not isinstance(type_, Varying) else 1.0 / axis.size

    def placeholder(self, type_: Type, meta: TensorMeta, axis: Axis) -> float:
        """A Replicate parameter's gradient is reduced once a step, in a bucket; a sharded one costs nothing."""
        if type_ == R and meta.grad:
            return COLLECTIVE_VOLUME["all_reduce"] * size_of(meta) * 0.99
        return 0.0

    def conversion(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis, of_parameter: bool = False) -> float:
        forward, backward = conversion_kinds(src, dst, meta.grad)
        # What is gathered of the batch must be as long on every rank: count tokens by a sum, however few bytes they are.
        least = 64 if self.parameters or not isinstance(src, Varying) else 1024
        return (COLLECTIVE_VOLUME[forward] + COLLECTIVE_VOLUME[backward]) * max(size_of(meta), least)
