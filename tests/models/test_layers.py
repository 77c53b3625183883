"""Rotary positions, norms and sizes against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtrainer.models.layers import RMSNorm, intermediate_size, rotate
from llmtrainer.models.rotary import Rotary
from tests.tolerances import FLOAT32_HIDDEN, FLOAT64_LOGITS


@pytest.mark.parametrize(("size", "theta"), [(64, 10_000.0), (32, 500_000.0), (2, 10.0)])
def test_the_rotary_table_is_the_formula_also_far_away(size: int, theta: float) -> None:
    positions = torch.tensor([[0, 1, 2, 77], [1023, 8191, 100_000, 131_071]], dtype=torch.int32)
    cos, sin = Rotary(size, theta)(positions, 131_072, torch.float64)
    angle = positions.numpy()[:, :, None].astype(np.float64) / theta ** (2 * np.arange(size // 2) / size)
    np.testing.assert_allclose(cos[:, :, 0].numpy(), np.cos(angle), rtol=0, atol=FLOAT64_LOGITS)
    np.testing.assert_allclose(sin[:, :, 0].numpy(), np.sin(angle), rtol=0, atol=FLOAT64_LOGITS)
    # A float32 table is the exact one rounded once, not one of float32 angles.
    narrow, _ = Rotary(size, theta)(positions, 131_072, torch.float32)
    assert torch.equal(narrow, cos.float())


def test_the_rotary_table_grows_without_changing_what_it_held() -> None:
    rotary, positions = Rotary(16, 10_000.0), torch.arange(40)[None]
    before = rotary(positions, 40, torch.float32)
    rotary(torch.tensor([[999]]), 1000, torch.float32)
    after = rotary(positions, 40, torch.float32)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scores_depend_on_the_distance_alone(share: float) -> None:
    C = 16
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, C, generator=random, dtype=torch.float64) for _ in range(2))
    rotary = Rotary(int(C * share), 10_000.0)

    def score(i: int, j: int) -> float:
        turned = [rotate(x, rotary(torch.tensor([[at]]), 4096, torch.float64)) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(3, 0), abs=FLOAT64_LOGITS)
    assert score(4003, 4000) == pytest.approx(score(3, 0), abs=FLOAT64_LOGITS)
    assert score(5, 3) != pytest.approx(score(3, 0), abs=1e-3)


def test_channels_beyond_the_rotated_share_carry_no_position() -> None:
    x = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, Rotary(8, 10_000.0)(torch.arange(3)[None], 3, torch.float32))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[:, 0], x[:, 0]) and not torch.equal(turned[:, 1:, :, :8], x[:, 1:, :, :8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_norm_divides_by_the_root_mean_square_in_float32_or_wider(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, 1e-5, master=torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 8))
    x = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1e3).to(dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.detach().double()
    tolerance = FLOAT64_LOGITS if dtype == torch.float64 else FLOAT32_HIDDEN
    assert norm(x).dtype == dtype
    found = norm(x, torch.float64 if dtype == torch.float64 else torch.float32).detach().double()
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("hidden", "expected"), [(2048, 5632), (4096, 11_008), (256, 768), (96, 256), (768, 2048)])
def test_the_mlp_is_eight_thirds_rounded_up_to_256(hidden: int, expected: int) -> None:
    assert intermediate_size(hidden) == expected
