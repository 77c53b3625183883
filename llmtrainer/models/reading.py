"""New tokens of rows behind those that were read, wherever keys and values lie."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.few_shapes import costs_by_shape, rounded
from llmtrainer.models.attention import attend_cached
from llmtrainer.models.visible import GRAIN, cached_blocks

if TYPE_CHECKING:
    from llmtrainer.models.reading_weights import ReadingWeights


class Store(Protocol):
    """Where keys and values of rows are: as `Cache` has them, or in blocks."""

    weights: ReadingWeights
    lengths_B: Tensor
    capacity: int

    @property
    def longest(self) -> int: ...

    def slots(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]: ...

    def places(self) -> list[Tensor]: ...

    def memory(self, layer: int) -> tuple[Tensor, Tensor]: ...

    def whole(self, layer: int) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def read_into(store: Store, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Put the first `lengths_B` of each row's tokens behind that row; logits [B, V] of what follows them. The
    store's own lengths stay as they were."""
    lengths_B = lengths_B.to(store.lengths_B.device)
    assert int((store.lengths_B + lengths_B).max()) <= store.capacity, f"room for {store.capacity} tokens a row"
    assert int(lengths_B.min()) >= 0 and int(lengths_B.max()) <= tokens_BT.shape[1]
    step = _Step(store, tokens_BT, lengths_B)
    return through(store, step, _and_more((lengths_B.cumsum(0) - 1).clamp(min=0), step.more_rows))[: len(lengths_B)]


def through(store: Store, step: Step, last_B: Tensor) -> Tensor:
    """A step's tokens through every layer; logits of the places `last_B` among them, float32 or wider."""
    weights = store.weights
    # Real tokens only, row after row, and behind them some so that few shapes occur: products see no other padding.
    x_ND = F.embedding(step.tokens_N, weights.embedding_VD)
    for number, layer in enumerate(weights.layers):
        q_NHC, *new = layer.project(layer.norm_before(x_ND), step.cos, step.sin)
        for held, slot, new_NKC in zip(store.memory(number), step.slots, new, strict=True):
            held.index_copy_(0, slot, new_NKC[: step.tokens].flatten(0, 1))
        attended_NHC = step.attend(q_NHC[: step.tokens], *store.whole(number))
        x_ND = x_ND + layer.output(_and_more(attended_NHC.flatten(1), step.more))
        gate_NF, up_NF = layer.gate_up(layer.norm_after(x_ND)).chunk(2, dim=-1)
        x_ND = x_ND + layer.down(F.silu(gate_NF).mul_(up_NF))
    logits_BV = weights.head(weights.norm(x_ND[last_B]))
    return logits_BV.to(torch.promote_types(weights.compute, torch.float32))


class Step(Protocol):
    """New tokens, where they go, and what each of them sees."""

    tokens_N: Tensor
    tokens: int
    more: int
    cos: Tensor
    sin: Tensor
    slots: tuple[Tensor, Tensor]

    def attend(self, q_NHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor: ...


class _Step:
    """Where the new tokens of one `read` stand, and what each of them sees; the same for every layer."""

    def __init__(self, store: Store, tokens_BT: Tensor, lengths_B: Tensor) -> None:
        weights, before_B = store.weights, store.lengths_B
        device = before_B.device
        few = weights.packed or costs_by_shape(device, weights.compute)
        T = tokens_BT.shape[1]
        if few and T > 1:
            tokens_BT = F.pad(tokens_BT, (0, rounded(T) - T))
        self.shape = tokens_BT.shape
        T = tokens_BT.shape[1]
        real_BT = torch.arange(T, device=device) < lengths_B[:, None]
        self.all_real = bool(real_BT.all())
        self.real = real_BT.flatten().nonzero()[:, 0]
        """[N]: places of the real tokens among all B * T."""
        self.tokens = len(self.real)
        """N. Behind them `more` go through products and norms, and behind the rows `more_rows` through the head."""
        self.more, self.more_rows = (_more(number) if few else 0 for number in (self.tokens, len(tokens_BT)))
        self.tokens_N = _and_more(tokens_BT.flatten()[self.real], self.more)
        row_N = self.real // T
        place_N = before_B[row_N] + self.real % T
        self.slots = store.slots(row_N, place_N)
        """[N * K] each: where a token's keys and values go."""
        self.cos, self.sin = turns(weights, _and_more(place_N, self.more), store.longest)
        self.blocks = cached_blocks(before_B, T, weights.window, store.capacity, GRAIN if few else 1)
        self.single = T == 1 and self.all_real
        self.hidden_B11S: Tensor | None = None
        """0 for a key that may be seen, minus infinity for one that may not. None: all may."""
        if self.single and (hidden := self.blocks[0].hidden_B11QK) is not None:
            zeros = torch.zeros(hidden.shape, dtype=weights.compute, device=device)
            self.hidden_B11S = zeros.masked_fill(hidden, -torch.inf)[:, :, 0]

    def attend(self, q_NHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """[N, H, C]"""
        B, T = self.shape
        if self.single:
            return attend_one(q_NHC, k_BKSC, v_BKSC, self.blocks[0].keys, self.hidden_B11S)
        if self.all_real:
            return attend_cached(q_NHC.unflatten(0, (B, T)), k_BKSC, v_BKSC, self.blocks).flatten(0, 1)
        padded = q_NHC.new_zeros(B * T, *q_NHC.shape[1:]).index_copy_(0, self.real, q_NHC)
        return attend_cached(padded.unflatten(0, (B, T)), k_BKSC, v_BKSC, self.blocks).flatten(0, 1)[self.real]


def turns(weights: ReadingWeights, place_N: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """What turns queries and keys at these places: cosines and sines [N, 1, R], as `_turn` takes them."""
    cos, sin = weights.rotary(place_N[None], longest)
    return torch.cat([cos, cos], dim=-1)[0], torch.cat([-sin, sin], dim=-1)[0]


def attend_one(
    q_BHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, keys: slice, hidden_B11S: Tensor | None
) -> Tensor:
    """A single query of each row and head against some of its keys. `hidden`: 0 for a key that may be seen, minus
    infinity for one that may not; None: all may."""
    # The G heads that share a key head are G queries to it: no key is read twice, none is repeated.
    q_BKGC = q_BHC.view(len(q_BHC), k_BKSC.shape[1], -1, q_BHC.shape[-1])
    attend = _fused if _fuses(q_BHC.device, q_BHC.dtype) else _by_products
    return attend(q_BKGC, k_BKSC[:, :, keys], v_BKSC[:, :, keys], hidden_B11S).reshape(q_BHC.shape)


def _more(rows: int) -> int:
    """How many rows go through products beside so many. A single one is multiplied in a way of its own."""
    return rounded(rows, 8) - rows if rows > 1 else 0


def _and_more(x: Tensor, more: int) -> Tensor:
    """So many zeros, or rows of zeros, behind x."""
    return torch.cat([x, x.new_zeros(more, *x.shape[1:])]) if more else x


@cache
def _fuses(device: torch.device, compute: torch.dtype) -> bool:
    """Whether torch's fused attention is the faster one for single queries: on accelerators, and in 16 bits on
    processors with AMX, whose products of tiny matrices take twice its time. Elsewhere products take an eighth."""
    if device.type != "cpu" or compute not in (torch.bfloat16, torch.float16):
        return device.type != "cpu"
    # The question is newer than the oldest torch that we run on.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def _fused(q_BKGC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, hidden_B11S: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q_BKGC, k_BKSC, v_BKSC, attn_mask=hidden_B11S)


def _by_products(q_BKGC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, hidden_B11S: Tensor | None) -> Tensor:
    scores_BKGS = (q_BKGC * q_BKGC.shape[-1] ** -0.5) @ k_BKSC.transpose(2, 3)
    if hidden_B11S is not None:
        scores_BKGS += hidden_B11S
    return scores_BKGS.softmax(dim=-1) @ v_BKSC
