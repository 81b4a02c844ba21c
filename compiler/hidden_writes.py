"""Ops that write to an operand without their schema saying so, as ops that say it: functionalizing loses what it cannot see.

All of them normalize and keep running statistics. `instance_norm` becomes its formula, with a `copy_` to each;
`native_batch_norm` has another name, which says what it writes; `batch_norm` becomes one that does while it is functionalized.
Those that only a device's library has, or that torch calls from these, are refused where they would write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..passes.normalize.rewrite import arguments
from .capture_error import CaptureError
from .fidelity import line_of_stack_trace
from .torch_compat import lazy_graph_modules

aten = torch.ops.aten

INSIDE = frozenset(
    getattr(aten, name).default
    for name in (
        "_batch_norm_impl_index",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts",
        "batch_norm_update_stats",
    )
    if hasattr(aten, name)
)
"""Ops that `torch.nn.functional.batch_norm` is made of."""
SELDOM = frozenset({aten.instance_norm.default, aten.native_batch_norm.default, *INSIDE})
HIDDEN_WRITES = frozenset({aten.batch_norm.default, *SELDOM})
"""Ops that update running statistics in secret."""

STATISTICS = ("running_mean", "running_var")
Inline = Callable[[fx.GraphModule, fx.Node, fx.GraphModule, tuple[fx.Node, ...]], None]


def show_writes(graph: fx.GraphModule, node: fx.Node, inline: Inline) -> None:
    """Replace a call of an op of `SELDOM`, in place, by calls that show what they write. `inline` puts a graph in place of a node.

    Raises CaptureError for what has no form that shows it.
    """
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    named = dict(zip(names, arguments(node), strict=True))
    kept, own = named.get("running_mean") is not None, named.get("training", True)
    if node.target is aten.instance_norm.default:
        _instance_norm(graph, node, named, inline)
    elif node.target is aten.native_batch_norm.default:
        node.target, left_out = {
            (True, True): (aten._native_batch_norm_legit.default, ()),
            (True, False): (aten._native_batch_norm_legit_no_training.default, ("training",)),
            (False, True): (aten._native_batch_norm_legit.no_stats, STATISTICS),
        }[kept, own]
        node.args, node.kwargs = tuple(v for k, v in named.items() if k not in left_out), {}
    elif kept and own:
        raise CaptureError(
            f"{node.target} writes to running statistics in secret, and what it writes would be lost",
            line_of_stack_trace(node.meta.get("stack_trace")),
            "call torch.nn.functional.batch_norm, which shows what it writes",
        )


def _instance_norm(graph: fx.GraphModule, node: fx.Node, named: dict[str, Any], inline: Inline) -> None:
    """x[n, c, ...] normalized over `...`, or by its running statistics; those that are updated are means over n."""
    names = [k for k in ("input", "weight", "bias", *STATISTICS) if named[k] is not None]
    own, momentum, eps = (named[k] for k in ("use_input_stats", "momentum", "eps"))

    def formula(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        whole = given["input"]
        x = whole.float() if whole.dtype in (torch.float16, torch.bfloat16) else whole
        x = x[..., None] if x.dim() == 2 else x
        dims = list(range(2, x.dim()))
        per_channel = [-1] + [1] * len(dims)
        if own:
            var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            count = x[0, 0].numel()
            new = mean, var * (count / max(1, count - 1))
            for k, value in zip(STATISTICS, new, strict=True):
                if k in given:
                    fresh = value.detach().flatten(1).mean(0).to(given[k].dtype)
                    given[k].copy_(given[k] * (1 - momentum) + fresh * momentum)
        else:
            mean, var = (given[k].reshape(per_channel) for k in STATISTICS)
        y = (x - mean) * torch.rsqrt(var + eps)
        y = y * given["weight"].reshape(per_channel) if "weight" in given else y
        y = y + given["bias"].reshape(per_channel) if "bias" in given else y
        return y.reshape(whole.shape).to(whole.dtype)

    operands = tuple(named[k] for k in names)
    values = [n.meta["val"].clone() for n in operands]  # nodes may share one: tracing would take them for one operand
    with torch.no_grad(), lazy_graph_modules():
        traced = make_fx(formula)(*values)
    for made in traced.graph.nodes:
        if made.op == "call_function":
            made.meta.update({k: v for k, v in node.meta.items() if k not in made.meta})
    inline(graph, node, traced, operands)
