"""doctor: what this machine has, how fast it multiplies, and which fallbacks are active."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.result import Result
from llmtrainer.base.units import Bytes
from llmtrainer.base.version import VERSION
from llmtrainer.core.precision import DTYPES, multiplies_bfloat16, resolve
from llmtrainer.core.products import in_float32, product
from llmtrainer.models import kernels, paths, prepacked

PACKAGES = (
    "torch", "numpy", "pydantic", "ruamel.yaml", "tokenizers", "safetensors", "pyarrow", "zstandard", "rich",
    "matplotlib", "transformers",
)
OPTIONAL = {"transformers": "hf"}
"""Packages that only an extra installs."""
COMPILERS = ("c++", "g++", "clang++")


class Examination(Config):
    """What to look at."""

    folder: Path = Path()
    """Whose disk has to hold the runs."""

    matrix_size: int = Field(default=1024, ge=64)
    """Rows and columns of the matrices whose product is timed."""

    repeats: int = Field(default=5, ge=1)
    """Products timed per type; the median counts."""


@dataclass(frozen=True)
class Diagnosis(Result):
    """The machine, as far as training depends on it."""

    llmtrainer: str
    python: str
    platform: str
    packages: dict[str, str | None]
    """Version by name; None if it is not installed."""
    cores: int
    """Processor cores this process may use."""
    threads: int
    """Threads that one matrix product uses."""
    memory: int | None
    """Bytes this process may use; None if the system does not say."""
    disk_free: int
    """Bytes."""
    devices: list[str]
    bfloat16: bool
    """Whether the first device multiplies it natively."""
    precision: str
    """What `precision: auto` means here."""
    matrix_rate: dict[str, float]
    """Floating-point operations per second by type: 2 n^3 over the median time of one product."""
    attention: dict[str, str | None]
    """What keeps each path of engine.attention from training here; None: nothing."""
    kernels: dict[str, str | None]
    """The same of engine.kernels."""
    compiler: str | None
    """The C++ compiler that torch.compile would use on a CPU."""
    fallbacks: list[str]
    """What works in another way here than on a machine that has everything."""

    def text(self) -> str:
        figures = [
            ("llmtrainer", self.llmtrainer), ("python", self.python), ("platform", self.platform),
            *((name, version or "not installed") for name, version in self.packages.items()),
            ("cores", f"{self.cores}, {self.threads} threads a product"), ("memory", _bytes(self.memory)),
            ("free disk", _bytes(self.disk_free)), ("devices", ", ".join(self.devices)),
            ("precision", f"auto is {self.precision} here"),
            *((f"{name} products", f"{rate / 1e9:,.0f} GFLOP/s") for name, rate in self.matrix_rate.items()),
            ("attention", ", ".join(name for name, lack in self.attention.items() if lack is None)),
            ("kernels", ", ".join(name for name, lack in self.kernels.items() if lack is None)),
            ("C++ compiler", self.compiler or "none"),
        ]
        lines = [f"{name:<17} {value}" for name, value in figures]
        active = [f"  {fallback}" for fallback in self.fallbacks] or ["  none"]
        return "\n".join([*lines, "", "active fallbacks", *active])


def doctor(examination: Examination) -> Diagnosis:
    """Look around, and time a few matrix products."""
    devices = _devices()
    device = torch.device(devices[0].partition(" ")[0])
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    packages = {name: _version(name) for name in PACKAGES}
    native, precision = multiplies_bfloat16(device), resolve("auto", device)
    attention = {name: paths.missing(name, device, DTYPES[precision]) for name in paths.PATHS}
    others = {name: kernels.missing(name, device) for name in kernels.KERNELS}
    rates = {
        str(dtype).removeprefix("torch."): _matrix_rate(device, dtype, examination)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Diagnosis(
        llmtrainer=VERSION,
        python=sys.version.split()[0],
        platform=platform.platform(),
        packages=packages,
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        disk_free=shutil.disk_usage(_existing(examination.folder)).free,
        devices=devices,
        bfloat16=native,
        precision=precision,
        matrix_rate=rates,
        attention=attention,
        kernels=others,
        compiler=compiler,
        fallbacks=_fallbacks(device, native, compiler, packages) + _lacks(attention, others),
    )


def _fallbacks(
    device: torch.device, native: bool, compiler: str | None, packages: dict[str, str | None]
) -> list[str]:
    found = []
    if device.type == "cpu":
        found.append("no accelerator: everything runs on the processor")
        if (reason := prepacked.missing()) is not None:
            found.append(f"generate multiplies with plain weights, more slowly: {reason}")
    if not native:
        found.append(f"{device.type} does not multiply bfloat16 natively: `precision: auto` is float32")
    if in_float32(device, torch.bfloat16):
        found.append("products of bfloat16 are computed in float32, and rounded once")
    if compiler is None and device.type == "cpu":
        found.append("no C++ compiler on the path: models run uncompiled, and engine.compile=true is refused")
    for name, version in packages.items():
        if version is None:
            what = f"install llmtrainer[{OPTIONAL[name]}]" if name in OPTIONAL else f"install {name}"
            found.append(f"{name} is not installed: what needs it is refused ({what})")
    return found


def _lacks(attention: dict[str, str | None], kernels: dict[str, str | None]) -> list[str]:
    named = [("engine.attention", attention), ("engine.kernels", kernels)]
    return [f"{key}={name} is refused: {lack}" for key, known in named for name, lack in known.items() if lack]


def _devices() -> list[str]:
    """Names of torch's devices, the one that `device: auto` takes first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({_processor()})"]


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)     # Any: it exists on Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _memory() -> int | None:
    """The machine's memory or, where it is less, what a container may use."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else ""
    known = [amount for amount in (physical, int(text) if text.isdecimal() else None) if amount is not None]
    return min(known, default=None)


def _matrix_rate(device: torch.device, dtype: torch.dtype, examination: Examination) -> float:
    size = examination.matrix_size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(examination.repeats + 1):
        started = time.perf_counter()
        product(a, b)[0, 0].item()     # .item() waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])     # the first product loads the kernels


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(item for item in (folder, *folder.parents) if item.exists())


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / Bytes.parse('1 GiB').count:,.1f} GiB"
