"""Control flow as ops (`scan`, `map`, `while_loop`, `cond`, compile regions) in a trace: their bodies are called in their place.

`torch.export` would keep such an op as one node with a graph of its own, to which no sharding rule applies. How often a body
runs is known while a model is traced: for a scan or a map from the length of what it goes over, for a loop or a branch where the
condition depends on no tensor's values. So the body is called that often, and its ops become nodes like any other.
`fidelity.Watch` sees these ops come, and then what their bodies call, step by step. Of branches that depend on data all are
computed (branches.py); a loop that does is one op (loops.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.ops.collectives import ops
from ..passes.ops.loops import floating
from .branches import Scope, chosen, entered
from .capture_error import CaptureError
from .torch_compat import OpOverload, asks_for_values, generic_associative_scan, pytree, unlogged_guards

Body = Callable[..., Any]

LONG = 250
"""Steps that are unrolled without a warning: with some five ops each, planning a free search takes a minute on one core."""

ON_GPUS = {
    "_higher_order_ops/associative_scan.py": (
        "associative_scan with combine_mode='pointwise', which torch before 2.14 has on GPUs alone: models are captured on the CPU",
        "pass combine_mode='generic', which computes the same",
    ),
    "nn/attention/flex_attention.py": (
        "flex_attention, whose backward torch has on GPUs alone: models are captured on the CPU",
        "use torch.nn.functional.scaled_dot_product_attention with a mask (in transformers: attn_implementation='sdpa')",
    ),
}
"""What has no form on the CPU, by the file of torch that an error comes from, and the way out."""


@dataclass
class Steps:
    """The steps of control flow that one trace has taken, and the branches that it is in, outermost first."""

    taken: int = 0
    inside: list[Scope] = field(default_factory=list)

    def count(self, number: int, name: str, source: str | None) -> None:
        """Warn when so many steps more make a long graph."""
        before, self.taken = self.taken, self.taken + number
        if before <= LONG < self.taken:
            warnings.warn(
                f"{name} is unrolled: with its {number} steps the forward has {self.taken} or more, each with nodes of its own in "
                "the graph. Capture takes time in proportion, planning more than that: pin a strategy, or take fewer, larger steps"
                + (f" (at {source})" if source else ""),
                stacklevel=2,
            )

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: str | None) -> Any:
        """What the higher-order op of that name gives, by calls of its bodies.

        Raises CaptureError, with `source` as its line, where it depends on data how often a body runs, and for ops that are not
        known here.
        """
        if name not in OPS:
            raise CaptureError(
                f"the forward uses the higher-order op {name}, whose body is a graph of its own, which is not sharded",
                source,
                "write it out in ordinary operations",
            )
        return OPS[name](self, source, *args, **kwargs)


def has_body(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a higher-order op is given functions to call, other than a region that `regions.py` makes plain nodes of."""
    return name in OPS or (name not in REGIONS and any(_is_body(a) for a in pytree.tree_leaves(args)))


def _is_body(value: Any) -> bool:
    return callable(value) and not isinstance(value, OpOverload)


def _scan(
    steps: Steps,
    source: str | None,
    body: Body,
    init: Sequence[Tensor],
    xs: Sequence[Tensor],
    additional: Sequence[Any],
    **options: Any,
) -> Any:
    """`body(*carry, *slices, *additional)` gives the next carry and a result of the step, and so does the scan: the last carry,
    and the steps' results stacked. Both are trees, or, where the body is a graph, one flat tuple."""
    carry: Sequence[Any] = init
    structure: Any = None
    results = []
    for slices in _slices(steps, "scan", xs, source):
        found = tuple(body(*carry, *slices, *additional))
        _check_carry(
            "scan", carry, found[: len(init)] if isinstance(body, fx.GraphModule) else pytree.tree_leaves(found[0]), source
        )
        leaves, structure = pytree.tree_flatten(found)
        carry = leaves[: len(init)]
        results.append(leaves[len(init) :])
    return pytree.tree_unflatten([*carry, *_stack("scan", results, source)], structure)


def _map(steps: Steps, source: str | None, body: Body, xs: Sequence[Tensor], additional: Sequence[Any], **options: Any) -> Any:
    structure: Any = None
    results = []
    for slices in _slices(steps, "map", xs, source):
        leaves, structure = pytree.tree_flatten(body(*slices, *additional))
        results.append(leaves)
    return pytree.tree_unflatten(_stack("map", results, source), structure)


def _associative_scan(
    steps: Steps, source: str | None, body: Body, xs: Sequence[Tensor], additional: Sequence[Any], **options: Any
) -> Any:
    """Of combine_mode='pointwise': the body takes all pairs of neighbours at once, some twice the logarithm of the length times, as
    it does in eager. With combine_mode='generic' torch itself does so, and no op is made."""
    structure: Any = None

    def combine(*pairs: Tensor) -> list[Any]:
        nonlocal structure
        leaves, structure = pytree.tree_flatten(body(*pairs, *additional))
        return leaves

    if _length("associative_scan", xs, source) == 1:
        combine(*xs, *xs)  # for the structure alone: there is nothing to combine
    found = generic_associative_scan(combine, list(xs))
    return pytree.tree_unflatten(found, structure)


def _slices(steps: Steps, name: str, xs: Sequence[Tensor], source: str | None) -> Iterator[tuple[Tensor, ...]]:
    """Of each step what it takes of `xs`. By `unbind`, whose backward is one `stack`, however many the steps."""
    steps.count(_length(name, xs, source), name, source)
    yield from zip(*(x.unbind(0) for x in xs), strict=True)


def _length(name: str, xs: Sequence[Tensor], source: str | None) -> int:
    lengths = {x.shape[0] for x in xs}
    if len(lengths) != 1 or 0 in lengths:
        raise CaptureError(f"{name} goes over tensors of lengths {sorted(lengths)}", source, "let them have one length, not 0")
    return lengths.pop()


def _stack(name: str, results: Sequence[Sequence[Any]], source: str | None) -> list[Any]:
    """The steps' results, leaf by leaf. A leaf may be None in all steps."""
    stacked = []
    for values in zip(*results, strict=True):
        if all(v is None for v in values):
            stacked.append(None)
        elif all(isinstance(v, Tensor) for v in values):
            stacked.append(torch.stack(values))
        else:
            other = next(v for v in values if not isinstance(v, Tensor))
            raise CaptureError(f"the body of {name} returns a {type(other).__name__}", source, "return tensors")
    return stacked


def _check_carry(name: str, before: Sequence[Any], after: Sequence[Any], source: str | None) -> None:
    """Eager asks the same of a body."""
    given, returned = (", ".join(_described(value) for value in values) for values in (before, after))
    if given != returned:
        raise CaptureError(
            f"the body of {name} is given a carry of {given} and returns one of {returned}",
            source,
            "return a carry like the one given, and start from one of that shape and dtype",
        )


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _while_loop(
    steps: Steps,
    source: str | None,
    condition: Body,
    body: Body,
    carried: Sequence[Any],
    additional: Sequence[Any],
    **options: Any,
) -> Any:
    result: Any = tuple(carried)
    while (more := _known(condition(*carried, *additional))) is not False:
        if more is None:
            return _loop(steps, source, condition, body, carried, additional)
        steps.count(1, "torch.while_loop", source)
        result = body(*carried, *additional)
        carried = pytree.tree_leaves(result)
    return result


def _loop(steps: Steps, source: str | None, condition: Body, body: Body, carried: Sequence[Any], additional: Sequence[Any]) -> Any:
    """As many steps as the values of tensors say: one is traced, between marks (loops.py). The op that it becomes has no rule, of
    which a warning tells."""
    before = [x if isinstance(x, Tensor) else torch.tensor(x) for x in carried]
    with entered(steps.inside, Scope("torch.while_loop", None, source)):
        given = ops.loop_begin(before)
        for x in floating(given) if torch.is_grad_enabled() else ():
            x.requires_grad_(True)  # as it may in later steps
        steps.inside[-1].note(given)
        more = condition(*given, *additional)
        if not isinstance(more, Tensor) or more.numel() != 1:
            raise CaptureError("the condition of torch.while_loop gives no tensor of one element", source, "give one, a bool")
        for outer in steps.inside:
            if outer.taken is not None:  # else a loop that is not to be taken might have no end
                more = more.reshape(()).bool() & outer.taken
        leaves, structure = pytree.tree_flatten(body(*given, *additional))
        _check_carry("torch.while_loop", before, leaves, source)
        after = ops.loop_end(more, leaves)
    return pytree.tree_unflatten(after, structure)


def _cond(
    steps: Steps,
    source: str | None,
    condition: Any,
    if_true: Body,
    if_false: Body,
    operands: Sequence[Any] = (),
    **options: Any,
) -> Any:
    known = _known(condition)
    if known is not None:
        return if_true(*operands) if known else if_false(*operands)
    _check_is_tensor("torch.cond", condition, source)
    is_true = condition.reshape(()).bool()
    return chosen(steps.inside, "torch.cond", (is_true, ~is_true), (if_true, if_false), operands, source)


def _switch(
    steps: Steps, source: str | None, index: Any, branches: Sequence[Body], operands: Sequence[Any] = (), **options: Any
) -> Any:
    """The branch of that index, or the nearest one, where there is none."""
    known, last = _known(index, int), len(branches) - 1
    if known is not None:
        return branches[min(max(known, 0), last)](*operands)
    _check_is_tensor("switch", index, source)
    nearest = index.reshape(()).clamp(0, last)
    return chosen(steps.inside, "switch", [nearest == k for k in range(len(branches))], branches, operands, source)


def _check_is_tensor(name: str, choice: Any, source: str | None) -> None:
    """A number made of a tensor's value is no operation that a graph has."""
    if not isinstance(choice, Tensor) or choice.numel() != 1:
        raise CaptureError(
            f"{name} chooses by a number that depends on the values of tensors",
            source,
            "keep it a tensor of one element: no .item()",
        )


def _known(condition: Any, kind: type[Any] = bool) -> Any:
    """A condition's value, None where it depends on the values of tensors that the model is given or computes from them."""
    try:
        with unlogged_guards():
            return kind(condition)
    except Exception as error:
        if asks_for_values(error):
            return None
        raise


def _operands_first(steps: Steps, source: str | None, body: Body, *operands: Any, **options: Any) -> Any:
    """What is given by name says how to compile the body, or what to compute again."""
    return body(*operands)


def _invoke_subgraph(steps: Steps, source: str | None, body: Body, identifier: str | None, *operands: Any, **options: Any) -> Any:
    return body(*operands)


def _strict_mode(steps: Steps, source: str | None, body: Body, operands: Sequence[Any], **options: Any) -> Any:
    return body(*operands)


def _hints_wrapper(
    steps: Steps, source: str | None, body: Body, args: Sequence[Any], kwargs: dict[str, Any], **options: Any
) -> Any:
    return body(*args, **kwargs)


OPS: dict[str, Callable[..., Any]] = {
    "scan": _scan,
    "map_impl": _map,
    "associative_scan": _associative_scan,
    "while_loop": _while_loop,
    "cond": _cond,
    "switch": _switch,
    "invoke_subgraph": _invoke_subgraph,
    "strict_mode": _strict_mode,
    "hints_wrapper": _hints_wrapper,
    "tag_activation_checkpoint": _operands_first,
    "wrap_activation_checkpoint": _operands_first,
    "invoke_quant": _operands_first,
    "invoke_quant_packed": _operands_first,
}
"""The higher-order ops whose bodies are called in their place, by torch's names. What some versions of torch say of them besides
(which operands a body writes to) follows from the calls."""

REGIONS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Those that torch.export makes itself, for `regions.py` to read."""
