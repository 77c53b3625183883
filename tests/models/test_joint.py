"""Several linear layers of one input as one product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrainer.core.products import turned_copy, weight_gradient
from llmtrainer.models.joint import joint_linear
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_joint_layers_give_what_each_layer_gives_alone_and_so_do_their_gradients(turned: bool, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = tuple(torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for rows in (6, 4, 4))
    biases = tuple(torch.randn(rows, dtype=torch.float64, requires_grad=True) if biased else None for rows in (6, 4, 4))
    leaves = [x, *weights, *(bias for bias in biases if bias is not None)]
    joint = joint_linear(x, weights, biases, turned)
    alone = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    upstream = [torch.randn_like(value) for value in alone]
    for mine, theirs in zip(joint, alone, strict=True):
        assert torch.allclose(mine, theirs, rtol=FLOAT64_GRADIENT_RELATIVE, atol=FLOAT64_GRADIENT_RELATIVE)
    ours, truth = (torch.autograd.grad(values, leaves, upstream) for values in (joint, alone))
    for mine, theirs in zip(ours, truth, strict=True):
        assert torch.allclose(mine, theirs, rtol=FLOAT64_GRADIENT_RELATIVE, atol=FLOAT64_GRADIENT_RELATIVE)


def test_a_frozen_layer_among_joint_layers_gets_no_gradient() -> None:
    x = torch.randn(1, 3, 8)
    weights = tuple(torch.randn(4, 8, requires_grad=trains) for trains in (True, False))
    sum(value.sum() for value in joint_linear(x, weights, (None, None))).backward()
    assert weights[0].grad is not None and weights[1].grad is None


def test_a_turned_copy_is_the_transposed_matrix_whatever_its_size() -> None:
    for rows in (1, 511, 512, 513, 1300):
        matrix = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
        assert torch.equal(turned_copy(matrix), matrix.t()) and turned_copy(matrix).is_contiguous()


def test_a_weight_gradient_is_the_same_product_either_way_round() -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((4, 9), (9, 4), (5, 5)):
        x, grad = torch.randn(70, inputs, dtype=torch.float64), torch.randn(70, outputs, dtype=torch.float64)
        expected = torch.einsum("no,ni->oi", grad, x)
        for turned in (False, True):
            found = weight_gradient(grad, x, torch.float64, turned)
            assert torch.allclose(found, expected, atol=FLOAT64_GRADIENT_RELATIVE)
