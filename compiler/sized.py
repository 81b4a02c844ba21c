"""Values whose bytes may have a price in a placement: what is kept for the backward, of the residual stream, and gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .backward_memory import Moment
from .offers import Uses, Value
from .parts import Part

Place = tuple[int, int]
"""A decision by its number, and a position among its operands and, after these, its results."""


@dataclass(frozen=True)
class KeptAt:
    """What is kept for the backward, of so many bytes in whole: values that are made at one place and used at the same.

    maker      where they are made
    part       which of the nodes there, and at their uses
    uses       where they are taken by what needs them in its backward; nowhere, where the maker's own does
    rebuilt    whether they are computed again from other kept values where they are needed as they were made
    """

    size: float
    maker: Place
    part: Part
    uses: tuple[Place, ...] = ()
    rebuilt: bool = False

    def cost(self, made: float, needed: float) -> float:
        """Bytes kept for a use that takes a share of `needed`, of what is made in shares of `made`."""
        return 0.0 if self.rebuilt and needed == made else self.size * needed

    def held(self, share: Callable[[Place], float]) -> float:
        """Bytes kept: for each share that is taken."""
        made = share(self.maker)
        return sum(self.cost(made, needed) for needed in ({share(use) for use in self.uses} or {made}))


@dataclass(frozen=True)
class Heavy:
    """Of a parameter: which of the heaviest blocks it is in (0 is the heaviest), of those of its group which one, and of all blocks
    like it how large a share the group is: what the group gathers counts so much of the block's price."""

    number: int
    block: object
    share: float


@dataclass(frozen=True)
class Large:
    """Of an op whose backward may hold the most: which of these it is (0 is the largest), its decision, bytes of the gradients of
    its operands and results, those that wait beside them at least, and of all ops like it the share of its group."""

    number: int
    decision: int
    sizes: tuple[float, ...]
    beside: float
    share: float = 1.0

    def held(self, share: Callable[[Place], float]) -> float:
        """Bytes, at least."""
        return self.beside + sum(size * share((self.decision, k)) for k, size in enumerate(self.sizes) if size)


def of_each(found: Iterable[tuple[int, float]], count: int) -> tuple[float, ...]:
    """Of (number, bytes) the most bytes of each number."""
    most = [0.0] * count
    for number, size in found:
        most[number] = max(most[number], float(size))
    return tuple(most)


@dataclass(frozen=True)
class Sized:
    """Values whose bytes may have a price: kept for the backward; of the residual stream, each with its share in the mean;
    parameters of the heaviest blocks, where they are gathered (compiler/heaviest.py); kept whatever the batch; and what the
    backward of the largest ops holds at once (compiler/large_ops.py). And what has none: what that of any other op does."""

    kept: Sequence[KeptAt] = ()
    stream: Sequence[KeptAt] = ()
    heaviest: Mapping[tuple[Value, Uses], Heavy] = field(default_factory=dict)
    fixed: Sequence[KeptAt] = ()
    large: Sequence[Large] = ()
    moments: Sequence[Moment[int]] = ()
