"""How a graph is placed along a tensor axis: in Megatron's layouts, or in whatever layouts take the least time.

Megatron's layouts (Shoeybi et al. 2019; Korthikanti et al. 2022) shard products and their parameters above all, and keep
activations between them whole or cut by their tokens. They need no machine, are known to whoever reads the program, and are what a
pinned tp means. Any layouts are what the search finds where it prices seconds alone: heads exchanged for tokens by an all-to-all,
small parameters kept whole, samples cut. What they gain in time they may pay in bytes; so a byte of parameters has a price, and one
that is kept for the backward, and at higher prices layouts take fewer (compiler/refine.py finds the prices at which they fit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from torch import fx

from ..passes.graph_tools import Calls, op_calls
from ..passes.rules.base import Axis
from ..passes.types import Type
from ..runtime.program import Mesh
from .backward_memory import least_bytes
from .cost import Seconds, power_of_two
from .few_gathers import thresholds
from .groups import together
from .keeping import Keeping, sized, sized_for
from .large_ops import least_of
from .layouts import Layouts
from .offers import Offers, offers
from .place import Barred, Placement, Policy, Priced, Rules, least, place, price
from .placed_cost import PlacedCost, placed_cost
from .prices import Prices, megatron_prices, size_of
from .samples import Samples, without_cuts
from .sized import Sized, of_each
from .step_sums import copies_rate
from .topology import Topology
from .totals import (
    ACTIVATIONS,
    COMPUTE,
    FIXED,
    HEAVIEST,
    LARGE,
    PARAMETERS,
    READ_AGAIN,
    RUNS,
    SECOND,
    STREAM,
    SUMS,
    TOTALS,
    TRAFFIC,
    TRAINABLE,
    Known,
    Line,
    relations,
    totals_of,
)


@dataclass(frozen=True)
class Load:
    """What a data rank runs in a step.

    share    of the captured batch
    runs     micro-batches that it is cut into
    sums     what a second in which gradients are summed over the axis, once a step, counts against one of the micro-batches
    few      whether a micro-batch has fewer samples than the axis has ranks
    """

    share: float = 1.0
    runs: int = 1
    sums: float = 1.0
    few: bool = False

    @property
    def size(self) -> float:
        """Of a value in a micro-batch, against its captured one: to a power of two."""
        return power_of_two(self.share / self.runs)

    @property
    def rounded(self) -> Load:
        """To powers of two, and sums to all or nothing: where loads are nearly alike, the fastest placements hardly differ."""
        runs = int(power_of_two(self.runs))
        return Load(power_of_two(self.share / self.runs) * runs, runs, float(self.sums > 0.1), self.few)


def load_for(layouts: Layouts, load: Load) -> Load:
    """What a placement in these layouts is made for. With no price on bytes it is a first one, for loads nearly alike."""
    if not layouts.any:
        return Load(few=load.few)
    if not layouts.byte_price:
        return load.rounded
    return load if layouts.sums_price is None else replace(load, sums=layouts.sums_price)


def policy_of(layouts: Layouts, loss: str | None, pinned: Mapping[str, Type], share: float = 1.0, runs: int = 1) -> Policy:
    """For a graph of which a step runs so large a share, in so many micro-batches. `pinned`: types of parameters, by name."""
    keys = {f"param.{name}": type_ for name, type_ in pinned.items()}
    kept, stream, gathered = layouts.kept_price * share, layouts.stream_price * share, [p * runs for p in layouts.gather_prices]
    large = [price * share for price in layouts.large_prices]
    sizes = kept, stream, layouts.fixed_price * runs, large, gathered
    return Policy("tensor", keys, loss, layouts.sequence, layouts.byte_price, *sizes)


def totals_prices(layouts: Layouts, load: Load) -> np.ndarray:
    """What a placement in these layouts pays for its totals."""
    found = np.zeros(len(TOTALS))
    found[[RUNS, TRAFFIC, SUMS, PARAMETERS]] = load.runs, load.share, load.sums, layouts.byte_price or 0.0
    found[[COMPUTE, ACTIVATIONS, STREAM]] = layouts.compute_price, layouts.kept_price, layouts.stream_price
    found[[COMPUTE, ACTIVATIONS, STREAM]] *= load.share
    if layouts.gather_prices:
        found[[HEAVIEST, SECOND]] = np.array(layouts.gather_prices) * load.runs
    if layouts.large_prices:
        found[LARGE] = np.array(layouts.large_prices) * load.share
    found[FIXED] = layouts.fixed_price * load.runs
    return found


def prices_of(layouts: Layouts, seconds: Seconds | None) -> Prices:
    """Raises ValueError for layouts by time on an unknown machine."""
    if not layouts.any:
        return megatron_prices(layouts.sequence)
    if seconds is None:
        raise ValueError("a plan whose layouts have prices places by time, and needs the topology whose times are meant")
    sums = seconds.sums if layouts.sums_price is None else layouts.sums_price
    return seconds.at(seconds.share, seconds.runs, sums, layouts.compute_price)


def tensor_placement(
    gm: fx.GraphModule,
    loss: str | None,
    size: int,
    layouts: Layouts,
    seconds: Seconds | None,
    calls: Calls | None = None,
    barred: Barred | None = None,
    pinned: Mapping[str, Type] | None = None,
    counted: Sized | None = None,
    offered: Offers | None = None,
    priced: Priced | None = None,
) -> Placement:
    """The placement over an axis tp of `size` ranks.

    seconds    of a mesh with that axis; None is enough for Megatron's layouts
    barred, calls      as `place` takes them       pinned    types of parameters, by name
    counted    `sized(...)`, where the caller has it and the layouts' prices of bytes need it
    offered, priced    as `place` takes them
    """
    calls = op_calls(gm) if calls is None else calls
    axis, (policy, prices) = Axis("tp", size), rules(layouts, loss, pinned or {}, seconds)
    mixed = mixed_rules(layouts, loss, seconds)
    offered = offered or offers(gm, axis, calls, "tensor", policy.pinned, groups=layouts.groups)
    counted = counted or sized_for(calls, offered, policy, mixed)
    return place(gm, axis, policy, prices, calls, barred, sized=counted, offered=offered, priced=priced, mixed=mixed)


def rules(layouts: Layouts, loss: str | None, pinned: Mapping[str, Type], seconds: Seconds | None) -> Rules:
    """What `place` is to go by, for the load of these seconds."""
    load = (seconds.share, seconds.runs) if seconds is not None else (1.0, 1)
    return policy_of(layouts, loss, pinned, *load), prices_of(layouts, seconds)


def mixed_rules(layouts: Layouts, loss: str | None, seconds: Seconds | None) -> Rules | None:
    """The same in the blocks that lie in other layouts."""
    return rules(layouts.mixed.layouts, loss, {}, seconds) if layouts.mixed else None


@dataclass
class Explored:
    """Placements over so many ranks that were found in any layouts, for values of about one size, and what is known of all.

    fewer    lines of those whose blocks each gather fewer than so many bytes
    """

    known: Known
    costs: list[PlacedCost]
    layouts: list[Layouts]
    fewer: list[tuple[int, Line]] = field(default_factory=list)

    def within(self, below: int | None) -> Known:
        """What is known of those whose blocks each gather fewer than so many bytes; of all for None."""
        if below is None:
            return self.known
        high = self.known.high.copy()
        high[[HEAVIEST, SECOND]] = np.minimum(high[[HEAVIEST, SECOND]], below)
        return replace(self.known, high=high, lines=[*self.known.lines, *(line for least, line in self.fewer if least >= below)])


class TensorAxis:
    """Placements of a graph over tensor axes of any size, and what they cost, each found once.

    Placements in any layouts depend on the load: the smaller a batch, the dearer are parameters that are gathered or whose
    gradients are summed.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        loss: str | None,
        topology: Topology,
        calls: Calls,
        kept: Keeping,
        find_samples: Callable[[], Samples] = dict,
    ) -> None:
        """`find_samples`: `samples(...)` of the graph (compiler/samples.py), for loads of few."""
        self.gm, self.loss, self.topology, self.calls, self.kept = gm, loss, topology, calls, kept
        self._samples = cache(find_samples)
        self._machines: dict[int, Seconds] = {}
        self._seconds: dict[tuple[int, Load], Seconds] = {}
        self._placements: dict[tuple[int, Layouts, Load], Placement] = {}
        self._costs: dict[tuple[int, Layouts, Load], PlacedCost] = {}
        self._offered: dict[tuple[int, bool, tuple[int, ...]], Offers] = {}
        self._priced: dict[tuple[int, Load, float], Priced] = {}
        self._converted: dict[tuple[int, Load], Priced] = {}
        self._sized: dict[tuple[int, tuple[int, ...]], Sized] = {}
        self._explored: dict[tuple[int, float, bool], Explored] = {}
        self._told: dict[tuple[int, float, bool], list[tuple[Layouts, Load, PlacedCost]]] = {}  # and is not yet explored
        self._least: dict[int, PlacedCost] = {}
        self._thresholds: dict[int, list[int]] = {}

    def cost(self, size: int, layouts: Layouts, load: Load) -> PlacedCost:
        """Depends on other axes of the mesh only through where tp lies."""
        key = self._key(size, layouts, load)
        if key not in self._costs:
            placement = self.placement(size, layouts, load)
            blocks = layouts.mixed_blocks
            offered = self._offers(size, key[2].few, blocks) if placement is not None else None
            counted = self._sized_of(size, blocks) if placement is not None else None
            seconds = self._seconds_of(size, key[2])
            cost = self._costs[key] = placed_cost(self.gm, seconds, placement, self.calls, self.kept, offered, counted)
            if placement is not None and layouts.any and layouts.mixed is None:
                self._told.setdefault((size, load.size, load.few), []).append((layouts, load, cost))
        return self._costs[key]

    def explored(self, size: int, load: Load) -> Explored:
        """What is known where values are about as large as under a load: the ways in which they change their types are the same."""
        key = size, load.size, load.few
        if key not in self._explored:
            self._explored[key] = Explored(self._known(size), [], [])
        explored = self._explored[key]
        for layouts, of, cost in self._told.pop(key, ()):
            explored.known.learn(totals_prices(layouts, load_for(layouts, of)), self.apart(size, layouts, of))
            explored.costs.append(cost)
            explored.layouts.append(layouts)
        return explored

    def _known(self, size: int) -> Known:
        whole, least = self.cost(1, Layouts(), Load()), self.least(size)
        low, most = totals_of(least), totals_of(whole)
        most[[HEAVIEST, SECOND]] = most[PARAMETERS]  # at most
        most[LARGE] = of_each(((op.number, op.held(lambda _: 1.0)) for op in self._sized_of(size, ()).large), len(LARGE))
        limited = [PARAMETERS, TRAINABLE, READ_AGAIN, HEAVIEST, SECOND, STREAM]
        high = np.full(len(TOTALS), np.inf)
        high[limited] = most[limited]
        rate = copies_rate(tensor_mesh(size), self.topology)
        scale = most.copy()
        scale[TRAFFIC], scale[SUMS] = most[COMPUTE], rate * most[TRAINABLE]
        return Known(low, high, np.where(scale > 0, scale, 1.0), relations(low, most, rate))

    def placement(self, size: int, layouts: Layouts, load: Load) -> Placement | None:
        """None where there is no such axis."""
        key = self._key(size, layouts, load)
        if size > 1 and key not in self._placements:
            blocks = layouts.mixed_blocks
            seconds, offered = self._seconds_of(size, key[2]), self._offers(size, key[2].few, blocks)
            counted = self._sized_of(size, blocks)
            priced = self._priced_of(size, key[2], layouts) if layouts.any and layouts.mixed is None else None
            self._placements[key] = tensor_placement(
                self.gm, self.loss, size, layouts, seconds, self.calls, counted=counted, offered=offered, priced=priced
            )
        return self._placements.get(key)

    def learn_fewer(self, size: int, layouts: Layouts, load: Load, below: int) -> None:
        """Find what placements cost at least at these prices whose blocks each gather fewer than so many bytes."""
        cost = self.apart(size, layouts, load, below)
        self.explored(size, load).fewer.append((below, Line(totals_prices(layouts, load_for(layouts, load)), -cost)))

    def apart(self, size: int, layouts: Layouts, load: Load, below: int | None = None) -> float:
        """What no placement costs less than at these prices, however each of like blocks lies. below: as `learn_fewer` has it."""
        placement = self.placement(size, layouts, load) if below is None else None
        load = load_for(layouts, load)
        assert layouts.any and layouts.mixed is None
        offered, priced = self._offers(size, load.few), self._priced_of(size, load, layouts)
        found = rules(layouts, self.loss, {}, self._seconds_of(size, load))
        alike = placement.bound if placement is not None else math.inf
        return least(self.gm, Axis("tp", size), found, self.calls, self._sized_of(size, ()), offered, priced, alike, below)

    def gather_thresholds(self, size: int) -> list[int]:
        """Bytes that the block that gathers the most may be said to gather fewer than, or not (compiler/few_gathers.py)."""
        if size not in self._thresholds:
            runs: dict[int, list[int]] = {}
            for (value, _), heavy in self._sized_of(size, ()).heaviest.items():
                runs.setdefault(heavy.number, []).append(size_of(self._offers(size).meta[value]))
            self._thresholds[size] = sorted({bytes_ for sizes in runs.values() for bytes_ in thresholds(sizes)})
        return self._thresholds[size]

    @property
    def placed(self) -> int:
        """Placements found so far."""
        return len(self._placements)

    def _priced_of(self, size: int, load: Load, layouts: Layouts) -> Priced:
        key = size, load, layouts.compute_price
        if key not in self._priced:
            bare = Layouts(byte_price=0.0, compute_price=layouts.compute_price)
            policy, seconds = policy_of(bare, self.loss, {}), prices_of(bare, self._seconds_of(size, load))
            same = size, replace(load, sums=0.0)  # neither sums nor compute count in conversions
            found = price(
                self.gm, Axis("tp", size), policy, seconds, self.calls, self._offers(size, load.few), self._converted.get(same)
            )
            self._converted.setdefault(same, found)
            self._priced[key] = found
        return self._priced[key]

    def _offers(self, size: int, few: bool = False, blocks: tuple[int, ...] = ()) -> Offers:
        """blocks: those that are placed by themselves."""
        key = size, few, blocks
        if key not in self._offered:
            if few:
                self._offered[key] = without_cuts(self._offers(size, False, blocks), self._samples())
            else:
                self._offered[key] = offers(self.gm, Axis("tp", size), self.calls, "tensor", groups=together(blocks))
        return self._offered[key]

    def _sized_of(self, size: int, blocks: tuple[int, ...]) -> Sized:
        if (size, blocks) not in self._sized:
            self._sized[size, blocks] = sized(self.calls, self.kept, self._offers(size, False, blocks))
        return self._sized[size, blocks]

    def least(self, size: int) -> PlacedCost:
        """Bytes that no placement over so many ranks is below."""
        if size not in self._least:
            whole, offered = self.cost(1, Layouts(), Load()), self._offers(size)
            self._least[size] = PlacedCost(
                parameters=whole.parameters / size,
                trainable=whole.trainable / size,
                read_again=whole.read_again / size,
                activations=whole.activations / size,
                temporaries=least_bytes(self.kept.gradients, offered),
                large=of_each(((op.number, least_of(op, offered)) for op in self._sized_of(size, ()).large), len(LARGE)),
                stream=whole.stream / size,
            )
        return self._least[size]

    @staticmethod
    def _key(size: int, layouts: Layouts, load: Load) -> tuple[int, Layouts, Load]:
        return size, layouts, load_for(layouts, load)

    def _seconds_of(self, size: int, load: Load) -> Seconds:
        if size not in self._machines:
            self._machines[size] = Seconds(self.topology, tensor_mesh(size))
        if (size, load) not in self._seconds:
            self._seconds[size, load] = self._machines[size].at(load.share, load.runs, load.sums)
        return self._seconds[size, load]


def tensor_mesh(size: int) -> Mesh:
    return Mesh(("tp",), (size,)) if size > 1 else Mesh((), ())
