"""What ranks must agree on before a step, found out before it runs; and the last words of a rank that dies."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import TracebackType
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import KeyStore, MeshCommunicator, abort_reason
from .errors import ABORT_KEY, AFTER_A_LOSS, MismatchError, PeerLostError, ShardwrightError
from .program import Mesh

T = TypeVar("T")
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
DATA_AXES = ("dp", "dp_replicate", "dp_shard")
"""Axes along which ranks have different shares of the batch."""

_SAMPLE = 1 << 14
"""Elements of a tensor that its checksum looks at: enough to tell batches apart, few enough to cost nothing."""

_FEW = 64
"""Ranks up to which every one of them sends to every other."""


class Control(Protocol):
    """Small messages among all ranks of the job, beside the program's collectives."""

    rank: int
    world_size: int

    def start_exchange(self, header: list[int]) -> Callable[[], list[list[int]]]:
        """A collective, which what is returned waits for: every rank's header (equally long, int64), by rank."""
        ...

    def exchange_text(self, text: str) -> list[str]:
        """Every rank's text, by rank. A collective."""
        ...


class WordStore(KeyStore, Protocol):
    """A store in which last words are left."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class CommunicatorControl:
    """A `Control` through a communicator, over all axes of its mesh: for ranks in one process."""

    def __init__(self, communicator: MeshCommunicator) -> None:
        self.rank, self.world_size = communicator.rank, communicator.mesh.world_size
        self._communicator = communicator
        self._axis = "+".join(communicator.mesh.axes)

    def start_exchange(self, header: list[int]) -> Callable[[], list[list[int]]]:
        if self.world_size == 1:
            return lambda: [header]
        headers = self._communicator.all_gather(torch.tensor(header, dtype=torch.int64), self._axis).tolist()
        return lambda: headers

    def exchange_text(self, text: str) -> list[str]:
        return gather_texts(self._communicator, self._axis, text) if self.world_size > 1 else [text]


class GlooControl:
    """A `Control` over its own Gloo group of all ranks of the default process group: never waits for a GPU.

    Its constructor is a collective. A peer that dies raises PeerLostError, with the reason it left in `store`.
    """

    def __init__(self, timeout: float = 300.0, store: KeyStore | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._store = store
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def _start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Everyone's `x`, by rank: among a few ranks all at once, which takes Gloo a quarter of the time of its all-gather."""
        rows = x.new_empty(self.world_size, *x.shape)
        own = x.unsqueeze(0).expand_as(rows).contiguous()
        with self._naming_the_lost():
            if self.world_size <= _FEW:
                work = dist.all_to_all_single(rows, own, group=self._group, async_op=True)
            else:
                work = dist.all_gather([*rows], x, group=self._group, async_op=True)

        def finish() -> Tensor:
            with self._naming_the_lost():
                if work is not None:
                    work.wait()
            return rows

        return finish

    @contextlib.contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = abort_reason(self._store)
            cause = f"A peer said: {reason}" if reason else f"torch.distributed said: {str(error).strip().splitlines()[0]}"
            raise PeerLostError(
                f"rank {self.rank} lost a peer while the ranks were comparing what they are about to run. {cause}. {AFTER_A_LOSS}"
            ) from error

    def start_exchange(self, header: list[int]) -> Callable[[], list[list[int]]]:
        finish = self._start_gather(torch.tensor(header, dtype=torch.int64))
        return lambda: finish().tolist()

    def exchange_text(self, text: str) -> list[str]:
        return _decode(text, lambda x: self._start_gather(x)(), torch.device("cpu"))


def _decode(text: str, gather: Callable[[Tensor], Tensor], device: torch.device) -> list[str]:
    data = text.encode()
    lengths = gather(torch.tensor([len(data)], dtype=torch.int64, device=device)).flatten().tolist()
    row = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    if data:
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = gather(row.to(device)).cpu()
    return [bytes(r[:n].tolist()).decode() for r, n in zip(rows, lengths, strict=True)]


def gather_texts(communicator: MeshCommunicator, axis: str, text: str) -> list[str]:
    """The text of every rank of `axis`, by index. A collective."""
    device = getattr(communicator, "device", torch.device("cpu"))
    return _decode(text, lambda x: communicator.all_gather(x, axis), device)


# --- agreement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallFacts:
    """What one rank is about to run.

    structure   of the call: the tree of arguments and the values of those that are no tensors; equal on all ranks
    shapes      key -> (shape, dtype) of the tensors
    content     a checksum of the tensors
    """

    structure: str
    shapes: Shapes
    content: int = 0

    @staticmethod
    def of(structure: str, tensors: Mapping[str, Tensor], *, with_content: bool = True) -> CallFacts:
        """`with_content` costs a synchronization on CUDA: leave it out where no two ranks share a batch."""
        shapes = {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()}
        return CallFacts(structure, shapes, checksum(tensors.values()) if with_content else 0)


@dataclass(frozen=True)
class Flags:
    """How the step is to be run. `stale`: whether this rank wrote its parameters since they were last gathered."""

    training: bool
    gradients: bool
    synchronize: bool = True
    stale: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of each other's call: the shapes by rank, rank 0's seed, and whether any rank is stale."""

    shapes: tuple[Shapes, ...]
    stale: bool
    seed: int


class Superseded(Exception):
    """A run was begun on an expectation that did not hold: what the ranks are to do is another thing, or an error."""


class Comparison:
    """One call, as it is being compared across ranks. Every rank must `confirm` it: the others wait for its part.

    call       what this rank calls, in numbers
    expected   what the ranks will have agreed on if all of them call as they did the last time, None where this rank does not
    """

    def __init__(self, call: tuple[int, ...], expected: Agreement | None, finish: Callable[[], Agreement]) -> None:
        self.call, self.expected = call, expected
        self._finish = finish
        self._outcome: Agreement | ShardwrightError | None = None

    def confirm(self) -> Agreement:
        """Waits for the other ranks. Raises MismatchError, on every rank, where ranks are about to run different things."""
        if self._outcome is None:
            try:
                self._outcome = self._finish()
            except ShardwrightError as error:
                self._outcome = error
        if isinstance(self._outcome, ShardwrightError):
            raise self._outcome
        return self._outcome

    def hold(self) -> None:
        """Raises Superseded unless what was expected is agreed on."""
        try:
            if self.confirm() == self.expected:
                return
        except ShardwrightError as error:
            raise Superseded from error
        raise Superseded


@dataclass
class Agreements:
    """Compares calls across ranks. One exchange of a few integers a step; texts travel once for each new combination."""

    control: Control
    _known: dict[tuple[tuple[int, ...], ...], tuple[Shapes, ...]] = field(default_factory=dict)
    _last: tuple[tuple[int, ...], Agreement] | None = None
    """This rank's last call that went well, and what was agreed on: there is a program for it."""

    def begin(self, facts: CallFacts, flags: Flags, groups: Sequence[Sequence[int]]) -> Comparison:
        """Start to compare a call. The ranks may go on before they know the outcome, as far as what they do needs no other rank.

        groups   ranks that must have been given the same batch
        """
        shapes = json.dumps(facts.shapes, sort_keys=True)
        mode = flags.training | flags.gradients << 1 | flags.synchronize << 2
        call = (mode, _hash(facts.structure), _hash(shapes))
        finish = self.control.start_exchange([*call, facts.content, int(flags.stale), flags.seed])
        expected = None
        if self._last is not None and self._last[0] == call:
            # Ranks go through their epochs alike: a rank that has made an optimizer step is not alone.
            expected = replace(self._last[1], stale=flags.stale, **({} if self.control.rank else {"seed": flags.seed}))

        def compare() -> Agreement:
            headers = finish()
            table = tuple((row[1], row[2]) for row in headers)
            known = self._known.get(table)
            if known is None or any(row[:2] != headers[0][:2] for row in headers):
                known = self._compare(facts, shapes, headers)
                self._known[table] = known
            for group in groups:
                _same_batch(group, headers, known)
            return Agreement(known, any(row[4] for row in headers), headers[0][5])

        return Comparison(call, expected, compare)

    def went_well(self, comparison: Comparison) -> None:
        """The call was run: when it comes again the ranks may expect the same."""
        self._last = (comparison.call, comparison.confirm())

    def agree(self, facts: CallFacts, flags: Flags, groups: Sequence[Sequence[int]]) -> Agreement:
        """The outcome of `begin`, at once."""
        return self.begin(facts, flags, groups).confirm()

    def _compare(self, facts: CallFacts, shapes: str, headers: list[list[int]]) -> tuple[Shapes, ...]:
        texts = self.control.exchange_text(json.dumps([facts.structure, shapes]))
        structures, all_shapes = zip(*(json.loads(text) for text in texts), strict=True)
        _same("ranks call the model differently", structures, lambda s: s)
        _same("ranks run the model in different modes", [row[0] for row in headers], _describe_mode)
        return tuple({key: (tuple(shape), dtype) for key, (shape, dtype) in json.loads(text).items()} for text in all_shapes)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _describe_mode(mode: int) -> str:
    kind = "training" if mode & 1 else "evaluation"
    return f"{kind}, {'with' if mode & 2 else 'without'} gradients, {'outside' if mode & 4 else 'inside'} no_sync()"


def _by_value(values: Sequence[T], ranks: Sequence[int]) -> list[tuple[T, list[int]]]:
    found: list[tuple[T, list[int]]] = []
    for value, rank in zip(values, ranks, strict=True):
        held = next((r for v, r in found if v == value), None)
        if held is None:
            found.append((value, [rank]))
        else:
            held.append(rank)
    return found


def _ranks(ranks: Iterable[int]) -> str:
    found = list(ranks)
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def _same(what: str, values: Sequence[T], describe: Callable[[T], str]) -> None:
    found = _by_value(values, range(len(values)))
    if len(found) > 1:
        lines = [f"\n  {_ranks(ranks)}: {_shorten(describe(value))}" for value, ranks in found]
        raise MismatchError(f"{what}; all of them must make the same calls in the same order:{''.join(lines)}")


def _shorten(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _same_batch(group: Sequence[int], headers: list[list[int]], shapes: Sequence[Shapes]) -> None:
    first = group[0]
    for rank in group[1:]:
        if headers[rank][2] != headers[first][2]:
            keys = sorted({*shapes[first], *shapes[rank]})
            key = next(k for k in keys if shapes[first].get(k) != shapes[rank].get(k))
            raise MismatchError(
                f"ranks {first} and {rank} share one batch and were given different ones: {key} is "
                f"{_shape(shapes[first].get(key))} on rank "
                f"{first} and {_shape(shapes[rank].get(key))} on rank {rank}. Shard the data by parallel.data_rank and "
                "parallel.data_world_size"
            )
        if headers[rank][3] != headers[first][3]:
            raise MismatchError(
                f"ranks {first} and {rank} share one batch and were given different ones: same shapes, other values. "
                "Shard the data by parallel.data_rank and parallel.data_world_size, with one seed for its shuffling on all ranks"
            )


def _shape(fact: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if fact is None else f"{fact[1]} {list(fact[0])}"


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that tells batches apart, int64: of a weighted sum over a sample of each tensor's elements."""
    sums = []
    for x in tensors:
        flat = x.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLE)]
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        values = torch.nan_to_num(flat.double(), nan=0.5, posinf=1.5, neginf=-1.5)
        weights = torch.arange(values.numel(), device=x.device, dtype=torch.float64) % 1009 + 1
        sums.append((values * weights).sum())
    return _hash(str([s.item().hex() for s in sums]))


def batch_groups(mesh: Mesh, shared: bool = False) -> tuple[tuple[int, ...], ...]:
    """Ranks that must be given the same batch: those at one place on the data axes; all of them if the batch is `shared`."""
    if shared:
        return (tuple(range(mesh.world_size)),)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world_size):
        here = mesh.coordinates(rank)
        groups.setdefault(tuple(here[axis] for axis in mesh.axes if axis in DATA_AXES), []).append(rank)
    return tuple(tuple(group) for group in groups.values())


def together(control: Control, what: str, work: Callable[[], T]) -> T:
    """`work()` on every rank, or an error on every rank: a rank whose work succeeded raises what went wrong on the others."""
    try:
        result = work()
        failure = ""
    except PeerLostError:
        raise
    except Exception as error:
        control.exchange_text(f"{type(error).__name__}: {error}")
        raise
    failures = [(rank, text) for rank, text in enumerate(control.exchange_text(failure)) if text]
    if failures:
        lines = "".join(
            f"\n  {_ranks(ranks)}: {text}" for text, ranks in _by_value([t for _, t in failures], [r for r, _ in failures])
        )
        raise ShardwrightError(f"{what} failed on other ranks:{lines}")
    return result


def from_first(control: Control, what: str, work: Callable[[], str], beat: float = 20.0) -> str:
    """Rank 0's `work()`, on every rank, however long it takes: the others hear of it every `beat` seconds, so that their time
    limit does not pass. What goes wrong on rank 0 is an error on all."""
    if control.rank:
        while not (text := control.exchange_text("")[0]):
            pass
        if text.startswith("!"):
            raise ShardwrightError(f"{what} failed on rank 0: {text[1:]}")
        return text[1:]
    done: Future[str] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # Not a pool, which would wait for the work when a peer is lost.
    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    while not wait([done], timeout=beat).done:
        control.exchange_text("")
    error = done.exception()
    control.exchange_text(f"={done.result()}" if error is None else f"!{type(error).__name__}: {error}")
    return done.result()


# --- last words -----------------------------------------------------------------------------------------------------


def last_words(rank: int, error: BaseException, trace: TracebackType | None) -> str:
    """`rank 2: ValueError: message at file:line`, in one line."""
    frames = traceback.extract_tb(trace)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split())
    return f"rank {rank}: {type(error).__name__}: {_shorten(message)}{place}"


def install_abort_hook(store: WordStore, rank: int) -> Callable[[], None]:
    """Have an exception that ends this process leave its reason in the job's store, where peers that lose this rank quote it.

    The first rank to fail is the one that is quoted. Returns what takes the hook out again.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the store's host is gone: the peers will say so themselves
            store.compare_set(ABORT_KEY, "", last_words(rank, error, trace))
        previous(kind, error, trace)

    sys.excepthook = hook

    def remove() -> None:
        if sys.excepthook is hook:
            sys.excepthook = previous

    return remove
