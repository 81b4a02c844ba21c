"""What is installed: the package alone, with its profiles, and no name that could be another package's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shardwright

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = ("compiler", "passes", "runtime")


def run_python(code: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_relative_symlinks(part: str) -> None:
    link = ROOT / "shardwright" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../{part}"
    assert (link / "__init__.py").samefile(ROOT / part / "__init__.py")


def test_every_folder_of_code_is_a_package() -> None:
    """setuptools is told not to take namespace packages: a folder without an __init__.py would be missing from a wheel."""
    assert PROJECT["tool"]["setuptools"]["packages"]["find"] == {"include": ["shardwright*"], "namespaces": False}
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_data_files_exist() -> None:
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package} has no {pattern}"


def test_import_is_quick_and_lazy() -> None:
    code = "import sys, shardwright; print([m for m in ('torch', 'sympy', 'rich', 'typer', 'transformers') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_public_names_resolve() -> None:
    assert set(shardwright.__all__) <= set(dir(shardwright))
    for name in shardwright.__all__:
        assert getattr(shardwright, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shardwright.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    source = (ROOT / "shardwright" / "__init__.py").read_text()
    seen = source[source.index("if TYPE_CHECKING:") : source.index("try:")]
    for name, home in shardwright._HOMES.items():
        lines = [line for line in seen.splitlines() if f"from .{home} import" in line]
        assert any(name in line.split("import")[1].replace(",", " ").split() for line in lines), f"{name} of {home}"
    assert set(shardwright._HOMES) | {"__version__"} == set(shardwright.__all__)


def test_transformers_is_not_needed() -> None:
    """It is an extra: nothing but the command line's config files asks for it."""
    code = "import sys; sys.modules['transformers'] = None; from shardwright import *; print(auto_parallelize.__name__)"
    assert run_python(code) == "auto_parallelize"


def test_no_upper_bounds_and_pins_within() -> None:
    dependencies = PROJECT["project"]["dependencies"]
    assert "torch>=2.11" in dependencies
    assert not [d for d in dependencies if "<" in d or "==" in d]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    names = {pin.split("==")[0] for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    for needed in [*dependencies, *extras["hf"], *extras["test"]]:
        assert needed.split(">=")[0] in names, f"{needed} is not pinned"


def private_torch_names(path: Path) -> list[str]:
    """Imports and attributes of torch with a leading underscore; operators (torch.ops...._x) are no private names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and parts[1:2] != ["ops"]:
                found += [f"{name}:{node.lineno}" for x in parts if x.startswith("_") and not x.startswith("__")][:1]
    return found


def test_only_one_module_uses_private_torch() -> None:
    """Private names are a debt, kept in one place."""
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*.py") if path.name != "torch_compat.py"]
    found = {str(path.relative_to(ROOT)): names for path in paths if (names := private_torch_names(path))}
    assert not found
    assert private_torch_names(ROOT / "compiler" / "torch_compat.py")
