"""What a captured graph costs on one rank of a tensor axis, before anything is emitted: seconds, bytes held, bytes received."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..passes.convert import is_free, makes_whole
from ..passes.graph_tools import Calls, is_parameter, metas
from ..passes.reshard import steps
from ..passes.rules.base import Axis, TensorMeta
from ..passes.rules.base import Strategy as NodeStrategy
from ..passes.types import I, R, Type
from .cost import Seconds, Timing, conversion_bytes, size_of
from .keeping import Keeping, keeping, kept_bytes, largest_backward_bytes
from .needs import gathered_again, read_again
from .offers import made_by
from .place import Placement
from .prices import held
from .topology import collective_bytes


@dataclass(frozen=True)
class PlacedCost:
    """A graph on one rank of a tensor axis, forward and backward: what grows with the batch as for the batch it was captured with.

    compute, traffic        seconds that grow with the batch
    launches, latencies     seconds of these that every run takes besides, whatever its batch
    gathers                 seconds in which every run gathers parameters over the tensor axis and scatters their gradients
    sums                    seconds in which gradients of replicated parameters are summed over the tensor axis, once a step
    activations             bytes that the forward keeps
    temporaries             bytes that the backward of the largest op holds beside these
    gathered                bytes of the parameters that a block gathers over the tensor axis: of the block with the most
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
    temporaries: float = 0.0
    gathered: float = 0.0
    parameters: float = 0.0
    trainable: float = 0.0
    read_again: float = 0.0
    received: float = 0.0
    received_gathers: float = 0.0
    received_once: float = 0.0
    stream: float = 0.0
    gap: float = 0.0

    def seconds(self, share: float, runs: int = 1) -> float:
        """Of a step with a share of the batch in so many micro-batches."""
        return (self.compute + self.traffic) * share + (self.launches + self.latencies + self.gathers) * runs + self.sums


def placed_cost(
    gm: fx.GraphModule, seconds: Seconds, placement: Placement | None, calls: Calls, kept: Keeping | None = None
) -> PlacedCost:
    """What every rank does under a placement over tp; None where there is no such axis.

    seconds    of a mesh of that axis, or of none       kept    `keeping(calls)`, where the caller has it
    """
    axis = Axis("tp", seconds.mesh.size("tp"))
    compute = launches = 0.0
    known: dict[tuple[int, int], Timing] = {}
    for node, (call, _) in calls.items():
        strategy = placement.choice[node.name] if placement else None
        key = id(call), id(strategy)  # identical blocks share both objects
        if key not in known:
            strategy = strategy or NodeStrategy("whole", (I,) * len(call.operands), (I,) * len(call.results))
            timing = seconds.node_timing(call, strategy)
            known[key] = Timing(timing.once, 0.0) if is_parameter(node) else timing
        compute, launches = compute + known[key].work, launches + known[key].fixed
    kept = kept or keeping(calls)
    parameters = trainable = again = sums = received_once = 0.0
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            meta, type_ = metas(node)[0], placement.placeholders[node.meta["key"]] if placement else I
            size = size_of(meta) * held(type_, axis)
            parameters += size
            trainable += size if meta.grad else 0.0
            again += size if read_again(node, calls) else 0.0
            if placement and type_ == R and meta.grad:
                sums += seconds.placeholder(type_, meta, axis)
                received_once += collective_bytes("all_reduce", size, axis.size)
    cost = PlacedCost(
        compute=compute,
        launches=launches,
        sums=sums,
        activations=kept_bytes(calls, kept, placement, axis),
        temporaries=largest_backward_bytes(calls, kept, placement, axis),
        parameters=parameters,
        trainable=trainable,
        read_again=again,
        received_once=received_once,
        stream=_stream(calls, placement, axis),
    )
    return cost if placement is None else _with_conversions(cost, gm, seconds, placement, calls, axis)


@dataclass(frozen=True)
class Conversion:
    """Of a value, for the first node that needs it so. again: of a parameter that the backward gathers once more."""

    source: fx.Node
    have: Type
    needed: Type
    meta: TensorMeta
    user: fx.Node
    again: bool

    @property
    def of_parameter(self) -> bool:
        return is_parameter(self.source)


def _with_conversions(
    cost: PlacedCost, gm: fx.GraphModule, seconds: Seconds, placement: Placement, calls: Calls, axis: Axis
) -> PlacedCost:
    """The cost, and that of what values go through to be of the types that ops need."""
    known: dict[tuple[Type, Type, TensorMeta, bool], tuple[Timing, float]] = {}
    traffic = latencies = gathers = received = received_gathers = 0.0
    blocks: Counter[object] = Counter()
    for c in _conversions(gm, calls, placement):
        key = c.have, c.needed, c.meta, c.again
        if key not in known:
            known[key] = _price(c, seconds, axis)
        timing, size = known[key]
        if not c.of_parameter:
            traffic, latencies, received = traffic + timing.work, latencies + timing.fixed, received + size
            continue
        gathers, received_gathers = gathers + timing.once, received_gathers + size
        if makes_whole(c.have, c.needed):
            blocks[c.user.meta.get("block")] += size_of(c.meta)
    return replace(
        cost,
        traffic=traffic,
        latencies=latencies,
        gathers=gathers,
        gathered=float(max(blocks.values(), default=0)),
        received=received,
        received_gathers=received_gathers,
        gap=placement.gap,
    )


def _price(c: Conversion, seconds: Seconds, axis: Axis) -> tuple[Timing, float]:
    """Seconds, and bytes received."""
    made = [(c.have, c.needed, c.meta)]
    if c.again:
        made.append((c.have, I, replace(c.meta, grad=False)))
    timings = [seconds.way_timing(a, b, meta, axis) for a, b, meta in made]
    path = [(a, b, meta) for src, dst, meta in made for a, b in steps(src, dst, meta, seconds.ways(axis))]
    received = sum(conversion_bytes(a, b, size_of(meta), axis.size, meta.grad).total for a, b, meta in path)
    return Timing(sum(t.fixed for t in timings), sum(t.work for t in timings)), received


def _conversions(gm: fx.GraphModule, calls: Calls, placement: Placement) -> Iterator[Conversion]:
    """The conversions that operands and outputs need, each made once for a value and a type."""
    made: set[tuple[fx.Node, int, Type]] = set()
    end = next(iter(gm.graph.find_nodes(op="output")))
    readers: list[tuple[fx.Node, Sequence[fx.Node], Sequence[Type]]]
    readers = [(node, sources, placement.choice[node.name].ins) for node, (_, sources) in calls.items()]
    readers.append((end, end.args[0], [placement.outputs[k] for k in range(len(end.args[0]))]))  # type: ignore[arg-type]
    for node, sources, types in readers:
        for source, needed in zip(sources, types, strict=True):
            have, k = produced(source, placement)
            if have is needed or (source, k, needed) in made:
                continue
            maker, _ = made_by(source)
            meta = calls[maker][0].results[k] if maker in calls else metas(source)[0]
            if is_free(have, needed, meta.grad):
                continue
            made.add((source, k, needed))
            yield Conversion(source, have, needed, meta, node, gathered_again(source, have, needed, calls))


def produced(node: fx.Node, placement: Placement) -> tuple[Type, int]:
    """The type of a value, and which of its node's results it is."""
    node, k = made_by(node)
    if node.op == "placeholder":
        return placement.placeholders[node.meta["key"]], k
    return placement.choice[node.name].outs[k], k


def least_crossing(calls: Calls) -> float:
    """Bytes of the residual stream."""
    return _stream(calls, None, Axis("tp", 1))


def _stream(calls: Calls, placement: Placement | None, axis: Axis) -> float:
    """Bytes that a rank holds of the residual stream: of the most common size among values with gradients, the mean over these."""
    sizes = {n: size_of(call.results[0]) for n, (call, _) in calls.items() if len(call.results) == 1 and call.results[0].grad}
    if not sizes:
        return 0.0
    ((size, count),) = Counter(sizes.values()).most_common(1)
    if placement is None:
        return float(size)
    return size * sum(held(placement.choice[n.name].outs[0], axis) for n, found in sizes.items() if found == size) / count
