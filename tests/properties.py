"""How many examples a property test draws: the same ones every time.

With SHARDWRIGHT_EXAMPLES=20, 20 times as many, at random, and one that fails is made as small as it can be, which takes minutes.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

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
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if TIMES > 1 else [])],
        suppress_health_check=ignored,
    )
