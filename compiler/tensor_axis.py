"""How a graph is placed along a tensor axis: in Megatron's layouts, or in whatever layouts take the least time.

Megatron's layouts (Shoeybi et al. 2019; Korthikanti et al. 2022) shard products and their parameters above all, and keep
activations between them whole or cut by their tokens. They need no machine, are known to whoever reads the program, and are what a
pinned tp means. Any layouts are what the search finds where it prices seconds alone: heads exchanged for tokens by an all-to-all,
small parameters kept whole, samples cut. What they gain in time they may pay in bytes of parameters; so a byte has a price, and the
placements at several prices are a Pareto front of time and memory, of which the search for a plan takes what fits. Where the
fastest does not fit, what is kept for the backward has its price too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..passes.graph_tools import Calls, metas, op_calls
from ..passes.rules.base import Axis
from ..passes.types import Type
from ..runtime.program import Mesh
from .cost import Seconds, size_of
from .keeping import Keeping, keeping, kept_at, kept_bytes
from .offers import Offers, offers
from .place import Barred, KeptAt, Placement, Policy, place
from .placed_cost import PlacedCost, placed_cost
from .plan import Plan
from .prices import Prices, megatron_prices
from .topology import Topology


@dataclass(frozen=True)
class Layouts:
    """sequence      Megatron's: activations between sharded products are cut by their tokens
    byte_price    any layouts: seconds that a byte of parameters costs which a rank holds. None: Megatron's
    kept_price    any layouts: seconds, of a micro-batch's, that a byte costs which it keeps for its backward
    """

    sequence: bool = False
    byte_price: float | None = None
    kept_price: float = 0.0

    @classmethod
    def of(cls, plan: Plan) -> Layouts:
        return cls(plan.sequence_parallel, plan.byte_price, plan.kept_price)

    def policy(self, loss: str | None, pinned: Mapping[str, Type], share: float = 1.0) -> Policy:
        """For a graph of which a step runs so large a share. `pinned`: types of parameters, by name."""
        keys = {f"param.{name}": type_ for name, type_ in pinned.items()}
        kept = self.kept_price * share
        return Policy("tensor", keys, loss, scatter=self.sequence, byte_price=self.byte_price, kept_price=kept)

    def prices(self, seconds: Seconds | None) -> Prices:
        """Raises ValueError for layouts by time on an unknown machine."""
        if self.byte_price is None:
            return megatron_prices(self.sequence)
        if seconds is None:
            raise ValueError("a plan with a byte_price places by time, and needs the topology whose times are meant")
        return seconds


def tensor_placement(
    gm: fx.GraphModule,
    loss: str | None,
    size: int,
    layouts: Layouts,
    seconds: Seconds | None,
    calls: Calls | None = None,
    barred: Barred | None = None,
    pinned: Mapping[str, Type] | None = None,
    kept: Sequence[KeptAt] = (),
    offered: Offers | None = None,
) -> Placement:
    """The placement over an axis tp of `size` ranks.

    seconds    of a mesh with that axis; None is enough for Megatron's layouts
    barred, calls      as `place` takes them       pinned    types of parameters, by name
    kept       `kept_at(...)`, where the caller has it and the layouts' `kept_price` needs it
    offered    as `place` takes it
    """
    policy = layouts.policy(loss, pinned or {}, seconds.share if seconds is not None else 1.0)
    if policy.kept_price and not kept:
        calls = op_calls(gm) if calls is None else calls
        kept = kept_at(calls, keeping(calls))
    return place(gm, Axis("tp", size), policy, layouts.prices(seconds), calls, barred, kept=kept, offered=offered)


DEAR = 10.0
"""The highest price of a byte: at it all that has one, held whole, costs so many times the step."""

APART = 0.01
"""Placements that differ by a smaller share of their bytes are not worth telling apart."""


def byte_prices(point: Callable[[float], tuple[float, float]], whole: float) -> list[float]:
    """Prices at which the lower hull of (seconds, bytes held) has its corners: at most three, from 0 upwards.

    point    what the placement at a price takes
    whole    bytes of everything that has the price
    """
    fastest = point(0.0)
    dear = DEAR * fastest[0] / max(whole, 1.0)
    smallest = point(dear)
    if fastest[1] - smallest[1] <= APART * fastest[1]:
        return [0.0]
    between = (smallest[0] - fastest[0]) / (fastest[1] - smallest[1])
    middle = point(between)
    apart = all(abs(middle[1] - end[1]) > APART * fastest[1] for end in (fastest, smallest))
    return [0.0, between, dear] if apart else [0.0, dear]


@dataclass(frozen=True)
class Load:
    """What a data rank runs in a step.

    share    of the captured batch
    runs     micro-batches that it is cut into
    """

    share: float = 1.0
    runs: int = 1

    @property
    def rounded(self) -> Load:
        """To powers of eight: where loads are nearly alike, the fastest placements hardly differ."""
        return Load(_to_a_power(self.share, 8), int(_to_a_power(self.runs, 8)))


def _to_a_power(x: float, base: int) -> float:
    """Of the base, the nearest."""
    return float(base) ** round(math.log(x, base))


class TensorAxis:
    """Placements of a graph over tensor axes of any size, and what they cost, each found once.

    Placements in any layouts depend on the load: the smaller a batch, the dearer are parameters that are gathered or whose
    gradients are summed.
    """

    def __init__(self, gm: fx.GraphModule, loss: str | None, topology: Topology, calls: Calls, kept: Keeping) -> None:
        self.gm, self.loss, self.topology, self.calls, self.kept = gm, loss, topology, calls, kept
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.parameters = float(sum(size_of(metas(n)[0]) for n in placeholders if n.meta["key"].startswith("param.")))
        self._seconds: dict[tuple[int, Load], Seconds] = {}
        self._placements: dict[tuple[int, Layouts, Load], Placement] = {}
        self._costs: dict[tuple[int, Layouts, Load], PlacedCost] = {}
        self._offered: dict[int, Offers] = {}
        self._fronts: dict[tuple[int, Load, float], list[Layouts]] = {}

    def front(self, size: int, load: Load, kept: float = 0.0) -> list[Layouts]:
        """Any layouts: the corners of the Pareto front of time and bytes, the fastest first.

        kept    what a byte costs that a micro-batch keeps for its backward, as a part of what a byte of parameters costs; rounded,
                for where on the front a plan lies matters more than which front it is
        """
        kept = _to_a_power(kept, 64) if kept else 0.0
        share, runs = load.rounded.share, load.rounded.runs
        key = size, load.rounded, kept
        if key not in self._fronts:

            def layouts(price: float) -> Layouts:
                return Layouts(byte_price=price, kept_price=price * kept)

            def point(price: float) -> tuple[float, float]:
                cost = self.cost(size, layouts(price), load)
                return cost.seconds(share, runs), cost.parameters + kept * share * cost.activations

            whole = self.parameters + kept * share * self.whole_activations
            self._fronts[key] = [layouts(price) for price in byte_prices(point, whole)]
        return self._fronts[key]

    def cost(self, size: int, layouts: Layouts, load: Load) -> PlacedCost:
        """Depends on other axes of the mesh only through where tp lies."""
        key = self._key(size, layouts, load)
        if key not in self._costs:
            placement = self.placement(size, layouts, load)
            self._costs[key] = placed_cost(self.gm, self._seconds_of(size, key[2]), placement, self.calls, self.kept)
        return self._costs[key]

    def placement(self, size: int, layouts: Layouts, load: Load) -> Placement | None:
        """None where there is no such axis."""
        key = self._key(size, layouts, load)
        if size > 1 and key not in self._placements:
            seconds = self._seconds_of(size, key[2])
            kept = self._kept_at if layouts.kept_price else ()
            self._placements[key] = tensor_placement(
                self.gm, self.loss, size, layouts, seconds, self.calls, kept=kept, offered=self._offers(size)
            )
        return self._placements.get(key)

    def _offers(self, size: int) -> Offers:
        if size not in self._offered:
            self._offered[size] = offers(self.gm, Axis("tp", size), self.calls, "tensor")
        return self._offered[size]

    @cached_property
    def _kept_at(self) -> list[KeptAt]:
        return kept_at(self.calls, self.kept)

    @cached_property
    def whole_activations(self) -> float:
        """Bytes that the captured batch keeps with no tensor axis."""
        return kept_bytes(self.calls, self.kept, None, Axis("tp", 1))

    @staticmethod
    def _key(size: int, layouts: Layouts, load: Load) -> tuple[int, Layouts, Load]:
        return size, layouts, Load() if layouts.byte_price is None else load.rounded

    def _seconds_of(self, size: int, load: Load) -> Seconds:
        if (size, load) not in self._seconds:
            self._seconds[size, load] = Seconds(self.topology, tensor_mesh(size), load.share, load.runs)
        return self._seconds[size, load]


def tensor_mesh(size: int) -> Mesh:
    return Mesh(("tp",), (size,)) if size > 1 else Mesh((), ())
