"""PyTorch's own samples of its ops (OpInfo), as the op calls that sharding rules see.

An entry's function is captured and normalized as any model is; every op of the graph is then a sample with the tensors that it
had. `examine` runs each under every strategy that its rule offers.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from samples import is_sharded, pairs
from torch import Tensor, fx, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwright.compiler.capture import capture
from shardwright.compiler.capture_error import CaptureError
from shardwright.compiler.check_rule import Run, Sample, check_lowered, check_strategy, runs, splits_of
from shardwright.passes.normalize import normalize
from shardwright.passes.rules.base import RULES, Axis, OpCall, Strategy, strategies

CANDIDATES, SAMPLES, ELEMENTS = 60, 4, 2000
"""Of an entry: how many of its samples are looked at and how many are examined; the largest tensor in one."""

STRATEGIES = 24
"""Of an op call along one axis: how many are executed, evenly taken from what is offered."""

DTYPES = (torch.float64, torch.int64, torch.bool, torch.float32, torch.complex128)
ENTRIES = {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in op_db}
TWO, THREE = Axis("x", 2), Axis("x", 3)


UNWRITTEN = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty")}
"""Ops whose results hold what was in memory before: there is nothing to compare."""


class Function(nn.Module):
    """`op(input, *args, **kwargs)` of a sample, as a function of its tensors alone."""

    def __init__(self, op: Any, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.held = (op, list(leaves), spec)

    def forward(self, *tensors: Tensor) -> Any:
        op, leaves, spec = self.held
        rest = iter(tensors)
        given, args, kwargs = tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        found = op(given, *args, **kwargs)
        return tuple(x for x in tree_flatten(found)[0] if isinstance(x, Tensor))


@dataclass
class Examined:
    """What came of an entry.

    refused    why none of its samples was captured, "" if one was: the project's own refusal
    failed     samples whose capture failed otherwise
    offered    (family, op, label) of every real sharding that its ops were offered
    whole      (family, op) of calls that were offered none
    wrong      strategies that gave another result than one rank
    """

    refused: str = ""
    failed: list[str] = field(default_factory=list)
    offered: set[tuple[str, str, str]] = field(default_factory=set)
    whole: set[tuple[str, str]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    tried: int = 0


class _Recorder(fx.Interpreter):
    """Keeps the calls of a graph with the tensors they had."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.calls: list[Sample] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.overloadpacket not in UNWRITTEN:
            self.calls.append(Sample(target, args, kwargs))
        return super().call_function(target, args, kwargs)


def samples_of(name: str) -> list[tuple[Any, list[Any], Any]]:
    """(op, leaves, spec) of some samples of an entry: the first, and those with the most dims to cut."""
    op = ENTRIES[name]
    dtype = next((d for d in DTYPES if d in op.supported_dtypes("cpu")), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    found: list[tuple[int, tuple[Any, list[Any], Any]]] = []
    for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), CANDIDATES):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if isinstance(sample.input, Tensor | list | tuple) and tensors and all(0 < t.numel() <= ELEMENTS for t in tensors):
            found.append((sum(size > 1 for size in tensors[0].shape), (op, leaves, spec)))
    first, rest = found[:1], sorted(found[1:], key=lambda item: -item[0])
    return [sample for _, sample in (*first, *rest[: SAMPLES - 1])]


def calls_of(sample: tuple[Any, list[Any], Any]) -> list[Sample]:
    """The op calls of a sample, which is captured and normalized as any model is."""
    op, leaves, spec = sample
    tensors = [x.clone() for x in leaves if isinstance(x, Tensor)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = capture(Function(op, leaves, spec), tuple(tensors), {})
        gm = normalize(found.graph)
    given = {**found.call.flatten(tuple(tensors), {}), **found.constants, "seed": torch.tensor(3)}
    recorder = _Recorder(gm)
    recorder.run(*(given[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"))
    return recorder.calls


def examine(name: str, *, execute: bool = True) -> Examined:
    """What the rules offer for every op of an entry, over two and three ranks and over two by two; `execute`: and run it."""
    found, refused, captured = Examined(), "", False
    for sample in samples_of(name):
        try:
            calls = calls_of(sample)
        except CaptureError as error:
            refused = _text(error)
        except Exception as error:
            found.failed.append(_text(error))
        else:
            captured = True
            for call in calls:
                _examine_call(call, found, execute)
    found.refused = "" if captured else refused
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _examine_call(sample: Sample, found: Examined, execute: bool) -> None:
    place = family(sample.target), str(sample.target)
    offered = False
    for whole in runs(sample):
        for axis in (TWO, THREE):
            shardings = real_shardings(whole.call, axis)
            found.offered |= {(*place, s.label.partition("#")[0]) for s in shardings}
            offered |= bool(shardings)
            if execute:
                _try_all(sample, whole, axis, shardings, found)
        if execute:
            _try_pairs(sample, whole, found)
    if not offered:
        found.whole.add(place)


def family(target: Any) -> str:
    """The file in passes/rules that an op's rule stands in."""
    rule = RULES.get(target)
    if rule is not None:
        return rule.__module__.rpartition(".")[2]
    return "pointwise" if torch.Tag.pointwise in getattr(target, "tags", ()) else "no rule"


def real_shardings(call: OpCall, axis: Axis) -> list[Strategy]:
    """Strategies under which some value is cut."""
    offered = strategies(call, axis, splits_of(call, axis.size))
    return [s for s in offered if is_sharded(s)]


def _try_all(sample: Sample, whole: Run, axis: Axis, offered: Sequence[Strategy], found: Examined) -> None:
    step = max(1, len(offered) // STRATEGIES)
    for strategy in offered[::step]:
        found.tried += 1
        try:
            check_strategy(sample, whole, axis, strategy)
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            found.wrong.append(f"{_text(error)} [{notes}]")


def _try_pairs(sample: Sample, whole: Run, found: Examined) -> None:
    for label, path in pairs(whole.call):
        found.tried += 1
        try:
            check_lowered(sample, whole, path)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            found.wrong.append(f"{type(error).__name__}: {text} [{sample} over 2 x 2 ranks, {label!r} first]")


class _Sharing(TorchDispatchMode):
    """Notes ops of several results of which some lie in memory of another, or of an operand, and whose schemas do not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x.numel()]
        silent = not any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))
        if isinstance(out, tuple | list) and silent:
            given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.numel()}
            places = [x.untyped_storage().data_ptr() for x in results]
            if len(set(places)) < len(places) or given & set(places):
                self.found.add(func)
        return out


def sharing(name: str, samples: int = 12) -> set[Any]:
    """The ops that an entry's samples come to, forward and backward, whose results share memory in silence."""
    op = ENTRIES[name]
    dtype = next((d for d in (torch.float64, torch.float32, torch.int64) if d in op.supported_dtypes("cpu")), torch.float32)
    grad = op.supports_autograd and dtype.is_floating_point
    with _Sharing() as mode:
        for sample in itertools.islice(_samples(op, dtype, grad), samples):
            try:
                leaves = tree_flatten(op(sample.input, *sample.args, **sample.kwargs))[0]
                given = tree_flatten((sample.input, sample.args, sample.kwargs))[0]
                roots = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
                wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
                if roots and wanted:
                    torch.autograd.grad([x.abs().sum() for x in roots], wanted, allow_unused=True)
            except Exception:  # a sample that is not for CPUs, or has no derivative: there is nothing to look at
                continue
    return mode.found


def _samples(op: Any, dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    try:
        yield from op.sample_inputs("cpu", dtype, requires_grad=grad)
    except Exception:
        return
