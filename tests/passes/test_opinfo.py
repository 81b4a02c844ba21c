"""Sharding rules by execution over PyTorch's own samples: a seeded tenth of the entries, or all with `--ops` (`make test-ops`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

pytest.importorskip("expecttest", reason="torch's own samples of its ops need it")

from op_table import EXAMINED
from opinfo import ENTRIES, examine, sharing

from shardwright.runtime.reuse import is_view

TENTH = sorted(random.Random(0).sample(sorted(ENTRIES), len(ENTRIES) // 10))
SHARDED = 500
"""Entries that must have at least one real sharding, with room for a tenth of them, and for older versions of torch."""


DEPENDS = "its shape or a branch depends on the values of tensors"
WRITES = "it writes to its input"
CUDA = "for CUDA alone"
SPARSE = "its operand is sparse"
REFUSED = {
    "_batch_norm_with_update": WRITES,
    "_native_batch_norm_legit": WRITES,
    "allclose": DEPENDS,
    "argwhere": DEPENDS,
    "bincount": DEPENDS,
    "cauchy": WRITES,
    "combinations": DEPENDS,
    "corrcoef": DEPENDS,
    "cov": DEPENDS,
    "equal": DEPENDS,
    "exponential": WRITES,
    "geometric": WRITES,
    "jiterator_2inputs_2outputs": CUDA,
    "jiterator_4inputs_with_extra_args": CUDA,
    "jiterator_binary": CUDA,
    "jiterator_binary_return_by_ref": CUDA,
    "jiterator_unary": CUDA,
    "linalg.lstsq": DEPENDS,
    "linalg.lstsq.grad_oriented": DEPENDS,
    "log_normal": WRITES,
    "masked_select": DEPENDS,
    "nn.functional.gaussian_nll_loss": DEPENDS,
    "nn.functional.instance_norm": WRITES,
    "nonzero": DEPENDS,
    "normal.in_place": WRITES,
    "sparse.mm.reduce": SPARSE,
    "sparse.sampled_addmm": SPARSE,
    "tensor_split": DEPENDS,
    "uniform": WRITES,
    "unique": DEPENDS,
    "unique_consecutive": DEPENDS,
}
"""Entries of which no sample can be captured, and why."""

FAILED = {"as_strided.partial_views": "it reads beyond its own elements, in memory that a copy has not"}
"""Entries with samples whose capture ends in another error than the project's own refusal, and why."""


def chosen(config: pytest.Config) -> list[str]:
    return sorted(ENTRIES) if config.getoption("--ops") else TENTH


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize("entry", chosen(metafunc.config))


@pytest.mark.filterwarnings("ignore")
def test_every_strategy_gives_what_one_rank_gives(entry: str, record_property: Callable[[str, object], None]) -> None:
    found = examine(entry)
    record_property(EXAMINED, asdict(replace(found, offered=sorted(found.offered), whole=sorted(found.whole))))
    assert not found.wrong, "\n".join(found.wrong[:5])
    add = f"mend capture, or add {entry!r} to {{}} in tests/passes/test_opinfo.py, with the reason"
    assert not found.failed or entry in FAILED, f"{found.failed[0]}: {add.format('FAILED')}"
    assert not found.refused or entry in REFUSED, f"no sample is captured: {found.refused}: {add.format('REFUSED')}"
    assert found.refused or entry not in REFUSED, f"{entry!r} is captured now: take it from REFUSED"
    if found.refused:
        pytest.skip(f"not captured: {found.refused}")


def test_the_entries_that_are_named_exist() -> None:
    assert {*REFUSED, *FAILED} <= {*ENTRIES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900)
def test_most_entries_have_a_real_sharding(pytestconfig: pytest.Config) -> None:
    """Of the tenth, as large a share as of all."""
    names = chosen(pytestconfig)
    sharded = sum(bool(examine(name, execute=False).offered) for name in names)
    assert sharded >= SHARDED * len(names) / len(ENTRIES), f"{sharded} of {len(names)}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900)
def test_results_of_several_lie_apart(pytestconfig: pytest.Config) -> None:
    """Or the op is known for a view: else one result might be written over while another is still to be read."""
    found = {op for name in chosen(pytestconfig) for op in sharing(name) if not is_view(op)}
    assert not found
    assert {str(op) for op in sharing("unsafe_split")} == {"aten.unsafe_split.Tensor"}, "what shares is found"
