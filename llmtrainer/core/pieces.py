"""Tensors of which every process has a piece, in memory and in files: each along its first axis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

OFFSETS = "DCP_SHARDING_INFO"
"""Where torch.distributed.checkpoint says, in the header of a safetensors file, where its pieces begin."""


def is_piece(tensor: Tensor) -> bool:
    """Whether this process has but a piece of the tensor: a DTensor."""
    return hasattr(tensor, "to_local")


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, sharing its memory: all of it, or its piece."""
    share: Tensor | None = getattr(tensor, "ds_tensor", None)
    if share is not None:
        return share.detach()   # of a parameter that DeepSpeed has divided
    piece: Tensor = tensor.to_local() if is_piece(tensor) else tensor    # type: ignore[attr-defined]
    return piece


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process asks."""
    gathered: Tensor = tensor.full_tensor() if is_piece(tensor) else tensor    # type: ignore[attr-defined]
    return gathered


def first_row(tensor: Tensor) -> int:
    """Where this process's piece begins along the first axis: pieces are equal, but for what is left at the end."""
    mesh: Any = getattr(tensor, "device_mesh")     # noqa: B009  only a DTensor has one
    return min(int(mesh.get_local_rank()) * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor, or this process's piece of it, the values of a whole one."""
    piece = own(tensor)
    if is_piece(tensor):
        value = value.narrow(0, first_row(tensor), piece.shape[0])
    piece.copy_(value)


class Stored(Mapping[str, Tensor]):
    """Named tensors of files, each read when it is asked for: whole ones, or put together from pieces.

    `folder/stem.safetensors`, `folder/stem-00001-of-00002.safetensors` and on, and what torch.distributed.checkpoint
    wrote into `folder/stem/`: whatever is there of these.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.files = [
            *(file for file in [folder / f"{stem}.safetensors"] if file.is_file()),
            *sorted(folder.glob(f"{stem}-*-of-*.safetensors")), *sorted((folder / stem).glob("*.safetensors")),
        ]
        self._pieces: dict[str, list[tuple[Path, tuple[int, ...], tuple[int, ...]]]] = {}
        """Name -> file, place and shape of each piece."""
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                offsets = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    shape = tuple(opened.get_slice(name).get_shape())
                    at = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                    self._pieces.setdefault(name, []).append((file, at, shape))

    def __getitem__(self, name: str) -> Tensor:
        pieces, shape = self._pieces[name], self.shape(name)
        found: Tensor | None = None
        for file, at, size in pieces:
            with safe_open(file, framework="pt") as opened:
                value: Tensor = opened.get_tensor(name)
            if size == shape:
                return value
            found = torch.empty(shape, dtype=value.dtype) if found is None else found
            found[tuple(slice(begin, begin + length) for begin, length in zip(at, size, strict=True))] = value
        assert found is not None
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, without reading it."""
        ends = [[begin + length for begin, length in zip(at, size, strict=True)] for _, at, size in self._pieces[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def type(self, name: str) -> str:
        """As safetensors calls it: F32, BF16."""
        with safe_open(self._pieces[name][0][0], framework="pt") as opened:
            return str(opened.get_slice(name).get_dtype())


class Writers(Protocol):
    """The processes that write a checkpoint together, each what only it has, on their writing threads."""

    rank: int

    def agree(self, done: bool) -> bool:
        """Whether every process has done its part. All of them ask."""
        ...

    def frozen(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU of what this process has of these tensors."""
        ...

    def write(self, named: Mapping[str, Tensor], folder: Path, stem: str) -> None:
        """Write such copies where `Stored(folder, stem)` finds them, in files of this process's own. All
        of them call it."""
        ...
