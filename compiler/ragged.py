"""Batches whose other dims differ between data ranks (sequences of another length): what is exact for them, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..passes.ops.collectives import COMMUNICATION, ops
from ..passes.types import Partial
from ..runtime.errors import MismatchError
from ..runtime.faults import Control, Shapes
from ..runtime.program import RankProgram

aten = torch.ops.aten


def same_lengths(shapes: Sequence[Shapes], batch_inputs: Sequence[str]) -> bool:
    """Whether the ranks' batches differ in the number of samples alone."""
    return len({tuple(s[k][0][1:] for k in batch_inputs) for s in shapes}) == 1


def check_ragged(program: RankProgram, shapes: Sequence[Shapes], batch_inputs: Sequence[str], control: Control) -> None:
    """Refuse, on every rank, what would be wrong when data ranks hold batches of different lengths.

    A sum over the batch divided by what is counted at run time (cross-entropy over the tokens that are not ignored) is exact.
    Divided by a constant of one rank's shapes (a plain `.mean()`) it is not. A tensor that is exchanged over a data axis must
    have one shape on all ranks.
    """
    if same_lengths(shapes, batch_inputs):
        return
    data = tuple(axis for axis in program.mesh.axes if axis.startswith("dp"))
    problem = _fixed_count(program, data)
    exchanged = repr(_exchanged(program, data))
    problems, traffic = zip(*(text.split("\n", 1) for text in control.exchange_text(f"{problem}\n{exchanged}")), strict=True)
    found = next((p for p in problems if p), "")
    here = {axis: i for axis, i in program.coordinates.items() if axis not in data}
    same = [r for r in range(program.mesh.world_size) if _matches(program.mesh.coordinates(r), here)]
    if not found and len({traffic[r] for r in same}) > 1:
        found = "a tensor that depends on the length is exchanged between data ranks"
    if found:
        raise MismatchError(
            f"data ranks hold batches of different lengths, and {found}: pad the batches of all ranks to one length"
        )


def _matches(coordinates: Mapping[str, int], here: Mapping[str, int]) -> bool:
    return all(coordinates[axis] == i for axis, i in here.items())


def _nodes(program: RankProgram) -> list[fx.Node]:
    return [n for spec in program.graphs.values() for n in spec.graph.graph.nodes if n.op == "call_function"]


def _fixed_count(program: RankProgram, data: Sequence[str]) -> str:
    """Where a sum that the data ranks share is divided by a number, or "" """
    for node in _nodes(program):
        if node.target is aten.div.Tensor and not isinstance(node.args[1], fx.Node):
            types = node.meta.get("types", {})
            if node.meta.get("phase") == "forward" and any(isinstance(types.get(axis), Partial) for axis in data):
                return f"a mean is taken over them by a fixed count ({node.meta.get('source', node.name)})".replace("\n", " ")
    return ""


def _exchanged(program: RankProgram, data: Sequence[str]) -> list[tuple[str, str, str]]:
    """(op, axis, shapes of what the ranks hold together) of each collective: shards may differ, their wholes may not."""
    found = []
    for node in _nodes(program):
        if node.target in COMMUNICATION and str(node.args[1]).split("+")[0] in data:
            wholes = node if node.target in GATHERS else node.args[0]
            found.append((str(node.target), str(node.args[1]), str(map_arg(wholes, _shapes))))
    return found


GATHERS = frozenset({ops.all_gather.default, ops.all_gather_bucket.default})


def _shapes(node: fx.Node) -> Any:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else [tuple(v.shape) for v in value]
