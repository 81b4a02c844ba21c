"""Text to train on that every machine has: the source code of its Python standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


class StdlibText(Dataset[dict[str, Tensor]]):
    """Pieces of `length` bytes as {"input_ids", "labels"}, int64 [length] each; the model shifts the labels itself."""

    def __init__(self, length: int, megabytes: float = 4.0) -> None:
        self.length = length
        self.text = torch.frombuffer(bytearray(_read(int(megabytes * 2**20))), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.text) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.text[index * self.length : (index + 1) * self.length].long()
        return {"input_ids": piece, "labels": piece.clone()}


def _read(size: int) -> bytes:
    """The first `size` bytes of the library's modules in alphabetical order, its tests and installed packages left out."""
    library = Path(sysconfig.get_path("stdlib"))
    found = b""
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(library).parts):
            found += path.read_bytes()
            if len(found) >= size:
                break
    return found[:size]
