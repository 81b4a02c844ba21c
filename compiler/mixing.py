"""Plans between two layouts: some of the repeated blocks lie in those that are fast, the others in those that take fewer bytes.

Where like blocks lie alike, a model has as many layouts as one block; the fastest that fit may leave much of the limit unused. With
some blocks in each of two, seconds and bytes lie between those of the two, in steps of a block (and of what values take to change
their types where blocks of the one kind follow on those of the other).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .dual import between
from .families import Family
from .groups import evenly
from .layouts import Layouts, Mixed

if TYPE_CHECKING:
    from .candidates import Candidate


DEARER = (1.05, 1.2)
"""At prices at which two layouts cost about the same, no block may take the other's, for values change their types at its borders.
Blocks do where bytes cost so many times as much; where more than they have to, the plan takes longer."""

NEAR = 0.005
"""Plans that take no more than such a share longer than what would lie between two layouts are near."""


def mixtures(family: Family, least: float, thoroughly: bool) -> Iterator[Candidate]:
    """Of the two of the family's layouts between which the fastest plan should lie that fits, by what is known of them. What is
    outside of blocks lies in one or the other.

    least         seconds: plans that fit and take as many are left out, for they pay for two layouts with nothing
    thoroughly    where none is near, bytes are dearer in the blocks of the layouts that fit
    """
    found = between(family.look())
    steps = evenly(family.search.runs, family.plan.stages)
    if found is None or found.seconds >= least or len(steps) < 2:
        return
    over, within = (family.explored.layouts[k] for k in (found.over, found.within))
    made = itertools.chain(
        _divided(family, over, within, steps, found.share, smaller=True),
        _divided(family, within, over, steps, 1 - found.share, smaller=False),
    )
    dearer = (_divided(family, over, within.dearer(times), steps, found.share, smaller=True) for times in DEARER)
    fastest, near = least, min(least, found.seconds * (1 + NEAR))
    for tried in (made, *(dearer if thoroughly else ())):
        for c in tried:
            fits = family.search.fits(c)
            if not fits or c.predicted.step_seconds < least:
                fastest = min(fastest, c.predicted.step_seconds) if fits else fastest
                yield c
        if fastest < near:
            return


def _divided(
    family: Family, most: Layouts, others: Layouts, steps: Sequence[tuple[int, ...]], share: float, smaller: bool
) -> Iterator[Candidate]:
    """With as many blocks in the other layouts as divides those that fit from those that do not, which is about a share of them.
    smaller: whether these layouts take fewer bytes."""
    search, (whole, *_) = family.search, family.whole
    blocks = list(itertools.accumulate(steps))
    low, high, count, stride = 0, len(steps), round(share * len(steps)), 1
    while low < high - 1:
        count = count if low < count < high else (low + high) // 2
        layouts = replace(most, mixed=Mixed(tuple(sorted(blocks[count - 1])), others))
        found = search.price(replace(family.plan, whole=whole.names, layouts=layouts), whole)
        yield found
        if search.fits(found) == smaller:
            high, count = count, count - stride
        else:
            low, count = count, count + stride
        stride *= 2
