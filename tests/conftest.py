"""What every test process shares: one torch thread, so that two workers fit two cores."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="real processes killed with -9 (make storm: 100)")
    parser.addoption("--faults", type=int, default=200, help="crashes inside a checkpoint (make storm: 500)")
