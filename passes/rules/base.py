"""What a sharding rule is, and how strategies follow from it.

A rule lists the loop *factors* of an op call, as in einsum: where each factor stands in every operand and result, and how
results that lack it combine. `matmul: m k, k n -> m n` has factors m and n, which map, and k, which sums. Sharding one
factor over an axis gives one strategy:

    an operand or result that has the factor    V on the dim where it stands
    an operand that lacks it                    R (P, where it is a term of the sum itself: what index_add adds to)
    a result that lacks it                      P, reduced as the factor says (a factor that cannot reduce is left out)

Besides these every call can run replicated on Invariant values (the strategy `I`) or on Replicate values (`R`), and an op
that is linear in some operands passes Partial values through (`P`).

A factor stands in a dim through a `Slot`: the dim is (outer, factor, inner), so `reshape [b, s, 12*64] -> [b, s, 12, 64]`
has factor heads at Slot(2, inner=64) of the operand and Slot(2) of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...compiler.torch_compat import OpOverload
from ..types import (
    I,
    P,
    Partial,
    R,
    ReduceOp,
    Sections,
    Type,
    Varying,
    even_sections,
    local_shape,
)


@dataclass(frozen=True)
class Axis:
    """Of a mesh.

    joins    the axes before it with whose conversions one over this axis may be a single collective
    even     whether it cuts dims evenly alone, but for those that inputs have otherwise: then all ranks see the same shapes along
             the axes after it
    unequal  whether samples lie over it in unequal shares: what each of its ranks has of them, later axes may cut otherwise
    """

    name: str
    size: int
    joins: tuple[str, ...] = ()
    even: bool = False
    unequal: bool = False


@dataclass(frozen=True)
class Operand:
    """Stands for tensor operand `index` among the arguments of an `OpCall`."""

    index: int


def has_derivatives(dtype: torch.dtype) -> bool:
    """Whether values of a dtype have gradients."""
    return dtype.is_floating_point or dtype.is_complex


@dataclass(frozen=True)
class TensorMeta:
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = False


def largest_shard(value: TensorMeta, type_: Type) -> TensorMeta:
    """The largest part of a value that a rank holds."""
    return _with_size(value, type_.dim, type_.largest_size) if isinstance(type_, Varying) else value


def unsharded(value: TensorMeta, type_: Type) -> TensorMeta:
    """What is held so, together."""
    return _with_size(value, type_.dim, type_.global_size) if isinstance(type_, Varying) else value


def _with_size(value: TensorMeta, dim: int, size: int) -> TensorMeta:
    return replace(value, shape=(*value.shape[:dim], size, *value.shape[dim + 1 :]))


@dataclass(frozen=True)
class OpCall:
    """One call of an op: its arguments with tensors replaced by `Operand(i)`, in order of appearance."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[TensorMeta, ...]
    results: tuple[TensorMeta, ...]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def operand_of(self, position: int, name: str = "") -> int | None:
        """The operand index of an argument that is a tensor, else None."""
        value = self.arg(position, name)
        return value.index if isinstance(value, Operand) else None

    def operand_shape(self, i: int) -> tuple[int, ...]:
        return self.operands[i].shape


@dataclass(frozen=True)
class Slot:
    """A factor's place in a dim: the dim is `outer * factor * inner` long, outermost first."""

    dim: int
    outer: int = 1
    inner: int = 1

    def place(self, sections: Sections) -> Varying:
        """The shard of the dim, from the cut of the factor."""
        if self.inner != 1:
            sections = tuple(tuple(length * self.inner for length in section) for section in sections)
        return Varying(self.dim, sections * self.outer)

    def factor_sections(self, sections: Sections) -> Sections | None:
        """The cut of the factor that gives `sections` on the dim, or None when there is none."""
        if len(sections) % self.outer:
            return None
        if self.inner == self.outer == 1:
            return sections
        period = len(sections) // self.outer
        if sections != sections[:period] * self.outer or any(n % self.inner for s in sections for n in s):
            return None
        return tuple(tuple(n // self.inner for n in section) for section in sections[:period])


@dataclass(frozen=True)
class Factor:
    """A loop of an op. `reduce` says how results that lack the factor combine; None: every result must have it. `terms`: operands
    that lack it and are terms of that sum themselves, and so enter as Partial."""

    name: str
    size: int
    operands: tuple[Slot | None, ...]
    results: tuple[Slot | None, ...]
    reduce: ReduceOp | None = None
    terms: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Strategy:
    """One way to run a call over an axis: the types it needs and gives, and what is run.

    `target`, `args`, `kwargs` None: the same op on local tensors (with sizes made local).
    """

    label: str
    ins: tuple[Type, ...]
    outs: tuple[Type, ...]
    target: Any = None
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None


def replicated(call: OpCall) -> Strategy:
    """The strategy of a call on values that are whole on every rank."""
    return Strategy("I", (I,) * len(call.operands), (I,) * len(call.results))


Swap = Callable[["OpCall", Axis, Strategy, Sections], Strategy | None]


@dataclass(frozen=True)
class Rule:
    """factors; `linear`: sets of operands that may be Partial together, the others Replicate; `extra`: strategies that no
    single factor gives; `swap`: turns a factor's strategy into the op that computes it on shards (or None: not offered)."""

    factors: tuple[Factor, ...] = ()
    linear: tuple[frozenset[int], ...] = ()
    extra: tuple[Strategy, ...] = ()
    swap: Mapping[str, Swap] = field(default_factory=dict)


RuleFunction = Callable[[OpCall, Axis], Rule | None]
RULES: dict[Any, RuleFunction] = {}


def rule_for(*targets: Any) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function (call, axis) -> Rule for ops."""

    def register(function: RuleFunction) -> RuleFunction:
        for target in targets:
            if target in RULES:
                raise ValueError(f"{target} has two sharding rules")
            RULES[target] = function
        return function

    return register


def find_rule(call: OpCall, axis: Axis) -> Rule | None:
    """The rule of a call; None for an op without one (it runs replicated)."""
    function = RULES.get(call.target)
    if function is None:
        tags = call.target.tags if isinstance(call.target, OpOverload) else ()
        if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
            from .pointwise import pointwise

            return pointwise(call, axis)
        return None
    return function(call, axis)


Splits = Mapping[tuple[str, int, int], Iterable[Sections]]
"""Cuts of dims worth trying beyond the even one: ("in" | "out", operand or result, dim) -> sections."""


def own_cuts(size: int, axis: Axis) -> list[Sections]:
    """The cut of a factor that an axis makes by itself, if there is one: of which every rank gets some."""
    return [even_sections(size, axis.size)] if size >= axis.size and not (axis.even and size % axis.size) else []


def own_extra(rule: Rule, axis: Axis) -> list[Strategy]:
    """Of the strategies that no factor gives, those that an axis makes by itself."""
    return [s for s in rule.extra if not axis.even or all(t.is_even for t in (*s.ins, *s.outs) if isinstance(t, Varying))]


def factor_cuts(factor: Factor, axis: Axis, splits: Splits) -> list[Sections]:
    """The even cut of a factor where every rank gets some of it, then those that its neighbours suggest."""
    cuts = own_cuts(factor.size, axis)
    for side, slots in (("in", factor.operands), ("out", factor.results)):
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            for sections in splits.get((side, i, slot.dim), ()):
                cut = slot.factor_sections(sections)
                if cut is not None and sum(map(sum, cut)) == factor.size and cut not in cuts:
                    cuts.append(cut)
    return cuts


def strategies(call: OpCall, axis: Axis, splits: Splits | None = None, rule: Rule | None = None) -> list[Strategy]:
    """Every strategy of a call over an axis, `I` first. With no rule: that and `R`, as a parameter on a data axis is."""
    found = [replicated(call)]
    rule = rule if rule is not None else find_rule(call, axis)
    if any(o.grad for o in call.operands):
        found.append(Strategy("R", (R,) * len(call.operands), (R,) * len(call.results)))
    if rule is None:
        return found
    for factor in rule.factors:
        if factor.reduce is None and None in factor.results:
            continue
        for k, cut in enumerate(factor_cuts(factor, axis, splits or {})):
            strategy = factor_strategy(call, factor, cut, k)
            swap = rule.swap.get(factor.name)
            changed = swap(call, axis, strategy, cut) if swap else strategy
            if changed is not None:
                found.append(changed)
    for operands in rule.linear:
        if any(call.operands[i].dtype == torch.bool for i in operands):
            continue  # a bool is no sum
        ins = tuple(P if i in operands else R for i in range(len(call.operands)))
        found.append(Strategy("P", ins, (P,) * len(call.results)))
    found.extend(own_extra(rule, axis))
    return found


def everywhere(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    """A `Swap` that offers only cuts of which every rank gets some, for ops that do not run on nothing."""
    return strategy if all(map(sum, zip(*cut, strict=True))) else None


def factor_strategy(call: OpCall, factor: Factor, cut: Sections, k: int = 0) -> Strategy:
    """The strategy of sharding `factor` with sections `cut`."""
    lacking = [P if i in factor.terms else R for i in range(len(factor.operands))]
    ins = tuple(slot.place(cut) if slot is not None else lack for slot, lack in zip(factor.operands, lacking, strict=True))
    reduced: Type = Partial(factor.reduce) if factor.reduce else R
    outs = tuple(slot.place(cut) if slot is not None else reduced for slot in factor.results)
    return Strategy(factor.name if k == 0 else f"{factor.name}#{k}", ins, outs)


LocalCall = tuple[Any, tuple[Any, ...], dict[str, Any]]
Localizer = Callable[[OpCall, Strategy, int], LocalCall]
LOCALIZERS: dict[Any, Localizer] = {}
"""Ops whose arguments speak of sizes or positions, and how to say them of one rank's part."""


def localizer(*targets: Any) -> Callable[[Localizer], Localizer]:
    """Register a function (call, strategy, index) -> (target, args, kwargs) for ops."""

    def register(function: Localizer) -> Localizer:
        LOCALIZERS.update(dict.fromkeys(targets, function))
        return function

    return register


def with_result_sizes(position: int) -> Localizer:
    """For ops whose argument at `position` is the shape of their one result."""

    def local_call(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
        sizes = list(local_shape(call.results[0].shape, strategy.outs[0], index))
        return call.target, (*call.args[:position], sizes, *call.args[position + 1 :]), dict(call.kwargs)

    return local_call


def localize(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    """What rank `index` of the axis runs under `strategy`: target, args and kwargs, tensors still as `Operand`s."""
    if strategy.target is not None:
        return strategy.target, strategy.args or (), dict(strategy.kwargs or {})
    if any(isinstance(t, Varying) for t in (*strategy.ins, *strategy.outs)) and call.target in LOCALIZERS:
        return LOCALIZERS[call.target](call, strategy, index)
    return call.target, call.args, dict(call.kwargs)
