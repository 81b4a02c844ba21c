"""Choose the strategy of every node along one axis: builds the assignment problem from what is offered, and reads the answer.

Costs count all nodes at the same position of identical blocks, which are one decision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from ..passes.convert import exists, is_free, makes_whole
from ..passes.graph_tools import Calls, is_parameter, metas, op_calls, where
from ..passes.prologue import TIME
from ..passes.rules.base import (
    Axis,
    Strategy,
    TensorMeta,
)
from ..passes.shard import ShardingError
from ..passes.types import I, Partial, R, Type, Varying
from . import assign_apart
from .assign import AssignError, Problem, Solution, Use, relative_gap, solve
from .assign import Value as AssignValue
from .assign_apart import Loose, Repeated
from .few_gathers import Gathered, capped
from .needs import read_again
from .offers import Decision, Offers, Role, Value, canonical, offers
from .prices import Prices, held, size_of
from .sized import KeptAt, Place, Sized


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
    stream_price    with it: what a byte of the residual stream costs
    fixed_price     with it: what a byte costs that is kept whatever the batch
    large_prices    with it: what a byte costs that the backward of one of the largest ops holds, in their order
    gather_prices   with it: what a byte of a parameter costs that one of the heaviest blocks gathers, in their order
    slices          time axis: the one way each batch input may be sliced
    """

    role: Role
    pinned: Mapping[str, Type] = field(default_factory=dict)
    loss: str | None = None
    scatter: bool = False
    byte_price: float | None = None
    kept_price: float = 0.0
    stream_price: float = 0.0
    fixed_price: float = 0.0
    large_prices: Sequence[float] = ()
    gather_prices: Sequence[float] = ()
    slices: Mapping[str, Type] = field(default_factory=dict)

    @property
    def prices_sizes(self) -> bool:
        """Whether values have a price by their bytes (`Sized`)."""
        single = self.kept_price, self.stream_price, self.fixed_price
        return any((*single, *self.large_prices, *self.gather_prices))


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


Rules = tuple[Policy, Prices]
"""By which the decisions of some blocks are made."""

Barred = Mapping[str, Sequence[tuple[Type, ...]]]
"""By node name: types, of all its results, that it must not give."""


@dataclass(frozen=True)
class Priced:
    """The problem of a graph along an axis before bytes have a price. types: of each value, in the order of its conversions.
    exit_types: of each output, by its number after the decisions. loose: costs of some of a decision's nodes."""

    costs: list[np.ndarray]
    loose: list[Loose]
    values: list[AssignValue]
    types: list[list[Type]]
    exit_types: dict[int, list[Type]]


def place(
    gm: fx.GraphModule,
    axis: Axis,
    policy: Policy,
    prices: Prices,
    calls: Calls | None = None,
    barred: Barred | None = None,
    like: Placement | None = None,
    sized: Sized | None = None,
    offered: Offers | None = None,
    priced: Priced | None = None,
    mixed: Rules | None = None,
) -> Placement:
    """The cheapest placement of `gm` along `axis`. Raises ShardingError naming the node where none exists.

    calls     `op_calls(gm)`, where the caller has it
    barred    what is left out of the search (for a node of a repeated block, in all of its repetitions)
    like      a placement of the same graph in other shapes: this one shards the same dims
    sized     what the policy's `kept_price` and `stream_price` are paid for (compiler/keeping.py)
    offered   `offers(...)`, where the caller has it, and what is sized is of it
    priced    `price(...)` at these prices and of what is offered, whatever the policy's prices of bytes: where the caller has it
    mixed     what holds, instead of the policy's prices of bytes and of `prices`, in the blocks of groups that are offered ways of
              their own
    """
    calls = op_calls(gm) if calls is None else calls
    offered = offered or offers(gm, axis, calls, policy.role, policy.pinned, policy.slices)
    builder = _Builder(gm, axis, (policy, prices), calls, offered, sized or Sized(), priced, mixed)
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


def least(
    gm: fx.GraphModule,
    axis: Axis,
    rules: Rules,
    calls: Calls,
    sized: Sized,
    offered: Offers,
    priced: Priced,
    alike: float = math.inf,
    below: int | None = None,
) -> float:
    """What no placement costs less than, those included that place each of like blocks by itself. All is as `place` takes it.

    alike    what none costs less than in which they lie alike
    below    bytes: of placements whose blocks each gather fewer; None of all
    """
    builder = _Builder(gm, axis, rules, calls, offered, sized, priced)
    found = builder.repeated()
    return assign_apart.least(found if below is None else capped(found, [*builder.gathers()], below), alike)


def price(
    gm: fx.GraphModule,
    axis: Axis,
    policy: Policy,
    prices: Prices,
    calls: Calls,
    offered: Offers,
    like: Priced | None = None,
) -> Priced:
    """What `place` finds out first, for calls that differ in the prices of bytes alone. like: at prices of the same conversions."""
    return _Builder(gm, axis, (policy, prices), calls, offered, Sized()).priced(like)


def _kinds(types: Sequence[Type]) -> tuple[object, ...]:
    """Which dims are cut, wherever the cuts are."""
    return tuple(t.dim if isinstance(t, Varying) else t for t in types)


def _sectioned(strategy: Strategy) -> tuple[int, ...]:
    """Of each type, in how many sections its dim is cut."""
    return tuple(len(t.sections) if isinstance(t, Varying) else 0 for t in (*strategy.ins, *strategy.outs))


def _makes_whole(types: Sequence[Type]) -> np.ndarray:
    """Which conversions from each of these to each do."""
    return np.array([[makes_whole(a, b) for b in types] for a in types])


def _alike(one: Strategy, other: Strategy | None) -> bool:
    """Whether both run an op in one way, on shapes that may differ; by which of a factor's cuts is not asked."""

    def way(s: Strategy) -> tuple[object, ...]:
        return s.label.partition("#")[0], _kinds(s.ins), _kinds(s.outs)

    return other is not None and way(one) == way(other)


class _Builder:
    def __init__(
        self,
        gm: fx.GraphModule,
        axis: Axis,
        rules: Rules,
        calls: Calls,
        offers: Offers,
        sized: Sized,
        priced: Priced | None = None,
        mixed: Rules | None = None,
    ) -> None:
        self.gm, self.axis, self.rules = gm, axis, (rules, mixed or rules)
        self.policy = rules[0]
        self.calls, self.offers, self.sized = calls, offers, sized
        self.decisions, self.meta = offers.decisions, offers.meta
        self.order = offers.order
        self.options = [d.offered for d in self.order]
        self.output = next(n for n in gm.graph.nodes if n.op == "output")
        self.followed: Placement | None = None
        self.known = priced
        self.tables: dict[tuple[object, ...], np.ndarray] = {}

    def bar(self, name: str, left_out: Sequence[tuple[Type, ...]]) -> None:
        decision = self.decisions[self.offers.twins.get(name, name)]
        left = self.options[decision.index] = [s for s in self.options[decision.index] if s.outs not in left_out]
        if not left:
            raise ShardingError(f"{where(decision.node)} has no other placement over axis {self.axis.name!r}")

    def follow(self, like: Placement) -> None:
        """Leave the options that are of the kinds that `like` chose."""
        self.followed = like
        for d in self.order:
            options = self.options[d.index]
            if d.node.op == "placeholder":
                given = _kinds((like.placeholders[d.node.meta["key"]],))
                same = [s for s in options if _kinds(s.outs) == given]
            else:
                chosen = like.choice.get(d.name)
                same = [s for s in options if _alike(s, chosen)]
                if chosen is not None and (closer := [s for s in same if _sectioned(s) == _sectioned(chosen)]):
                    same = closer
                if not same and chosen is not None:  # by another factor, where a dim of one sample was none
                    same = [s for s in options if (_kinds(s.ins), _kinds(s.outs)) == (_kinds(chosen.ins), _kinds(chosen.outs))]
            # What is exchanged may differ where there is none, and is found out (passes/check_schedules.py).
            self.options[d.index] = same or options

    def problem(self) -> Problem:
        """Where the nodes of a decision take one strategy."""
        found = self.repeated(apart=False)
        costs = list(found.problem.node_cost)
        for loose in found.loose:
            costs[loose.node] = costs[loose.node] + loose.costs
        return replace(found.problem, node_cost=tuple(costs))

    def repeated(self, apart: bool = True) -> Repeated:
        """The same with what tells the nodes of a decision apart.

        apart    what a block gathers is priced as the mean over like blocks: the one with the most gathers no less
        """
        base = self.known or self.priced()
        self.exit_types = base.exit_types
        costs, values, loose = list(base.costs), list(base.values), list(base.loose)
        parts = [*self.offers.uses.values()]
        places: list[tuple[Hashable, ...]] = [(value, *uses) for value, uses in self.offers.uses]
        self._price_held(costs)
        self._price_gathered(base, values, apart)
        self._price_large(costs)
        for which, sized in (("kept", self.sized.kept), ("stream", self.sized.stream), ("fixed", self.sized.fixed)):
            for kept in sized:
                policy, _ = self._rules(self.order[kept.maker[0]])
                price = {"kept": policy.kept_price, "stream": policy.stream_price, "fixed": policy.fixed_price}[which]
                if price and kept.uses:
                    values.append(self._kept_value(price, kept))
                    parts.append(kept.part)
                    places.append((("kept", kept.maker), *(("kept", use) for use in kept.uses)))
                elif price:
                    cost = price * np.array([kept.cost(share, share) for share in self._shares(kept.maker)])
                    loose.append(Loose((which, kept.maker), kept.maker[0], cost, kept.part.makers))
        counts = [d.places.total() for d in self.order] + [1] * len(self.exit_types)
        return Repeated(Problem(tuple(costs), tuple(values)), counts, parts, places, loose)

    def _rules(self, d: Decision) -> Rules:
        return self.rules[min(d.group, 1)]

    def priced(self, like: Priced | None = None) -> Priced:
        costs, loose = [], list[Loose]()
        for d in self.order:
            found = self._option_costs(d)
            costs.append(found[0][0] if len(found) == 1 else np.zeros(len(self.options[d.index])))
            loose += [Loose("run", d.index, *each) for each in found if len(found) > 1]
        if like is not None:
            costs += [np.zeros(len(types)) for types in like.exit_types.values()]
            return replace(like, costs=costs, loose=loose)
        self.exit_types: dict[int, list[Type]] = {}
        for k, value in enumerate(self.offers.exits):
            self.exit_types[len(costs)] = types = self._output_types(k, value)
            costs.append(np.zeros(len(types)))
        values, types = [], []
        for (value, uses), part in self.offers.uses.items():
            made, order = self._assign_value(value, part.makers, [(node, self._needed(value, node, k)) for node, k in uses])
            values.append(made)
            types.append(order)
        return Priced(costs, loose, values, types, self.exit_types)

    def _price_held(self, costs: list[np.ndarray]) -> None:
        for d in self.order:
            each = self._rules(d)[0].byte_price
            if each and d.node.op == "placeholder" and is_parameter(d.node):
                price = each * size_of(metas(d.node)[0]) * d.places.total()
                costs[d.index] = costs[d.index] + price * np.array(self._shares((d.index, 0)))

    def _price_gathered(self, base: Priced, values: list[AssignValue], apart: bool) -> None:
        """apart: the mean over like blocks."""
        heaviest, blocks = self.sized.heaviest, self._blocks()
        for i, (key, part) in enumerate(self.offers.uses.items()):
            prices = self._rules(self.decisions[key[0][0]])[0].gather_prices
            if any(prices) and key in heaviest:
                heavy = heaviest[key]
                price = prices[heavy.number] * heavy.share * size_of(self.meta[key[0]])
                price *= min(1.0, part.makers / blocks[heavy.block]) if apart else 1.0
                whole = _makes_whole(base.types[i])
                values[i] = replace(values[i], conversion=values[i].conversion + np.where(whole, price, 0.0))

    def _blocks(self) -> Counter[object]:
        """Of the first block of a group, how many like it are in the group; 1 outside of blocks."""
        found = Counter[object]({None: 1})
        for d in self.order:
            block = d.node.meta.get("block")
            if d.call is not None and block is not None:
                found[block] = max(found[block], d.places.total())
        return found

    def gathers(self) -> Iterator[Gathered]:
        """What each of the heaviest blocks may gather."""
        base, blocks = self.known or self.priced(), self._blocks()
        for i, (key, part) in enumerate(self.offers.uses.items()):
            heavy, count = self.sized.heaviest.get(key), self.decisions[key[0][0]].places.total()
            if heavy is not None and part.makers == count <= blocks[heavy.block]:
                share = count / blocks[heavy.block]
                yield Gathered(i, heavy.number, share, size_of(self.meta[key[0]]), _makes_whole(base.types[i]))

    def _price_large(self, costs: list[np.ndarray]) -> None:
        """Of like blocks placed each by itself the mean: the one that holds the most holds no less."""
        for op in self.sized.large:
            prices = self._rules(self.order[op.decision])[0].large_prices
            if any(prices):
                shares = [[held(t, self.axis) for t in (*s.ins, *s.outs)] for s in self.options[op.decision]]
                bytes_ = np.array([op.held(lambda place, own=own: own[place[1]]) for own in shares])
                costs[op.decision] = costs[op.decision] + prices[op.number] * op.share * bytes_

    def _kept_value(self, price: float, kept: KeptAt) -> AssignValue:
        """What is kept is paid for once for each share that a use takes of it, as conversions are."""
        made, taken = self._shares(kept.maker), {use: self._shares(use) for use in kept.uses}
        own, others = sorted({*made}), sorted({share for shares in taken.values() for share in shares})
        table = np.full((len(own) + len(others),) * 2, np.inf)  # made in so large shares, needed in so large
        np.fill_diagonal(table, 0.0)
        table[: len(own), len(own) :] = [[price * kept.cost(m, n) for n in others] for m in own]
        asked = tuple(Use(use[0], tuple(len(own) + others.index(n) for n in shares)) for use, shares in taken.items())
        return AssignValue(kept.maker[0], tuple(map(own.index, made)), table, asked)

    def _shares(self, place: Place) -> list[float]:
        """Of a value that a rank holds, by the strategy of the node that takes or makes it."""
        return [held((*s.ins, *s.outs)[place[1]], self.axis) for s in self.options[place[0]]]

    def _needed(self, value: Value, reader: int, k: int) -> list[Type]:
        """The types in which a reader needs operand k, which is `value`, under each of its strategies."""
        if reader in self.exit_types:
            return self.exit_types[reader]
        return [canonical(s.ins[k], self.meta[value].grad) for s in self.options[reader]]

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

    def _assign_value(self, value: Value, count: int, uses: list[tuple[int, list[Type]]]) -> tuple[AssignValue, list[Type]]:
        """And in which order its conversions have the types."""
        meta = self.meta[value]
        d = self.decisions[value[0]]
        produced = [canonical(s.outs[value[1]], meta.grad) for s in self.options[d.index]]
        ids: dict[Type, int] = {}
        for t in (*produced, *(t for _, types in uses for t in types)):
            ids.setdefault(t, len(ids))
        types = list(ids)
        of_parameter = is_parameter(d.node)
        again = of_parameter and read_again(d.node, self.calls)
        # Values alike in all of this take as long: over time what is allowed depends on the value.
        key = tuple(types), meta, of_parameter, again, min(d.group, 1), d.index if self.policy.role == "time" else None
        if key not in self.tables:
            self.tables[key] = self._table(types, meta, d, of_parameter, again)
        asked = tuple(Use(node, tuple(ids[t] for t in needed)) for node, needed in uses)
        return AssignValue(d.index, tuple(ids[t] for t in produced), self.tables[key] * count, asked), types

    def _table(self, types: Sequence[Type], meta: TensorMeta, d: Decision, of_parameter: bool, again: bool) -> np.ndarray:
        """What conversions of a value that d makes cost, from each type to each. again: whether what is gathered of it is gathered
        once more for the backward."""
        _, prices = self._rules(d)
        table = np.full((len(types), len(types)), np.inf)
        for i, a in enumerate(types):
            for j, b in enumerate(types):
                if is_free(a, b, meta.grad):
                    table[i, j] = 0.0
                elif exists(a, b, meta.grad) and self._allowed(a, b, meta, d):
                    table[i, j] = prices.conversion(a, b, meta, self.axis, of_parameter)
                    if again and makes_whole(a, b):
                        table[i, j] += prices.conversion(a, I, replace(meta, grad=False), self.axis, of_parameter)
        return table

    def _allowed(self, a: Type, b: Type, meta: TensorMeta, d: Decision) -> bool:
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

    def _option_costs(self, d: Decision) -> list[tuple[np.ndarray, int]]:
        """By strategy; of nodes that cost others, each by themselves, and how many they are."""
        options, (_, prices) = self.options[d.index], self._rules(d)
        if d.node.op == "placeholder":
            meta = metas(d.node)[0]
            found = [prices.placeholder(s.outs[0], meta, self.axis) for s in options]
            return [(np.array(found, dtype=float) * d.places.total(), d.places.total())]
        assert d.call is not None
        counts: Counter[tuple[bool, ...]] = Counter()
        for operands, count in d.places.items():
            counts[tuple(is_parameter(self.decisions[name].node) for name, _ in operands)] += count
        return [
            (count * np.array([prices.node(d.call, s, self.axis, from_parameters) for s in options], dtype=float), count)
            for from_parameters, count in counts.items()
        ]

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
            feasible = self.options[d.index]
            if d.node.op != "placeholder":
                feasible = [s for s in feasible if self._reachable(d, s, possible, samples)]
            if samples & {*d.operands}:
                samples |= {*d.values}
            if not feasible:
                return self._summed_by(d, possible)
            for k, value in enumerate(d.values):
                possible[value] = {canonical(s.outs[k], self.meta[value].grad) for s in feasible}
        return None

    def _reachable(self, d: Decision, s: Strategy, possible: Mapping[Value, set[Type]], samples: set[Value]) -> bool:
        def reached(value: Value, need: Type) -> bool:
            meta, maker = self.meta[value], self.decisions[value[0]]
            if meta.grad and value in samples and need == R:
                return False  # each micro-batch would compute all samples, whose loss cannot be summed
            return any(
                is_free(have, need, meta.grad) or (exists(have, need, meta.grad) and self._allowed(have, need, meta, maker))
                for have in possible[value]
            )

        return all(reached(value, need) for value, need in zip(d.operands, s.ins, strict=True))

    def _summed_by(self, d: Decision, possible: Mapping[Value, set[Type]]) -> fx.Node:
        partial = next((v for v in d.operands if all(isinstance(t, Partial) for t in possible[v])), None)
        return d.node if partial is None else self._summed_by(self.decisions[partial[0]], possible)

    def placement(self, solution: Solution) -> Placement:
        first = self.offers.first
        chosen = {d.name: self.options[d.index][solution.choice[d.index]] for d in self.order}
        given = self.gm.graph.find_nodes(op="placeholder")
        placeholders = {node.meta["key"]: chosen[first(node)].outs[0] for node in given}
        choice = {}
        for node, (call, _) in self.calls.items():
            strategy = chosen[first(node)]
            choice[node.name] = strategy if strategy.target is None else self.offers.own(strategy, node, call)
        outputs = {k: types[solution.choice[end]] for k, (end, types) in enumerate(self.exit_types.items())}
        return Placement(self.axis, choice, placeholders, outputs, solution.cost, solution.bound)
