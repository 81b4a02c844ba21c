"""Ranks that hold different models, or read them differently, are found out before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, fx, nn

from ..passes.check_schedules import collectives_of
from ..passes.graph_tools import where
from ..runtime.errors import MismatchError
from ..runtime.faults import Control
from ..runtime.program import Mesh, RankProgram
from .plan import Plan


def same_request(control: Control, request: Mapping[str, object]) -> None:
    """Raises MismatchError, on every rank, naming the first argument of `auto_parallelize` that differs. A collective."""
    _same(control, [f"{name}={value}" for name, value in request.items()], "ask for different plans")


def same_model(control: Control, model: nn.Module) -> None:
    """Raises MismatchError, on every rank, naming the first parameter or buffer that differs. A collective."""
    facts = [f"parameter {n}: {_kind(p)}{'' if p.requires_grad else ', frozen'}" for n, p in model.named_parameters()]
    facts += [f"buffer {n}: {_kind(b)}" for n, b in model.named_buffers()]
    _same(control, facts, "hold different models")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def same_graph(control: Control, plan: Plan, gm: fx.GraphModule, *, same_shapes: bool) -> None:
    """Raises MismatchError, on every rank, naming the first op that differs. A collective.

    same_shapes   whether all ranks captured the call at the same shapes: if not, only the ops are compared
    """
    _same(control, [f"plan {plan.hash}"], "made different plans")
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    _same(
        control,
        [f"{n.target}{n.args if same_shapes else ''}" for n in nodes],
        "captured different graphs of the model (its code, or an option that the code reads, differs)",
        lambda i: where(nodes[i]),
    )


def same_collectives(control: Control, program: RankProgram) -> None:
    """Raises MismatchError, on every rank, naming the first collective in which the ranks of an axis would not meet. A collective.

    Ranks that were given batches of other lengths run graphs of other shapes, each rewritten by itself.
    """
    own = collectives_of(program)
    digests = {axis: hashlib.sha256("\n".join(what for what, _ in steps).encode()).hexdigest() for axis, steps in own.items()}
    everyone = [json.loads(text) for text in control.exchange_text(json.dumps(digests))]
    mesh = program.mesh
    for axis in sorted({axis for found in everyone for axis in found}):
        apart = next((pair for pair in _neighbours(mesh, axis) if everyone[pair[0]].get(axis) != everyone[pair[1]].get(axis)), None)
        if apart is None:
            continue
        lists = [json.loads(text) for text in control.exchange_text(json.dumps(own.get(axis, [])))]
        one, other = (lists[rank] for rank in apart)
        pairs = enumerate(zip(one, other, strict=False))
        first = next((k for k, (a, b) in pairs if a[0] != b[0]), min(len(one), len(other)))
        places = (f"rank {r}: {' in '.join(lists[r][first]) if first < len(lists[r]) else 'nothing more'}" for r in apart)
        raise MismatchError(f"ranks would not meet in their collectives over {axis!r}:\n  " + "\n  ".join(places))


def _neighbours(mesh: Mesh, axis: str) -> Iterator[tuple[int, int]]:
    """Pairs of ranks that `axis` joins, every rank that it joins being in one."""
    for rank in range(mesh.world_size):
        group = mesh.ranks_on(rank, axis)
        if rank in group:
            yield group[0], rank


def _same(control: Control, facts: Sequence[str], what: str, describe: Callable[[int], str] = lambda i: "") -> None:
    """Compare hashes; only where they differ do texts travel."""
    digests = control.exchange_text(hashlib.sha256("\n".join(facts).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone = [text.split("\n") for text in control.exchange_text("\n".join(facts))]
    longest = max(map(len, everyone))
    first = next(i for i in range(longest) if len({lines[i] if i < len(lines) else None for lines in everyone}) > 1)
    place = describe(first) if first < len(facts) else ""
    own = [(lines[first] if first < len(lines) else "nothing more") for lines in everyone]
    places = control.exchange_text(place)
    held: dict[str, list[int]] = {}
    for rank, (text, at) in enumerate(zip(own, places, strict=True)):
        held.setdefault(f"{text}{f', at {at}' if at else ''}", []).append(rank)
    lines = "".join(f"\n  rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}: {text}" for text, r in held.items())
    raise MismatchError(f"ranks {what}; the first difference:{lines}")
