"""The model that a user trains: forward runs the whole step, backward hands out the gradients that it computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..compiler.torch_compat import register_child, tensor_hooks
from .clip import clip_grad_norm_
from .delivery import Delivery, attach, has_pending
from .errors import ShardwrightError
from .executor import Executor, StepResult
from .faults import DATA_AXES, Agreement, Agreements, CallFacts, Comparison, Control, Flags, Superseded
from .heap import HeapWatch
from .parameters import ParameterStore
from .program import Key, OutputSpec, RankProgram
from .sharded import Layout, ShardedTensor
from .state import dtensor_of, load_state_dict, parameter_names, state_dict

O = TypeVar("O", bound=torch.optim.Optimizer)
SEED_BITS = 62


class BoundProgram(Protocol):
    """A program and the call signature that it serves.

    loss      key of the output that is differentiable, None if there is none
    flatten   the call's tensors by key, on the program's device
    rebuild   the model's own output object, None in place of keys that are missing
    place_of  where an output stands in it, as `past.0.keys`
    """

    @property
    def program(self) -> RankProgram: ...
    @property
    def executor(self) -> Executor: ...
    @property
    def loss(self) -> Key | None: ...

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[Key, Tensor]: ...
    def rebuild(self, outputs: Mapping[Key, Any]) -> Any: ...
    def place_of(self, key: Key) -> str: ...


class Engine(Protocol):
    """What compiles calls to programs.

    groups      ranks that must be given the same batch, once the mesh is known
    certificate  of what was verified before the first call, None where it was not asked for
    describe    what a call is, to be compared among ranks
    prepare     the first call, where there were no example inputs: capture, plan, materialize
    program_for the program of a call, from a cache if its shapes were seen before
    """

    plan: Any
    device: torch.device
    groups: tuple[tuple[int, ...], ...]
    certificate: Any

    @property
    def program(self) -> RankProgram: ...

    def describe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallFacts: ...
    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ParameterStore: ...

    def program_for(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool, grad: bool, agreed: Agreement
    ) -> BoundProgram: ...


class ParameterTree(nn.Module):
    """A submodule's name and parameters, this rank's shards of them, without what it computes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ShardwrightError("a part of a parallel model cannot be called: its weights are sharded. Call the whole model")


class ParallelModule(nn.Module):
    """`model`, sharded and scheduled over a mesh.

    `parallel(*args, **kwargs)` in training mode runs forward and backward of the whole step and returns the model's own
    output; its loss is an ordinary tensor, equal on all ranks, whose `backward()` adds the gradients to the parameters'
    `.grad`. In eval mode, or under `torch.no_grad()`, only the forward runs. Tensors that the ranks hold shards of come
    back as DTensors (ShardedTensors where DTensor cannot hold the shard, or there is no process group): `.full_tensor()`.

    model     what is left of the original: its structure and attributes
    store     None until the first call where there were no example inputs
    """

    def __init__(self, engine: Engine, store: ParameterStore | None, model: nn.Module, control: Control) -> None:
        super().__init__()
        self._engine, self._store, self._agreements = engine, None, Agreements(control)
        self._synchronize, self._calls = True, 0
        self._heap = HeapWatch()
        self._waiting: list[tuple[torch.optim.Optimizer, dict[str, Any]]] = []
        self.training = model.training
        if store is not None:
            self._adopt(store, model)
        # Not a submodule: its parameters are gone.
        object.__setattr__(self, "_model", model)
        # Bound here, not decorated: that would import the compiler with this module. The signature is the model's own.
        forward = torch.compiler.disable(self._forward, reason="a parallel model runs programs that are compiled already")
        setattr(forward, "__signature__", inspect.signature(model.forward))  # noqa: B010
        object.__setattr__(self, "forward", forward)

    def _adopt(self, store: ParameterStore, model: nn.Module) -> None:
        """Take the parameters on, under the model's own names and in its order."""
        aliases = {alias: spec.name for spec in store.specs() for alias in (spec.name, *spec.aliases)}
        for name, persistent in parameter_names(model):
            held = aliases.get(name)
            if held is None:
                continue
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                child = dict(owner.named_children()).get(part)
                if child is None:
                    child = ParameterTree()
                    register_child(owner, part, child)
                owner = child
            if held in store.buffers:
                owner.register_buffer(leaf, store.buffers[held], persistent)
            else:
                owner.register_parameter(leaf, store.parameters[held])
        self._store = store
        for optimizer, options in self._waiting:
            _fill(optimizer, list(self.parameters()), options)
        self._waiting = []

    # --- calls ---

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        grad = torch.is_grad_enabled()
        bound, delivery, outputs = self._step(args, kwargs, grad=grad)
        if grad:
            outputs = attach(delivery, bound.loss, outputs, bound.place_of)
        return bound.rebuild(outputs)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward in one call: adds the gradients to `.grad` and returns the loss, detached."""
        if not self.training:
            raise ShardwrightError("train_step() in eval mode; call parallel.train() first")
        bound, delivery, outputs = self._step(args, kwargs, grad=True)
        if bound.loss is None or bound.loss not in outputs:
            raise ShardwrightError(_NO_LOSS)
        delivery.deliver()
        return outputs[bound.loss].detach()

    def _step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool) -> tuple[BoundProgram, Delivery, dict[Key, Any]]:
        self._refuse_ambient()
        store = self._store
        if store is None:
            store = self._engine.prepare(args, kwargs)
            self._adopt_late(store)
        differentiate = self.training and grad
        self._refuse_changed(store)
        defer, calls = differentiate and (not self._synchronize or has_pending(store)), self._calls

        def run(agreed: Agreement, gate: Callable[[], None] | None) -> tuple[BoundProgram, StepResult]:
            bound = self._engine.program_for(args, kwargs, training=self.training, grad=differentiate, agreed=agreed)
            store.refresh(agreed.stale)
            bound.executor.gather = store.gather
            seed = (agreed.seed + calls) % (1 << SEED_BITS)
            inputs = bound.flatten(args, kwargs)
            return bound, bound.executor.run(store.working(), inputs, seed, defer_reduction=defer, gate=gate)

        bound, result = self._run_compared(self._compare(store, args, kwargs, differentiate), run)
        store.update_buffers(result.buffers)
        if bound.program.device == "cpu":
            self._heap.check()
        delivery = Delivery(
            store,
            result.gradients,
            reducer=bound.executor,
            raw=defer,
            synchronize=self._synchronize,
            refused="" if differentiate else _NO_GRADIENTS,
        )
        specs = {spec.key: spec for spec in bound.program.outputs}
        return bound, delivery, {key: self._output(store, specs[key], x) for key, x in result.outputs.items()}

    def _run_compared(
        self, comparison: Comparison, run: Callable[[Agreement, Callable[[], None] | None], tuple[BoundProgram, StepResult]]
    ) -> tuple[BoundProgram, StepResult]:
        """`run` on what is expected, while the ranks compare their calls, and else on what they agree on. Whatever happens on this
        rank, it takes part in the comparison, and a call that is agreed on counts."""
        found, failed = None, None
        if comparison.expected is not None:
            try:
                found = run(comparison.expected, comparison.hold)
            except Superseded:
                pass
            except Exception as error:
                failed = error
        # Not inside the handlers: the error there would keep what the first run has made alive.
        agreed = comparison.confirm()
        self._calls += 1
        if failed is not None and agreed == comparison.expected:
            raise failed
        if found is None:
            failed = None
            found = run(agreed, None)
        self._agreements.went_well(comparison)
        return found

    def _adopt_late(self, store: ParameterStore) -> None:
        model = self.__dict__.pop("_model")  # its attributes must not shadow the parameters while these are registered
        try:
            self._adopt(store, model)
        finally:
            object.__setattr__(self, "_model", model)

    def _compare(self, store: ParameterStore, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool) -> Comparison:
        facts = self._engine.describe(args, kwargs)
        seed = torch.initial_seed() % (1 << SEED_BITS)
        flags = Flags(self.training, grad, self._synchronize, store.dirty, seed)
        return self._agreements.begin(facts, flags, self._engine.groups)

    def _refuse_ambient(self) -> None:
        kind = self._engine.device.type
        if torch.is_autocast_enabled(kind):
            raise ShardwrightError(
                "torch.autocast around a parallel model: its program has its dtypes already. Leave autocast out, and give the "
                "precision to auto_parallelize(..., precision=torch.bfloat16), or a model in that dtype"
            )

    def _refuse_changed(self, store: ParameterStore) -> None:
        for name, slot in store.slots.items():
            if slot.parameter.requires_grad and not slot.spec.trainable:
                raise ShardwrightError(
                    f"parameter {name!r} was frozen when the model was planned and requires a gradient now, which its program "
                    "does not compute; set requires_grad before auto_parallelize"
                )
            if tensor_hooks(slot.parameter):
                raise ShardwrightError(
                    f"parameter {name!r} has a gradient hook, which would not be called: backward() hands out gradients that the "
                    "step has computed. Remove the hook, and change the gradients between backward and optimizer.step"
                )

    def _output(self, store: ParameterStore, spec: OutputSpec, value: Tensor) -> Tensor:
        cuts = tuple(cut for cut in spec.cuts if cut.axis in store.mesh.axes)
        if not cuts:
            return value
        layout = Layout(store.mesh, store.communicator.rank, cuts, store.communicator)
        sharded = ShardedTensor(value, layout, spec.shape)
        plain = dtensor_of(sharded)
        return sharded if plain is None else plain

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within: gradients are not summed over the ranks, but with those of the next step outside, in one go.

        Saves traffic when gradients accumulate over several steps. Under ZeRO-3 the gradients are scattered within the
        step, and nothing is saved. An optimizer step, or clipping, before that next step raises.
        """
        before, self._synchronize = self._synchronize, False
        try:
            yield
        finally:
            self._synchronize = before

    # --- parameters ---

    def _ready(self, what: str) -> ParameterStore:
        if self._store is None:
            raise ShardwrightError(
                f"{what} before the model was captured: how parameters are sharded is decided from a batch. Give "
                "auto_parallelize(..., example_inputs=batch), or make the optimizer with parallel.optimizer(cls, **options), "
                "which waits for the first call"
            )
        return self._store

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters (under a pipeline, its stage's) under the model's own names, in its order."""
        self._ready("parameters were asked for")
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def optimizer(self, cls: type[O], **options: Any) -> O:
        """`cls(parallel.parameters(), **options)`, which before the first call has no parameters yet and gets them with it."""
        if self._store is not None:
            return cls(self.parameters(), **options)
        placeholder = nn.Parameter(torch.zeros(0, device=self._engine.device))
        made = cls([placeholder], **options)
        self._waiting.append((made, options))
        return made

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._store is not None:
            super().zero_grad(set_to_none)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the whole model: one reduction over all axes and stages. Call it on every rank."""
        return clip_grad_norm_(self._ready("clip_grad_norm_() was called"), max_norm, norm_type, error_if_nonfinite, foreach)

    # --- state ---

    def state_dict(
        self,
        *,
        full: bool = False,
        rank0_only: bool = True,
        cpu_offload: bool = False,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Parameters and persistent buffers under the model's own names, tied ones under each. A collective.

        As they are, this rank's DTensors (of its stage, under a pipeline); `full`: whole tensors, on rank 0 alone (elsewhere
        the result is empty) or with rank0_only=False on every rank, gathered one at a time.
        """
        found = state_dict(
            self._ready("state_dict() was called"), self._model, full=full, rank0_only=rank0_only, cpu_offload=cpu_offload
        )
        result = {} if destination is None else destination
        result.update((prefix + name, value) for name, value in found.items())
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take this rank's part of each tensor: whole ones, as a plain model's, or what `state_dict()` gives. A collective.

        Raises RuntimeError as `nn.Module.load_state_dict` does, on every rank, for missing and unexpected keys and shapes.
        """
        if assign:
            raise ShardwrightError("load_state_dict(assign=True): the memory of sharded parameters stays; leave `assign` out")
        return load_state_dict(self._ready("load_state_dict() was called"), self._model, state_dict, strict)

    # --- what it is ---

    @property
    def plan(self) -> Any:
        return self._engine.plan

    @property
    def program(self) -> RankProgram:
        return self._engine.program

    @property
    def certificate(self) -> Any:
        """What `auto_parallelize(..., verify=True)` checked; None without."""
        return self._engine.certificate

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def _data_place(self) -> tuple[int, int]:
        store = self._ready("the data rank was asked for")
        place, size = 0, 1
        for axis, index in store.mesh.coordinates(store.communicator.rank).items():
            if axis in DATA_AXES:
                place, size = place * store.mesh.size(axis) + index, size * store.mesh.size(axis)
        return place, size

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank is to be given, of `data_world_size`."""
        return self._data_place()[0]

    @property
    def data_world_size(self) -> int:
        return self._data_place()[1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_model")
            if model is None or name.startswith("_"):
                raise
        value = getattr(model, name)
        if inspect.ismethod(value):
            return _refusing(name, type(model).__name__)
        if isinstance(value, nn.Parameter) or (isinstance(value, nn.Module) and any(True for _ in value.parameters())):
            raise AttributeError(f"{name!r} is held by other pipeline stages (or not sharded yet)")
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """A copy with parameters of its own that shares the programs: an average of the weights, say."""
        store = self._ready("a copy was made").copy()
        made = ParallelModule(self._engine, store, self._model, self._agreements.control)
        made.train(self.training)
        memo[id(self)] = made
        return made

    # --- what moves or casts a module ---

    def _unmoved(self, what: str, move: Callable[[Tensor], Tensor]) -> ParallelModule:
        store = self._ready(f".{what}() was called")
        for dtype in {spec.dtype for spec in store.specs()}:
            probe = torch.empty(0, dtype=dtype, device=store.device)
            moved = move(probe)
            if moved.dtype != dtype or moved.device != probe.device:
                raise ShardwrightError(
                    f".{what}() on a parallel model: its programs are made for {dtype} on {store.device}. Convert the model first"
                )
        return self

    def to(self, *args: Any, **kwargs: Any) -> ParallelModule:
        return self._unmoved("to", lambda x: x.to(*args, **kwargs) if x.is_floating_point() else x.to(_device_of(x, args, kwargs)))

    def cuda(self, device: Any = None) -> ParallelModule:
        return self._unmoved("cuda", lambda x: x.cuda(device))

    def cpu(self) -> ParallelModule:
        return self._unmoved("cpu", lambda x: x.cpu())

    def float(self) -> ParallelModule:
        return self._unmoved("float", lambda x: x.float() if x.is_floating_point() else x)

    def double(self) -> ParallelModule:
        return self._unmoved("double", lambda x: x.double() if x.is_floating_point() else x)

    def half(self) -> ParallelModule:
        return self._unmoved("half", lambda x: x.half() if x.is_floating_point() else x)

    def bfloat16(self) -> ParallelModule:
        return self._unmoved("bfloat16", lambda x: x.bfloat16() if x.is_floating_point() else x)


_NO_LOSS = (
    "the model's output has no loss: a 0-dim floating-point tensor (returned as it is, first in a tuple, or named `loss`). "
    "Give auto_parallelize a loss_fn, or the call its labels"
)
_NO_GRADIENTS = (
    "backward() of a forward that ran in eval mode: only the forward was computed. Call parallel.train() first (a model with its "
    "dropout set to 0 trains as in eval mode)"
)


def _device_of(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    return torch.empty(0, device=x.device).to(*args, **kwargs).device


def _refusing(name: str, model: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ShardwrightError(
            f"{name}() is a method of {model}, which would run on one device: its weights are sharded now. To use it, load "
            f"parallel.state_dict(full=True) into an ordinary {model}; inside training, call parallel(...) itself"
        )

    refuse.__name__ = name
    return refuse


def _fill(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
    """Give a waiting optimizer its parameters, and the state that its constructor makes for them."""
    fresh = type(optimizer)(parameters, **options)
    optimizer.state.clear()
    optimizer.state.update(fresh.state)
    optimizer.param_groups[0]["params"] = fresh.param_groups[0]["params"]
