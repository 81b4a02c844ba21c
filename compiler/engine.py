"""What turns calls into programs while a model trains: captures, plans once, emits, and remembers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.communicator import MeshCommunicator
from ..runtime.errors import MismatchError
from ..runtime.executor import Executor
from ..runtime.faults import Agreement, Agreements, CallFacts, Control, Flags, Shapes, batch_groups, from_first, together
from ..runtime.materialize import materialize
from ..runtime.parameters import ParameterStore
from ..runtime.program import Key, Mesh, RankProgram
from .agreement import same_collectives, same_graph, same_model, same_request
from .bind import BatchMode, Bound, batch_keys, batch_size, bind, local_batches
from .call_structure import CallStructure, flatten_call
from .capture import CaptureError, capture
from .certify import Certificate, certify
from .choose import choose
from .collector import give_back
from .emit import Problem, emit
from .fidelity import check_capture
from .guess import likely_plan, spread
from .plan import Plan
from .ragged import check_ragged, same_lengths
from .strategy import Request
from .topology import Topology


@dataclass(frozen=True)
class Options:
    """The user's request, as auto_parallelize takes it."""

    request: Request
    loss_fn: Callable[..., Tensor] | None = None
    topology: Topology | None = None
    memory_limit: float | None = None
    precision: torch.dtype | None = None
    microbatches: int | None = None
    batch: BatchMode = "local"
    outputs: str = "loss"
    verify: bool = False
    source: Any = None

    def shared(self) -> dict[str, object]:
        """What every rank must ask for alike."""
        names = ("batch", "outputs", "microbatches", "memory_limit", "precision", "verify")
        request = {"mesh": f"{self.request.world_size} ranks, {' x '.join(self.request.order)}", "strategy": self.request.strategy}
        return request | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BoundCall:
    """A program with its executor, and how calls of its signature become inputs and its outputs become theirs."""

    program: RankProgram
    executor: Executor
    call: CallStructure
    loss: Key | None
    device: torch.device
    shown: frozenset[Key]
    cut_inputs: bool

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Key, Tensor]:
        tensors = {k: x.to(self.device) for k, x in self.call.flatten(args, kwargs).items()}
        if self.cut_inputs:
            for spec in self.program.inputs:
                for cut in spec.cuts:
                    here = self.program.coordinates[cut.axis]
                    start = sum(cut.sections[0][:here])
                    tensors[spec.key] = tensors[spec.key].narrow(cut.dim, start, cut.sections[0][here])
        return tensors

    def rebuild(self, outputs: Mapping[Key, Any]) -> Any:
        return self.call.rebuild({k: v for k, v in outputs.items() if k in self.shown})

    def place_of(self, key: Key) -> str:
        return self.call.place_of(key)


@dataclass
class ModelEngine:
    """Compiles the calls of one model on one rank. See runtime.module.Engine."""

    model: nn.Module
    options: Options
    control: Control
    connect: Callable[[Mesh], MeshCommunicator]
    device: torch.device
    plan: Plan | None = None
    communicator: MeshCommunicator | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    certificate: Certificate | None = None
    programs: dict[Hashable, BoundCall] = field(default_factory=dict)
    report: Callable[[str], None] = lambda text: None
    _first: BoundCall | None = None
    _captured: Bound | None = None
    """What planning captured, kept until the first program is made of it."""

    @property
    def program(self) -> RankProgram:
        if self._first is None:
            raise RuntimeError("there is no program before the first call: pass example_inputs, or call the model once")
        return self._first.program

    def describe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallFacts:
        tree, tensors = flatten_call(args, kwargs)
        shared = any(len(group) > 1 for group in self.groups)
        real = not any(t.is_meta for t in tensors.values())
        return CallFacts.of(repr(tree), tensors, with_content=shared and real)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ParameterStore:
        """The first call: capture, plan, emit, and put the parameters where the plan wants them."""
        facts = self.describe(args, kwargs)
        agreed = Agreements(self.control).agree(facts, Flags(self.model.training, True), ())
        same_request(self.control, self.options.shared())
        same_model(self.control, self.model)
        if self.options.verify:
            together(self.control, "comparing the captured model with the eager one", lambda: self._verify(args, kwargs))
        text = together(self.control, "planning", lambda: self._choose(args, kwargs, agreed.shapes))
        self.plan = Plan.from_json(self.control.exchange_text(text)[0])
        self.groups = batch_groups(self.plan.mesh, shared=self.options.batch == "global")
        self.communicator = self.connect(self.plan.mesh)
        self._first = self._compile(args, kwargs, self.model.training, True, agreed.shapes, first=True)
        self.programs[self._key(facts, self.model.training, True, agreed.shapes)] = self._first
        store = ParameterStore(self.program.parameters, self.program.buffers, self.communicator, self.device)
        self.report("placing the parameters")
        materialize(self.model, store, self.options.source)
        give_back()
        return store

    def _verify(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What was captured gives the eager model's loss and gradients, on this rank's example."""
        tensors = [*self.model.parameters(), *flatten_call(args, kwargs)[1].values()]
        if any(t.is_meta for t in tensors):
            raise CaptureError(
                "verify=True compares numbers, and the model or its example inputs are on the meta device", None, "pass real ones"
            )
        captured = capture(self.model, args, kwargs, loss_fn=self.options.loss_fn)
        check_capture(captured, self.model, args, kwargs, self.options.loss_fn)

    def _choose(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Sequence[Shapes]) -> str:
        """Rank 0 decides, and gives the plan as JSON; the others give ""."""
        if self.control.rank != 0:
            return ""
        self.report("choosing a plan")
        options = self.options
        rows = batch_size(shapes[0])
        topology = options.topology or Topology.preset("cpu", devices=options.request.world_size)
        facts = {"rows": rows, "memory_limit": options.memory_limit, "batch": options.batch, "microbatches": options.microbatches}

        def captured(batches: Sequence[int]) -> Bound:
            return self._bind(args, kwargs, batches, shapes, self.model.training, True)

        guess = likely_plan(self.model, options.request, topology, lambda batches: captured(batches).problem, **facts)
        probe = captured(spread(rows, guess.data_size, options.batch))
        found = choose(probe.problem, options.request, topology, **facts, known=guess.known)
        self._captured = probe
        return replace(found, device=self.device.type).to_json()

    def _bind(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batches: Sequence[int],
        shapes: Sequence[Shapes],
        training: bool,
        grad: bool,
    ) -> Bound:
        same = self._captured
        if (
            same is not None
            and same.problem.local_batches == tuple(batches)
            and same.problem.training == grad
            and same.captured.training == training
        ):
            self._captured = None
            return same
        with warnings.catch_warnings():
            if self.control.rank:
                warnings.simplefilter("ignore", UserWarning)  # rank 0 says it for all
            return bind(
                self.model,
                args,
                kwargs,
                batches,
                batch_keys(shapes),
                loss_fn=self.options.loss_fn,
                training=training,
                differentiate=grad,
                precision=self.options.precision,
            )

    def _compile(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        training: bool,
        grad: bool,
        shapes: Sequence[Shapes],
        first: bool = False,
    ) -> BoundCall:
        """The program of a call. A collective: what goes wrong on one rank is an error on all."""
        assert self.plan is not None and self.communicator is not None
        problem, plan, call, program = together(
            self.control, "compiling the call", lambda: self._emit(args, kwargs, training, grad, shapes)
        )
        same_graph(self.control, plan, problem.graph, same_shapes=not problem.ragged)
        check_ragged(program, shapes, batch_keys(shapes), self.control)
        same_collectives(self.control, program)
        if first:
            self.plan = plan
            if self.options.verify:
                self.certificate = self._certify(problem, plan, args, kwargs, shapes)
        executor = Executor(program, self.communicator, self.device)
        everything = plan.stages == 1 or self.options.outputs == "all"
        shown = frozenset(o.key for o in program.outputs if o.key == problem.loss or everything)
        return BoundCall(program, executor, call, problem.loss, self.device, shown, self.options.batch == "global")

    def _certify(
        self, problem: Problem, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Sequence[Shapes]
    ) -> Certificate:
        """Rank 0 checks the plan of all with its own example, repeated."""

        # In the thread that `from_first` works in, the model is captured as the plan's graph was.
        autocast = torch.autocast("cpu", dtype=torch.get_autocast_dtype("cpu"), enabled=torch.is_autocast_enabled("cpu"))

        def captured(batches: Sequence[int]) -> Problem:
            with autocast:
                return self._bind(args, kwargs, batches, shapes, self.model.training, problem.training).problem

        def work() -> str:
            inputs = flatten_call(args, kwargs)[1]
            return certify(problem, plan, inputs, capture=captured, report=self.report).to_json()

        return Certificate.from_json(from_first(self.control, "verifying the plan", work))

    def _emit(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        training: bool,
        grad: bool,
        shapes: Sequence[Shapes],
    ) -> tuple[Problem, Plan, CallStructure, RankProgram]:
        """This rank's part of `_compile`, without its peers."""
        plan = self.plan
        assert plan is not None
        batches = local_batches(shapes, [group[0] for group in self._data_groups(plan)], self.options.batch)
        if min(batches) < 1:
            raise MismatchError(
                f"a batch of {sum(batches)} samples leaves nothing for some of the {plan.data_size} data ranks (they get "
                f"{batches}): use a larger batch or fewer data ranks"
            )
        self.report("capturing the model")
        bound = self._bind(args, kwargs, batches, shapes, training, grad)
        ragged = not same_lengths(shapes, bound.problem.batch_inputs)
        problem = replace(bound.problem, share_outputs=self.options.outputs == "all", ragged=ragged)
        plan = replace(plan, microbatches=max(1, min(plan.microbatches, *batches)))
        self.report("emitting the program")
        return problem, plan, bound.captured.call, emit(problem, plan, self.control.rank)

    @staticmethod
    def _data_groups(plan: Plan) -> tuple[tuple[int, ...], ...]:
        """Ranks of each data rank, in the order of data ranks."""
        groups = batch_groups(plan.mesh)
        return tuple(sorted(groups, key=lambda g: plan.data_rank(plan.mesh.coordinates(g[0]))))

    @staticmethod
    def _key(facts: CallFacts, training: bool, grad: bool, shapes: Sequence[Shapes]) -> Hashable:
        return facts.structure, training, grad, tuple(tuple(s.items()) for s in shapes)

    def program_for(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool, grad: bool, agreed: Agreement
    ) -> BoundCall:
        facts = self.describe(args, kwargs)
        key = self._key(facts, training, grad, agreed.shapes)
        if key not in self.programs:
            self.programs[key] = self._compile(args, kwargs, training, grad, agreed.shapes)
        return self.programs[key]
