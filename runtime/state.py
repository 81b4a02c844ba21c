"""State dicts of a sharded model: under the model's own names, sharded as DTensors or whole, and loaded from either."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compiler.torch_compat import incompatible_keys
from ..passes.types import chunk_sizes
from .communicator import ProcessGroupCommunicator
from .errors import ShardwrightError
from .faults import gather_texts
from .parameters import PIPELINE, ParameterStore
from .sharded import Layout, ShardedTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_device_meshes: weakref.WeakKeyDictionary[ProcessGroupCommunicator, DeviceMesh] = weakref.WeakKeyDictionary()


def parameter_names(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """(name, persistent) of every parameter and buffer in the order of the model's state dict; tied ones under each name."""
    persistent = set(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for leaf, _ in own:
            name = f"{prefix}.{leaf}" if prefix else leaf
            yield name, name in persistent


# --- DTensors -------------------------------------------------------------------------------------------------------


def _tensor_axes(layout: Layout) -> tuple[str, ...]:
    """The axes that a DTensor of one stage lives on."""
    return tuple(axis for axis in layout.mesh.axes if axis != PIPELINE and layout.mesh.size(axis) > 1)


def _mesh_of(layout: Layout) -> DeviceMesh | None:
    """The job's DeviceMesh (of this rank's stage, under a pipeline), None where there is none.

    Made of the groups that the communicator has, without talking to anyone: stages may ask for it at different times.
    """
    communicator = layout.communicator
    axes = _tensor_axes(layout)
    if not isinstance(communicator, ProcessGroupCommunicator) or not dist.is_initialized() or not axes:
        return None
    found = _device_meshes.get(communicator)
    if found is None:
        from torch.distributed.device_mesh import DeviceMesh

        mesh, here = layout.mesh, layout.mesh.coordinates(communicator.rank)
        whole = torch.arange(mesh.world_size).view(mesh.sizes)
        ranks = whole[tuple(here[axis] if axis == PIPELINE else slice(None) for axis in mesh.axes)].view(
            [mesh.size(a) for a in axes]
        )
        groups = [communicator.process_group(axis) for axis in axes]
        found = DeviceMesh.from_group(
            groups if len(groups) > 1 else groups[0], communicator.device.type, ranks, mesh_dim_names=axes
        )
        _device_meshes[communicator] = found
    return found


def _placements(layout: Layout) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Replicate, Shard

    dims = {axis: cut.dim for cut in layout.cuts for axis in cut.axis.split("+")}
    return tuple(Shard(dims[axis]) if axis in dims else Replicate() for axis in _tensor_axes(layout))


def is_plain(layout: Layout) -> bool:
    """Whether DTensor holds the same shards: each dim cut in the mesh's order, in one section, as torch.chunk cuts.

    The same on every rank that holds part of the tensor.
    """
    of_dim: dict[int, list[Any]] = {}
    for cut in layout.cuts:
        of_dim.setdefault(cut.dim, []).append(cut)
    for cuts in of_dim.values():
        if any(len(cut.sections) > 1 for cut in cuts):
            return False
        order = [layout.mesh.axes.index(axis) for cut in cuts for axis in cut.axis.split("+")]
        lengths = [cut.sections[0] for cut in cuts]
        if len(order) > 1 and (order != sorted(order) or any(len(set(row)) > 1 for row in lengths)):
            return False
        if len(order) == 1 and lengths[0] != chunk_sizes(sum(lengths[0]), len(lengths[0])):
            return False
    return True


def dtensor_of(x: ShardedTensor) -> DTensor | None:
    """`x` as a DTensor over the same memory, None where DTensor cannot hold its shards or there is no process group."""
    mesh = _mesh_of(x.sharding)
    if mesh is None or not is_plain(x.sharding):
        return None
    from torch.distributed.tensor import DTensor

    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(x.to_local(), mesh, _placements(x.sharding), run_check=False, shape=x.shape, stride=stride)


def as_dtensor(x: ShardedTensor) -> DTensor:
    """`x` as a DTensor: over the same memory if DTensor can hold its shards, else brought to plain `Shard`. A collective."""
    found = dtensor_of(x)
    if found is not None:
        return found
    mesh = _mesh_of(x.sharding)
    if mesh is None:
        raise ShardwrightError("a DTensor needs a process group; without one use .full_tensor() or .to_local()")
    from torch.distributed.tensor import DTensor

    placements = _placements(x.sharding)
    local = x.full_tensor()
    for axis, placement in zip(mesh.mesh_dim_names or (), placements, strict=True):
        if placement.is_shard():
            dim, index = placement.dim, mesh.get_local_rank(axis)  # type: ignore[attr-defined]
            sizes = chunk_sizes(local.shape[dim], mesh[axis].size())
            local = local.narrow(dim, sum(sizes[:index]), sizes[index])
    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(local.clone(), mesh, placements, run_check=False, shape=x.shape, stride=stride)


# --- saving ---------------------------------------------------------------------------------------------------------


def held_tensor(store: ParameterStore, name: str) -> ShardedTensor:
    """This rank's part of a parameter or buffer, knowing its whole."""
    if name in store.buffers:
        spec = store.buffer_specs[name]
        return ShardedTensor(store.buffers[name], store.layout(spec), spec.shape)
    slot = store.slots[name]
    p = slot.parameter.detach()
    return p if isinstance(p, ShardedTensor) else ShardedTensor(p, slot.layout, slot.spec.shape)


def _names(store: ParameterStore, model: nn.Module) -> dict[str, str]:
    """Name in the state dict -> name in the store, for the whole model, in the model's order."""
    facts = {fact.name: fact for held in store.directory for fact in held.values()}
    homes = {name: fact.name for fact in facts.values() for name in (fact.name, *fact.aliases)}
    return {name: homes[name] for name, persistent in parameter_names(model) if persistent and name in homes}


def state_dict(store: ParameterStore, model: nn.Module, *, full: bool, rank0_only: bool, cpu_offload: bool) -> dict[str, Any]:
    """See `ParallelModule.state_dict`."""
    names = _names(store, model)
    here = store.directory[store.stage]
    keep = not full or not rank0_only or store.communicator.rank == 0
    made: dict[str, Any] = {}
    for held in dict.fromkeys(names.values()):
        if full:
            value = _whole(store, held)
        elif held in here:
            value = _sharded(held_tensor(store, held))
        else:
            continue
        if keep:
            made[held] = value.cpu() if cpu_offload and not isinstance(value, ShardedTensor) else value
    return {name: made[held] for name, held in names.items() if held in made}


def _sharded(x: ShardedTensor) -> Tensor:
    """As a DTensor; where that cannot be, an ordinary tensor if it is whole, else the ShardedTensor itself."""
    if _mesh_of(x.sharding) is not None:
        return as_dtensor(x)
    return x if x.sharding.cuts else x.to_local()


def _whole(store: ParameterStore, name: str) -> Tensor:
    """The whole tensor, on every rank: gathered in the stage that has it, then sent to the other stages."""
    here = name in store.directory[store.stage]
    owner = store.owner(name)
    if here and (owner == store.stage or len(store.directory) == 1):
        value = held_tensor(store, name).full_tensor().detach()
    else:
        fact = store.directory[owner][name]
        value = torch.empty(fact.shape, dtype=fact.dtype, device=store.device)
    if len(store.directory) > 1:
        value = store.communicator.broadcast(value.contiguous(), PIPELINE, owner)
    return value


# --- loading --------------------------------------------------------------------------------------------------------


def load_state_dict(store: ParameterStore, model: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
    """See `ParallelModule.load_state_dict`."""
    names = _names(store, model)
    here = store.directory[store.stage]
    wanted = [name for name, held in names.items() if held in here]
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in names]
    errors = []
    if strict and unexpected:
        errors.append(f"Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}. ")
    if strict and missing:
        errors.append(f"Missing key(s) in state_dict: {', '.join(map(repr, missing))}. ")
    for name in wanted:
        shape = store.directory[store.stage][names[name]].shape
        if name in state and tuple(state[name].shape) != shape:
            errors.append(
                f"size mismatch for {name}: copying a param with shape {torch.Size(state[name].shape)} from checkpoint, "
                f"the shape in current model is {torch.Size(shape)}."
            )
    everyone = "+".join(store.mesh.axes)
    texts = gather_texts(store.communicator, everyone, "\n\t".join(errors)) if everyone else ["\n\t".join(errors)]
    found = list(dict.fromkeys(text for text in texts if text))
    if found:
        raise RuntimeError("Error(s) in loading state_dict for {}:\n\t{}".format(type(model).__name__, "\n\t".join(found)))
    loaded: set[str] = set()
    for name in wanted:
        if name in state and names[name] not in loaded:
            loaded.add(names[name])
            _load(store, names[name], state[name])
    return incompatible_keys(missing, unexpected)


def _load(store: ParameterStore, name: str, value: Any) -> None:
    """Fill this rank's part from a whole tensor, a DTensor (a collective if it is sharded) or a ShardedTensor."""
    own = held_tensor(store, name)
    if isinstance(value, ShardedTensor):
        if value.sharding == own.sharding:
            own.to_local().copy_(value.to_local())
            store.touched(name)
            return
        value = value.full_tensor()
    elif hasattr(value, "full_tensor"):
        as_it_is = dtensor_of(own)
        if as_it_is is not None and as_it_is.device_mesh == value.device_mesh and as_it_is.placements == value.placements:
            own.to_local().copy_(value.to_local())
            store.touched(name)
            return
        value = value.full_tensor()
    store.set_whole(name, value.detach())
