"""A branch that depends on data: all branches are computed, and what they give is chosen from.

Ranks that took different branches would meet different collectives, and a graph in a graph has no sharding rule. Computed side by
side, the ops of all branches are nodes like any other. What is not taken may overflow, where it was never meant to be computed; so
the gradients of what a branch reads from outside are chosen too, by a `where` (`Scope.enter`): zero times infinity is no gradient.
In the forward that is the operand itself, as `passes/simplify.py` sees.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .capture_error import CaptureError
from .torch_compat import pytree, write_count

NORMS = (functional.batch_norm, functional.instance_norm)
"""They write to their running statistics in secret."""


@dataclass
class Scope:
    """What is traced of one branch, or of a step of a loop.

    name       of the control flow, for errors
    taken      bool, 0-dim: whether it is the one; None: whatever is traced counts
    made       what its own ops gave
    entered    by its id, and whether its gradient counts, what it reads from outside, what its ops read instead, and how often each
               had been written to then
    """

    name: str
    taken: Tensor | None
    source: str | None
    made: dict[int, Any] = field(default_factory=dict)
    entered: dict[tuple[int, bool], tuple[Tensor, Tensor, tuple[int, int]]] = field(default_factory=dict)

    def enter(self, args: Any) -> Any:
        """These arguments of an op in it, with a gradient that is zero where the branch is not taken."""
        return pytree.tree_map_only(Tensor, self._enter, args)

    def _enter(self, x: Tensor) -> Tensor:
        if id(x) in self.made:
            return x
        gated = self.taken is not None and x.requires_grad and torch.is_grad_enabled()
        if (id(x), gated) not in self.entered:
            inside = torch.where(self.taken, x, x.detach()) if self.taken is not None and gated else x
            self.entered[id(x), gated] = (x, inside, (write_count(x), write_count(inside)))
            if gated:
                self.note(inside)
        return self.entered[id(x), gated][1]

    def note(self, results: Any) -> None:
        """That ops of it gave these."""
        self.made.update((id(x), x) for x in pytree.tree_leaves(results) if isinstance(x, Tensor))

    def check_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> None:
        """Refuse an op that writes to what is outside, whether or not the branch is taken."""
        written = args[0] if writes and args else _statistics(function, args, kwargs)
        if any(isinstance(x, Tensor) and id(x) not in self.made for x in pytree.tree_leaves(written)):
            raise self._writes()

    def check_written(self) -> None:
        """The same of what it wrote to through a view."""
        if any((write_count(x), write_count(inside)) != counts for x, inside, counts in self.entered.values()):
            raise self._writes()

    def _writes(self) -> CaptureError:
        return CaptureError(
            f"a body of {self.name} writes to a tensor from outside",
            self.source,
            "return the new value, and write it where the control flow has ended",
        )


def chosen(
    inside: list[Scope],
    name: str,
    takes: Sequence[Tensor],
    branches: Sequence[Callable[..., Any]],
    operands: Any,
    source: str | None,
) -> Any:
    """What the branch gives that is taken: of `takes`, bools of one element, one is True.

    inside    the branches that are being traced, outermost first; these are entered in their turn

    Raises CaptureError where branches give other things than tensors alike, and where one writes to what is outside.
    """
    warnings.warn(
        f"{name} chooses by the values of tensors: all its branches are computed, in every step, and the result of one is taken"
        + (f" (at {source})" if source else ""),
        stacklevel=2,
    )
    structure: Any = None
    results = []
    for taken, branch in zip(takes, branches, strict=True):
        with entered(inside, Scope(name, taken, source)):
            leaves, found = pytree.tree_flatten(branch(*operands))
        if structure is not None and found != structure:
            raise CaptureError(f"the branches of {name} return {structure} and {found}", source, "return the same structure")
        structure = found
        results.append(leaves)
    return pytree.tree_unflatten([_one_of(name, takes, values, source) for values in zip(*results, strict=True)], structure)


def _statistics(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The running mean that a norm writes to."""
    if function in NORMS:
        named = inspect.signature(function).bind(*args, **kwargs)
        named.apply_defaults()
        mean, _, _, _, own = list(named.arguments.values())[1:6]
    elif any(norm.__name__ in getattr(function, "__name__", "") for norm in NORMS) and len(args) > 5:
        mean, _, own = args[3:6]  # of torch.batch_norm, torch.native_batch_norm and others
    else:
        return None
    return mean if own else None


@contextmanager
def entered(inside: list[Scope], branch: Scope) -> Iterator[None]:
    """While active, what is traced is of this branch, the innermost."""
    inside.append(branch)
    original = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            raise CaptureError(
                f"a body of {branch.name} sets the attribute {name!r} of a module to a tensor",
                branch.source,
                "return the new value, and set it where the control flow has ended",
            )
        original(module, name, value)

    nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
        inside.pop()
    branch.check_written()


def _one_of(name: str, takes: Sequence[Tensor], values: Sequence[Any], source: str | None) -> Any:
    """Of the branches' results at one place of their structure, the one that counts."""
    first = values[0]
    if not all(isinstance(v, Tensor) for v in values):
        if all(type(v) is type(first) and v == first for v in values):
            return first
        raise CaptureError(
            f"the branches of {name} return {', '.join(type(v).__name__ for v in values)}",
            source,
            "return tensors from every branch",
        )
    kinds = [f"{v.dtype} {list(v.shape)}" for v in values]
    if len(set(kinds)) > 1:
        raise CaptureError(f"the branches of {name} return {', '.join(kinds)}", source, "return the same dtype and shape from each")
    result = values[-1]
    for taken, value in zip(takes[-2::-1], values[-2::-1], strict=True):
        result = torch.where(taken, value, result)
    return result
