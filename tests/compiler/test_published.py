"""The cost model against published step times of fused-attention training runs, for the constants of the shipped profiles.

Step times are derived from the tokens/s that the sources print: mosaicml/llm-foundry scripts/train/benchmarking/README.md
(MPT), pytorch/torchtitan docs/performance.md and benchmarks/ (Llama 2 and 3), MooreThreads/SimuMax docs/b200 (Llama 3 cut to 12
and 4 layers).
"""

import math
import statistics

import pytest

from shardwright.compiler.topology import Topology
from tests.compiler.transformer import Run, step_seconds

# (profile, devices, seconds a step, run)
ROWS = [
    ("a100-80", 8, 3.6, Run(12, 768, 3072, 12, 12, 50368, 32768, 8, 1, 1, 32, 2, 2, 3, "none")),
    ("a100-80", 8, 2.23, Run(24, 1024, 4096, 16, 16, 50368, 2048, 8, 1, 1, 512, 32, 2, 3, "none")),
    ("a100-80", 8, 5.591, Run(24, 2048, 8192, 16, 16, 50368, 2048, 8, 1, 1, 448, 14, 2, 3, "none")),
    ("a100-80", 8, 10.13, Run(32, 2560, 10240, 20, 20, 50368, 512, 8, 1, 1, 1920, 40, 2, 3, "none")),
    ("a100-80", 8, 5.432, Run(40, 5120, 20480, 40, 40, 50368, 2048, 8, 1, 1, 48, 2, 2, 3, "none")),
    ("a100-40", 8, 1.387, Run(12, 768, 3072, 12, 12, 50368, 4096, 8, 1, 1, 312, 13, 2, 3, "none")),
    ("a100-40", 8, 4.71, Run(24, 1536, 6144, 12, 12, 50368, 16384, 8, 1, 1, 32, 1, 2, 3, "none")),
    ("a100-40", 8, 7.467, Run(32, 2560, 10240, 20, 20, 50368, 4096, 8, 1, 1, 128, 2, 2, 3, "none")),
    ("a100-80", 64, 2.755, Run(32, 4096, 14336, 32, 8, 128256, 8192, 64, 1, 1, 64, 1, 3, 3, "selective")),
    ("a100-80", 64, 3.789, Run(40, 5120, 13824, 40, 40, 32000, 4096, 64, 1, 1, 128, 2, 3, 3, "none")),
    ("a100-80", 64, 23.21, Run(80, 8192, 28672, 64, 8, 32000, 4096, 64, 1, 1, 128, 2, 3, 3, "full")),
    ("h100", 8, 3.534, Run(24, 1536, 6144, 12, 12, 50368, 16384, 8, 1, 1, 48, 3, 2, 3, "none")),
    ("h100", 8, 0.6308, Run(24, 2048, 8192, 16, 16, 50368, 2048, 8, 1, 1, 112, 14, 2, 3, "none")),
    ("h100", 8, 4.543, Run(32, 2560, 10240, 20, 20, 50368, 1024, 8, 1, 1, 960, 20, 2, 3, "none")),
    ("h100", 256, 1.214, Run(32, 4096, 16384, 32, 32, 50368, 2048, 256, 1, 1, 1536, 6, 2, 3, "none")),
    ("h100", 64, 2.807, Run(32, 4096, 14336, 32, 8, 128256, 8192, 8, 8, 1, 96, 12, 3, 3, "selective", True)),
    ("h100", 128, 2.515, Run(32, 4096, 14336, 32, 8, 128256, 8192, 128, 1, 1, 256, 2, 3, 3, "selective")),
    ("h100", 256, 27.43, Run(80, 8192, 28672, 64, 8, 128256, 8192, 32, 8, 1, 512, 16, 3, 3, "full", True)),
    ("b200", 8, 0.4098, Run(12, 8192, 28672, 64, 8, 128256, 4096, 2, 4, 1, 8, 1, 3, 1, "none", True)),
    ("b200", 8, 5.436, Run(12, 8192, 28672, 64, 8, 128256, 4096, 4, 1, 2, 128, 1, 3, 1, "none")),
    ("b200", 8, 3.455, Run(4, 16384, 53248, 128, 16, 128256, 4096, 2, 4, 1, 64, 1, 3, 1, "none", True)),
    ("b200", 8, 7.046, Run(4, 16384, 53248, 128, 16, 128256, 4096, 4, 1, 2, 128, 1, 3, 1, "none")),
]


def ratio(profile, devices, seconds, run):
    return step_seconds(run, Topology.preset(profile, devices=devices)) / seconds


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[3].hidden}-{row[3].seq}")
def test_every_published_step_is_met_within_a_third(row):
    assert 1 / 1.35 < ratio(*row) < 1.35


def test_half_of_them_within_a_tenth():
    assert statistics.median(abs(math.log(ratio(*row))) for row in ROWS) < 0.1
