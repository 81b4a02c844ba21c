"""A tensor that knows its whole: this rank's shard of a parameter, gradient or optimizer state.

Shape and dtype are those of the whole tensor; the memory is the shard alone. Elementwise ops, and so elementwise
optimizers, act on the shards; whatever would mix elements of different ranks raises one clear error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..compiler.torch_compat import wrapper_tensor, write_count
from ..passes.ops.collectives import ops, take_shard, use_communicator
from ..passes.types import flatten_sections
from .errors import ShardwrightError
from .program import Cut, Mesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .communicator import MeshCommunicator

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """How a rank's shard lies in the whole tensor.

    cuts           from the whole to the shard, in order; `cut.sections[s][i]` is what index `i` of the axis holds
    communicator   reaches the other shards; None after loading from a file. No part of equality.
    """

    mesh: Mesh
    rank: int
    cuts: tuple[Cut, ...] = field(default=())
    communicator: MeshCommunicator | None = field(default=None, compare=False, repr=False)

    def index(self, axis: str) -> int:
        """Where the rank stands on `axis`, which may join several with `+`."""
        return self.mesh.index(self.mesh.coordinates(self.rank), axis)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's shard of `whole`; a view where it is one piece."""
        for cut in self.cuts:
            whole = take_shard(whole, cut.dim, cut.sections, self.index(cut.axis))
        return whole

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        left = list(shape)
        for cut in self.cuts:
            left[cut.dim] = sum(section[self.index(cut.axis)] for section in cut.sections)
        return tuple(left)

    def join(self, local: Tensor) -> Tensor:
        """The whole, from every rank's shard. A collective over every axis of `cuts`."""
        if not self.cuts:
            return local
        if self.communicator is None:
            raise ShardwrightError(
                "a tensor loaded from a file has no peers to gather its whole from; load it into an optimizer or model first"
            )
        with torch.no_grad(), use_communicator(self.communicator):
            for cut in reversed(self.cuts):
                local = ops.all_gather(local, cut.axis, cut.dim, flatten_sections(cut.sections))
        return local

    def __str__(self) -> str:
        if not self.cuts:
            return "whole"
        parts = []
        for cut in self.cuts:
            sections = len(cut.sections)
            split = f", split={sections}" if sections > 1 else ""
            size = max(map(len, cut.sections))
            parts.append(f"Shard({cut.dim}{split}) {self.index(cut.axis)} of {size} over {cut.axis}")
        return ", ".join(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self


class _Writes:
    """How often a shard was written through the tensors that share it."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class ShardedTensor(Tensor):
    """A rank's shard `local` of a tensor of `shape`, lying in it as `layout` says.

    unreduced   of a gradient: what was computed under `no_sync()` and is still to be summed over ranks. Such a gradient
                takes no op but `zero_` until a step outside `no_sync()` has reduced it.
    """

    __slots__ = ("_layout", "_local", "_size", "_writes", "unreduced")
    _layout: Layout
    _local: Tensor
    _size: tuple[int, ...]
    _writes: _Writes
    unreduced: Tensor | None

    def __new__(cls, local: Tensor, layout: Layout, shape: Sequence[int]) -> ShardedTensor:
        made = wrapper_tensor(cls, tuple(shape), local.dtype, local.device)
        made._size = tuple(shape)
        made._local, made._layout, made._writes, made.unreduced = local, layout, _Writes(), None
        return made

    @property
    def sharding(self) -> Layout:
        """How the shard lies in the whole. (`layout` is torch's word for strided or sparse.)"""
        return self._layout

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the shard is written, through this tensor or through `to_local()`."""
        return self._writes.count, write_count(self._local)

    def to_local(self) -> Tensor:
        """This rank's shard itself, not a copy."""
        return self._local

    def add_reduced(self, shard: Tensor) -> None:
        """Of an unreduced gradient: add to the part that has been reduced."""
        self._local = self._local + shard

    def full_tensor(self) -> Tensor:
        """The whole tensor, the same on every rank. A collective over the axes it is cut on."""
        return _FullTensor.apply(self)

    def to_dtensor(self) -> DTensor:
        """The same values as a DTensor on the job's DeviceMesh; a shard that DTensor cannot hold is brought to plain
        `Shard` first. A collective. Raises ShardwrightError where there is no process group."""
        from .state import as_dtensor

        return as_dtensor(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        pending = ", not yet reduced" if self.unreduced is not None else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ShardedTensor({dtype} {list(self.shape)}, {self._layout}: {self._local}{pending}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = ShardedTensor(self._local.detach().clone(), self._layout, self.shape)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        cuts = tuple((cut.axis, cut.dim, cut.sections) for cut in self._layout.cuts)
        mesh = self._layout.mesh
        return rebuild_sharded, (self._local.detach(), tuple(self.shape), mesh.axes, mesh.sizes, self._layout.rank, cuts)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handler = _handler(func)
        if handler is None:
            raise refusal(func)
        return handler(func, args, kwargs or {})


def rebuild_sharded(
    local: Tensor, shape: tuple[int, ...], axes: tuple[str, ...], sizes: tuple[int, ...], rank: int, cuts: tuple[Any, ...]
) -> ShardedTensor:
    """What `torch.load` calls to restore a saved ShardedTensor; it does nothing else."""
    layout = Layout(Mesh(tuple(axes), tuple(sizes)), rank, tuple(Cut(axis, dim, tuple(map(tuple, s))) for axis, dim, s in cuts))
    return ShardedTensor(local, layout, shape)


torch.serialization.add_safe_globals([rebuild_sharded])


class _FullTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharded: ShardedTensor) -> Tensor:
        ctx.sharded = sharded.detach()
        found = sharded._layout.join(sharded._local)
        return found.view_as(found) if found is not sharded._local else found.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        layout = ctx.sharded._layout
        return ShardedTensor(layout.take(grad), layout, grad.shape)


def full_tensor(x: Tensor) -> Tensor:
    """The whole of `x`, whether it is sharded (a collective then) or ordinary."""
    found = getattr(x, "full_tensor", None)
    return found() if found is not None else x


def local_tensor(x: Tensor) -> Tensor:
    """This rank's memory of `x`, whether it is sharded or ordinary."""
    return x.to_local() if isinstance(x, ShardedTensor) else x


def refusal(func: Any) -> ShardwrightError:
    return ShardwrightError(
        f"{func.name()} mixes elements of a tensor of which this rank holds only a shard, so its result would be wrong. "
        "An optimizer must be elementwise (SGD, Adam, AdamW, RMSprop, Adagrad, ...); Adafactor, LBFGS, Muon and Shampoo are not, "
        "and torch.nn.utils.clip_grad_norm_ would see this rank's shards alone: call parallel.clip_grad_norm_(max_norm). "
        "To look at values use .full_tensor(), which gathers the whole, or .to_local(), this rank's shard."
    )


# --- dispatch -------------------------------------------------------------------------------------------------------

_PLAIN_OPS = frozenset(
    """detach alias clone copy_ _to_copy lift_fresh zero_ fill_ fill masked_fill masked_fill_ where
    empty_like zeros_like ones_like full_like""".split()
)
"""Elementwise without torch's tag `pointwise`."""

_SHARING = frozenset("detach alias lift_fresh".split())
"""Those whose result is the same memory."""

_FUSED = frozenset("_fused_adam_ _fused_adamw_ _fused_sgd_ _fused_adagrad_".split())
_FOREACH_MIXING = frozenset("norm max powsum mm".split())
_Handler = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


@functools.cache
def _base(func: Any) -> str:
    return func.name().split("::")[1].split(".")[0]


@functools.cache
def _handler(func: Any) -> _Handler | None:
    base = _base(func)
    if func in (aten.index_put_.default, aten.index_put.default):
        return _masked_put
    if func is aten.copy_.default:
        return _copy
    if base == "_amp_foreach_non_finite_check_and_unscale_":
        return _unscale
    if torch.Tag.nondeterministic_seeded in func.tags or torch.Tag.inplace_view in func.tags:
        return None
    if base in _FUSED or (base.startswith("_foreach_") and _is_elementwise_foreach(base)):
        return _per_position
    elementwise = torch.Tag.pointwise in func.tags or base in _PLAIN_OPS
    if not elementwise or torch.Tag.data_dependent_output in func.tags:
        return None
    return _elementwise if base in _SHARING else _update if _in_place(func) else _compute


def _is_elementwise_foreach(base: str) -> bool:
    name = base.removeprefix("_foreach_").removesuffix("_")
    if name in _FOREACH_MIXING:
        return False
    packet = getattr(aten, name, None)
    tagged = packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
    return tagged or name in ("zero", "copy")


@functools.cache
def _in_place(func: Any) -> bool:
    base = _base(func)
    return base.startswith("__i") if base.startswith("__") else base.endswith("_")


def _checked(x: ShardedTensor, func: Any) -> ShardedTensor:
    if x.unreduced is not None and _base(func) not in ("detach", "alias"):
        raise ShardwrightError(
            f"{func.name()} was called on a gradient that no_sync() left unreduced; run the last micro-batch of an accumulation "
            "outside no_sync(), so that gradients are summed over the ranks, before clipping or stepping (zero_grad() drops it)"
        )
    return x


def _operand(x: Any, like: ShardedTensor, func: Any) -> Any:
    """`x` as it takes part in an op on the shard of `like`."""
    if isinstance(x, ShardedTensor):
        same = x._layout is like._layout or x._layout == like._layout
        if (same and x.shape == like.shape) or (x.dim() == 0 and not x._layout.cuts):
            return x._local
        raise ShardwrightError(
            f"{func.name()} of tensors that are sharded differently: {list(like.shape)} ({like._layout}) and {list(x.shape)} "
            f"({x._layout})"
        )
    if isinstance(x, Tensor) and not (x.numel() == 1 and x.dim() <= like.dim()):
        raise ShardwrightError(
            f"{func.name()} of a sharded tensor {list(like.shape)} ({like._layout}) and an ordinary one {list(x.shape)}: an "
            "ordinary operand "
            "must be a single number; use .to_local() on both sides if it is a shard"
        )
    return x


def _alike(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The shards of operands that are numbers or reduced tensors of one layout and shape: nearly all that optimizers call, and
    they do so for each parameter. None for others, which `_operand` looks at one by one."""
    like = args[0]
    if not isinstance(like, ShardedTensor) or any(isinstance(x, Tensor) for x in kwargs.values()):
        return None
    found = []
    for x in args:
        if isinstance(x, ShardedTensor):
            if x._layout is not like._layout or x._size != like._size or x.unreduced is not None:
                return None
            found.append(x._local)
        elif isinstance(x, Tensor):
            return None
        else:
            found.append(x)
    return found


def _wrap(result: Any, like: ShardedTensor) -> Any:
    if isinstance(result, Tensor):
        return ShardedTensor(result, like._layout, like._size)
    if isinstance(result, list | tuple):
        return [_wrap(r, like) for r in result]
    return result


def _update(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An elementwise op in place."""
    operands = _alike(args, kwargs)
    if operands is None:
        return _elementwise(func, args, kwargs)
    func(*operands, **kwargs)
    args[0]._writes.count += 1
    return args[0]


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An elementwise op that gives new memory."""
    operands = _alike(args, kwargs)
    return _elementwise(func, args, kwargs) if operands is None else _wrap(func(*operands, **kwargs), args[0])


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    sharded = [x for x in (*args, *kwargs.values()) if isinstance(x, ShardedTensor)]
    like = next((x for x in sharded if x.dim()), sharded[0])
    target = kwargs.get("out", args[0] if _in_place(func) else None)
    if isinstance(target, ShardedTensor) and target.unreduced is not None and _base(func) == "zero_":
        target.unreduced.zero_()
        target._local = torch.zeros_like(target._local)
        return target
    for x in sharded:
        _checked(x, func)
    if isinstance(target, ShardedTensor):
        like = target
    elif target is not None:
        raise refusal(func)
    result = func(*(_operand(x, like, func) for x in args), **{k: _operand(x, like, func) for k, x in kwargs.items()})
    if target is not None:
        target._writes.count += 1
        return target
    wrapped = _wrap(result, like)
    if _base(func) in _SHARING:  # the same memory: what is written is written to both
        wrapped._writes, wrapped.unreduced = like._writes, like.unreduced
    return wrapped


def _copy(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`copy_` also takes an ordinary tensor of the whole's shape, of which the shard is taken."""
    target, source = args[:2]
    if isinstance(target, ShardedTensor) and not isinstance(source, ShardedTensor) and source.shape == target.shape:
        _checked(target, func)._local.copy_(target._layout.take(source))
        target._writes.count += 1
        return target
    return _elementwise(func, args, kwargs)


def _masked_put(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`x[mask] = number` is elementwise; any other indexing is not."""
    x, indices, value = args[:3]
    mask = indices[0] if len(indices) == 1 else None
    if not (isinstance(x, ShardedTensor) and isinstance(mask, ShardedTensor) and mask.dtype == torch.bool and value.numel() == 1):
        raise refusal(func)
    result = func(_checked(x, func)._local, [_operand(mask, x, func)], value, *args[3:], **kwargs)
    if not _in_place(func):
        return _wrap(result, x)
    x._writes.count += 1
    return x


def _position(items: Sequence[Any], others: Sequence[Sequence[Any]], i: int) -> ShardedTensor | None:
    return next((x[i] for x in (items, *others) if isinstance(x[i], ShardedTensor)), None)


def _per_position(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An op over lists: position i of every list makes one elementwise op. Ordinary tensors may stand at other positions."""
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, list | tuple) and any(isinstance(t, Tensor) for t in x)]
    for x in (t for items in lists for t in items if isinstance(t, ShardedTensor)):
        _checked(x, func)
    likes = [_position(lists[0], lists[1:], i) for i in range(len(lists[0]))]

    def local(x: Any) -> Any:
        if isinstance(x, ShardedTensor):
            raise refusal(func)
        if not isinstance(x, list | tuple) or not any(isinstance(t, Tensor) for t in x):
            return x
        return [t if like is None else _operand(t, like, func) for t, like in zip(x, likes, strict=True)]

    result = func(*(local(x) for x in args), **{k: local(x) for k, x in kwargs.items()})
    if _in_place(func):
        for x in args[0]:
            if isinstance(x, ShardedTensor):
                x._writes.count += 1
        return None
    return [r if like is None else _wrap(r, like) for r, like in zip(result, likes, strict=True)]


def _unscale(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """GradScaler's unscaling. Whether a gradient is infinite is asked of all ranks, so that all skip the step or none."""
    tensors, found_inf, scale = args
    sharded = next(x for x in tensors if isinstance(x, ShardedTensor))
    func([_checked(x, func)._local if isinstance(x, ShardedTensor) else x for x in tensors], found_inf, scale, **kwargs)
    layout = sharded._layout
    if layout.communicator is not None and layout.mesh.world_size > 1:
        found_inf.copy_(layout.communicator.all_reduce(found_inf, "+".join(layout.mesh.axes), "max"))
