"""Products of 16 bits on processors without instructions for them: in float32, rounded once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmtrainer.core import listed, products
from llmtrainer.core.precision import multiplies
from llmtrainer.models.adapters.lora import Lora
from tests.models.multiplied import Multiplied
from tests.models.rows import rows, shared_prompt
from tests.models.test_decoder import decoder
from tests.tolerances import BFLOAT16_RELATIVE

CPU = torch.device("cpu")
HALF_A_STEP = 2.0**-8
"""Of bfloat16, relative: what one rounding may change; sums in float32 add some millionths."""


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: True, torch.float16: True})


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    # The last summand: sums that cancel are near 0, and float32 rounds their parts.
    assert ((found.double() - exact).abs() <= (HALF_A_STEP + 1e-5) * exact.abs() + 1e-4).all()


def test_a_product_is_rounded_once_at_its_end() -> None:
    x_NI, weight_OI, bias_O, total_NO = random(9, 700), random(33, 700), random(33), random(9, 33)
    x, weight = x_NI.double(), weight_OI.double()
    assert_rounded_once(products.linear(x_NI, weight_OI, bias_O), F.linear(x, weight, bias_O.double()))
    assert_rounded_once(products.product(x_NI, weight_OI.t()), x @ weight.t())
    exact = total_NO.double() + 0.3 * (x @ weight.t())
    same = products.add_product(total_NO, x_NI, weight_OI.t(), 0.3)
    assert same is total_NO
    assert_rounded_once(total_NO, exact)
    gradient_NO = random(9, 33)
    found = products.weight_gradient(gradient_NO, x_NI, torch.float32, turned=False)
    assert found.dtype == torch.float32, "a master's gradient is not rounded at all"
    torch.testing.assert_close(found.double(), gradient_NO.double().t() @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slow", [True, False])
def test_no_product_of_a_step_or_of_reading_is_computed_in_16_bits_where_these_are_slow(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: slow})
    model, adapted = decoder(compute=torch.bfloat16), decoder(compute=torch.bfloat16)
    Lora(rank=2).insert(adapted)
    with Multiplied() as found:
        for one in (model, adapted):
            out = one(shared_prompt(17, [9, 12]), ("logp", "entropy"))
            assert out.logp_BT is not None
            out.logp_BT.sum().backward()
        model.read(torch.tensor([[5, 6, 7]]), torch.tensor([3]), model.cache(1, 8))
    assert (torch.bfloat16 in found.types) == (not slow)


def test_a_model_comes_to_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = rows([[37], [20]]), {}
    for slow in (True, False):
        monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: slow})
        model = decoder(compute=torch.bfloat16)
        out = model(batch, ("logp",))
        assert out.logp_BT is not None
        (out.logp_BT * batch.weights_BT).sum().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        read = model.read(batch.tokens_BT, torch.tensor([37, 20]), model.cache(2, 37))
        found[slow] = out.logp_BT.detach(), gradient, read
    for wide, narrow in zip(found[True], found[False], strict=True):
        assert (wide - narrow).norm() <= 3 * BFLOAT16_RELATIVE * wide.norm()


@pytest.mark.parametrize("slow", [True, False])
def test_a_model_that_holds_its_weights_rounded_has_the_bits_of_one_with_masters(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: slow})
    batch, (masters, rounded) = rows([[37], [20]]), (decoder(compute=torch.bfloat16) for _ in range(2))
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16() if parameter.ndim == 2 else parameter.data
    teacher = listed.told_by(masters.hidden(batch), masters.head_weight, batch, 5)
    batch = replace(batch, signals=teacher)
    found = [model(batch, ("logp", "entropy", "listed_logp", "rest_logp")) for model in (masters, rounded)]
    for name in ("logp_BT", "entropy_BT", "listed_logp_BTK", "rest_logp_BT"):
        assert torch.equal(*(getattr(out, name) for out in found)), name


@pytest.mark.parametrize(
    ("has", "dtype", "answer"),
    [
        ({"architecture": "x86_64", "avx2": True}, torch.bfloat16, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, torch.bfloat16, True),
        ({"architecture": "x86_64", "amx_bf16": True}, torch.bfloat16, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, torch.float16, False),
        ({"architecture": "x86_64", "avx2": True}, torch.float32, True),
        ({"architecture": "aarch64"}, torch.bfloat16, True),
        ({}, torch.bfloat16, True),
    ],
)
def test_only_of_processors_that_lack_the_instructions_is_it_said(
    has: dict[str, Any], dtype: torch.dtype, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert multiplies(CPU, dtype) is answer
    assert multiplies(torch.device("meta"), dtype)
