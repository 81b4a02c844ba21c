"""Fill a rank's shards from a model, from files, or by the model's own initialization, never holding the whole model.

A model whose tensors are real is consumed: each parameter's shard is copied, then its memory is let go. A model on the
meta device is filled one parameter (from files) or one module (by initialization) at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compiler.torch_compat import reset_method
from .errors import ShardwrightError
from .faults import gather_texts
from .parameters import ParameterStore, TensorFacts

Source = Mapping[str, Any] | str | Path | Sequence[str | Path] | None


def materialize(model: nn.Module, store: ParameterStore, source: Source = None, seed: int | None = None) -> None:
    """Fill `store` with this rank's part of the model, and leave `model` on the meta device. A collective.

    source   a plain state dict; a file or folder of safetensors (with its index), or several: of a file only this rank's
             part is read. None: the model's own tensors, and those on the meta device by the model's own initialization:
             each module's `reset_parameters()`, then the `_init_weights(module)` of the model around it.
    seed     of that initialization, None for rank 0's `torch.initial_seed()`. A module's numbers depend on it and on the
             module's name alone: they are the same on every rank and mesh.

    Raises ShardwrightError, on every rank, naming what `source` lacks or holds in another shape, and the parameters and
    buffers on the meta device that no initialization fills.
    """
    tensors = _Tensors(model)
    found = None if source is None else open_source(source)
    facts = {name: fact for held in store.directory for name, fact in held.items()}
    problems = [] if found is None else _missing(found, facts)
    _raise_on_every_rank(store, problems)
    mine = {spec.name: facts[spec.name] for spec in store.specs()}
    tensors.release(name for name in tensors.places if not any(name in (f.name, *f.aliases) for f in mine.values()))
    remaining: dict[str, TensorFacts] = {}
    for name, fact in mine.items():
        values = found if found is not None else {}
        key = next((k for k in (name, *fact.aliases) if k in values), None)
        if key is not None:
            problems += _fill(store, fact, values[key], key)
        elif tensors.is_meta(name):
            remaining[name] = fact
        else:
            problems += _fill(store, fact, tensors.get(name).detach(), name)
        if name not in remaining:
            tensors.release((name, *fact.aliases))
    if any(tensors.was_meta(name) for name in facts):
        problems += _initialize(model, store, tensors, remaining, _agreed_seed(store, seed))
    _raise_on_every_rank(store, problems)


def _fill(store: ParameterStore, fact: TensorFacts, value: Any, key: str) -> list[str]:
    if tuple(value.shape) != fact.shape:
        return [f"{key} has shape {list(value.shape)} in the source and {list(fact.shape)} in the model"]
    with torch.no_grad():
        store.set_whole(fact.name, value)
    return []


def _missing(source: Mapping[str, Any], facts: Mapping[str, TensorFacts]) -> list[str]:
    lacking = [f.name for f in facts.values() if f.persistent and not any(k in source for k in (f.name, *f.aliases))]
    return (
        [f"the source has no {', '.join(lacking[:8])}{f' and {len(lacking) - 8} more' if len(lacking) > 8 else ''}"]
        if lacking
        else []
    )


def _raise_on_every_rank(store: ParameterStore, problems: list[str]) -> None:
    axes = "+".join(store.mesh.axes)
    texts = gather_texts(store.communicator, axes, json.dumps(problems)) if axes else [json.dumps(problems)]
    everyone = list(dict.fromkeys(problem for text in texts for problem in json.loads(text)))
    if everyone:
        raise ShardwrightError("the model cannot be given its values:\n  " + "\n  ".join(everyone))


def _agreed_seed(store: ParameterStore, seed: int | None) -> int:
    own = torch.tensor((torch.initial_seed() if seed is None else seed) % (1 << 63), dtype=torch.int64, device=store.device)
    axes = "+".join(store.mesh.axes)
    return int((store.communicator.broadcast(own, axes, 0) if axes else own).item())


# --- the model's tensors --------------------------------------------------------------------------------------------


class _Tensors:
    """Where each name of the model stands in its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for leaf in own_tensors(module):
                self.places[f"{prefix}.{leaf}" if prefix else leaf] = (module, leaf)
        self._were_meta = {name for name in self.places if self.is_meta(name)}
        self._meta: dict[int, tuple[Tensor, Tensor]] = {}

    def get(self, name: str) -> Tensor:
        module, leaf = self.places[name]
        return getattr(module, leaf)

    def is_meta(self, name: str) -> bool:
        return name in self.places and self.get(name).is_meta

    def was_meta(self, name: str) -> bool:
        return name in self._were_meta

    def release(self, names: Iterable[str]) -> None:
        """Put meta tensors in the place of real ones; what was tied stays tied."""
        for name in names:
            if name in self.places and not self.is_meta(name):
                module, leaf = self.places[name]
                setattr(module, leaf, self._meta_of(getattr(module, leaf)))
        self._meta = {key: pair for key, pair in self._meta.items() if any(self.get(n) is pair[0] for n in self.places)}

    def _meta_of(self, x: Tensor) -> Tensor:
        pair = self._meta.get(id(x))
        if pair is None or pair[0] is not x:
            empty = torch.empty_like(x, device="meta")
            made = nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty
            pair = self._meta[id(x)] = (x, made)
        return pair[1]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the module itself, by attribute."""
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


# --- files ----------------------------------------------------------------------------------------------------------


def open_source(source: Source) -> Mapping[str, Any]:
    """The source as a mapping from names to what has a `shape` and is indexed by slices."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, str | Path):
        return _Files(_files_of(Path(source)))
    assert source is not None
    return _Files([file for path in source for file in _files_of(Path(path))])


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
        if index is not None:
            listed = json.loads(index.read_text())["weight_map"].values()
            return [path / name for name in dict.fromkeys(listed)]
        files = sorted(path.glob("*.safetensors"))
    else:
        files = [path] if path.suffix == ".safetensors" and path.is_file() else []
    if not files:
        raise ShardwrightError(
            f"{path}: no safetensors file, nor a folder of some. For other formats give the state dict itself, "
            "e.g. torch.load(path, mmap=True, weights_only=True)"
        )
    return files


class _Files(Mapping[str, Any]):
    """The tensors of safetensors files, read on demand. No code is executed by reading them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ShardwrightError("reading safetensors files needs the package safetensors: pip install safetensors") from error
        self._files: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="pt", device="cpu")
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> _FileTensor:
        return _FileTensor(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _FileTensor:
    """A tensor in a file, of which slices are read."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name, self._slice = file, name, file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._slice[index] if index else self._file.get_tensor(self._name)


# --- the model's own initialization ---------------------------------------------------------------------------------


@dataclass
class _Initializer:
    """Runs modules' own initializations on real memory, one group of modules at a time.

    A group is one module, and those below it whose tensors its initialization writes too (a residual projection that its
    block scales down, say): these are initialized again before it, so that what it finds is what it would find in the
    whole model.
    """

    model: nn.Module
    seed: int
    paths: dict[nn.Module, str] = field(default_factory=dict)
    owners: dict[nn.Module, nn.Module | None] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._walk(self.model, "", None)

    def _walk(self, module: nn.Module, path: str, owner: nn.Module | None) -> None:
        """Children before parents; the owner of a module is the innermost one around it that has `_init_weights`."""
        if module in self.paths:
            return
        self.paths[module] = path
        owner = module if callable(getattr(module, "_init_weights", None)) else owner
        self.owners[module] = owner
        for name, child in module.named_children():
            self._walk(child, f"{path}.{name}" if path else name, owner)
        self.order.append(module)

    def has_initialization(self, module: nn.Module) -> bool:
        return reset_method(module) is not None or self.owners[module] is not None

    def run(self, module: nn.Module, take: Callable[[nn.Module, str, Tensor, bool], None]) -> None:
        """Initialize `module` and hand `take` (module, attribute, value, whether it was filled) of all it wrote."""
        below: dict[int, nn.Module] = {}
        for m in module.modules():
            if m is not module:
                for t in own_tensors(m).values():
                    below.setdefault(id(t), m)
        group = [module]
        while True:
            originals = {m: own_tensors(m) for m in group}
            try:
                empty = {m: _make_real(m) for m in group}
                touched = {id(t) for m in group for t in own_tensors(m).values()}
                watch = _Watch(touched | below.keys())
                for m in group:
                    self._initialize(m, watch)
                more = {below[key] for key in watch.seen if key in below} - set(group)
                if not more:
                    for m in group:
                        for leaf, value in own_tensors(m).items():
                            take(m, leaf, value.detach(), _is_filled(value, empty[m].get(leaf), watch))
                    return
            finally:
                for m, tensors in originals.items():
                    for leaf, tensor in tensors.items():
                        setattr(m, leaf, tensor)
            members = {*group, *more}
            group = [m for m in self.order if m in members]

    def _initialize(self, module: nn.Module, watch: _Watch) -> None:
        digest = hashlib.sha256(f"{self.seed}/{self.paths[module]}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"), watch:
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            reset = reset_method(module)
            if reset is not None:
                reset()
            owner = self.owners[module]
            if owner is not None:
                owner._init_weights(module)  # type: ignore[operator]


class _Watch(TorchFunctionMode):
    """Notes which of some tensors are used, other than asked for their shape and the like."""

    HARMLESS = frozenset(
        "size dim numel ndimension stride is_floating_point is_complex element_size __hash__ __len__ __repr__".split()
    )

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self._ids = ids
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            harmless = name != "data"
        else:
            harmless = name in self.HARMLESS
        if not harmless:
            for x in (*args, *(kwargs or {}).values()):
                for t in x if isinstance(x, list | tuple) else (x,):
                    if id(t) in self._ids:
                        self.seen.add(id(t))
        return func(*args, **(kwargs or {}))


def _make_real(module: nn.Module) -> dict[str, Tensor]:
    """Give the module's own tensors memory, filled with what no initialization leaves."""
    made = {}
    for leaf, old in own_tensors(module).items():
        value = torch.empty_like(old, device="cpu")
        if value.is_floating_point() or value.is_complex():
            value.fill_(float("nan"))
        elif value.dtype != torch.bool:
            value.fill_(torch.iinfo(value.dtype).min)
        made[leaf] = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        setattr(module, leaf, made[leaf])
    return made


def _is_filled(value: Tensor, empty: Tensor | None, watch: _Watch) -> bool:
    """Whether an initialization wrote all of `value`, which was `empty` before. Of bools all that is known is that it was used."""
    if value.dtype == torch.bool:
        return value is not empty or id(value) in watch.seen
    if value.is_floating_point() or value.is_complex():
        return not bool(torch.isnan(value).any())
    return not bool((value == torch.iinfo(value.dtype).min).any())


def _initialize(
    model: nn.Module, store: ParameterStore, tensors: _Tensors, wanted: Mapping[str, TensorFacts], seed: int
) -> list[str]:
    """Initialize the modules that have parameters or buffers in `wanted`, and those that write such ones of others."""
    initializer = _Initializer(model, seed)
    homes = {tensors.places[name]: name for name in wanted}
    unfilled = dict.fromkeys(wanted)

    def take(module: nn.Module, leaf: str, value: Tensor, filled: bool) -> None:
        name = homes.get((module, leaf))
        if name is not None and filled and tuple(value.shape) == wanted[name].shape:
            store.set_whole(name, value)
            unfilled.pop(name, None)

    below: set[nn.Module] = set()
    for module in initializer.order:
        own = any((module, leaf) in homes for leaf in own_tensors(module))
        # A module without tensors of its own may still write those of the modules in it.
        if initializer.has_initialization(module) and (own or any(child in below for child in module.children())):
            initializer.run(module, take)
        if own or any(child in below for child in module.children()):
            below.add(module)
    if not unfilled:
        return []
    kinds = sorted({type(tensors.places[name][0]).__name__ for name in unfilled})
    names = ", ".join(list(unfilled)[:8]) + (f" and {len(unfilled) - 8} more" if len(unfilled) > 8 else "")
    return [
        f"{names} (of {', '.join(kinds)}) on the meta device: no initialization fills them. Give "
        f"{'the module' if len(kinds) == 1 else 'the modules'} "
        "a reset_parameters() that does, give the values in a state dict or safetensors files, or build the model on the CPU"
    ]
