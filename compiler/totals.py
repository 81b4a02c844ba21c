"""What is known of all placements of a graph over an axis at once: lines that the totals of none of them are below.

What a plan takes depends on a placement through a few totals alone: seconds of compute, bytes held, bytes kept. A placement that is
the cheapest at some prices of these says of all others that they cost no less at these prices; and of those that place each block
for itself, how much at least (compiler/assign_apart.py). However many of that are known, the
least that a plan can take within them is a linear program; and what holds of one mesh and batch holds of all with as many ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import highspy
import numpy as np

from .large_ops import COUNT
from .placed_cost import PlacedCost

_SINGLE = tuple("runs compute traffic sums parameters trainable read_again activations fixed stream heaviest second".split())

TOTALS = (*_SINGLE, *(f"large {number}" for number in range(COUNT)))
"""As `PlacedCost` has them; "runs": what every run takes besides, its launches, latencies and gathers."""

RUNS, COMPUTE, TRAFFIC, SUMS, PARAMETERS, TRAINABLE, READ_AGAIN, ACTIVATIONS, FIXED, STREAM, HEAVIEST, SECOND, *LARGE = range(
    len(TOTALS)
)

ALL = range(len(TOTALS))

OF_SECONDS = (RUNS, COMPUTE, TRAFFIC, SUMS, PARAMETERS, TRAINABLE, READ_AGAIN, STREAM)
"""What the seconds of a step depend on."""

OF_BYTES = (SUMS, PARAMETERS, TRAINABLE, ACTIVATIONS, FIXED, HEAVIEST, SECOND, *LARGE)
"""What the bytes of its peak depend on."""

SLACK = 1e-5
"""The share by which a bound may be too high for a solver's rounding."""

_TANGENTS = 6
"""How often a bound is sought again with what is found to be too low of it."""


def totals_of(cost: PlacedCost) -> np.ndarray:
    rest = (getattr(cost, name) for name in _SINGLE[1:])
    return np.array([cost.launches + cost.latencies + cost.gathers, *rest, *cost.large])


def cost_of(totals: np.ndarray, least: PlacedCost) -> PlacedCost:
    """Of a placement with these totals, as far as they tell. least: the temporaries, and what is gathered, at least."""
    launches, *values = totals.tolist()
    rest, large = dict(zip(_SINGLE[1:], values, strict=False)), tuple(values[len(_SINGLE) - 1 :])
    gathered, temporaries = max(least.gathered, rest["heaviest"], rest["second"]), max(least.temporaries, *large)
    return PlacedCost(launches=launches, temporaries=temporaries, large=large, gathered=gathered, **rest)


@dataclass(frozen=True)
class Line:
    """`slopes @ totals + constant`."""

    slopes: np.ndarray
    constant: float = 0.0

    def at(self, totals: np.ndarray) -> float:
        return float(self.slopes @ totals) + self.constant


Function = Callable[[np.ndarray], float]
"""Of totals, and convex in these."""


def by_totals(of: Callable[[PlacedCost], float], depends: Callable[[PlacedCost], Hashable], least: PlacedCost) -> Function:
    """A function of costs, of those with such totals; least: as `cost_of` takes it. Of costs alike in what it depends on it
    is asked once: most totals are the ones that it does not grow with, as where another one is larger."""
    found: dict[Hashable, float] = {}

    def function(totals: np.ndarray) -> float:
        cost = cost_of(totals, least)
        key = depends(cost)
        if key not in found:
            found[key] = of(cost)
        return found[key]

    return function


def tangent(of: Function, totals: np.ndarray, scale: np.ndarray, depends: Sequence[int] = ALL) -> Line:
    """A line that touches a function near `totals` and is nowhere above it.

    scale      of each total, about how large it is
    depends    the totals that the function depends on

    Near it, and not there: where the larger of two totals counts, slopes are those of one of them.
    """
    totals = totals + 1e-4 * scale / np.arange(2, 2 + len(scale))
    here = of(totals)
    slopes = np.zeros(len(totals))
    for j in depends:
        there = totals.copy()
        there[j] += 1e-7 * scale[j]
        slopes[j] = (of(there) - here) / (there[j] - totals[j])
    return Line(slopes, float(here - slopes @ totals))


def relations(low: np.ndarray, whole: np.ndarray, rate: float) -> list[Line]:
    """Between totals of any placement, where these are the least and those of one that cuts nothing: what is at least 0.

    Parameters that have no gradients, or that the backward does not read, are held cut at most and whole at least; and those whose
    gradients are summed, at so many seconds a byte (`rate`), are held whole.
    """

    def line(constant: float = 0.0, **slopes: float) -> Line:
        return Line(np.array([slopes.get(name, 0.0) for name in TOTALS]), constant)

    found = []
    for j, name in ((TRAINABLE, "trainable"), (READ_AGAIN, "read_again")):
        least, most = (x[PARAMETERS] - x[j] for x in (low, whole))
        found += [line(-least, **{"parameters": 1.0, name: -1.0}), line(most, **{"parameters": -1.0, name: 1.0})]
    cut = 1 - low[TRAINABLE] / (whole[TRAINABLE] or 1.0)
    return [*found, line(-rate * low[TRAINABLE], trainable=rate, sums=-cut)]


@dataclass
class Envelope:
    """What plans take by the totals of their placement, and lines that touch these functions from below, as far as they were asked.

    seconds, size    of a step, and bytes of its peak
    depends          the totals that each of the two depends on
    trainable        of which placements this holds: of those whose total "trainable" is between these
    time, room       lines of these
    """

    seconds: Function
    size: Function
    depends: tuple[Sequence[int], Sequence[int]] = ALL, ALL
    trainable: tuple[float, float] = 0.0, math.inf
    time: list[Line] = field(default_factory=list)
    room: list[Line] = field(default_factory=list)

    def touch(self, totals: np.ndarray, scale: np.ndarray, limited: bool) -> None:
        self.time.append(tangent(self.seconds, totals, scale, self.depends[0]))
        if limited:
            self.room.append(tangent(self.size, totals, scale, self.depends[1]))


@dataclass(frozen=True)
class Least:
    """seconds    that no placement is below; inf where none can be
    prices     of totals: a placement that is the cheapest at these tells the most of it
    of_bytes   of these, as far as they are of bytes
    """

    seconds: float
    prices: np.ndarray | None = None
    of_bytes: np.ndarray | None = None


@dataclass
class Known:
    """Of placements over so many ranks.

    low, high    totals that none is below, and above
    lines        what is at least 0 for each
    scale        about how large totals are
    """

    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    lines: list[Line]

    def learn(self, prices: np.ndarray, least: float) -> None:
        """No placement costs less at these prices."""
        self.lines.append(Line(prices, -least))

    def least(self, envelope: Envelope, limit: float, start: np.ndarray) -> Least:
        """Of placements whose bytes are within the limit. start: where the envelope is looked at first."""
        limited = math.isfinite(limit)
        low, high = self.low.copy(), self.high.copy()
        least, most = envelope.trainable
        low[TRAINABLE], high[TRAINABLE] = max(least, low[TRAINABLE]), min(most, high[TRAINABLE])
        if low[TRAINABLE] > high[TRAINABLE]:
            return Least(math.inf)
        # Where copies are more than in the least, so are parameters, and bytes no fewer; but not fewer than of as many others.
        if limited and envelope.size(self.low) > limit * (1 + SLACK):
            return Least(math.inf)
        if not (envelope.room if limited else envelope.time):
            envelope.touch(start, self.scale, limited)
        found = Least(0.0)
        for _ in range(_TANGENTS):
            solved = _solve(self, (low, high), envelope.time, envelope.room if limited else [], limit)
            if solved is None:
                return Least(math.inf)
            found, point = solved
            near = envelope.seconds(point) <= found.seconds * (1 + 1e-4)
            if near and (not limited or envelope.size(point) <= limit * (1 + 1e-4)):
                break
            envelope.touch(point, self.scale, limited)
        return replace(found, seconds=found.seconds * (1 - SLACK))

    @cached_property
    def solver(self) -> highspy.Highs:
        """To be given one program after the other: with each it puts away what it knew of the last."""
        solver = highspy.Highs()
        for option, setting in {"output_flag": False, "parallel": "off", "presolve": "off"}.items():
            solver.setOptionValue(option, setting)
        return solver


def _solve(
    known: Known, between: tuple[np.ndarray, np.ndarray], seconds: Sequence[Line], size: Sequence[Line], limit: float
) -> tuple[Least, np.ndarray] | None:
    """The least that the highest of the lines of seconds can be, and where. None: nowhere are all lines of bytes within the limit.

    between: totals that none is below, and above. Columns are the totals, each over its scale, and the seconds.
    """
    scale = known.scale
    lines = [*known.lines, *seconds, *size]
    slopes, constants = np.array([line.slopes for line in lines]) * scale, np.array([line.constant for line in lines])
    first, last = len(known.lines), len(known.lines) + len(seconds)  # lines of seconds
    by = np.abs(slopes).max(1)
    unit = max(float(np.maximum(by, np.abs(constants))[first:last].max()), 0.0) or 1.0
    by[by == 0.0] = 1.0
    by[first:last], by[last:] = unit, max(limit, 1.0)
    of_seconds, least, most = np.zeros((len(lines), 1)), np.zeros(len(lines)), np.full(len(lines), np.inf)
    of_seconds[first:last], least[first:], most[first:last], most[last:] = -1.0 * unit, -np.inf, 0.0, limit
    matrix = np.hstack([slopes, of_seconds]) / by[:, None]
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(scale) + 1, len(lines)
    model.col_cost_ = np.append(np.zeros(len(scale)), 1.0)
    low, high = between
    model.col_lower_, model.col_upper_ = np.append(low / scale, -np.inf), np.append(high / scale, np.inf)
    model.row_lower_, model.row_upper_ = (least - constants) / by, (most - constants) / by
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    model.a_matrix_.index_ = np.tile(np.arange(matrix.shape[1], dtype=np.int32), len(lines))
    model.a_matrix_.value_ = matrix.ravel()
    solver = known.solver
    solver.passModel(model)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return Least(0.0), low
    solution = solver.getSolution()
    point, duals = np.asarray(solution.col_value), np.asarray(solution.row_dual)
    of_seconds, of_bytes = (np.abs(d) for d in np.split(duals[len(known.lines) :], [len(seconds)]))
    room = np.zeros(len(scale))
    if size:
        room = of_bytes * unit / max(limit, 1.0) @ np.array([line.slopes for line in size])
    prices = of_seconds @ np.array([line.slopes for line in seconds]) + room
    return Least(float(point[-1]) * unit, prices, room), point[:-1] * scale
