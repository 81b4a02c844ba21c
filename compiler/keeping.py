"""Which values of a captured graph a forward keeps for its backward, as passes/partition.py will find, before anything is emitted.

Views keep what they are views of. A parameter is there anyway; gathered or cast, it is so again for the backward. What follows by
a cheap op from other kept values is computed again and not kept; but what is converted for an op that needs it (gathered, say) is
kept as converted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..passes.graph_tools import Calls, is_getitem, is_parameter, metas
from ..passes.partition import CHEAP
from ..passes.rules.base import Axis, OpCall
from ..passes.types import I, Type
from .backward_memory import Moment, Use, moments, moments_at
from .cost import FREE, op_name, size_of
from .heaviest import heaviest
from .large_ops import large_ops
from .needs import NEEDS_RESULT, held_by, needs_value, passes_on, read_again
from .offers import Offers
from .parts import Readers, parts
from .place import Placement, Policy, Rules
from .prices import held
from .sized import KeptAt, Place, Sized
from .stream import Stream, stream, stream_at


@dataclass(frozen=True)
class Keeping:
    """uses       of each value that some backward needs, by node and number of result, the operands that need it; () where it is
               an op's own result
    rebuilt    of these, what need not be kept as it is made
    fixed      of these, what follows from no input: as large for any batch
    returned   what else is there until the step ends, for the model returns it
    gradients, moments    of the backwards, what is in memory of its own, and what they hold at once (compiler/backward_memory.py)
    stream     what goes from block to block
    again      bytes of the parameters that the backward reads, by key
    """

    uses: Mapping[tuple[fx.Node, int], tuple[Use, ...]]
    rebuilt: frozenset[tuple[fx.Node, int]]
    fixed: frozenset[tuple[fx.Node, int]]
    returned: frozenset[tuple[fx.Node, int]]
    gradients: Mapping[fx.Node, tuple[bool, ...]]
    moments: Mapping[fx.Node, Moment[fx.Node]]
    stream: Stream
    again: Mapping[str, int]

    def used(self, *, fixed: bool) -> Iterator[tuple[tuple[fx.Node, int], tuple[Use, ...]]]:
        """Of `uses` what is fixed, or what is not."""
        return ((value, uses) for value, uses in self.uses.items() if (value in self.fixed) == fixed)

    def shown(self, *, fixed: bool) -> frozenset[tuple[fx.Node, int]]:
        """Of `returned` the same: all of it counts as what grows with the batch."""
        return frozenset() if fixed else self.returned


def keeping(calls: Calls) -> Keeping:
    """What is kept, whatever the placement. Placeholders are there anyway."""
    uses: dict[tuple[fx.Node, int], list[Use]] = {}
    for node, (call, sources) in calls.items():
        if not any(o.grad for o in call.operands):
            continue
        if op_name(call.target) in NEEDS_RESULT:
            for k in range(len(call.results)):
                uses.setdefault((node, k), [])
        for i, source in enumerate(sources):
            value = held_by(source)
            if value[0].op == "call_function" and not is_parameter(value[0]) and needs_value(node, call, i):
                uses.setdefault(value, []).append((node, i))
    rebuilt = set()
    for value in uses:
        node, _ = value
        if node.target in CHEAP:
            below = [held_by(source) for source in calls[node][1]]
            if all(v[0].op == "placeholder" or v in uses for v in below):
                rebuilt.add(value)
    returned = _returned(calls)
    kept = {value: tuple(found) for value, found in uses.items()}
    others = frozenset(value for value in returned - (kept.keys() - rebuilt) if value[0] in calls)
    gradients = _gradients(calls, _written_over(calls, returned))
    fixed = frozenset(kept.keys() - _of_inputs(calls))
    at_once = moments(calls, kept, rebuilt, gradients)
    return Keeping(kept, frozenset(rebuilt), fixed, others, gradients, at_once, stream(calls), _read_again(calls))


def _read_again(calls: Calls) -> dict[str, int]:
    placeholders = next(iter(calls)).graph.find_nodes(op="placeholder") if calls else []
    parameters = (n for n in placeholders if n.meta["key"].startswith("param."))
    return {n.meta["key"]: size_of(metas(n)[0]) for n in parameters if read_again(n, calls)}


def _of_inputs(calls: Calls) -> set[tuple[fx.Node, int]]:
    """The values that follow from what the model is called with."""
    found: set[fx.Node] = set()
    for node, (_, sources) in calls.items():
        if any(s in found or (s.op == "placeholder" and s.meta["key"].startswith("input.")) for s in sources):
            found.add(node)
            found.update(user for user in node.users if is_getitem(user))
    return {(node, k) for node in found if node in calls for k in range(len(calls[node][0].results))}


def _returned(calls: Calls) -> frozenset[tuple[fx.Node, int]]:
    outputs = [node for node in next(iter(calls)).graph.nodes if node.op == "output"] if calls else []
    return frozenset(held_by(n) for output in outputs for n in output.all_input_nodes)


def _written_over(calls: Calls, returned: frozenset[tuple[fx.Node, int]]) -> frozenset[tuple[fx.Node, int]]:
    """Values that their gradient is written over: logits that a loss alone reads (runtime/reuse.py), and what they are a sum of."""
    found: set[tuple[fx.Node, int]] = set()
    others = set(returned)
    for node in reversed(list(calls)):
        call, sources = calls[node]
        for meta, source in zip(call.operands, sources, strict=True):
            over = op_name(call.target) in ("logsumexp", "pick") or (passes_on(call, meta) and (node, 0) in found - others)
            (found if over else others).add(held_by(source))
    return frozenset(found - others)


def kept_bytes(calls: Calls, kept: Keeping, placement: Placement | None, axis: Axis, *, fixed: bool = False) -> float:
    """Bytes that a rank keeps, of what grows with the batch, or of what is `fixed`. Each value once for each type that a backward
    needs it in."""
    return sum(size for _, size in kept_values(calls, kept, placement, axis, fixed=fixed))


def kept_values(
    calls: Calls, kept: Keeping, placement: Placement | None, axis: Axis, *, fixed: bool = False
) -> Iterator[tuple[fx.Node, float]]:
    """(node, bytes that a rank keeps of a result of it): for the backward, and of what is returned."""
    for (node, k), uses in kept.used(fixed=fixed):
        call, _ = calls[node]
        made = placement.choice[node.name].outs[k] if placement else I
        size = size_of(call.results[k])
        shares = {held(_type_at(use, placement), axis) for use in uses}
        own = held(made, axis)
        total = 0.0
        if own in shares or not uses:
            shares.discard(own)
            total = 0.0 if (node, k) in kept.rebuilt else size * own
        yield node, total + size * sum(shares)
    for node, k in kept.shown(fixed=fixed):
        made = placement.choice[node.name].outs[k] if placement else I
        yield node, size_of(calls[node][0].results[k]) * held(made, axis)


def kept_where(calls: Calls, kept: Keeping) -> list[tuple[float, tuple[fx.Node, ...]]]:
    """The same, whole, with the nodes where the backward needs it: over a border of stages it is kept where it is needed."""
    found = [
        (float(size_of(calls[node][0].results[k])), tuple(user for user, _ in uses) or (node,))
        for (node, k), uses in kept.uses.items()
        if (node, k) not in kept.rebuilt
    ]
    return [*found, *((float(size_of(calls[node][0].results[k])), (node,)) for node, k in kept.returned)]


def kept_at(calls: Calls, kept: Keeping, offered: Offers, *, fixed: bool = False) -> list[KeptAt]:
    """The same by where an axis decides in which types values are made and taken: those of repeated blocks together."""

    def at(node: fx.Node, position: int) -> Place:
        return offered.decisions[offered.first(node)].index, position

    def result(node: fx.Node, k: int) -> Place:
        return at(node, len(calls[node][0].operands) + k)

    found: list[tuple[tuple[Place, tuple[Place, ...], bool], fx.Node, Readers]] = []
    sizes: Counter[tuple[Place, tuple[Place, ...], bool]] = Counter()
    for (node, k), uses in kept.used(fixed=fixed):
        readers: dict[Place, list[fx.Node | None]] = {}
        for use in sorted(uses, key=lambda use: at(*use)):
            readers.setdefault(at(*use), []).append(use[0])
        found.append(((result(node, k), tuple(readers), (node, k) in kept.rebuilt), node, readers))
        sizes[found[-1][0]] += size_of(calls[node][0].results[k])
    for node, k in kept.shown(fixed=fixed):
        found.append(((result(node, k), (), False), node, {}))
        sizes[found[-1][0]] += size_of(calls[node][0].results[k])
    counted = parts(found)
    return [KeptAt(float(size), key[0], counted[key], key[1], key[2]) for key, size in sizes.items()]


def sized(calls: Calls, kept: Keeping, offered: Offers) -> Sized:
    """All values whose bytes may have a price, and what has none."""
    return replace(_with_prices(calls, kept, offered), moments=moments_at(kept.moments.values(), offered))


def _with_prices(calls: Calls, kept: Keeping, offered: Offers) -> Sized:
    fixed, large = kept_at(calls, kept, offered, fixed=True), large_ops(kept.gradients, kept.moments, offered)
    return Sized(kept_at(calls, kept, offered), stream_at(kept.stream, offered), heaviest(offered), fixed, large)


def sized_for(calls: Calls, offered: Offers, policy: Policy, mixed: Rules | None) -> Sized | None:
    """Those with a price, where a policy has one for them, as `place` takes it. mixed: what else it goes by."""
    policies = (policy, mixed[0]) if mixed is not None else (policy,)
    return _with_prices(calls, keeping(calls), offered) if any(p.prices_sizes for p in policies) else None


def _gradients(calls: Calls, written_over: frozenset[tuple[fx.Node, int]]) -> dict[fx.Node, tuple[bool, ...]]:
    """Of each op with a backward, of which of its operands and results this holds gradients in memory of their own."""
    found = {}
    # Of a loss the gradients of logsumexp and of pick are one (passes/fuse.py).
    in_losses = {held_by(sources[0]) for call, sources in calls.values() if op_name(call.target) == "logsumexp"}
    for node, (call, sources) in calls.items():
        is_view = op_name(call.target) in FREE and len(call.results) == 1
        if is_view or not any(o.grad for o in call.operands):
            continue
        made = []
        for meta, source in zip(call.operands, sources, strict=True):
            value = held_by(source)
            own = value[0].op == "call_function" and value not in written_over and not passes_on(call, meta)
            merged = op_name(call.target) == "pick" and value in in_losses
            made.append(meta.grad and own and not merged)
        over = _goes_over(call, made)
        made += [meta.grad and (node, k) not in written_over and not over for k, meta in enumerate(call.results)]
        found[node] = tuple(made)
    return found


_ELEMENTWISE = frozenset("cos div exp gelu mul neg pow rsqrt sigmoid silu sin sqrt tanh".split())
"""Ops whose backward is products of elements: the last of them is written over the result's gradient (runtime/reuse.py)."""


def _goes_over(call: OpCall, made: Sequence[bool]) -> bool:
    """Whether an operand's gradient is written over that of the result."""
    alike = all(o.shape == call.results[0].shape for o in call.operands if o.grad)
    return op_name(call.target) in _ELEMENTWISE and alike and any(made)


def _type_at(use: Use, placement: Placement | None) -> Type:
    node, i = use
    return placement.choice[node.name].ins[i] if placement else I
