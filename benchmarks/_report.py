"""What the benchmarks share: tables, JSON files, and the memory of this process."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

MIB, GIB = 2**20, 2**30


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column left, the others right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 110)  # in a log too
    console.print(table)


def machine() -> dict[str, Any]:
    """Where and when the figures were taken."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "devices": torch.cuda.device_count(),
        "cpus": os.cpu_count(),
    }


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write the results, with the machine they are of, to `path` if there is one."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")


def peak_rss() -> int:
    """Bytes: the most that this process has held, since `reset_peak` where the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Start to measure `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present


def peak_bytes(device: torch.device) -> int:
    """The peak of the device's own memory; on the CPU, of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
