"""What every test process shares: one thread for torch, in this process and in those that it starts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two processes of two threads each on two cores wait for each other in busy loops: measured twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

MOST_DESCRIPTORS = 200


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch compiles is kept for this run of the tests, by all of its processes: the headers take longest."""
    one_of_several = os.environ.get("PYTEST_XDIST_WORKER") is not None
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str((base.parent if one_of_several else base) / "compiled"))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_descriptors() -> Iterator[None]:
    """Mapped stores are closed when Python collects garbage, which a process of thousands of tests does too rarely for
    the thousand descriptors that it may have."""
    yield
    if Path("/proc/self/fd").is_dir() and len(os.listdir("/proc/self/fd")) > MOST_DESCRIPTORS:
        gc.collect()


LONGEST = (
    "training/test_storm", "test_docs", "conformance/test_engines", "training/test_asynchronous",
    "training/test_recipes", "training/test_ranks", "data/test_memory", "training/test_engines_in_runs",
    "invariants/test_table", "training/test_exact_runs", "training/test_logp_cache", "models/test_lora",
    "training/test_examples", "training/test_prepare", "data/test_encode", "training/test_teacher",
)  # fmt: skip
"""The files that take longest, the longest first: begun last, one of two processes would end alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    places = {root / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="processes killed while they save (make storm: 500)")
    parser.addoption("--corruptions", type=int, default=20, help="checkpoints damaged (make storm: 100)")
    parser.addoption("--faults", type=int, default=200, help="crashes inside a checkpoint (make storm: 500)")
    parser.addoption("--injected", type=int, default=8, help="faults in jobs of several ranks (make faults: 40)")
    parser.addoption("--exact-steps", type=int, default=5, help="of exact runs; 60 with ten real kills (make storm)")
