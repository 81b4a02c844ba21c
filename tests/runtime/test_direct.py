"""What stands for an op does what the op does: over PyTorch's own samples, and for our own by their schemas."""

from __future__ import annotations

import inspect
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("expecttest", reason="torch's own samples of its ops need it")

from torch.testing._internal.common_methods_invocations import op_db

from shardwright.passes.ops.collectives import KERNELS, StaticCommunicator, ops, use_communicator
from shardwright.runtime.direct import _FUNCTIONS, direct, op_path

SAMPLES = 6
OTHERS = {"conv2d": "convolution", "layer_norm": "native_layer_norm", "matmul": "_unsafe_view"}
"""Functions whose samples call an aten op of another name."""


class Compare(TorchDispatchMode):
    """Runs every op both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        expected = func(*args, **kwargs)
        if direct(func) is not func:
            found = direct(func)(*args, **kwargs)
            self.seen.add(op_path(func)[1])
            taken = {memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True):
                same(a, b, taken, str(func))
        return expected


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def same(a: Any, b: Any, taken: set[int], what: str) -> None:
    """As values, in memory, and in whether they are views of the operands, whose memory is `taken`."""
    if not isinstance(a, Tensor):
        assert a == b, what
        return
    assert (a.dtype, a.stride(), a.device, a.is_conj()) == (b.dtype, b.stride(), b.device, b.is_conj()), what
    assert (memory(a) in taken) == (memory(b) in taken), what
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=what)


@pytest.mark.filterwarnings("ignore")
def test_public_functions_do_what_their_ops_do() -> None:
    torch.manual_seed(0)
    seen: set[str] = set()
    for op in op_db:
        name = op.name.rpartition(".")[2]
        if OTHERS.get(name, name) not in _FUNCTIONS:
            continue
        for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
            if dtype not in op.supported_dtypes("cpu"):
                continue
            for sample in islice(op.sample_inputs("cpu", dtype), SAMPLES):
                with torch.no_grad(), Compare() as mode:
                    op(sample.input, *sample.args, **sample.kwargs)
                seen |= mode.seen
    assert seen == set(_FUNCTIONS)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_take_what_their_schemas_say(name: str) -> None:
    wanted = [(arg.name, arg.default_value) for arg in getattr(ops, name).default._schema.arguments]
    parameters = [p for p in inspect.signature(KERNELS[name]).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    given = [(p.name, None if p.default is p.empty else p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(given) < len(parameters):
        assert parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL
        wanted = wanted[: len(given)]
    assert given == wanted


def test_ops_of_users_stay_as_they_are() -> None:
    assert direct(torch.ops.aten._softmax.default) is torch.ops.aten._softmax.default
    assert direct(torch.ops.aten.add.out) is torch.ops.aten.add.out
    assert direct(torch.ops.prims.mul.default) is torch.ops.prims.mul.default


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kernels_do_not_follow_the_users_default_device(device: str) -> None:
    x, seed = torch.randn(4, 6), torch.tensor(3)
    calls = [("shard_index", "tp", [3, 2]), ("arange_shard", 0, 2, "tp", [4, 4], torch.int64), ("dropout", x, seed, 0.5, 1)]
    with use_communicator(StaticCommunicator({"tp": 2}, {"tp": 1})):
        for name, *args in calls:
            expected = getattr(ops, name).default(*args)
            with torch.device(device):
                assert torch.equal(KERNELS[name](*args), expected)
