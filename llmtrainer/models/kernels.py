"""Who computes norms, rotations and gated MLPs: torch, or Liger's fused Triton kernels."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models.gated import Biases, Weights
from llmtrainer.models.layers import TORCH, Kernels, rotate_both

KERNELS = ("torch", "liger")


def missing(name: str, device: torch.device) -> str | None:
    """What keeps these kernels from running on `device`, for people; None: nothing."""
    if name == "torch":
        return None
    if device.type != "cuda":
        return f"Liger's kernels run on CUDA, not on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'llmtrainer[liger]'"
    return None


def choose(asked: str, device: torch.device, dtype: torch.dtype, fallback: bool) -> tuple[str, tuple[str, ...]]:
    """Whose kernels to take, and what to tell about it. Raises UserError if they cannot run here and no others may."""
    lack = missing("liger", device)
    if asked == "torch" or (asked == "auto" and (device.type != "cuda" or dtype == torch.float64)):
        return "torch", ()
    if lack is None:
        return "liger", ()
    if asked == "auto" or fallback:
        return "torch", (f"norms, rotations and gated MLPs run on torch's kernels: {lack}",)
    raise UserError(
        "Liger's kernels cannot run here",
        where="engine.kernels",
        why=f"{lack}; here run torch's",
        fix="engine.kernels=torch, or engine.fallback=true to take those and be told",
    )


def kernels(name: str) -> Kernels:
    if name == "torch":
        return TORCH
    # torch.compile passes Triton kernels of others over as they are: it cannot look into their autograd functions.
    return Kernels(*map(torch.compiler.disable, (liger_norm, liger_rotate, liger_gated_mlp)))


def liger_norm(x: Tensor, weight: Tensor, epsilon: float, out_type: torch.dtype) -> Tensor:
    """As norm.rms_norm."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is Liger's word for: all in float32, rounded once at the end. Not in place: the gradient that
    # arrives may belong to somebody else.
    normed: Tensor = LigerRMSNormFunction.apply(x.contiguous(), weight, epsilon, 0.0, "gemma", False)
    return normed.to(out_type)


def liger_rotate(q_BTHC: Tensor, k_BTKC: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As layers.rotate_both, which it leaves heads to that are rotated in part."""
    cos, sin = rotary
    if 2 * cos.shape[-1] != q_BTHC.shape[-1]:
        return rotate_both(q_BTHC, k_BTKC, rotary)
    from liger_kernel.ops.rope import LigerRopeFunction

    # Its tables name every angle twice. It writes over what it is given, hence the copies.
    whole_cos, whole_sin = (torch.cat([x, x], dim=-1).squeeze(2) for x in (cos, sin))
    turned = LigerRopeFunction.apply(
        q_BTHC.clone().transpose(1, 2), k_BTKC.clone().transpose(1, 2), whole_cos, whole_sin
    )
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def liger_gated_mlp(x_BTD: Tensor, weights: Weights, biases: Biases, turned: bool = False) -> Tensor:
    """As gated.gated_mlp; `turned` is a fact of some CPUs and means nothing here."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up, down = (
        (weight.to(x_BTD.dtype), None if bias is None else bias.to(x_BTD.dtype))
        for weight, bias in zip(weights, biases, strict=True)
    )
    return F.linear(LigerSiLUMulFunction.apply(F.linear(x_BTD, *gate), F.linear(x_BTD, *up)), *down)
