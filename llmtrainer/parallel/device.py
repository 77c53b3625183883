"""Which device this process computes on, and what can run there."""

from __future__ import annotations

import shutil

import torch

from llmtrainer.base import process
from llmtrainer.base.errors import UserError


def find_device(name: str, precision: str) -> torch.device:
    """The device `name` means on this machine. Raises UserError if it is not there or cannot compute so."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and process.world_size() > 1:
        name = f"cuda:{process.local_rank()}"     # each process its own card
    try:
        device = torch.device(name)
        found = torch.empty((), device=device).device   # with its number, which futures of CUDA ask for
        device = found if device.type == "cuda" else device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"there is no device `{name}` here", where="engine.device",
            why=str(error).splitlines()[0],
            fix="engine.device=auto",
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"nothing is computed on device `{name}`", where="engine.device", fix="engine.device=auto")
    if device.type == "mps" and precision == "float64":
        raise UserError(
            "MPS has no float64", where="precision, engine.device", fix="engine.device=cpu, or precision=float32"
        )
    return device


def require_graphs(device: torch.device, fallback: bool) -> tuple[str, ...]:
    """Nothing, where CUDA graphs can run; what to tell, where they cannot and need not. Else a UserError."""
    if device.type == "cuda":
        return ()
    if not fallback:
        raise UserError(
            "CUDA graphs cannot run here", where="engine.cuda_graphs", why=f"the device is {device}",
            fix="engine.cuda_graphs=false, or engine.fallback=true to go without and be told",
        )
    return (f"the model runs without CUDA graphs: the device is {device}",)


def require_compiler(device: torch.device) -> None:
    """Refuse to compile for a CPU without a C++ compiler, which torch.compile needs there."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError(
            "torch.compile needs a C++ compiler, and there is none on the path",
            where="engine.compile",
            why="on a CPU, torch.compile writes C++",
            fix="install g++ or clang++, or engine.compile=false",
        )
