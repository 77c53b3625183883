"""The hash of a policy's weights: equal for equal bytes, another for every change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmtrainer.core.weights_version import weights_version


def module() -> nn.Module:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(40, 30), nn.Linear(3, 1), nn.Linear(64, 64, dtype=torch.bfloat16))
    inside[1].requires_grad_(False)
    return inside


def test_equal_weights_have_equal_versions_wherever_they_are() -> None:
    one = module()
    assert weights_version(one) == weights_version(copy.deepcopy(one)) == weights_version(module())


@pytest.mark.parametrize("name", [name for name, _ in module().named_parameters()])
def test_every_single_element_counts_frozen_ones_too(name: str) -> None:
    changed = module()
    before, seen = weights_version(changed), set()
    weight = dict(changed.named_parameters())[name].detach().view(-1)
    for place in {0, len(weight) // 2, len(weight) - 1}:
        kept = weight[place].clone()
        weight.data[place] = kept * 1.01 + 1e-3    # written behind autograd's back
        seen.add(weights_version(changed))
        weight.data[place] = kept
    assert len(seen) == len({0, len(weight) // 2, len(weight) - 1}) and before not in seen
    assert weights_version(changed) == before


def test_the_same_bytes_under_another_name_type_or_shape_are_other_weights() -> None:
    def of(name: str, weight: torch.Tensor) -> str:
        holder = nn.Module()
        holder.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return weights_version(holder)

    flat = torch.arange(512, dtype=torch.int32)
    versions = {
        of("a", flat), of("b", flat), of("a", flat.view(16, 32)), of("a", flat.view(torch.float32)),
        of("a", torch.cat([flat[256:], flat[:256]])),
    }  # fmt: skip
    assert len(versions) == 5
