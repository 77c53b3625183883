"""How processes write a checkpoint together: each its own files, over a process group that only writing uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from llmtrainer.core.pieces import is_piece, own
from llmtrainer.parallel.world import PATIENCE, World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException


class WholeTensors:
    """Each process has some tensors whole, and writes them as `STEM-00001-of-00002.safetensors`."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        # Of its own: on the thread that writes, so that its messages never mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def agree(self, done: bool) -> bool:
        failed = torch.tensor([not done], dtype=torch.int64)
        dist.all_reduce(failed, group=self._group)
        return not bool(failed)

    def frozen(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in named.items()}

    def write(self, named: Mapping[str, Tensor], folder: Path, stem: str) -> None:
        file = folder / f"{stem}-{self.rank + 1:05d}-of-{self.size:05d}.safetensors"
        save_file(dict(named), file, {"format": "pt"})


class Pieces(WholeTensors):
    """Each process has a piece of every tensor; torch.distributed.checkpoint writes them as safetensors below `STEM/`.

    Its writer for Hugging Face's format, because its own format keeps a pickle beside the tensors. Scalars, which all
    processes have alike, are written by rank 0.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._mesh = init_device_mesh("cpu", (world.size,))

    def frozen(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: on_mesh(own(value).detach().to("cpu", copy=True), value, self._mesh) if is_piece(value)
            else value.detach().to("cpu", copy=True)
            for name, value in named.items()
        }  # fmt: skip

    def write(self, named: Mapping[str, Tensor], folder: Path, stem: str) -> None:
        alike = {name: value for name, value in named.items() if not is_piece(value)}
        pieces = {name: value for name, value in named.items() if is_piece(value)}
        if pieces:
            self._write_pieces(pieces, folder / stem)
        if alike and self.rank == 0:
            save_file(alike, folder / f"{stem}.safetensors", {"format": "pt"})

    def _write_pieces(self, pieces: Mapping[str, Tensor], folder: Path) -> None:
        # torch re-exports these without saying so.
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)    # type: ignore[attr-defined]
        try:
            dcp.save(dict(pieces), storage_writer=writer, process_group=self._group)    # type: ignore[attr-defined]
        except dcp.CheckpointException as error:    # type: ignore[attr-defined]
            raise _first(error) from error
        for file in folder.glob(f"shard-{self.rank + 1:05d}-*.safetensors"):
            settle_header(file)


def on_mesh(piece: Tensor, like: Tensor, mesh: DeviceMesh) -> DTensor:
    """A piece as part of a whole with the shape of `like`, along the first axis."""
    return DTensor.from_local(
        piece, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=_strides(like.shape)
    )  # fmt: skip


def settle_header(file: Path) -> None:
    """Put the facts of a safetensors header in order: the library writes several of them in any, and equal weights
    would be files with other hashes."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(settled) <= length, "the same keys take no more room"
        handle.seek(8)
        handle.write(settled.ljust(length))


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _first(error: CheckpointException) -> BaseException:
    """What went wrong on this machine or elsewhere, where it is a disk's error: that is told to people."""
    found = [failure[0] for failure in error.failures.values()]
    return next((each for each in found if isinstance(each, OSError)), error)
