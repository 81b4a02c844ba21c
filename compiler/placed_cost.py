"""What a captured graph costs on one rank of a tensor axis, before anything is emitted: seconds, bytes held, bytes received."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..passes.convert import is_free, makes_whole
from ..passes.graph_tools import Calls, is_getitem, is_parameter, metas, result_of
from ..passes.reshard import steps
from ..passes.rules.base import Axis, TensorMeta, replicated
from ..passes.types import I, R, Type
from .backward_memory import largest
from .cost import Seconds, Timing, conversion_bytes, size_of
from .heaviest import COUNT, block_of
from .keeping import Keeping, keeping, kept_bytes, sized
from .large_ops import COUNT as LARGE
from .needs import gathered_again
from .offers import Offers, Uses, Value, offers
from .place import Placement
from .prices import held
from .sized import Heavy, Place, Sized, of_each
from .stream import stream_bytes
from .topology import collective_bytes


@dataclass(frozen=True)
class PlacedCost:
    """A graph on one rank of a tensor axis, forward and backward: what grows with the batch as for the batch it was captured with.

    compute, traffic        seconds that grow with the batch
    launches, latencies     seconds of these that every run takes besides, whatever its batch
    gathers                 seconds in which every run gathers parameters over the tensor axis and scatters their gradients
    sums                    seconds in which gradients of replicated parameters are summed over the tensor axis, once a step
    activations             bytes that the forward keeps
    fixed                   the same of what is as large for any batch
    temporaries             bytes that the backward holds at once beside these (compiler/backward_memory.py)
    large                   the same at least of the ops that may hold the most, by number (compiler/large_ops.py)
    gathered                bytes of the parameters that a block gathers over the tensor axis: of the block with the most
    heaviest, second        the same of the two blocks whose parameters are the most (compiler/heaviest.py)
    parameters              bytes held of all parameters; of these `trainable` have gradients, `read_again` are used in the backward
    received, received_gathers, received_once       bytes received over the tensor axis in these traffics
    stream                  bytes of the residual stream
    gap                     of the placement, see `Placement.gap`
    """

    compute: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0
    latencies: float = 0.0
    gathers: float = 0.0
    sums: float = 0.0
    activations: float = 0.0
    fixed: float = 0.0
    temporaries: float = 0.0
    large: tuple[float, ...] = (0.0,) * LARGE
    gathered: float = 0.0
    heaviest: float = 0.0
    second: float = 0.0
    parameters: float = 0.0
    trainable: float = 0.0
    read_again: float = 0.0
    received: float = 0.0
    received_gathers: float = 0.0
    received_once: float = 0.0
    stream: float = 0.0
    gap: float = 0.0


def placed_cost(
    gm: fx.GraphModule,
    seconds: Seconds,
    placement: Placement | None,
    calls: Calls,
    kept: Keeping | None = None,
    offered: Offers | None = None,
    counted: Sized | None = None,
) -> PlacedCost:
    """What every rank does under a placement over tp; None where there is no such axis.

    seconds    of a mesh of that axis, or of none
    kept, offered, counted     `keeping(calls)`, what the placement was chosen of, and `sized(...)`, where the caller has them
    """
    axis = Axis("tp", seconds.mesh.size("tp"))
    kept = kept or keeping(calls)
    compute = launches = 0.0
    parameters = trainable = sums = received_once = 0.0
    if placement is not None:
        offered = offered or offers(gm, axis, calls, "tensor")
    for node, count in _distinct(gm, offered):
        if node in calls:
            timing = _timing(node, calls, placement, seconds)
            compute, launches = compute + timing.work * count, launches + timing.fixed * count
        elif node.op == "placeholder" and node.meta["key"].startswith("param."):
            meta, type_ = metas(node)[0], placement.placeholders[node.meta["key"]] if placement else I
            size = size_of(meta) * held(type_, axis) * count
            parameters += size
            trainable += size if meta.grad else 0.0
            if placement and type_ == R and meta.grad:
                sums += seconds.gradient_sum(meta, axis) * count
                received_once += collective_bytes("all_reduce", size, axis.size)
    cost = PlacedCost(
        compute=compute,
        launches=launches,
        sums=sums,
        parameters=parameters,
        trainable=trainable,
        read_again=_read_again(kept, placement, axis),
        received_once=received_once,
        stream=stream_bytes(kept.stream),
    )
    if placement is None or offered is None:
        activations, fixed = (kept_bytes(calls, kept, None, axis, fixed=which) for which in (False, True))
        return replace(cost, activations=activations, fixed=fixed, temporaries=largest(kept.moments.values(), lambda _: 1.0))
    return _with_conversions(cost, seconds, placement, calls, offered, counted or sized(calls, kept, offered))


def _read_again(kept: Keeping, placement: Placement | None, axis: Axis) -> float:
    """Bytes held of parameters that the backward reads: at the same place of blocks, some may and others not."""
    found = 0.0
    for key, size in kept.again.items():
        found += size * held(placement.placeholders[key] if placement else I, axis)
    return found


def _distinct(gm: fx.GraphModule, offered: Offers | None) -> Iterator[tuple[fx.Node, int]]:
    """Of the nodes at the same place of identical blocks the first, and how many they are."""
    if offered is not None:
        return ((d.node, d.places.total()) for d in offered.order)
    twins: Mapping[str, str] = gm.meta.get("twins", {})
    counts = Counter(twins.get(node.name, node.name) for node in gm.graph.nodes)
    return ((node, counts[node.name]) for node in gm.graph.nodes if twins.get(node.name, node.name) == node.name)


def _timing(node: fx.Node, calls: Calls, placement: Placement | None, seconds: Seconds) -> Timing:
    """Of parameters alone as much for any batch, as in `Seconds.node`."""
    call, sources = calls[node]
    timing = seconds.node_timing(call, placement.choice[node.name] if placement else replicated(call))
    return Timing(timing.once, 0.0) if sources and all(map(is_parameter, sources)) else timing


@dataclass(frozen=True)
class Conversion:
    """Of values made at one place, for the first of their uses that needs them so; made so many times.

    again    of a parameter that the backward gathers once more
    """

    source: fx.Node
    value: Value
    uses: Uses
    have: Type
    needed: Type
    meta: TensorMeta
    count: int
    again: bool


def _with_conversions(
    cost: PlacedCost, seconds: Seconds, placement: Placement, calls: Calls, offered: Offers, counted: Sized
) -> PlacedCost:
    """The cost, with what values go through to be of the types that ops need, and with the bytes of them that count."""
    nodes = [d.node for d in offered.order]
    traffic = latencies = gathers = received = received_gathers = 0.0
    blocks: Counter[object] = Counter()
    heavy: Counter[Heavy] = Counter()
    for c in _conversions(placement, calls, offered, nodes):
        timing, size = _price(c, seconds, placement.axis)
        if not is_parameter(c.source):
            traffic, latencies, received = traffic + timing.work, latencies + timing.fixed, received + size
            continue
        gathers, received_gathers = gathers + timing.once, received_gathers + size
        if makes_whole(c.have, c.needed):
            blocks[block_of(offered, c.uses)] += size_of(c.meta)
            if (c.value, c.uses) in counted.heaviest:
                heavy[counted.heaviest[c.value, c.uses]] += size_of(c.meta)

    heaviest = of_each(((of.number, size) for of, size in heavy.items()), COUNT)

    def share(place: Place) -> float:
        strategy = placement.choice[nodes[place[0]].name]
        return held((*strategy.ins, *strategy.outs)[place[1]], placement.axis)

    return replace(
        cost,
        traffic=traffic,
        latencies=latencies,
        gathers=gathers,
        gathered=float(max(blocks.values(), default=0)),
        heaviest=heaviest[0],
        second=heaviest[1],
        activations=sum(k.held(share) for k in counted.kept),
        fixed=sum(k.held(share) for k in counted.fixed),
        temporaries=largest(counted.moments, share),
        large=of_each(((op.number, op.held(share)) for op in counted.large), LARGE),
        stream=sum(k.held(share) for k in counted.stream),
        received=received,
        received_gathers=received_gathers,
        gap=placement.gap,
    )


def _price(c: Conversion, seconds: Seconds, axis: Axis) -> tuple[Timing, float]:
    """Seconds, and bytes received, of all of them."""
    made = [(c.have, c.needed, c.meta)]
    if c.again:
        made.append((c.have, I, replace(c.meta, grad=False)))
    timings = [seconds.way_timing(a, b, meta, axis) for a, b, meta in made]
    path = [(a, b, meta) for src, dst, meta in made for a, b in steps(src, dst, meta, seconds.ways(axis))]
    received = sum(conversion_bytes(a, b, size_of(meta), axis.size, meta.grad).total for a, b, meta in path)
    return Timing(c.count * sum(t.fixed for t in timings), c.count * sum(t.work for t in timings)), c.count * received


def _conversions(placement: Placement, calls: Calls, offered: Offers, nodes: Sequence[fx.Node]) -> Iterator[Conversion]:
    """The conversions that operands and outputs need, each made once for a value and a type."""
    for ((name, k), uses), part in offered.uses.items():
        maker = offered.decisions[name].node
        have, _ = produced(maker, placement, k)
        meta = offered.meta[name, k]
        made: set[Type] = set()
        for reader, position in uses:
            inside = reader < len(nodes)
            needed = placement.choice[nodes[reader].name].ins[position] if inside else placement.outputs[reader - len(nodes)]
            if needed in made or is_free(have, needed, meta.grad):
                continue
            made.add(needed)
            again = gathered_again(maker, have, needed, calls)
            yield Conversion(maker, (name, k), uses, have, needed, meta, part.makers, again)


def produced(node: fx.Node, placement: Placement, k: int = 0) -> tuple[Type, int]:
    """The type of a value, and which of its node's results it is: the k-th, or the one that a getitem takes."""
    if is_getitem(node):
        node, k = result_of(node)
    if node.op == "placeholder":
        return placement.placeholders[node.meta["key"]], k
    return placement.choice[node.name].outs[k], k
