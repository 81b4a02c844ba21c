"""The command line: `shardwright plan | estimate | emit | verify MODEL`. Needs no devices and no torchrun.

MODEL is a Hugging Face config file (config.json), built on the meta device as a model with a loss, or `module:function`
(also `file.py:function`), which returns a model, or a model and its example inputs, as the function wishes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from torch import nn

    from . import PlannedModel, Strategy, Topology

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ModelOption = Annotated[str, typer.Argument(help="config.json, module:function or file.py:function")]
DevicesOption = Annotated[int, typer.Option(help="number of devices in all")]
TopologyOption = Annotated[str, typer.Option(help="a preset (h100, a100-80, cpu, ...) or a file that `Topology.save` wrote")]
BatchOption = Annotated[int, typer.Option(help="samples that one data rank gets; for config files")]
SequenceOption = Annotated[int, typer.Option("--seq", help="tokens of a sample; for config files")]
StrategyOption = Annotated[str, typer.Option(help="auto, or pins: tp=8,zero=3,sequence_parallel=true,layouts=any,schedule=1f1b")]


def load_model(source: str, batch: int, length: int) -> tuple[nn.Module, Any]:
    """The model that `source` names (see above), and its example inputs, None if it gives none."""
    if ":" not in source:
        return _from_config(Path(source), batch, length)
    place, name = source.rsplit(":", 1)
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise typer.BadParameter(f"there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise typer.BadParameter(f"{place} has no function {name!r}")
    made = getattr(module, name)()
    return made if isinstance(made, tuple) else (made, None)


def _from_config(path: Path, batch: int, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """The architecture that the config names, on the meta device, with random token ids and labels."""
    import torch
    import transformers

    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise typer.BadParameter(f"{path} is neither a config file nor module:function")
    options = json.loads(path.read_text())
    config = transformers.AutoConfig.for_model(**options)
    names = options.get("architectures")
    make = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = make(config)
    if isinstance(config.dtype, torch.dtype):
        model = model.to(config.dtype)
    vocabulary = config.get_text_config().vocab_size
    return model, {key: torch.randint(vocabulary, (batch, length)) for key in ("input_ids", "labels")}


def load_topology(source: str, devices: int) -> Topology:
    from . import Topology

    if Path(source).is_file():
        return Topology.from_file(source).resized(devices=devices)
    return Topology.preset(source, devices=devices)


def parse_strategy(text: str) -> Strategy | Literal["auto"]:
    """`tp=8,zero=3` as a Strategy; "auto" as it is."""
    from . import Strategy

    if text == "auto":
        return "auto"
    known = [f.name for f in fields(Strategy)]
    values = {"true": True, "false": False}
    pins: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in known or not value:
            raise typer.BadParameter(f"--strategy takes name=value with names {', '.join(known)}, not {item!r}")
        pins[name] = values.get(value.lower(), int(value) if value.isdigit() else value)
    return Strategy(**pins)


def _plan(model: str, devices: int, topology: str, batch: int, seq: int, strategy: str) -> PlannedModel:
    from . import plan

    module, inputs = load_model(model, batch, seq)
    return plan(module, load_topology(topology, devices), example_inputs=inputs, strategy=parse_strategy(strategy))


@app.command("plan")
def plan_command(
    model: ModelOption,
    devices: DevicesOption = 8,
    topology: TopologyOption = "h100",
    batch: BatchOption = 1,
    seq: SequenceOption = 2048,
    strategy: StrategyOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the plan here too")] = None,
) -> None:
    """Search a plan, and say why it was chosen."""
    found = _plan(model, devices, topology, batch, seq, strategy)
    typer.echo(found.explain())
    if json_file is not None:
        json_file.write_text(found.plan.to_json() + "\n")


@app.command()
def estimate(
    model: ModelOption,
    devices: DevicesOption = 8,
    topology: TopologyOption = "h100",
    batch: BatchOption = 1,
    seq: SequenceOption = 2048,
    strategy: StrategyOption = "auto",
) -> None:
    """Seconds, bytes and traffic of a step as the plan predicts them, as JSON."""
    found = _plan(model, devices, topology, batch, seq, strategy).plan
    mesh = dict(zip(found.mesh.axes, found.mesh.sizes, strict=True))
    predicted = json.loads(found.to_json())["predicted"]
    typer.echo(json.dumps({"mesh": mesh, "zero": found.zero, "microbatches": found.microbatches, "predicted": predicted}, indent=2))


@app.command("emit")
def emit_command(
    model: ModelOption,
    devices: DevicesOption = 8,
    topology: TopologyOption = "h100",
    batch: BatchOption = 1,
    seq: SequenceOption = 2048,
    strategy: StrategyOption = "auto",
    rank: Annotated[int, typer.Option(help="whose program")] = 0,
    out: Annotated[Path | None, typer.Option(help="write it to this folder instead of printing it")] = None,
) -> None:
    """The program of one rank, as Python."""
    from . import emit

    program = emit(_plan(model, devices, topology, batch, seq, strategy), rank)
    if out is None:
        typer.echo(program.print_readable())
    else:
        program.save(out)
        typer.echo(f"rank {rank} of {devices}: {out}")


@app.command("verify")
def verify_command(
    model: ModelOption,
    devices: DevicesOption = 4,
    topology: TopologyOption = "cpu",
    batch: BatchOption = 4,
    seq: SequenceOption = 32,
    strategy: StrategyOption = "auto",
    numbers: Annotated[bool, typer.Option(help="compare with one device by numbers too, in float64")] = True,
) -> None:
    """Check the types and schedules of all ranks' programs, and run them in this process to compare with one device."""
    from . import plan, verify

    module, inputs = load_model(model, batch, seq)
    pins = parse_strategy(strategy)
    planned = plan(module, load_topology(topology, devices), example_inputs=inputs, strategy=pins, device="cpu")
    typer.echo(str(verify(planned, numbers=numbers)))


def main() -> None:
    """The console script: an error of the request is one message, not a traceback."""
    from . import ShardwrightError

    try:
        app()
    except (ShardwrightError, ValueError) as error:  # StrategyError is a ValueError
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
