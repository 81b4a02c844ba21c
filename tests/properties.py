"""How many examples a property test draws: the same ones every time; with SHARDWRIGHT_EXAMPLES=20, 20 times as many, at random."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("SHARDWRIGHT_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Settings of a test that draws `count` examples."""
    ignored = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=ignored,
    )
