"""Normalize: a captured graph becomes one of the ops that later passes have rules for, in one spelling each.

`normalize` is pure. What holds of its result, besides the meaning of the graph it was given:

- no assertions, aliases, clones, casts to the same dtype, additions of 0, multiplications by 1, concatenations of one
- every reshaping view is `reshape`, its sizes explicit, never on another `reshape`; `expand` names every size
- dims are non-negative, slice bounds lie within the dim; trailing default arguments are left out; add and sub have no alpha
- constants name their dtype and no device
- linear, mm and convolution have no bias; `linear` and `matmul` keep batch dims apart
- means, variances, batch norm and losses are sums, divided by counts; class losses use shardwright.logsumexp and .pick
- attention is shardwright.attention, or chunked_attention where it has dropout or a mask with a gradient
- dropout is shardwright.dropout(x, seed, p, site), with a placeholder of key "seed"
- no sorting in mixtures of experts: shardwright.grouped_linear on tokens in their order
- rows scattered by a mask are looked up; a dim indexed by a full range stays a dim; what a mask chooses is a `where`
- bags of embeddings are sums of lookups, short-time Fourier transforms are transforms of frames
- composite ops that nothing here knows are taken apart

`check_normal` checks what of this can be seen in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...compiler.torch_compat import OpOverload
from . import (
    attention,
    bags,
    batch_norm,
    cleanup,
    decompose,
    experts,
    indexing,
    linear,
    losses,
    random,
    reductions,
    scatter,
    spectra,
    views,
)
from .gradients import mark_gradients
from .rewrite import Rules, bind, rewrite, trim, wrap_dims

__all__ = ["check_normal", "normalize"]

aten = torch.ops.aten

RULES: Rules = {
    **cleanup.RULES,
    **views.RULES,
    **linear.RULES,
    **reductions.RULES,
    **losses.RULES,
    **batch_norm.RULES,
    **attention.RULES,
    **random.RULES,
    **indexing.RULES,
    **bags.RULES,
    **spectra.RULES,
    **experts.RULES,
    **scatter.RULES,
    None: decompose.decompose,
}

ADDITIONS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
BANISHED = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.alias.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.conv2d.default,
        aten.mean.dim,
        aten.mean.default,
        aten.var.correction,
        aten.cross_entropy_loss.default,
        aten.scaled_dot_product_attention.default,
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.dropout.default,
    }
)


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm`, a captured graph, in normal form. Placeholders and outputs keep their order, unused
    constants left out; "seed" may come as a last input.

    Requires: call_function nodes over ATen with meta["val"], functional. Ensures: the module's text; every node has
    meta["val"] and meta["grad"], and the "source" and "module" of the node it came from.
    """
    result = rewrite(gm, RULES)
    mark_gradients(result.graph)
    check_normal(result)
    return result


def check_normal(gm: fx.GraphModule) -> None:
    """Raises ValueError at the first node that is not in normal form, naming the node and what is wrong with it."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            fault = _fault(node)
            if fault:
                raise ValueError(f"node {node.name!r} ({node.target}, {node.meta.get('source')}) {fault}")


def _fault(node: fx.Node) -> str | None:
    if node.target in BANISHED:
        return "should have been rewritten"
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return "writes to an operand"
    args, kwargs = bind(node.target, node.args, node.kwargs)
    if (list(trim(node.target, args, kwargs)[0]), wrap_dims(node.target, args)) != (list(node.args), args):
        return "has default arguments, or negative dims, spelled out"
    if node.target in (aten.reshape.default, aten.expand.default):
        if -1 in args[1]:
            return "has a size of -1"
        if tuple(args[1]) == tuple(args[0].meta["val"].shape):
            return "changes nothing"
    if node.target is aten.reshape.default and args[0].target is aten.reshape.default:
        return "follows another reshape"
    if (
        node.target is aten.linear.default
        and args[2] is not None
        or node.target is aten.convolution.default
        and args[2] is not None
    ):
        return "has a bias"
    if node.target is aten._to_copy.default and kwargs["dtype"] in (None, args[0].meta["val"].dtype):
        return "changes nothing"
    if node.target in ADDITIONS and kwargs.get("alpha", 1) != 1:
        return "has an alpha"
    return _slice_fault(node, args)


def _slice_fault(node: fx.Node, args: tuple[Any, ...]) -> str | None:
    if node.target is not aten.slice.Tensor:
        return None
    value: Tensor = args[0].meta["val"]
    _, dim, start, end, _ = args
    return None if 0 <= (start or 0) <= (end if end is not None else 0) <= value.shape[dim] else "has bounds outside the dim"
