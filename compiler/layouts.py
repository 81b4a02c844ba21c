"""How values lie over a tensor axis, as a plan says it: in Megatron's layouts, or in whatever take the least time at some prices.

Where each value lies follows from this, by a search that is exact (compiler/place.py), anew at each shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .groups import Groups, together


@dataclass(frozen=True)
class Layouts:
    """sequence      Megatron's: activations between sharded products are cut by their tokens
    byte_price    any layouts: seconds that a byte of parameters costs which a rank holds. None: Megatron's
    kept_price    any layouts: seconds, of a micro-batch's, that a byte costs which it keeps for its backward
    stream_price  any layouts: the same of the residual stream, which crosses the borders of stages
    gather_prices   any layouts: the same of what one of the heaviest blocks gathers (compiler/heaviest.py), in their order
    fixed_price     any layouts: the same of one that is kept whatever the batch
    large_prices    any layouts: the same of what the backward of one of the largest ops holds (compiler/large_ops.py), by number
    compute_price   any layouts: what a second of compute counts, less than 1 where it hides traffic over the data axes
    sums_price    any layouts: what a second counts in which gradients are summed over the axis, once a step, against one of the
                  micro-batches; below 0 where data ranks whose axis holds copies sum theirs faster. None: as the load says
    mixed         any layouts: others, that some of the repeated blocks lie in
    """

    sequence: bool = False
    byte_price: float | None = None
    kept_price: float = 0.0
    stream_price: float = 0.0
    gather_prices: tuple[float, ...] = ()
    fixed_price: float = 0.0
    large_prices: tuple[float, ...] = ()
    compute_price: float = 1.0
    sums_price: float | None = None
    mixed: Mixed | None = None

    @property
    def any(self) -> bool:
        """Whether they are whatever take the least time, and not Megatron's."""
        return self.byte_price is not None

    @property
    def mixed_blocks(self) -> tuple[int, ...]:
        """Those that lie in others."""
        return self.mixed.blocks if self.mixed else ()

    @property
    def groups(self) -> Groups:
        """The blocks whose layouts are found together."""
        return together(self.mixed_blocks)

    def dearer(self, times: float) -> Layouts:
        """Where bytes cost so many times as much."""
        single = {name: times * getattr(self, name) for name in ("kept_price", "stream_price", "fixed_price")}
        several = {name: tuple(times * price for price in getattr(self, name)) for name in ("gather_prices", "large_prices")}
        return replace(self, byte_price=times * (self.byte_price or 0.0), **single, **several)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Layouts:
        """Of what `dataclasses.asdict` gives, or JSON of it."""
        mixed = data["mixed"]
        found = Mixed(tuple(mixed["blocks"]), cls.from_data(mixed["layouts"])) if mixed else None
        prices = {name: tuple(data.get(name, ())) for name in ("gather_prices", "large_prices")}
        return cls(**{**data, **prices, "mixed": found})


@dataclass(frozen=True)
class Mixed:
    """blocks     of the repeated ones, by number
    layouts    theirs
    """

    blocks: tuple[int, ...]
    layouts: Layouts
