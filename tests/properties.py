"""How many examples a property test draws, and how many of all pairs a test of pairs takes: the same ones every time.

With SHARDWRIGHT_EXAMPLES=20, 20 times as many examples, at random, and one that fails is made as small as it can be, which takes
minutes; and all pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("SHARDWRIGHT_EXAMPLES", "1"))


def pairs(rows: Sequence[str], columns: Sequence[str], whole: Sequence[str]) -> list[tuple[str, str]]:
    """Of the rows that are `whole` all pairs, of the others every second: each with half of the columns, spread evenly."""
    found = [(row, column, (i + k) % 2 == 0) for i, row in enumerate(rows) for k, column in enumerate(columns)]
    return [(row, column) for row, column, taken in found if taken or row in whole or TIMES > 1]


def examples(count: int) -> settings:
    """Settings of a test that draws `count` examples."""
    ignored = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if TIMES > 1 else [])],
        suppress_health_check=ignored,
    )
