"""The command line, on a small Llama config and on a model of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shardwright import Strategy
from shardwright.cli import app, load_model, load_topology, parse_strategy

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}

FUNCTION = """
import torch

class Model(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().mean()

def make():
    torch.manual_seed(0)
    return Model(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), torch.randn(4, 8)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_config_becomes_a_meta_model(config: str) -> None:
    model, inputs = load_model(config, 2, 16)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {"input_ids": (2, 16), "labels": (2, 16)}
    folder_model, _ = load_model(str(Path(config).parent), 2, 16)
    assert type(folder_model) is type(model)


def test_function_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "models.py"
    path.write_text(FUNCTION)
    model, inputs = load_model(f"{path}:make", 1, 1)
    assert sum(p.numel() for p in model.parameters()) == 8 * 16 + 16 + 16 * 4 + 4
    assert inputs.shape == (4, 8)
    with pytest.raises(typer.BadParameter, match="no function 'other'"):
        load_model(f"{path}:other", 1, 1)
    with pytest.raises(typer.BadParameter, match="no file"):
        load_model(f"{tmp_path}/none.py:make", 1, 1)
    with pytest.raises(typer.BadParameter, match="neither a config file"):
        load_model(str(tmp_path / "none.json"), 1, 1)


def test_strategies() -> None:
    assert parse_strategy("auto") == "auto"
    assert parse_strategy("tp=2, zero=3,sequence_parallel=true") == Strategy(tp=2, zero=3, sequence_parallel=True)
    assert parse_strategy("pp=2,schedule=gpipe") == Strategy(pp=2, schedule="gpipe")
    for text in ("tensor=2", "tp", "tp="):
        with pytest.raises(typer.BadParameter, match="takes name=value"):
            parse_strategy(text)


def test_topology_from_preset_and_file(tmp_path: Path) -> None:
    preset = load_topology("h100", 16)
    assert preset.world_size == 16
    preset.save(tmp_path / "mine.json")
    assert load_topology(str(tmp_path / "mine.json"), 16) == preset
    assert load_topology(str(tmp_path / "mine.json"), 32).world_size == 32


def test_plan_estimate_emit(config: str, tmp_path: Path) -> None:
    options = ["--devices", "4", "--batch", "4", "--seq", "16", "--strategy", "dp=2,tp=2,pp=1,zero=1"]
    shown = run("plan", config, *options, "--json", str(tmp_path / "plan.json"))
    assert "tp=2" in shown
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["zero"] == 1
    estimate = json.loads(run("estimate", config, *options))
    assert estimate["mesh"] == {"dp_shard": 2, "tp": 2}
    assert estimate["predicted"]["step_seconds"] > 0
    text = run("emit", config, *options, "--rank", "3")
    assert "all_reduce" in text and "tp" in text
    run("emit", config, *options, "--rank", "3", "--out", str(tmp_path / "program"))
    assert list((tmp_path / "program").rglob("forward.py"))


def test_verify_compares_with_one_device(config: str, tmp_path: Path) -> None:
    shown = run("verify", config, "--devices", "2", "--batch", "2", "--seq", "8", "--strategy", "tp=2")
    assert "gradients; largest relative error" in shown
    path = tmp_path / "models.py"
    path.write_text(FUNCTION)
    shown = run("verify", f"{path}:make", "--devices", "2", "--strategy", "dp=2,zero=3")
    assert "and 4 gradients" in shown
    assert "not compared" in run("verify", config, "--devices", "2", "--seq", "8", "--strategy", "dp=2", "--no-numbers")


def test_refusal_is_one_message(config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from shardwright.cli import main

    monkeypatch.setattr("sys.argv", ["shardwright", "plan", config, "--devices", "4", "--strategy", "tp=3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: tp=3 does not divide the 4 ranks")
    assert "Traceback" not in shown
