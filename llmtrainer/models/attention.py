"""Grouped-query attention over documents packed in rows, by several paths that agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from llmtrainer.core.products import widened
from llmtrainer.models.joint import joint_linear
from llmtrainer.models.layers import TORCH, Kernels, Linear, RMSNorm
from llmtrainer.models.lora import Beside
from llmtrainer.models.visible import BLOCK, Block, Visible

RotaryTable = tuple[Tensor, Tensor]


def attend_cached(q_BTHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """New queries against cached keys and values; no gradient."""
    B, K = k_BKSC.shape[:2]
    k_ZSC, v_ZSC = k_BKSC.flatten(0, 1), v_BKSC.flatten(0, 1)
    out_BTHC = torch.empty_like(q_BTHC)
    for block in blocks:
        p_ZQK = _probabilities(_by_query(q_BTHC, block, K), k_ZSC, block, B)
        _write_queries(out_BTHC, torch.bmm(p_ZQK, v_ZSC[:, block.keys]), block, K)
    return out_BTHC


def attend_reference(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """The definition, at full cost: every score, then the mask, then softmax in float32 or wider."""
    groups = q_BTHC.shape[2] // k_BTKC.shape[2]
    wide = torch.promote_types(q_BTHC.dtype, torch.float32)
    keys, values = (x.repeat_interleave(groups, dim=2).to(wide) for x in (k_BTKC, v_BTKC))
    scores = torch.einsum("bqhc,bkhc->bhqk", q_BTHC.to(wide), keys) / math.sqrt(q_BTHC.shape[-1])
    scores = scores.masked_fill(~visible.mask_BTT[:, None], -math.inf)
    return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), values).to(q_BTHC.dtype)


def attend_sdpa(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """torch's fused kernels: by far the fastest on CUDA, by far the slowest on a CPU."""
    out_BHTC = scaled_dot_product_attention(
        q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2),
        attn_mask=None if visible.plain else visible.mask_BTT[:, None],
        is_causal=visible.plain,
        enable_gqa=q_BTHC.shape[2] != k_BTKC.shape[2],
    )
    return out_BHTC.transpose(1, 2)


def attend_blocks(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, visible: Visible) -> Tensor:
    """Blocks of queries, each by plain products against the one range of keys that it needs."""
    q, k, v = (widened(x) for x in (q_BTHC, k_BTKC, v_BTKC))
    return _Blocks.apply(q, k, v, visible.blocks).to(q_BTHC.dtype)


Path = Callable[[Tensor, Tensor, Tensor, Visible], Tensor]

PATHS: dict[str, Path] = {
    "blocks": attend_blocks, "sdpa": attend_sdpa, "reference": attend_reference,
}
"""The same function of (q_BTHC, k_BTKC, v_BTKC, visible) -> out_BTHC, by name: those that run anywhere."""


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        B, T, H, _ = q_BTHC.shape
        K = k_BTKC.shape[2]
        k_ZTC, v_ZTC = _by_head(k_BTKC), _by_head(v_BTKC)
        queries, out = _cut(q_BTHC, K, blocks), _Room(q_BTHC, K, blocks)
        keep = any(ctx.needs_input_grad) and B * H * T * T * q_BTHC.element_size() // 2 <= _KEPT_BYTES
        scores, again = (_Scratch.of(q_BTHC, blocks, B * H) for _ in range(2))
        kept = []
        for block, q_ZQC, out_ZQC in zip(blocks, queries, out.blocks(), strict=True):
            p_ZQK = _probabilities(q_ZQC, k_ZTC, block, B, scores, None if keep else again)
            torch.bmm(p_ZQK, v_ZTC[:, block.keys], out=out_ZQC)
            kept.append(p_ZQK if keep else None)
        # Through autograd, so that whoever recomputes activations drops these too.
        ctx.save_for_backward(k_ZTC, v_ZTC, *queries, *kept)
        ctx.blocks, ctx.shape = blocks, q_BTHC.shape
        return out.joined()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k_ZTC, v_ZTC, *saved = ctx.saved_tensors
        B, T, H, C = ctx.shape
        K, dtype = k_ZTC.shape[0] // B, k_ZTC.dtype
        gradients, dq = _cut(grad_BTHC, K, ctx.blocks), _Room(grad_BTHC, K, ctx.blocks)
        # Every block adds to the keys before it; in bfloat16 these sums would lose digits with the row's length.
        wide = torch.promote_types(dtype, torch.float32)
        dk_ZTC, dv_ZTC = (torch.zeros(k_ZTC.shape, dtype=wide, device=k_ZTC.device) for _ in range(2))
        queries, probabilities = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        first, second, third = (_Scratch.of(grad_BTHC, ctx.blocks, B * H) for _ in range(3))
        for block, q_ZQC, kept, g_ZQC, dq_ZQC in zip(
            ctx.blocks, queries, probabilities, gradients, dq.blocks(), strict=True
        ):  # fmt: skip
            keys = block.keys
            p_ZQK = _probabilities(q_ZQC, k_ZTC, block, B, first, second) if kept is None else kept
            dv_ZTC[:, keys] += torch.bmm(p_ZQK.transpose(1, 2), g_ZQC)
            dp_ZQK = torch.bmm(g_ZQC, v_ZTC[:, keys].transpose(1, 2), out=first.room(p_ZQK.shape))
            ds_ZQK = torch.ops.aten._softmax_backward_data(
                dp_ZQK, p_ZQK, -1, p_ZQK.dtype, grad_input=third.room(p_ZQK.shape)
            )
            _scaled(ds_ZQK, k_ZTC[:, keys], C, out=dq_ZQC)
            dk_ZTC[:, keys] += _scaled(ds_ZQK.transpose(1, 2), q_ZQC, C)
        dk_BTKC, dv_BTKC = (x.view(B, K, T, C).transpose(1, 2).to(dtype) for x in (dk_ZTC, dv_ZTC))
        return dq.joined(), dk_BTKC, dv_BTKC, None


_KEPT_BYTES = 64 * 2**20
"""Probabilities of one layer up to this size wait for backward; larger ones are computed again."""


class _Scratch:
    """Memory for the scores of one block at a time, the same for all. They grow along a row, so what one block
    freed would never be enough for the next, and a process would come to hold several times what it needs."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    @classmethod
    def of(cls, x: Tensor, blocks: tuple[Block, ...], heads: int) -> _Scratch:
        most = max((block.stop - block.start) * (block.latest - block.earliest) for block in blocks)
        return cls(x.new_empty(heads * most))

    def room(self, shape: Sequence[int]) -> Tensor:
        return self._flat[: math.prod(shape)].view(*shape)


def _by_head(x_BTKC: Tensor) -> Tensor:
    """[Z = B*K, T, C]: one matrix for each row and key head."""
    return x_BTKC.transpose(1, 2).flatten(0, 1).contiguous()


def _by_query(x_BTHC: Tensor, block: Block, K: int) -> Tensor:
    """[Z = B*K, Q = G*n, C]: the n queries of a block of all G heads that share a key head."""
    B, _, H, C = x_BTHC.shape
    n = block.stop - block.start
    part = x_BTHC[:, block.start : block.stop].view(B, n, K, H // K, C)
    return part.permute(0, 2, 3, 1, 4).reshape(B * K, H // K * n, C)


def _whole(blocks: tuple[Block, ...]) -> int:
    """How many blocks, from the first on, are whole ones of an even grid: one copy moves them all."""
    places = enumerate(blocks)
    return sum(1 for _ in itertools.takewhile(lambda item: item[1].stop == (item[0] + 1) * BLOCK, places))


def _cut(x_BTHC: Tensor, K: int, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
    """The queries of every block, each as `_by_query` gives them."""
    B, _, H, C = x_BTHC.shape
    whole, G = _whole(blocks), H // K
    part = x_BTHC[:, : whole * BLOCK].view(B, whole, BLOCK, K, G, C)
    even = part.permute(1, 0, 3, 4, 2, 5).reshape(whole, B * K, G * BLOCK, C).unbind(0)
    return (*even, *(_by_query(x_BTHC, block, K) for block in blocks[whole:]))


class _Room:
    """Unset results for every block of queries, as `_cut` lays them out."""

    def __init__(self, x_BTHC: Tensor, K: int, blocks: tuple[Block, ...]) -> None:
        B, _, H, C = x_BTHC.shape
        self.shape, self.K, G, whole = x_BTHC.shape, K, H // K, _whole(blocks)
        self.whole_NZQC = x_BTHC.new_empty(whole, B * K, G * BLOCK, C)
        self.others = blocks[whole:]
        sizes = [G * (block.stop - block.start) for block in self.others]
        self.other_ZQC = [x_BTHC.new_empty(B * K, size, C) for size in sizes]

    def blocks(self) -> tuple[Tensor, ...]:
        return (*self.whole_NZQC, *self.other_ZQC)

    def joined(self) -> Tensor:
        """[B, T, H, C]: one copy for all whole blocks."""
        B, _, H, C = self.shape
        whole, G = len(self.whole_NZQC), H // self.K
        out_BTHC = self.whole_NZQC.new_empty(self.shape)
        part = self.whole_NZQC.view(whole, B, self.K, G, BLOCK, C).permute(1, 0, 4, 2, 3, 5)
        out_BTHC[:, : whole * BLOCK].view(B, whole, BLOCK, self.K, G, C).copy_(part)
        for block, x_ZQC in zip(self.others, self.other_ZQC, strict=True):
            _write_queries(out_BTHC, x_ZQC, block, self.K)
        return out_BTHC


def _scaled(a: Tensor, b: Tensor, C: int, out: Tensor | None = None) -> Tensor:
    """a b / sqrt(C): the product's own epilogue scales, before it rounds."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0.0, alpha=C**-0.5, out=out)


def _write_queries(out_BTHC: Tensor, x_ZQC: Tensor, block: Block, K: int) -> None:
    B, _, H, C = out_BTHC.shape
    n = block.stop - block.start
    part = out_BTHC[:, block.start : block.stop].view(B, n, K, H // K, C)
    part.copy_(x_ZQC.view(B, K, H // K, n, C).permute(0, 3, 1, 2, 4))


def _probabilities(
    q_ZQC: Tensor, k_ZTC: Tensor, block: Block, B: int, scores: _Scratch | None = None, room: _Scratch | None = None
) -> Tensor:
    """softmax over the visible keys of a block: [Z, Q, keys]; reduced in float32 inside torch's kernel. `scores` and
    `room`: where the scores and the result may lie."""
    shape = *q_ZQC.shape[:2], block.latest - block.earliest
    keys_ZCK = k_ZTC[:, block.keys].transpose(1, 2)
    scores_ZQK = _scaled(q_ZQC, keys_ZCK, q_ZQC.shape[-1], None if scores is None else scores.room(shape))
    bias, n = block.bias(q_ZQC.dtype, q_ZQC.device), block.stop - block.start
    by_row = scores_ZQK.view(B, -1, shape[1] // n, n, shape[2])
    by_row[..., -bias.shape[-1] :] += bias
    return torch.softmax(scores_ZQK, -1) if room is None else torch.softmax(scores_ZQK, -1, out=room.room(shape))


class Attention(nn.Module):
    """Grouped-query attention, H query heads on K key heads (arXiv:2305.13245)."""

    def __init__(self, shape: AttentionShape, *, master: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.kernels: Kernels = TORCH
        D, H, K, C = shape.hidden_size, shape.heads, shape.kv_heads, shape.head_size
        self.q_proj = Linear(D, H * C, bias=shape.bias, master=master)
        self.k_proj = Linear(D, K * C, bias=shape.bias, master=master)
        self.v_proj = Linear(D, K * C, bias=shape.bias, master=master)
        self.o_proj = Linear(H * C, D, bias=shape.output_bias, master=master)
        normed = shape.query_key_norm
        self.q_norm = RMSNorm(C, shape.norm_epsilon, master=master) if normed else None
        self.k_norm = RMSNorm(C, shape.norm_epsilon, master=master) if normed else None

    def project(
        self, x_BTD: Tensor, rotary: RotaryTable, turned: bool = False, beside: Beside | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two normalised (if asked) and rotated. `turned`: see
        core/products.py; `beside`: for dropout of adapters."""
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        if q.adapter is k.adapter is v.adapter is None:
            joint = joint_linear(x_BTD, (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias), turned)
        else:
            joint = q(x_BTD, beside), k(x_BTD, beside), v(x_BTD, beside)
        q_BTHC, k_BTKC, v_BTKC = (x.unflatten(-1, (-1, self.shape.head_size)) for x in joint)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        return *self.kernels.rotate(q_BTHC, k_BTKC, rotary), v_BTKC


@dataclass(frozen=True)
class AttentionShape:
    """What an attention layer needs to know of its family."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    bias: bool
    output_bias: bool
    query_key_norm: bool
    norm_epsilon: float
