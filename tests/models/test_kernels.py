"""Norms, rotations and gated MLPs: every set of kernels is the same functions, here or on the device that has them."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arrangement
from llmtrainer.models import kernels
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.layers import TORCH
from tests.models.rows import rows
from tests.tolerances import FLOAT32_GRADIENT, FLOAT32_HIDDEN

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeNorm:
    """LigerRMSNormFunction as its documentation has it: eps, offset, casting mode, in place."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, epsilon: float, offset: float, mode: str, in_place: bool) -> Tensor:
        assert x.is_contiguous() and offset == 0.0 and mode == "gemma" and not in_place
        return F.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)


class FakeRope(torch.autograd.Function):
    """LigerRopeFunction: [B, H, T, C] against tables [B, T, C] that name every angle twice; in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        assert cos.shape == (q.shape[0], q.shape[2], q.shape[3])
        ctx.save_for_backward(cos, sin)
        return tuple(x.copy_(_turned(x, cos, sin)).clone() for x in (q, k))     # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*(_turned(x, cos, -sin) for x in gradients), None, None)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None]


class FakeSiluMul:
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with Liger's functions as they are documented, that runs anywhere."""
    classes = {"rms_norm": ("LigerRMSNormFunction", FakeNorm), "rope": ("LigerRopeFunction", FakeRope),
               "swiglu": ("LigerSiLUMulFunction", FakeSiluMul)}
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for file, (name, made) in classes.items():
        module = ModuleType(f"liger_kernel.ops.{file}")
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernels, "missing", lambda name, device: None)


def decoder(device: torch.device = CPU, **fields: Any) -> Decoder:
    made = Llama(hidden_size=32, layers=2, heads=4, kv_heads=2, mlp_bias=True, query_key_norm=True, **fields).build(320)
    made.initialise(0)
    return made.to(device)


def require_same_model(device: torch.device, **fields: Any) -> None:
    batch = rows([[9, 4], [12]]).to(device)
    found = []
    for name in ("torch", "liger"):
        model = decoder(device, **fields)
        told = model.arrange(Arrangement(kernels=name))
        assert told.facts["kernels"] == name
        logp = model(batch, ("logp",)).logp_BT
        found.append([logp.detach(), *torch.autograd.grad(logp.sum(), list(model.parameters()))])
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        allowed = FLOAT32_GRADIENT if index else FLOAT32_HIDDEN
        torch.testing.assert_close(other, one, rtol=FLOAT32_GRADIENT, atol=allowed)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_model_on_ligers_functions_is_the_same_model(liger: None, share: float) -> None:
    require_same_model(CPU, rotary_share=share)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run here: no CUDA device")
def test_a_model_on_ligers_kernels_is_the_same_model() -> None:
    pytest.importorskip("liger_kernel", reason="not run here: liger-kernel is not installed")
    require_same_model(CUDA)


def test_ligers_rotation_leaves_its_inputs_alone(liger: None) -> None:
    q, k, angle = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 4)
    before, rotary = (q.clone(), k.clone()), (angle.cos(), angle.sin())
    for ours, theirs in zip(kernels.liger_rotate(q, k, rotary), TORCH.rotate(q, k, rotary), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32_HIDDEN)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


@pytest.mark.parametrize(("device", "said"), [(CPU, "not on cpu"), (CUDA, "pip install 'llmtrainer[liger]'")], ids=str)
def test_liger_is_refused_where_it_cannot_run_unless_a_fallback_is_allowed(
    device: torch.device, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        kernels.choose("liger", device, torch.float32, fallback=False)
    assert said in str(caught.value) and "engine.kernels=torch" in str(caught.value)
    name, (sentence,) = kernels.choose("liger", device, torch.float32, fallback=True)
    assert name == "torch" and said in sentence


def test_auto_takes_liger_on_cuda_where_it_is_installed_and_tells_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.choose("auto", CPU, torch.float32, False) == ("torch", ())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name, (sentence,) = kernels.choose("auto", CUDA, torch.bfloat16, False)
    assert name == "torch" and "llmtrainer[liger]" in sentence
    assert kernels.choose("torch", CUDA, torch.bfloat16, False) == ("torch", ())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert kernels.choose("auto", CUDA, torch.bfloat16, False) == ("liger", ())
    assert kernels.choose("auto", CUDA, torch.float64, False) == ("torch", ())
