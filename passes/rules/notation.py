"""Einsum-like text for rules whose dims are plain factors: `"m k, k n -> m n"`.

Each operand lists its dims; `...` stands for leading dims shared by all that have it, aligned from the right. A factor that
a result lacks is reduced by sum, unless it is named after `; block:`.
"""

from __future__ import annotations

from functools import cache

from ...compiler.torch_compat import OpOverload
from .base import RULES, Axis, Factor, OpCall, Rule, Slot


@cache
def parse(text: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...], frozenset[str]]:
    """(dims of each operand, dims of each result, factors that are never sharded)."""
    text, _, blocked = text.partition("; block:")
    left, right = text.split("->")
    operands = tuple(tuple(part.split()) for part in left.split(","))
    results = tuple(tuple(part.split()) for part in right.split(","))
    return operands, results, frozenset(blocked.split())


def _expand(dims: tuple[str, ...], rank: int) -> list[str]:
    """Names of the dims of a tensor of `rank` dims, `...` filled with numbered names counted from the right."""
    if "..." not in dims:
        if len(dims) != rank:
            raise ValueError(f"the notation has {len(dims)} dims ({' '.join(dims)}) for a tensor of {rank}")
        return list(dims)
    k = dims.index("...")
    missing = rank - (len(dims) - 1)
    return [*dims[:k], *(f"...{missing - i}" for i in range(missing)), *dims[k + 1 :]]


def factors(text: str, call: OpCall) -> tuple[Factor, ...]:
    """The factors of `call` as `text` describes them. Dims of length 1 that broadcast are not occurrences of a factor."""
    operand_text, result_text, blocked = parse(text)
    operand_dims = [_expand(d, len(m.shape)) for d, m in zip(operand_text, call.operands, strict=True)]
    result_dims = [_expand(d, len(m.shape)) for d, m in zip(result_text, call.results, strict=True)]
    sizes: dict[str, int] = {}
    for dims, meta in zip([*operand_dims, *result_dims], [*call.operands, *call.results], strict=True):
        for name, size in zip(dims, meta.shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)

    def slot(dims: list[str], shape: tuple[int, ...], name: str) -> Slot | None:
        if name in dims and shape[dims.index(name)] == sizes[name]:
            return Slot(dims.index(name))
        return None

    return tuple(
        Factor(
            name,
            size,
            tuple(slot(d, m.shape, name) for d, m in zip(operand_dims, call.operands, strict=True)),
            tuple(slot(d, m.shape, name) for d, m in zip(result_dims, call.results, strict=True)),
            reduce="sum",
        )
        for name, size in sizes.items()
        if size > 1 and name not in blocked
    )


def register_rule(target: OpOverload, text: str) -> None:
    """Give an op a rule: see `shardwright.register_rule`, which proves it besides. Raises ValueError for text that cannot be read,
    and for an op that has a rule."""
    if target in RULES:
        raise ValueError(f"{target} has a sharding rule already")
    if text.count("->") != 1:
        raise ValueError(f"a sharding rule reads 'dims of operands -> dims of results', as in 'r c, r -> r c', not {text!r}")
    parse(text)

    def rule(call: OpCall, axis: Axis) -> Rule:
        try:
            return Rule(factors(text, call))
        except ValueError as error:
            shapes = ", ".join(str(list(o.shape)) for o in call.operands)
            raise ValueError(f"the sharding rule {text!r} of {target} does not fit a call with {shapes}: {error}") from error

    RULES[target] = rule
