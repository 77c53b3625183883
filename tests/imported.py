"""Everything that a run imports: processes that are forked from one that has it need not import it once more."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import torch._dynamo  # what optimizers and gradients import when they are first used: most of a short run's time
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim
import torch.fx.experimental.symbolic_shapes  # noqa: F401

import llmtrainer.apps
import llmtrainer.data
import llmtrainer.generation
import llmtrainer.models
import llmtrainer.objectives
import llmtrainer.optim
import llmtrainer.parallel
import llmtrainer.training
import tests.invariants.patches  # noqa: F401

for package in (
    llmtrainer.apps, llmtrainer.data, llmtrainer.generation, llmtrainer.models, llmtrainer.objectives, llmtrainer.optim,
    llmtrainer.parallel, llmtrainer.training,
):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError:
            continue    # an extra that is not installed

# The first collection of every fork would write to all of it, and so copy it.
gc.freeze()
