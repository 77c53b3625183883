"""Grouped-query attention over documents packed in rows, by several paths that agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from llmtrainer.core.batch import Batch
from llmtrainer.models.joint import joint_linear
from llmtrainer.models.layers import TORCH, Kernels, Linear, RMSNorm
from llmtrainer.models.lora import Beside

BLOCK = 128
"""Query rows of one block. Measured on CPU: smaller blocks skip more keys, larger ones multiply faster."""
_GRAIN = 32
"""Blocks of a row of several documents, and their keys, begin at multiples of it, so that few shapes occur: on a CPU
the first product of a shape costs as much as thirty others."""

RotaryTable = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Visible:
    """Which keys each query of a batch may see; made once for all layers.

    A key must not be later, must be of the same document, within the sliding window by position, and either
    shared by all sequences of its document (-1: a prompt with several answers) or of the query's own.
    Padding is a document of its own.
    """

    document_BT: Tensor
    sequence_BT: Tensor
    position_BT: Tensor
    window: int | None = None
    """A query sees at most this many positions, its own included."""
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a path made of this once for all layers, by the path's name."""

    @classmethod
    def of(cls, batch: Batch, window: int | None) -> Visible:
        return cls(batch.document_BT, batch.sequence_BT, batch.position_BT, window)

    @cached_property
    def mask_BTT(self) -> Tensor:
        """bool [B, query, key]."""
        T = self.document_BT.shape[1]
        seen = self.document_BT[:, :, None] == self.document_BT[:, None, :]
        seen &= torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
        query_BT1, key_B1T = self.sequence_BT[:, :, None], self.sequence_BT[:, None, :]
        seen &= (key_B1T == -1) | (key_B1T == query_BT1)
        if self.window is not None:
            seen &= self.position_BT[:, :, None] - self.position_BT[:, None, :] < self.window
        return seen

    @cached_property
    def branching(self) -> bool:
        """Whether some document holds several sequences, so that what a query sees is no unbroken range."""
        same = self.document_BT[:, 1:] == self.document_BT[:, :-1]
        return bool((same & (self.sequence_BT[:, 1:] != self.sequence_BT[:, :-1])).any())

    @cached_property
    def plain(self) -> bool:
        """Whether causality alone decides for every real token: one document a row, no window that bites."""
        short = self.window is None or self.document_BT.shape[1] <= self.window
        return short and not self.branching and bool((self.document_BT <= 0).all())

    @cached_property
    def first_BT(self) -> Tensor:
        """The earliest key a query may see, never falling along a row.

        Padding goes on with the document before it: nothing reads what it sees, and plain rows need no mask.
        """
        T = self.document_BT.shape[1]
        place_T = torch.arange(T, device=self.document_BT.device)
        starts_BT = torch.zeros_like(self.document_BT, dtype=torch.bool)
        starts_BT[:, 1:] = (self.document_BT[:, 1:] != self.document_BT[:, :-1]) & (self.document_BT[:, 1:] >= 0)
        first_BT = (starts_BT * place_T).cummax(dim=1).values
        if self.window is not None and not self.branching:
            first_BT = torch.maximum(first_BT, place_T - (self.window - 1))
        return first_BT

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The queries in blocks, each with the one range of keys that its rows need."""
        return tuple(self._block(start, stop) for start, stop in itertools.pairwise(self._borders()))

    def _borders(self) -> list[int]:
        """Where blocks begin, and the end of the last. One row of several documents is cut where they begin: a block
        across two would multiply each with the other's keys. Short neighbours share a block all the same."""
        T = self.document_BT.shape[1]
        changes = self.document_BT[0, 1:] != self.document_BT[0, :-1]
        if len(self.document_BT) > 1 or self.branching or not bool(changes.any()):
            return [*range(0, T, BLOCK), T]
        # Not below a document's begin: the block's first rows would need the keys of the document before.
        ends = sorted({min(-(-place // _GRAIN) * _GRAIN, T) for place in [*(1 + changes.nonzero()[:, 0]).tolist(), T]})
        borders, whole = [0], 0
        for end in ends:
            if end - borders[-1] > BLOCK:
                if whole > borders[-1]:
                    borders.append(whole)    # the documents before it fill a block of their own
                while end - borders[-1] > BLOCK:
                    pieces = -(-(end - borders[-1]) // BLOCK)
                    borders.append(borders[-1] + -(-(end - borders[-1]) // (pieces * _GRAIN)) * _GRAIN)
            whole = end
        return [*borders, T]

    def _block(self, start: int, stop: int) -> Block:
        earliest = int(self.first_BT[:, start].min()) // _GRAIN * _GRAIN
        if self.branching:
            hidden = ~self.mask_BTT[:, start:stop, earliest:stop]
            return Block(start, stop, earliest, stop, hidden[:, None, None])
        if int(self.first_BT[:, stop - 1].max()) <= earliest:
            return Block(start, stop, earliest, stop, None)
        place_k = torch.arange(earliest, stop, device=self.document_BT.device)
        hidden = place_k < self.first_BT[:, start:stop, None]
        hidden |= place_k > place_k[start - earliest :, None]
        return Block(start, stop, earliest, stop, hidden[:, None, None])


@dataclass(frozen=True)
class Block:
    """Queries start..stop against keys earliest..latest, ends not included."""

    start: int
    stop: int
    earliest: int
    latest: int
    hidden_B11QK: Tensor | None
    """What may not be seen, bool. None: the last key stands at the last query, and only what is later is
    hidden."""
    made: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def keys(self) -> slice:
        return slice(self.earliest, self.latest)

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """0 where a key may be seen and -inf where not, of the block's last keys: [B or 1, 1, 1, Q, their number].

        To be added: that is many times faster than to fill by a mask, and 0 changes no bit. Made once for all layers.
        """
        if dtype not in self.made:
            if self.hidden_B11QK is None:
                n = self.stop - self.start    # only the square on the diagonal holds later keys
                self.made[dtype] = torch.full((1, 1, 1, n, n), -math.inf, dtype=dtype, device=device).triu(1)
            else:
                bias = torch.zeros(self.hidden_B11QK.shape, dtype=dtype, device=device)
                self.made[dtype] = bias.masked_fill_(self.hidden_B11QK, -math.inf)
        return self.made[dtype]


def cached_blocks(read_B: Tensor, T: int, window: int | None, capacity: int) -> tuple[Block, ...]:
    """T new tokens of each row, of which `read_B` were read before, against all keys up to them."""
    shortest, longest = int(read_B.min()), int(read_B.max())
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        latest = min(longest + stop, capacity)
        # Padding past the capacity is taken to stand at its last place: every query must see some key.
        earliest = 0 if window is None else max(0, min(shortest + start, capacity - 1) - window + 1)
        hidden = None
        if shortest != longest or window is not None or latest != longest + stop:
            key_k = torch.arange(earliest, latest, device=read_B.device)
            query_BQ1 = (read_B[:, None] + torch.arange(start, stop, device=read_B.device))[:, :, None]
            query_BQ1 = query_BQ1.clamp(max=capacity - 1)
            hidden = key_k > query_BQ1
            if window is not None:
                hidden |= key_k <= query_BQ1 - window
            hidden = hidden[:, None, None]
        blocks.append(Block(start, stop, earliest, latest, hidden))
    return tuple(blocks)


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
    return _Blocks.apply(q_BTHC, k_BTKC, v_BTKC, visible.blocks)


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
        kept = []
        for block, q_ZQC, out_ZQC in zip(blocks, queries, out.blocks(), strict=True):
            p_ZQK = _probabilities(q_ZQC, k_ZTC, block, B)
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
        B, T, _, C = ctx.shape
        K, dtype = k_ZTC.shape[0] // B, k_ZTC.dtype
        gradients, dq = _cut(grad_BTHC, K, ctx.blocks), _Room(grad_BTHC, K, ctx.blocks)
        # Every block adds to the keys before it; in bfloat16 these sums would lose digits with the row's length.
        wide = torch.promote_types(dtype, torch.float32)
        dk_ZTC, dv_ZTC = (torch.zeros(k_ZTC.shape, dtype=wide, device=k_ZTC.device) for _ in range(2))
        queries, probabilities = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        for block, q_ZQC, kept, g_ZQC, dq_ZQC in zip(
            ctx.blocks, queries, probabilities, gradients, dq.blocks(), strict=True
        ):  # fmt: skip
            keys = block.keys
            p_ZQK = _probabilities(q_ZQC, k_ZTC, block, B) if kept is None else kept
            dv_ZTC[:, keys] += torch.bmm(p_ZQK.transpose(1, 2), g_ZQC)
            dp_ZQK = torch.bmm(g_ZQC, v_ZTC[:, keys].transpose(1, 2))
            ds_ZQK = torch._softmax_backward_data(dp_ZQK, p_ZQK, -1, p_ZQK.dtype)
            _scaled(ds_ZQK, k_ZTC[:, keys], C, out=dq_ZQC)
            dk_ZTC[:, keys] += _scaled(ds_ZQK.transpose(1, 2), q_ZQC, C)
        dk_BTKC, dv_BTKC = (x.view(B, K, T, C).transpose(1, 2).to(dtype) for x in (dk_ZTC, dv_ZTC))
        return dq.joined(), dk_BTKC, dv_BTKC, None


_KEPT_BYTES = 64 * 2**20
"""Probabilities of one layer up to this size wait for backward; larger ones are computed again."""


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


def _probabilities(q_ZQC: Tensor, k_ZTC: Tensor, block: Block, B: int) -> Tensor:
    """softmax over the visible keys of a block: [Z, Q, keys]; reduced in float32 inside torch's kernel."""
    scores_ZQK = _scaled(q_ZQC, k_ZTC[:, block.keys].transpose(1, 2), q_ZQC.shape[-1])
    bias, n = block.bias(q_ZQC.dtype, q_ZQC.device), block.stop - block.start
    by_row = scores_ZQK.view(B, -1, scores_ZQK.shape[1] // n, n, scores_ZQK.shape[2])
    by_row[..., -bias.shape[-1] :] += bias
    return scores_ZQK.softmax(-1)


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
