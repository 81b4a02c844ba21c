"""How many data ranks a plan will have, guessed before the model is captured at the batch of so many.

Of a deep model a few layers are captured, which gives what the whole costs: a hundred layers take torch.export longer than planning
takes. The plan that is best by these costs is priced on the whole model: where it costs the same, it is best there too. Where the
number of data ranks was wrong, the model is captured again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeGuard

from torch import fx, nn

from ..passes.blocks import Run, find_blocks
from ..passes.graph_tools import copy_call, extract, named_results
from ..passes.types import balanced_sizes
from .bind import BatchMode
from .choose import Known, choose, contents, data_ranks
from .collector import without_collection
from .emit import Problem
from .prepare import mark_twins
from .strategy import Request
from .topology import Topology

DEEP = 48
"""Layers, of all long lists, beyond which a few are captured first: one takes torch.export about 0.1 s, and where all fits the
most data ranks are mostly the best."""

DEEP_FOR_A_LIMIT = 12
"""The same where memory is limited: then fewer data ranks are often the best."""

CAPTURED = 4
"""Layers of a list that are captured: a first that may differ, two that repeat, and a last that may differ."""


@dataclass(frozen=True)
class Guess:
    """known: of a deep model, the plan that was found to be the best."""

    data_size: int
    known: Known | None = None


@without_collection()
def likely_plan(
    model: nn.Module,
    request: Request,
    topology: Topology,
    capture: Callable[[Sequence[int]], Problem],
    *,
    rows: int,
    memory_limit: float | None,
    batch: BatchMode,
    microbatches: int | None,
) -> Guess:
    """The data ranks of the plan that will be best: the most that the request allows, or for a deep model what its costs say.

    capture    the problem of one call at other local batches; the other arguments as of `choose`
    """
    fewest, most = data_ranks(request, rows, batch)
    with shallow(model, DEEP if memory_limit is None else DEEP_FOR_A_LIMIT) as left_out, warnings.catch_warnings():
        if not left_out or most == fewest:
            return Guess(most)
        warnings.simplefilter("ignore")  # the model itself is captured next, and warns then
        try:
            problem = deepened(capture(spread(rows, most, batch)), left_out)
            if problem is None:
                return Guess(most)
            plan = choose(problem, request, topology, rows=rows, memory_limit=memory_limit, batch=batch, microbatches=microbatches)
            return Guess(plan.data_size, Known(plan, contents(problem.graph)))
        except Exception:  # whatever a model says without its layers: what is wrong with it whole is said later
            return Guess(most)


def spread(rows: int, data_size: int, batch: BatchMode) -> tuple[int, ...]:
    """Local batches of `data_size` data ranks: `rows` each, or together if the batch is global."""
    return balanced_sizes(rows, data_size) if batch == "global" else (rows,) * data_size


@contextmanager
def shallow(model: nn.Module, deep: int = DEEP) -> Iterator[Mapping[str, int]]:
    """Within: long lists of layers that are alike, but for the first, hold the first few. Gives the number of those left out, by
    the name of the list; none where there are not more than `deep` in all."""
    long = {name: module for name, module in model.named_modules() if _is_long(module)}
    if sum(map(len, long.values())) <= deep:
        long = {}
    left_out = {name: len(module) - CAPTURED for name, module in long.items()}
    held = [(module, module._modules) for module in long.values()]
    try:
        for module, children in held:
            module._modules = dict(list(children.items())[:CAPTURED])
        yield left_out
    finally:
        for module, children in held:
            module._modules = children


def _is_long(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) <= 2 * CAPTURED:
        return False
    return len({_form(layer) for layer in list(module)[1:]}) == 1


def _form(module: nn.Module) -> tuple[object, ...]:
    return type(module), tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())


def deepened(problem: Problem, left_out: Mapping[str, int]) -> Problem | None:
    """`problem` with as many blocks as were left out of each list, made after the last: what costs are summed over. None where the
    blocks of a list are not found."""
    gm = extract(problem.graph, named_results(problem.graph), {})
    for name, count in left_out.items():
        run = next((run for run in find_blocks(gm.graph).runs if _is_of(run, f"param.{name}." if name else "param.")), None)
        if run is None:
            return None
        _lengthen(gm, run, count)
    mark_twins(gm)
    return replace(problem, graph=gm, trainable=None)


def _is_of(run: Run, prefix: str) -> bool:
    return any(str(leaf.meta.get("key", "")).startswith(prefix) for leaf in run.leaves[-1])


def _lengthen(gm: fx.GraphModule, run: Run, count: int) -> None:
    """`count` copies of the last instance after it, with parameters of their own."""
    last, before = run.instances[-1], run.instances[-2]
    inside, own = set(last), [leaf for leaf in run.leaves[-1] if leaf not in run.leaves[-2]]
    outer = {node: [user for user in node.users if user not in inside] for node in last}
    above, previous = last[-1], list(last)
    for k in range(count):
        new: dict[fx.Node, fx.Node] = dict(zip(before, previous, strict=True))
        for leaf in own:
            with gm.graph.inserting_after(leaf):
                new[leaf] = gm.graph.placeholder(f"{leaf.name}_{k}")
            new[leaf].meta = {**leaf.meta, "key": f"{leaf.meta['key']}#{k}"}
        made = []
        for node in last:
            operands = {source: new.get(source, source) for source in node.all_input_nodes}
            with gm.graph.inserting_after(above):
                above = new[node] = copy_call(gm.graph, node, operands)
            above.meta = dict(node.meta)
            made.append(above)
        previous = made
    for node, copy in zip(last, previous, strict=True):
        for user in outer[node]:
            user.replace_input_with(node, copy)
