"""Proof at the start of a run: what was chosen is run once, forward and backward, against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core import vocab_head
from llmtrainer.models import kernels, paths
from llmtrainer.models.attention import AttentionShape, attend_reference
from llmtrainer.models.visible import Visible

ALLOWED = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 1.5e-2, torch.bfloat16: 1e-1}
"""Largest difference of any row of a result or gradient, as a share of the root mean square row. Three to ten times
what right ones show; a key too many or too few is a difference of about 1 where few keys are seen."""

_LENGTHS = ((93, 61), (30, 130))
"""Documents of the two rows: one row ends in padding, and both are longer than one block of queries."""
_TOKENS = 160
_WINDOW = 40


def require_attention(
    name: str, shape: AttentionShape, window: int | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises UserError if attention by `name` is not what it should be on this machine."""
    why = attention_fault(name, shape, window, device, dtype)
    if why is None:
        return
    others = [other for other in paths.that_can_run(device, dtype) if other != name]
    right = [other for other in others if attention_fault(other, shape, window, device, dtype) is None]
    raise UserError(
        f"attention by `{name}` computes something else than attention on {device}",
        where="engine.attention",
        why=f"{why}; within bounds: {', '.join(right) or 'no path'}",
        fix=f"engine.attention={right[0]}" if right else "train on another device: engine.device=cpu",
    )


def attention_fault(
    name: str, shape: AttentionShape, window: int | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is wrong with a path, for people; None: nothing."""
    seen = _visible(None if window is None else min(window, _WINDOW))
    K = min(shape.kv_heads, 2)
    H = K * (shape.heads // shape.kv_heads)
    inputs = _random([(2, _TOKENS, heads, shape.head_size) for heads in (H, K, K)], dtype)
    document_BT, position_BT = seen.document_BT.to(device), seen.position_BT.to(device)
    there = Visible(document_BT, document_BT, position_BT, seen.window)
    real_BT11 = (seen.document_BT >= 0)[..., None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paths.PATHS[name](q, k, v, there) * real_BT11.to(device)

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_reference(q, k, v, seen) * real_BT11

    return fault(attend, define, inputs, device)


def require_kernels(
    name: str, sizes: tuple[int, int], epsilon: float, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises UserError if norms, rotations or gated MLPs by `name` are not what they should be.

    sizes: width of the residual stream and of a head.
    """
    for part, why in kernel_faults(name, sizes, epsilon, device, dtype).items():
        other = "torch" if name == "liger" else "liger"
        raise UserError(
            f"{part} by `{name}` kernels computes something else on {device}",
            where="engine.kernels",
            why=why,
            fix=f"engine.kernels={other}" if kernels.missing(other, device) is None else "engine.device=cpu",
        )


def kernel_faults(
    name: str, sizes: tuple[int, int], epsilon: float, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """What is wrong with which operator, for people."""
    D, C = sizes
    chosen = kernels.kernels(name)
    wide = torch.promote_types(dtype, torch.float32)
    angle = torch.arange(24.0, dtype=torch.float64)[None, :, None, None] * 0.5 ** torch.arange(C // 2)
    rotary = angle.cos().to(wide).to(device), angle.sin().to(wide).to(device)

    def rotate(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(chosen.rotate(q, k, rotary), dim=2)

    def define_rotation(q: Tensor, k: Tensor) -> Tensor:
        x, turn = torch.cat([q, k], dim=2), torch.polar(torch.ones_like(angle), angle)
        turned = torch.complex(x[..., : C // 2], x[..., C // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def define_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), weight, epsilon)

    def define_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    x, weight = _random([(2, 24, D)], dtype), _random([(D,)], wide)
    mlp = _random([(96, D), (96, D), (D, 96)], wide, 0.1)
    found = {
        "RMSNorm": fault(lambda x, w: chosen.norm(x, w, epsilon, dtype), define_norm, [*x, *weight], device),
        "rotary": fault(rotate, define_rotation, _random([(1, 24, 4, C), (1, 24, 2, C)], dtype), device),
        "the gated MLP": fault(
            lambda x, *w: chosen.gated(x, w, (None, None, None), False), define_mlp, [*x, *mlp], device
        ),
    }  # fmt: skip
    return {part: why for part, why in found.items() if why is not None}


def require_same(
    what: str, compiled: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]],
    leaves: Sequence[Tensor], dtype: torch.dtype,
) -> None:
    """Raises UserError if a compiled function, or a gradient of it, is not that of the function it was made from.

    With the inputs of the first step: other sizes could be compiled once more, and later kernels would depend on
    them.
    """
    found, exact = (_flat_outcome(function(), leaves) for function in (compiled, plain))
    _require_near(what, found, exact, dtype)


def proven(arithmetic: vocab_head.Arithmetic, dtype: torch.dtype) -> vocab_head.Arithmetic:
    """The head's compiled arithmetic, of which each part is compared with the plain one when it is first used."""
    waiting = {"reduce", "differentiate"}

    def reduce(logits: Tensor, targets_n: Tensor, entropy: bool) -> vocab_head.Reduced:
        found = arithmetic.reduce(logits, targets_n, entropy)
        if "reduce" in waiting:
            waiting.discard("reduce")
            exact = vocab_head.PLAIN.reduce(logits, targets_n, entropy)
            _require_near("log-probabilities", _tensors(found), _tensors(exact), dtype)
        return found

    def differentiate(logits: Tensor, *others: Tensor | None) -> None:
        first = "differentiate" in waiting
        copy = logits.clone() if first else None    # both write over the logits
        arithmetic.differentiate(logits, *others)
        if copy is not None:
            waiting.discard("differentiate")
            vocab_head.PLAIN.differentiate(copy, *others)
            _require_near("the gradient of log-probabilities", [logits], [copy], dtype)

    return vocab_head.Arithmetic(reduce, differentiate, arithmetic.turn)


def _tensors(reduced: vocab_head.Reduced) -> list[Tensor]:
    return [x for x in reduced if x is not None]


def _require_near(what: str, results: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> None:
    for found, exact in zip(results, right, strict=True):
        off = difference(found, exact)
        if not off <= ALLOWED[dtype]:
            raise UserError(
                f"torch.compile makes something else of {what} on {exact.device}",
                where="engine.compile",
                why=f"a result or gradient is off by {off:.1e} in {str(dtype).removeprefix('torch.')}, where "
                f"{ALLOWED[dtype]:.0e} is allowed",
                fix="engine.compile=false",
            )


def _flat_outcome(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results, and the gradients of the leaves for a gradient that points along the results."""
    values, tracked = [result.detach() for result in results], [result for result in results if result.requires_grad]
    if not tracked:
        return values
    along = [result.detach() / result.detach().norm().clamp(min=1e-6) for result in tracked]
    return [*values, *torch.autograd.grad(tracked, leaves, along, materialize_grads=True)]


def fault(
    fast: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: Sequence[Tensor], device: torch.device
) -> str | None:
    """Compare a function, and its gradients, with its definition in float64 on the CPU; what differs, for people."""
    dtype = inputs[0].dtype
    try:
        found = _outcome(fast, [x.to(device) for x in inputs])
    except UserError:
        raise
    except Exception as error:    # foreign kernels and compilers raise whatever they like
        return f"it stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    exact = _outcome(definition, [x.double() for x in inputs])
    for index, (ours, right) in enumerate(zip(found, exact, strict=True)):
        off = difference(ours, right)
        if not off <= ALLOWED[dtype]:      # NaN is off as well
            what = "the result" if index == 0 else f"the gradient of input {index}"
            name = str(dtype).removeprefix("torch.")
            return f"{what} is off by {off:.1e} in {name}, where {ALLOWED[dtype]:.0e} is allowed"
    return None


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest row of the difference over the root mean square row of the exact one. A vector is one row."""
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    exact = exact.to(wide).reshape(-1, exact.shape[-1])
    off = (found.detach().to(exact).reshape(exact.shape) - exact).norm(dim=-1).max()
    size = exact.norm(dim=-1).square().mean().sqrt()
    return float(off / size) if bool(size > 0) else float(off)


def _outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value, and the gradients of the inputs for a fixed gradient of the value."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
    gradient = _random([tuple(out.shape)], inputs[0].dtype)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out))]


def _random(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """The same numbers on every machine, drawn without touching anybody's generator."""
    random = torch.Generator().manual_seed(len(shapes))
    return [(torch.randn(shape, generator=random, dtype=torch.float64) * scale).to(dtype) for shape in shapes]


def _visible(window: int | None) -> Visible:
    document_BT, position_BT = (torch.full((2, _TOKENS), value, dtype=torch.int32) for value in (-1, 0))
    for row, lengths in enumerate(_LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            document_BT[row, start : start + length] = number
            position_BT[row, start : start + length] = torch.arange(length, dtype=torch.int32)
            start += length
    return Visible(document_BT, document_BT, position_BT, window)
