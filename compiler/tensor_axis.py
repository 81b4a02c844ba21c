"""How a graph is placed along a tensor axis: in Megatron's layouts, or in whatever layouts take the least time.

Megatron's layouts (Shoeybi et al. 2019; Korthikanti et al. 2022) shard products and their parameters above all, and keep
activations between them whole or cut by their tokens. They need no machine, are known to whoever reads the program, and are what a
pinned tp means. Any layouts are what the search finds where it prices seconds alone: heads exchanged for tokens by an all-to-all,
small parameters kept whole, samples cut. What they gain in time they may pay in bytes; so a byte of parameters has a price, and one
that is kept for the backward, and at higher prices layouts take fewer (compiler/refine.py finds the prices at which they fit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..passes.graph_tools import Calls, op_calls
from ..passes.rules.base import Axis
from ..passes.types import Type
from ..runtime.program import Mesh
from .cost import Seconds, power_of_two
from .keeping import Keeping, keeping, kept_at, least_backward_bytes
from .offers import Offers, offers
from .place import Barred, KeptAt, Placement, Policy, Priced, place, price
from .placed_cost import PlacedCost, placed_cost
from .plan import Plan
from .prices import Prices, megatron_prices
from .topology import Topology


@dataclass(frozen=True)
class Load:
    """What a data rank runs in a step.

    share    of the captured batch
    runs     micro-batches that it is cut into
    sums     what a second in which gradients are summed over the axis, once a step, counts against one of the micro-batches
    """

    share: float = 1.0
    runs: int = 1
    sums: float = 1.0

    @property
    def rounded(self) -> Load:
        """To powers of two, and sums to all or nothing: where loads are nearly alike, the fastest placements hardly differ."""
        return Load(power_of_two(self.share), int(power_of_two(self.runs)), float(self.sums > 0.1))


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

    def load(self, load: Load) -> Load:
        """What a placement in these layouts is made for. With no price on bytes it is a first one, for loads nearly alike."""
        if self.byte_price is None:
            return Load()
        return load if self.byte_price else load.rounded

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
    priced: Priced | None = None,
) -> Placement:
    """The placement over an axis tp of `size` ranks.

    seconds    of a mesh with that axis; None is enough for Megatron's layouts
    barred, calls      as `place` takes them       pinned    types of parameters, by name
    kept       `kept_at(...)`, where the caller has it and the layouts' `kept_price` needs it
    offered, priced    as `place` takes them
    """
    policy = layouts.policy(loss, pinned or {}, seconds.share if seconds is not None else 1.0)
    calls = op_calls(gm) if calls is None else calls
    axis = Axis("tp", size)
    offered = offered or offers(gm, axis, calls, "tensor", policy.pinned)
    if policy.kept_price and not kept:
        kept = kept_at(calls, keeping(calls), offered)
    return place(gm, axis, policy, layouts.prices(seconds), calls, barred, kept=kept, offered=offered, priced=priced)


@dataclass(frozen=True)
class Least:
    """Bytes that no placement is below, as `PlacedCost` has them."""

    parameters: float
    trainable: float
    read_again: float
    activations: float
    temporaries: float
    stream: float


class TensorAxis:
    """Placements of a graph over tensor axes of any size, and what they cost, each found once.

    Placements in any layouts depend on the load: the smaller a batch, the dearer are parameters that are gathered or whose
    gradients are summed.
    """

    def __init__(self, gm: fx.GraphModule, loss: str | None, topology: Topology, calls: Calls, kept: Keeping) -> None:
        self.gm, self.loss, self.topology, self.calls, self.kept = gm, loss, topology, calls, kept
        self._machines: dict[int, Seconds] = {}
        self._seconds: dict[tuple[int, Load], Seconds] = {}
        self._placements: dict[tuple[int, Layouts, Load], Placement] = {}
        self._costs: dict[tuple[int, Layouts, Load], PlacedCost] = {}
        self._offered: dict[int, Offers] = {}
        self._priced: dict[tuple[int, Load], Priced] = {}
        self._kept: dict[int, list[KeptAt]] = {}
        self._least: dict[int, Least] = {}

    def cost(self, size: int, layouts: Layouts, load: Load) -> PlacedCost:
        """Depends on other axes of the mesh only through where tp lies."""
        key = self._key(size, layouts, load)
        if key not in self._costs:
            placement = self.placement(size, layouts, load)
            offered = self._offers(size) if placement is not None else None
            self._costs[key] = placed_cost(self.gm, self._seconds_of(size, key[2]), placement, self.calls, self.kept, offered)
        return self._costs[key]

    def placement(self, size: int, layouts: Layouts, load: Load) -> Placement | None:
        """None where there is no such axis."""
        key = self._key(size, layouts, load)
        if size > 1 and key not in self._placements:
            seconds, offered = self._seconds_of(size, key[2]), self._offers(size)
            kept = self._kept_of(size) if layouts.kept_price else ()
            priced = None if layouts.byte_price is None else self._priced_of(size, key[2])
            self._placements[key] = tensor_placement(
                self.gm, self.loss, size, layouts, seconds, self.calls, kept=kept, offered=offered, priced=priced
            )
        return self._placements.get(key)

    @property
    def placed(self) -> int:
        """Placements found so far."""
        return len(self._placements)

    def _priced_of(self, size: int, load: Load) -> Priced:
        if (size, load) not in self._priced:
            seconds, policy = self._seconds_of(size, load), Layouts(byte_price=0.0).policy(self.loss, {})
            self._priced[size, load] = price(self.gm, Axis("tp", size), policy, seconds, self.calls, self._offers(size))
        return self._priced[size, load]

    def _offers(self, size: int) -> Offers:
        if size not in self._offered:
            self._offered[size] = offers(self.gm, Axis("tp", size), self.calls, "tensor")
        return self._offered[size]

    def _kept_of(self, size: int) -> list[KeptAt]:
        if size not in self._kept:
            self._kept[size] = kept_at(self.calls, self.kept, self._offers(size))
        return self._kept[size]

    def least(self, size: int) -> Least:
        """Of every placement over so many ranks."""
        if size not in self._least:
            whole = self.cost(1, Layouts(), Load())
            self._least[size] = Least(
                parameters=whole.parameters / size,
                trainable=whole.trainable / size,
                read_again=whole.read_again / size,
                activations=whole.activations / size,
                temporaries=least_backward_bytes(self.kept, self._offers(size)),
                stream=whole.stream / size,
            )
        return self._least[size]

    @staticmethod
    def _key(size: int, layouts: Layouts, load: Load) -> tuple[int, Layouts, Load]:
        return size, layouts, layouts.load(load)

    def _seconds_of(self, size: int, load: Load) -> Seconds:
        if size not in self._machines:
            self._machines[size] = Seconds(self.topology, tensor_mesh(size))
        if (size, load) not in self._seconds:
            self._seconds[size, load] = self._machines[size].at(load.share, load.runs, load.sums)
        return self._seconds[size, load]


def tensor_mesh(size: int) -> Mesh:
    return Mesh(("tp",), (size,)) if size > 1 else Mesh((), ())
