"""Choose the strategy of every node along one axis: builds the assignment problem from a graph, and reads the answer.

Nodes at the same position of identical blocks (meta["blocks"] of the graph) are one decision; costs count them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import fx

from ..passes.convert import exists, is_free
from ..passes.graph_tools import Calls, is_getitem, is_parameter, metas, op_calls, where
from ..passes.prologue import TIME
from ..passes.rules.base import (
    Axis,
    OpCall,
    Strategy,
    TensorMeta,
    find_rule,
    strategies,
)
from ..passes.shard import ShardingError
from ..passes.splits import Cuts, Site, Value, spread
from ..passes.types import I, Partial, R, Type, Varying, even_sections
from .assign import AssignError, Problem, Solution, Use, relative_gap, solve
from .assign import Value as AssignValue
from .needs import gathered_again
from .prices import Prices, held, size_of

Role = Literal["data", "time", "tensor"]


@dataclass(frozen=True)
class Policy:
    """What is fixed before the search along an axis.

    role            "data": parameters stay whole and the batch is sharded. "time": the same over micro-batches, where nothing
                    can be communicated inside. "tensor": parameters may be sharded.
    pinned          types of placeholders by key
    loss            key of the loss, which may leave as P
    scatter         tensor axis: activations may be reduce-scattered (sequence parallelism)
    byte_price      tensor axis: None for Megatron's layouts; any, where it is what a byte of a parameter costs that a rank holds
    kept_price      with it: what a byte costs that is kept for the backward
    slices          time axis: the one way each batch input may be sliced
    """

    role: Role
    pinned: Mapping[str, Type] = field(default_factory=dict)
    loss: str | None = None
    scatter: bool = False
    byte_price: float | None = None
    kept_price: float = 0.0
    slices: Mapping[str, Type] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """The strategies of a graph along one axis, as passes.shard takes them."""

    axis: Axis
    choice: Mapping[str, Strategy]
    placeholders: Mapping[str, Type]
    outputs: Mapping[int, Type]
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How far, relative to its cost, the placement may be from the cheapest there is; 0 where it is proven to be that."""
        return relative_gap(self.cost, self.bound)


Barred = Mapping[str, Sequence[tuple[Type, ...]]]
"""By node name: types, of all its results, that it must not give."""


@dataclass(frozen=True)
class KeptAt:
    """A value that is kept for the backward, of so many bytes in whole, in the types in which nodes take it or give it: each node,
    and the position among its operands and, after these, its results. What is rebuilt is so from shards: whole it is kept."""

    size: float
    places: tuple[tuple[fx.Node, int], ...]
    rebuilt: bool = False


def place(
    gm: fx.GraphModule,
    axis: Axis,
    policy: Policy,
    prices: Prices,
    calls: Calls | None = None,
    barred: Barred | None = None,
    like: Placement | None = None,
    kept: Sequence[KeptAt] = (),
) -> Placement:
    """The cheapest placement of `gm` along `axis`. Raises ShardingError naming the node where none exists.

    calls     `op_calls(gm)`, where the caller has it
    barred    what is left out of the search (for a node of a repeated block, in all of its repetitions)
    like      a placement of the same graph in other shapes: this one shards the same dims
    kept      what the policy's `kept_price` is paid for (compiler/keeping.py)
    """
    builder = _Builder(gm, axis, policy, prices, op_calls(gm) if calls is None else calls, kept)
    builder.read()
    for name, left_out in (barred or {}).items():
        builder.bar(name, left_out)
    if like is not None:
        builder.follow(like)
    problem = builder.problem()
    try:
        solution = solve(problem)
    except AssignError as error:
        raise builder.explain(error) from error
    return builder.placement(solution)


def _kinds(types: Sequence[Type]) -> tuple[object, ...]:
    """Which dims are cut, wherever the cuts are."""
    return tuple(t.dim if isinstance(t, Varying) else t for t in types)


def _alike(one: Strategy, other: Strategy | None) -> bool:
    """Whether both run an op in one way, on shapes that may differ."""
    return other is not None and (one.label, _kinds(one.ins), _kinds(one.outs)) == (
        other.label,
        _kinds(other.ins),
        _kinds(other.outs),
    )


_Uses = tuple[tuple[int, int], ...]
"""Those who read a value: indices of decisions (or outputs), and which of their operands it is."""


@dataclass
class _Decision:
    """One node, standing for all nodes at the same place of identical blocks.

    options     what may be chosen, of all that is offered
    operands    its own
    places      how many of the nodes take which operands: later ones have others where one block hands values to the next
    """

    name: str
    node: fx.Node
    options: list[Strategy]
    values: tuple[Value, ...] = ()
    operands: tuple[Value, ...] = ()
    places: Counter[tuple[Value, ...]] = field(default_factory=Counter)
    call: OpCall | None = None
    site: Site | None = None
    offered: Sequence[Strategy] = ()


class _Builder:
    def __init__(
        self, gm: fx.GraphModule, axis: Axis, policy: Policy, prices: Prices, calls: Calls, kept: Sequence[KeptAt]
    ) -> None:
        self.gm, self.axis, self.policy, self.prices, self.calls, self.kept = gm, axis, policy, prices, calls, kept
        self.decisions: dict[str, _Decision] = {}
        self.meta: dict[Value, TensorMeta] = {}
        self.twins: Mapping[str, str] = gm.meta.get("twins", {})  # node name -> name of the first node at its place
        self.output = next(n for n in gm.graph.nodes if n.op == "output")
        self.followed: Placement | None = None

    def first(self, node: fx.Node) -> str:
        return self.twins.get(node.name, node.name)

    def value_of(self, node: fx.Node) -> Value:
        if is_getitem(node):
            return self.first(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        return self.first(node), 0

    def read(self) -> None:
        """Decisions with their options, from the rules."""
        given: dict[Value, Varying] = {}
        sites: list[Site] = []
        for node in self.gm.graph.nodes:
            name = self.first(node)
            if node.op == "output" or is_getitem(node):
                continue
            operands = tuple(self.value_of(n) for n in self.calls[node][1]) if node.op != "placeholder" else ()
            if name in self.decisions:
                self.decisions[name].places[operands] += 1
                continue
            results = {(name, k): m for k, m in enumerate(metas(node))}
            self.meta.update(results)
            decision = _Decision(name, node, [], tuple(results), operands, Counter([operands]))
            self.decisions[name] = decision
            if node.op == "placeholder":
                pinned = self.policy.pinned.get(node.meta["key"]) or self.policy.slices.get(node.meta["key"])
                if isinstance(pinned, Varying):
                    given[name, 0] = pinned
                continue
            decision.call = self.calls[node][0]
            sites.append(Site(decision.call, find_rule(decision.call, self.axis), operands, decision.values))
        again = [replace(s, operands=o) for s in sites for o in self.decisions[s.results[0][0]].places if o != s.operands]
        self.cuts = cuts = spread((*sites, *again), self.axis, Cuts(given))
        for site in sites:
            decision = self.decisions[site.results[0][0]]
            decision.site = site
            decision.options = self._options(site, cuts)
        for decision in self.decisions.values():
            if decision.node.op == "placeholder":
                decision.options = [Strategy(str(t), (), (t,)) for t in self._placeholder_types(decision, cuts)]
            decision.offered = tuple(decision.options)

    def bar(self, name: str, left_out: Sequence[tuple[Type, ...]]) -> None:
        decision = self.decisions[self.twins.get(name, name)]
        decision.options = [s for s in decision.options if s.outs not in left_out]
        if not decision.options:
            raise ShardingError(f"{where(decision.node)} has no other placement over axis {self.axis.name!r}")

    def follow(self, like: Placement) -> None:
        """Leave the options that are of the kinds that `like` chose."""
        self.followed = like
        for decision in self.decisions.values():
            if decision.node.op == "placeholder":
                given = _kinds((like.placeholders[decision.node.meta["key"]],))
                same = [s for s in decision.options if _kinds(s.outs) == given]
            else:
                chosen = like.choice.get(decision.name)
                same = [s for s in decision.options if _alike(s, chosen)]
                if not same and chosen is not None:  # by another factor, where a dim of one sample was none
                    same = [
                        s for s in decision.options if (_kinds(s.ins), _kinds(s.outs)) == (_kinds(chosen.ins), _kinds(chosen.outs))
                    ]
            # What is exchanged may differ where there is none, and is found out (passes/check_schedules.py).
            decision.options = same or decision.options

    def _options(self, site: Site, cuts: Cuts) -> list[Strategy]:
        assert site.call is not None
        seen: dict[Any, Strategy] = {}
        for s in strategies(site.call, self.axis, cuts.of(site), site.rule):
            ins = tuple(self._canonical(t, m.grad) for t, m in zip(s.ins, site.call.operands, strict=True))
            outs = tuple(self._canonical(t, m.grad) for t, m in zip(s.outs, site.call.results, strict=True))
            seen.setdefault((ins, outs), s)
        return list(seen.values())

    @staticmethod
    def _canonical(type_: Type, grad: bool) -> Type:
        return I if type_ == R and not grad else type_

    def _placeholder_types(self, decision: _Decision, cuts: Cuts) -> list[Type]:
        node = decision.node
        key, meta = node.meta["key"], metas(node)[0]
        if key in self.policy.pinned:
            return [self.policy.pinned[key]]
        if not key.startswith("param."):
            return [I]
        whole: Type = R if meta.grad else I
        if self.policy.role != "tensor":
            return [whole]
        types: list[Type] = [I] if whole == I else [I, R]
        for dim, size in enumerate(meta.shape):
            if size >= self.axis.size > 1:
                types.append(Varying(dim, even_sections(size, self.axis.size)))
            for sections in cuts.known.get(((decision.name, 0), dim), ()):
                if all(sum(column) for column in zip(*sections, strict=True)):
                    types.append(Varying(dim, sections))
        return types

    def problem(self) -> Problem:
        self.order = list(self.decisions.values())
        self.index = {d.name: i for i, d in enumerate(self.order)}
        costs = [self._option_costs(d) for d in self.order]
        self.exits: list[tuple[int, Value]] = []
        self.exit_types: dict[int, list[Type]] = {}
        for k, result in enumerate(self.output.args[0]):  # type: ignore[arg-type]
            value = self.value_of(result)  # type: ignore[arg-type]
            self.exit_types[len(costs)] = types = self._output_types(k, value)
            self.exits.append((len(costs), value))
            costs.append(np.zeros(len(types)))
        values = [
            self._assign_value(value, count, [(node, self._needed(value, node, k)) for node, k in uses])
            for (value, uses), count in self._uses().items()
        ]
        if self.policy.kept_price:
            self._price_kept(costs, values)
        return Problem(tuple(costs), tuple(values))

    def _price_kept(self, costs: list[np.ndarray], values: list[AssignValue]) -> None:
        """What is kept costs its largest share among the types in which it is taken. Where several nodes choose them, that share is
        a choice of its own, from which each node may take as much or less."""
        sizes: dict[tuple[tuple[tuple[int, int], ...], bool], float] = {}
        for kept in self.kept:
            key = tuple(dict.fromkeys((self.index[self.first(n)], k) for n, k in kept.places)), kept.rebuilt
            sizes[key] = sizes.get(key, 0.0) + kept.size
        for (places, rebuilt), size in sizes.items():
            shares = [[held((*s.ins, *s.outs)[k], self.axis) for s in self.order[i].options] for i, k in places]
            levels = sorted({share for each in shares for share in each})
            prices = self.policy.kept_price * size * np.array([0.0, *levels[1:]] if rebuilt else levels)
            chosen = [tuple(map(levels.index, each)) for each in shares]
            if len(places) == 1:
                costs[places[0][0]] += prices[list(chosen[0])]
                continue
            takes = np.where(np.tri(len(levels), dtype=bool), 0.0, np.inf)
            uses = [Use(i, each) for (i, _), each in zip(places, chosen, strict=True)]
            values.append(AssignValue(len(costs), tuple(range(len(levels))), takes, tuple(uses)))
            costs.append(prices)

    def _uses(self) -> Counter[tuple[Value, _Uses]]:
        """How many nodes at a value's place give it to the same uses. A block's last repetition may serve others than the first
        ones do, and pays for the conversions that these need alone."""
        uses: dict[tuple[fx.Node, int], dict[tuple[int, int], None]] = {}
        for node in self.calls:
            reader = self.index[self.first(node)]
            for k, source in enumerate(self.calls[node][1]):
                uses.setdefault(self._made_by(source), {})[reader, k] = None
        for (reader, _), result in zip(self.exits, self.output.args[0], strict=True):  # type: ignore[arg-type]
            uses.setdefault(self._made_by(result), {})[reader, 0] = None  # type: ignore[arg-type]
        return Counter(((self.first(maker), k), tuple(found)) for (maker, k), found in uses.items())

    @staticmethod
    def _made_by(node: fx.Node) -> tuple[fx.Node, int]:
        return (node.args[0], int(node.args[1])) if is_getitem(node) else (node, 0)  # type: ignore[arg-type,return-value]

    def _needed(self, value: Value, reader: int, k: int) -> list[Type]:
        """The types in which a reader needs operand k, which is `value`, under each of its strategies."""
        if reader in self.exit_types:
            return self.exit_types[reader]
        return [self._canonical(s.ins[k], self.meta[value].grad) for s in self.order[reader].options]

    def _output_types(self, k: int, value: Value) -> list[Type]:
        """How an output may leave: I; V as it was made; P for the loss, which the schedule reduces."""
        key, meta = self.gm.meta["outputs"][k], self.meta[value]
        if key.startswith("buffer."):
            return [I]
        produced = {s.outs[value[1]] for s in self.decisions[value[0]].offered}
        over_time = self.output.args[0][k].meta.get("types", {}).get(TIME)  # type: ignore[union-attr]
        if self.axis.name != TIME and isinstance(over_time, Varying):
            # Micro-batches are joined along this dim: a cut of it within each would leave samples out of order.
            produced = {t for t in produced if not (isinstance(t, Varying) and t.dim == over_time.dim)}
        types: list[Type] = [I]
        if key == self.policy.loss:
            types.append(Partial())
        elif meta.shape:
            types += sorted((t for t in produced if isinstance(t, Varying)), key=str)
        if self.followed is not None:
            types = [t for t in types if _kinds((t,)) == _kinds((self.followed.outputs[k],))] or types
        return types

    def _assign_value(self, value: Value, count: int, uses: list[tuple[int, list[Type]]]) -> AssignValue:
        meta = self.meta[value]
        d = self.decisions[value[0]]
        produced = [self._canonical(s.outs[value[1]], meta.grad) for s in d.options]
        ids: dict[Type, int] = {}
        for t in (*produced, *(t for _, types in uses for t in types)):
            ids.setdefault(t, len(ids))
        types = list(ids)
        of_parameter = is_parameter(d.node)
        conversion = np.full((len(types), len(types)), np.inf)
        for i, a in enumerate(types):
            for j, b in enumerate(types):
                if is_free(a, b, meta.grad):
                    conversion[i, j] = 0.0
                elif exists(a, b, meta.grad) and self._allowed(a, b, meta, d):
                    price = self.prices.conversion(a, b, meta, self.axis, of_parameter)
                    if gathered_again(d.node, a, b, self.calls):
                        price += self.prices.conversion(a, I, replace(meta, grad=False), self.axis, of_parameter)
                    conversion[i, j] = price * count
        return AssignValue(
            self.index[d.name],
            tuple(ids[t] for t in produced),
            conversion,
            tuple(Use(node, tuple(ids[t] for t in needed)) for node, needed in uses),
        )

    def _allowed(self, a: Type, b: Type, meta: TensorMeta, d: _Decision) -> bool:
        """Conversions that the axis can make: over time only slices of what is known before the step; over data no other shares."""
        if self.policy.role == "time":
            if d.node.op == "placeholder":
                return b == self.policy.slices.get(d.node.meta["key"])
            return a == I and isinstance(b, Varying) and self._is_slice_of_batch(b)
        if self.policy.role == "tensor":
            return self._tensor_axis_makes(a, b, meta)
        # Samples stay where the call put them, unequal shares included: micro-batches and lengths are of these.
        return not (isinstance(a, Varying) and isinstance(b, Varying) and a.dim == b.dim)

    def _is_slice_of_batch(self, type_: Varying) -> bool:
        """Whether every section is cut as the batch is: micro-batches of as many samples have equal shapes throughout."""
        batches = {t.sections[0] for t in self.policy.slices.values() if isinstance(t, Varying)}
        return all(
            any(all(n * sum(batch) == m * sum(section) for n, m in zip(section, batch, strict=True)) for batch in batches)
            for section in type_.sections
        )

    def _tensor_axis_makes(self, a: Type, b: Type, meta: TensorMeta) -> bool:
        """Between sharded products an activation is I (tensor parallelism) or cut by its tokens (sequence parallelism): the layouts
        of Megatron (Shoeybi et al. 2019; Korthikanti et al. 2022), unless the policy wants any."""
        if isinstance(b, Partial):
            return False
        if isinstance(a, Partial) and self.policy.byte_price is None:
            tokens = len(meta.shape) - 2
            scattered = self.policy.scatter and isinstance(b, Varying) and b.dim == tokens and b.is_plain
            return b == I or scattered
        return True

    def _option_costs(self, d: _Decision) -> np.ndarray:
        if d.node.op == "placeholder":
            meta = metas(d.node)[0]
            prices = [self.prices.placeholder(s.outs[0], meta, self.axis) + self._holding(s.outs[0], meta) for s in d.options]
            return np.array(prices, dtype=float) * d.places.total()
        assert d.call is not None
        counts: Counter[tuple[bool, ...]] = Counter()
        for operands, count in d.places.items():
            counts[tuple(is_parameter(self.decisions[name].node) for name, _ in operands)] += count
        total = np.zeros(len(d.options))
        for from_parameters, count in counts.items():
            total += count * np.array([self.prices.node(d.call, s, self.axis, from_parameters) for s in d.options], dtype=float)
        return total

    def _holding(self, type_: Type, meta: TensorMeta) -> float:
        return (self.policy.byte_price or 0.0) * size_of(meta) * held(type_, self.axis)

    def explain(self, error: AssignError) -> ShardingError:
        names = [where(self.order[i].node) for i in error.nodes if i < len(self.order)][:4]
        if self.policy.role == "time":
            culprit = self._couples_samples()
            return ShardingError(
                "the batch cannot be cut into micro-batches: an op couples samples of different micro-batches, at "
                + (where(culprit) if culprit is not None else "; ".join(names) or "an output")
                + ". Use microbatches=1"
            )
        return ShardingError(f"no placement over axis {self.axis.name!r} exists: {error}; at " + "; ".join(names))

    def _couples_samples(self) -> fx.Node | None:
        """The first node that, with all samples of a micro-batch but no others, cannot be computed; or, where it is sums over
        samples that it lacks, the node that sums them."""
        possible: dict[Value, set[Type]] = {}
        samples = {(d.name, 0) for d in self.order if d.node.op == "placeholder" and d.node.meta["key"] in self.policy.slices}
        for d in self.order:
            feasible = (
                d.options if d.node.op == "placeholder" else [s for s in d.options if self._reachable(d, s, possible, samples)]
            )
            if samples & {*d.operands}:
                samples |= {*d.values}
            if not feasible:
                return self._summed_by(d, possible)
            for k, value in enumerate(d.values):
                possible[value] = {self._canonical(s.outs[k], self.meta[value].grad) for s in feasible}
        return None

    def _reachable(self, d: _Decision, s: Strategy, possible: Mapping[Value, set[Type]], samples: set[Value]) -> bool:
        def reached(value: Value, need: Type) -> bool:
            meta, maker = self.meta[value], self.decisions[value[0]]
            if meta.grad and value in samples and need == R:
                return False  # each micro-batch would compute all samples, whose loss cannot be summed
            return any(
                is_free(have, need, meta.grad) or (exists(have, need, meta.grad) and self._allowed(have, need, meta, maker))
                for have in possible[value]
            )

        return all(reached(value, need) for value, need in zip(d.operands, s.ins, strict=True))

    def _summed_by(self, d: _Decision, possible: Mapping[Value, set[Type]]) -> fx.Node:
        partial = next((v for v in d.operands if all(isinstance(t, Partial) for t in possible[v])), None)
        return d.node if partial is None else self._summed_by(self.decisions[partial[0]], possible)

    def _own(self, node: fx.Node, strategy: Strategy) -> Strategy:
        """What the strategy of the first node at its place is for `node`: the same, but where it says what to run and the calls
        differ, as those of random ops do by their site."""
        decision, call = self.decisions[self.first(node)], self.calls[node][0]
        if strategy.target is None or decision.site is None or call == decision.call:
            return strategy
        types = strategy.ins, strategy.outs
        return next(s for s in self._options(replace(decision.site, call=call), self.cuts) if (s.ins, s.outs) == types)

    def placement(self, solution: Solution) -> Placement:
        chosen = {d.name: d.options[solution.choice[i]] for i, d in enumerate(self.order)}
        choice, placeholders = {}, {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                placeholders[node.meta["key"]] = chosen[self.first(node)].outs[0]
            elif node.op != "output" and not is_getitem(node):
                choice[node.name] = self._own(node, chosen[self.first(node)])
        outputs = {k: self.exit_types[node][solution.choice[node]] for k, (node, _) in enumerate(self.exits)}
        return Placement(self.axis, choice, placeholders, outputs, solution.cost, solution.bound)
