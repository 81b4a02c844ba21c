"""Graphs as Python that a person reads and the executor runs: one line per node, values deleted after their last use.

A graph becomes `forward(args: list) -> tuple`. The list is boxed: the function empties it, so that an argument dies at
its last use. Beside each line stand the value's shape and its placement on each axis; above it, where they change, the
module path and the user's source line.
"""

from __future__ import annotations

import functools
import hashlib
import keyword
import linecache
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .direct import OpOverload, direct_namespaces, op_path
from .errors import GRAPH_MARK, ShardwrightError
from .homes import product_into
from .program import GraphSpec, RankProgram, TensorSpec
from .recycle import INTO, recycled
from .reuse import owner, placeholders_at, result_nodes, reused

GraphFunction = Callable[[list[Any]], tuple[Any, ...]]

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_FACTORIES = frozenset(
    {"arange", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"}
    | {"randn", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "zeros"}
)
"""aten ops that make a tensor from none: where they name no device they are given the program's."""

_RESERVED = {
    "args",
    "constants",
    "device",
    "torch",
    "operator",
    "inf",
    "nan",
    "complex",
    "slice",
    "getattr",
    "Ellipsis",
    GRAPH_MARK,
    "into",
    "product_into",
}


def graph_text(
    spec: GraphSpec,
    name: str,
    device: str = "cpu",
    namespaces: Mapping[str, str] | None = None,
    products: frozenset[int] = frozenset(),
    donated: frozenset[int] | None = None,
) -> str:
    """One graph as a Python module with the function `forward`. See `compile_graph` for what it raises.

    namespaces  renames op namespaces, for a saved program whose copies of the ops must not clash with the installed ones
    donated     with results written over values that nothing reads any more (`reuse.py`, `recycle.py`), these inputs among them
    """
    header = _header([spec], device, namespaces or {})
    into = _into(spec, donated, products, device) if donated is not None else {}
    return "\n".join([*header, f"{GRAPH_MARK} = {name!r}", "", "", *_function(spec, "forward", products, into)]) + "\n"


def program_text(program: RankProgram) -> str:
    """A rank's whole program: where it stands, what it stores, its schedule, and every graph."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(program.mesh.axes, program.mesh.sizes, strict=True)) or "one rank"
    here = ", ".join(f"{axis} {index}" for axis, index in program.coordinates.items())
    where = f"Rank {program.rank} of {program.mesh.world_size}{f' ({here})' if here else ''} on the mesh {mesh}"
    what = f"one {'training' if program.training else 'evaluation'} step of {program.microbatches} micro-batch(es)"
    lines = [
        f'"""{where}: {what}.',
        "",
        "Stored here:",
        *(f"    {_spec_line(spec)}" for spec in (*program.parameters, *program.buffers)),
        "",
        "Schedule:",
        *(f"    {line}" for instruction in program.schedule for line in _instruction_lines(instruction)),
        '"""',
        "",
        *_header(program.graphs.values(), program.device, {}),
    ]
    for name, spec in program.graphs.items():
        lines += ["", "", f"# graph {name}", *_function(spec, identifier(name))]
    return "\n".join(lines) + "\n"


def compile_graph(
    spec: GraphSpec,
    name: str = "graph",
    device: torch.device | str = "cpu",
    products: frozenset[int] = frozenset(),
    donated: frozenset[int] = frozenset(),
) -> GraphFunction:
    """The function that `graph_text` prints, with each op called directly (`direct.py`) and in place where it can be (`reuse.py`).
    It takes the values of `spec.inputs` in a list, which it empties.

    products    outputs, matrix products all, for which the caller gives memory: the list then begins with a list of `homes.Place`
                for every output
    donated     inputs that it may write over

    Raises ShardwrightError for a graph that is not plain ops over placeholders and attributes, naming the node.
    """
    code = _code(graph_text(spec, name, str(device), products=products, donated=donated), name)
    scope: dict[str, Any] = {"__name__": f"shardwright_graph_{identifier(name)}", "product_into": product_into}
    exec(code, scope)  # noqa: S102  (text of our own, made from a graph that was checked node by node)
    scope.update(direct_namespaces(spec.graph.graph.nodes))
    scope["constants"].update({key: value.to(device) for key, value in graph_constants(spec.graph).items()})
    return scope["forward"]


def graph_constants(graph: GraphModule) -> dict[str, Tensor]:
    """The tensors a graph reads from its module, by attribute path."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = functools.reduce(getattr, str(node.target).split("."), graph)
            if not isinstance(value, Tensor):
                raise ShardwrightError(f"node {node.name} reads {node.target!r}, which is a {type(value).__name__}, not a tensor")
            found[str(node.target)] = value.detach()
    return found


@functools.lru_cache(maxsize=512)
def _code(text: str, name: str) -> CodeType:
    filename = f"<shardwright {name} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    return compile(text, filename, "exec")


def identifier(name: str) -> str:
    """A name as Python allows it, of a function or a file."""
    clean = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    return f"_{clean}" if clean[0].isdigit() or keyword.iskeyword(clean) else clean


def _spec_line(spec: TensorSpec) -> str:
    cuts = ", ".join(f"dim {cut.dim} over {cut.axis}" for cut in spec.cuts) or "whole"
    return f"{spec.name}: {_shape(spec.dtype, spec.shape)}, {cuts}{'' if spec.trainable else ', frozen'}"


def _instruction_lines(instruction: Any) -> Iterator[str]:
    yield str(instruction)
    if instruction.kind in ("gather", "all_reduce", "reduce_scatter"):
        for start in range(0, len(instruction.keys), 4):
            yield "    " + ", ".join(instruction.keys[start : start + 4])


def _makes_tensor(target: Any) -> bool:
    namespace, op, _ = op_path(target)
    return namespace == "aten" and op in _FACTORIES


def _header(specs: Iterable[GraphSpec], device: str, namespaces: Mapping[str, str]) -> list[str]:
    nodes = [node for spec in specs for node in spec.graph.graph.nodes if node.op == "call_function"]
    used = sorted({op_path(node.target)[0] for node in nodes if isinstance(node.target, OpOverload)})
    imports = ["import operator"] if any(_operator_name(node.target) for node in nodes) else []
    lines = [*imports, "from math import inf, nan  # noqa: F401", "", "import torch", ""]
    lines += [f"{name} = torch.ops.{namespaces.get(name, name)}" for name in used]
    return [*lines, f"device = torch.device({device!r})", "constants: dict[str, torch.Tensor] = {}"]


def _operator_name(target: Any) -> str:
    """The name in the module `operator` of a function other than getitem, which prints as an index."""
    name = getattr(target, "__name__", "")
    return name if target is not operator.getitem and getattr(operator, name, None) is target else ""


def _callee(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverload):
        return ".".join(op_path(target))
    if name := _operator_name(target):
        return f"operator.{name}"
    raise ShardwrightError(
        f"node {node.name} calls {target!r}, which is no op: a program's graphs hold ops and operator functions only"
    )


def _literal(value: Any, names: Mapping[Node, str]) -> str:
    """An argument as Python. Raises ShardwrightError for what has no readable form."""
    match value:
        case Node():
            return names[value]
        case None | bool() | str() | torch.dtype() | torch.memory_format() | torch.layout():
            return repr(value)
        case int() if type(value) is int:
            return repr(value)
        case float():
            return repr(float(value))  # inf and nan are imported by those names
        case complex():
            return f"complex({value.real!r}, {value.imag!r})"
        case torch.device():
            return "device" if value.type in ("cpu", "cuda") else f"torch.device({str(value)!r})"
        case slice():
            return f"slice({', '.join(_literal(v, names) for v in (value.start, value.stop, value.step))})"
        case tuple():
            inner = ", ".join(_literal(v, names) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        case list():
            return f"[{', '.join(_literal(v, names) for v in value)}]"
        case dict():
            return "{" + ", ".join(f"{k!r}: {_literal(v, names)}" for k, v in value.items()) + "}"
        case _ if value is Ellipsis:
            return "..."
    raise ShardwrightError(f"a graph holds {value!r} ({type(value).__name__}) as an argument, which cannot be written as Python")


def _names(nodes: Iterable[Node], taken: set[str]) -> dict[Node, str]:
    names: dict[Node, str] = {}
    used = set(taken)
    for node in nodes:
        base = name = identifier(node.name)
        count = 0
        while name in used:
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        names[node] = name
    return names


def _into(spec: GraphSpec, donated: frozenset[int], products: frozenset[int], device: str) -> dict[Node, Node]:
    """The values into whose memory nodes write their results."""
    nodes, given = list(spec.graph.graph.nodes), placeholders_at(spec, donated)
    over = reused(nodes, given)
    found: dict[Node, Any] = {node: node.args[i] for node, i in over.items()}
    if torch.device(device).type == "cpu":
        results = zip(count(), spec.outputs, result_nodes(spec.graph), strict=False)
        apart = {owner(node) for i, key, node in results if node is not None and (i in products or key.startswith("out."))}
        found |= recycled(nodes, over, given, apart)
    return found


def _last_uses(nodes: list[Node], into: Mapping[Node, Node]) -> dict[Node, list[Node]]:
    """For each node, the values that it is the last to read, or to write its result `into`. What nobody reads is not listed."""
    dying: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(nodes):
        read = [*node.all_input_nodes, *([into[node]] if node in into else [])]
        fresh = [value for value in dict.fromkeys(read) if value not in seen]
        seen.update(fresh)
        dying[node] = fresh
    return dying


def _function(
    spec: GraphSpec, function: str, products: frozenset[int] = frozenset(), into: Mapping[Node, Node] | None = None
) -> list[str]:
    into = into or {}
    nodes = list(spec.graph.graph.nodes)
    placed = {nodes[-1].args[0][i]: i for i in products}
    used_namespaces = {op_path(n.target)[0] for n in nodes if isinstance(n.target, OpOverload)}
    names = _names(nodes, _RESERVED | used_namespaces)
    dying = _last_uses(nodes, into)
    keys = iter(spec.inputs)
    lines = [f"def {function}(args: list) -> tuple:", "    args.reverse()", *(["    into = args.pop()"] if placed else [])]
    module = source = None
    for node in nodes:
        if node.op == "placeholder":
            key = next(keys, None)
            if key is None:
                raise ShardwrightError(
                    f"placeholder {node.name} has no key: the graph has more placeholders than the {len(spec.inputs)} inputs"
                )
            read = f"{names[node]} = args.pop()" if node.users else "args.pop()"
            lines.append(f"    {read}  # {_facts(node, key)}")
            continue
        if node.op == "output":
            lines.append(f"    return {_returned(node, names, spec)}")
            break
        where = node.meta.get("module"), node.meta.get("source")
        if where[0] and where[0] != module:
            module = where[0]
            lines.append(f"    # module {module}")
        if where[1] and where[1] != source:
            source = where[1]
            lines.append(f"    # {' '.join(str(source).split())}")
        lines.append(f"    {_statement(node, names, dying[node], placed.get(node), into.get(node))}")
    if next(keys, None) is not None:
        raise ShardwrightError(f"the graph has fewer placeholders than the {len(spec.inputs)} inputs it is given keys for")
    return lines


def _returned(node: Node, names: Mapping[Node, str], spec: GraphSpec) -> str:
    values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    if len(values) != len(spec.outputs):
        raise ShardwrightError(f"a graph of {len(values)} outputs was given {len(spec.outputs)} output keys")
    keys = f"  # {', '.join(spec.outputs)}" if spec.outputs else ""
    return _literal(tuple(values), names) + keys


def _statement(node: Node, names: Mapping[Node, str], dying: list[Node], place: int | None = None, into: Node | None = None) -> str:
    """The line of a node. place: where among the memory that the graph is given that for its result stands; into: the value that it
    is written over."""
    if node.op == "get_attr":
        right = f"constants[{str(node.target)!r}]"
    elif node.op != "call_function":
        raise ShardwrightError(f"node {node.name} is a {node.op}: a program's graphs hold ops, placeholders and attributes only")
    elif node.target is operator.getitem:
        right = f"{_literal(node.args[0], names)}[{_literal(node.args[1], names)}]"
    else:
        arguments = [_literal(value, names) for value in node.args]
        named = dict(node.kwargs)
        if isinstance(node.target, OpOverload) and _makes_tensor(node.target) and named.get("device") is None:
            named["device"] = torch.device("cpu")
        arguments += [f"{key}={_literal(value, names)}" for key, value in named.items()]
        right = f"{_callee(node)}({', '.join(arguments)})"
        if place is not None:
            right = f"product_into({', '.join(arguments)}, into[{place}])"
        elif into is not None:
            how = INTO[node.target]
            shape, had = (tuple(map(int, n.meta["val"].shape)) for n in (node, into))
            memory = names[into] if shape == had else f"{names[into]}.view({shape})"
            right = f"{how.callee}({', '.join(arguments)}, {how.keyword}={memory})"
    text = f"{names[node]} = {right}" if node.users else right
    if dying:
        text += f"; del {', '.join(names[value] for value in dying)}"
    facts = _facts(node)
    return f"{text}  # {facts}" if facts else text


def _facts(node: Node, key: str = "") -> str:
    """`key  f32[4, 8] | dp:V(0) tp:R`, as far as they are known."""
    val = node.meta.get("val")
    shape = f"({', '.join(map(_value_shape, val))})" if isinstance(val, (tuple, list)) else _value_shape(val)
    types = node.meta.get("types") or {}
    placement = " ".join(f"{axis}:{_placement(type_)}" for axis, type_ in types.items())
    return " | ".join(part for part in (" ".join(p for p in (key, shape) if p), placement) if part)


def _placement(type_: Any) -> str:
    return f"({', '.join(map(str, type_))})" if isinstance(type_, (tuple, list)) else str(type_)


def _value_shape(val: Any) -> str:
    if isinstance(val, Tensor):
        return _shape(val.dtype, val.shape)
    return "" if val is None else type(val).__name__


def _shape(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{_SHORT.get(dtype, str(dtype).removeprefix('torch.'))}[{', '.join(str(int(n)) for n in shape)}]"
