"""What a plan's step depends on beside its placement: found once, for it is asked of many placements what the step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .gradient_sums import GradientSums
from .stages import Stages, StageShare
from .topology import Collectives


@dataclass(frozen=True)
class Terms:
    """Of a plan, whichever parameters it keeps whole.

    share      of the captured batch, what a data rank gets
    stages     what each has; `fullest`: those that may need the most bytes, as `Stages.fullest` has them
    bubble     how much longer a stage's step takes than its micro-batches do
    uneven     whether data ranks run other shapes: then the backward is not cut into parts
    sums       of gradients; `whole`: of those of parameters that ZeRO-3 keeps whole, None where it keeps none
    times      of collectives over the mesh's axes
    """

    zero: int
    microbatches: int
    share: float
    stages: Stages
    fullest: Sequence[tuple[StageShare, float]]
    bubble: float
    uneven: bool
    sums: GradientSums
    whole: GradientSums | None
    times: Collectives

    @property
    def pp(self) -> int:
        return len(self.stages.shares)

    @cached_property
    def dp_shard(self) -> int:
        return self.times.mesh.size("dp_shard")

    @cached_property
    def copies_rate(self) -> float:
        """Seconds a byte of `PlacedCost.sums`."""
        return self.times.collective("all_reduce", "tp").rate

    @property
    def scatters_once(self) -> bool:
        """Whether gradients are scattered once a step, from buckets."""
        return self.zero in (1, 2) or self.whole is not None
