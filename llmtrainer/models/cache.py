"""Reading token by token: keys and values of what was read, per row."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.few_shapes import costs_by_shape, rounded
from llmtrainer.models.attention import attend_cached
from llmtrainer.models.prepacked import Product
from llmtrainer.models.visible import GRAIN, cached_blocks

if TYPE_CHECKING:
    from llmtrainer.models.attention import Attention
    from llmtrainer.models.decoder import Block, Decoder
    from llmtrainer.models.layers import Linear, RMSNorm


class Cache:
    """Keys and values [B, K, S, C] of every layer, S the capacity, with the weights that made them.

    Rows may have different lengths; a row's tokens lie without gaps from place 0. Padding is never written, and
    costs nothing but its share of attention.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        family = decoder.family
        self.capacity = capacity
        self.weights = Weights.of(decoder)
        device = decoder.head_weight.device
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = (rows, family.kv_heads or family.heads, capacity, family.channels)
        # Zeros, not unset memory: a masked key has probability 0, but 0 * NaN would still be NaN.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=decoder.compute, device=device) for _ in range(family.layers)]
            for _ in range(2)
        )

    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, and there are as many rows as named: finished rows are left out, and
        the row of a prompt is repeated for each of its answers."""
        assert rows and min(rows) >= 0 and max(rows) < len(self.lengths_B)
        self.lengths_B = self.lengths_B[list(rows)]
        downwards = len(set(rows)) == len(rows) and all(source >= row for row, source in enumerate(rows))
        for held in (self.keys, self.values):
            for layer, kept_BKSC in enumerate(held):
                if not downwards:
                    held[layer] = kept_BKSC[list(rows)]
                    continue
                # Only rows that move are copied. None moves up, so none is written over before it was read.
                for row, source in enumerate(rows):
                    if source != row:
                        kept_BKSC[row] = kept_BKSC[source]
                held[layer] = kept_BKSC[: len(rows)]

    @property
    def longest(self) -> int:
        """Tokens that a row may come to have, which some rotary positions depend on."""
        return self.capacity

    def slots(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Where the keys and the values of a place of a row go, in memory that is one list of them: [N * K] each."""
        K = self.keys[0].shape[1] if self.keys else 1
        device = self.lengths_B.device
        slot_NK = ((row_N * K)[:, None] + torch.arange(K, device=device)) * self.capacity + place_N[:, None]
        return slot_NK.flatten(), slot_NK.flatten()

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """The two lists: [slots, C]."""
        C = self.keys[layer].shape[-1]
        return self.keys[layer].view(-1, C), self.values[layer].view(-1, C)

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every place: [B, K, capacity, C]."""
        return self.keys[layer], self.values[layer]

    def read(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """See Decoder.read."""
        logits_BV = read_into(self, tokens_BT, lengths_B)
        self.lengths_B = self.lengths_B + lengths_B.to(self.lengths_B.device)
        return logits_BV


class Store(Protocol):
    """Where keys and values of rows are: as `Cache` has them, or in blocks."""

    weights: Weights
    lengths_B: Tensor
    capacity: int

    @property
    def longest(self) -> int: ...

    def slots(self, row_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]: ...

    def memory(self, layer: int) -> tuple[Tensor, Tensor]: ...

    def whole(self, layer: int) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def read_into(store: Store, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Put the first `lengths_B` of each row's tokens behind that row; logits [B, V] of what follows them. The
    store's own lengths stay as they were."""
    weights = store.weights
    lengths_B = lengths_B.to(store.lengths_B.device)
    assert int((store.lengths_B + lengths_B).max()) <= store.capacity, f"room for {store.capacity} tokens a row"
    assert int(lengths_B.min()) >= 0 and int(lengths_B.max()) <= tokens_BT.shape[1]
    step = _Step(store, tokens_BT, lengths_B)
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
    last_B = (lengths_B.cumsum(0) - 1).clamp(min=0)
    logits_BV = weights.head(weights.norm(x_ND[_and_more(last_B, step.more_rows)]))[: len(last_B)]
    return logits_BV.to(torch.promote_types(weights.compute, torch.float32))


class _Step:
    """Where the new tokens of one `read` stand, and what each of them sees; the same for every layer."""

    def __init__(self, store: Store, tokens_BT: Tensor, lengths_B: Tensor) -> None:
        weights, before_B = store.weights, store.lengths_B
        device = before_B.device
        few = costs_by_shape(device, weights.compute)
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
        cos, sin = weights.rotary(_and_more(place_N, self.more)[None], store.longest)
        self.cos, self.sin = torch.cat([cos, cos], dim=-1)[0], torch.cat([-sin, sin], dim=-1)[0]
        self.blocks = cached_blocks(before_B, T, weights.window, store.capacity, GRAIN if few else 1)
        self.single = T == 1 and self.all_real
        self.attend_single = _fused if _fuses(device, weights.compute) else _by_products
        self.hidden_B11S: Tensor | None = None
        """0 for a key that may be seen, minus infinity for one that may not. None: all may."""
        if self.single and (hidden := self.blocks[0].hidden_B11QK) is not None:
            zeros = torch.zeros(hidden.shape, dtype=weights.compute, device=device)
            self.hidden_B11S = zeros.masked_fill(hidden, -torch.inf)[:, :, 0]

    def attend(self, q_NHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """[N, H, C]"""
        B, T = self.shape
        if self.single:
            # The G heads that share a key head are G queries to it: no key is read twice, none is repeated.
            keys = self.blocks[0].keys
            q_BKGC = q_NHC.view(B, k_BKSC.shape[1], -1, q_NHC.shape[-1])
            out_BKGC = self.attend_single(q_BKGC, k_BKSC[:, :, keys], v_BKSC[:, :, keys], self.hidden_B11S)
            return out_BKGC.reshape(q_NHC.shape)
        if self.all_real:
            return attend_cached(q_NHC.unflatten(0, (B, T)), k_BKSC, v_BKSC, self.blocks).flatten(0, 1)
        padded = q_NHC.new_zeros(B * T, *q_NHC.shape[1:]).index_copy_(0, self.real, q_NHC)
        return attend_cached(padded.unflatten(0, (B, T)), k_BKSC, v_BKSC, self.blocks).flatten(0, 1)[self.real]


def _more(rows: int) -> int:
    """How many rows go through products beside so many. A single one is multiplied in a way of its own."""
    return rounded(rows, 8) - rows if rows > 1 else 0


def _and_more(x: Tensor, more: int) -> Tensor:
    """So many zeros, or rows of zeros, behind x."""
    return torch.cat([x, x.new_zeros(more, *x.shape[1:])]) if more else x


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


class Weights:
    """A copy of a decoder's weights in its compute type, made for reading: queries, keys and values are one
    product, gate and up another, and matrices are laid out as the processor wants them."""

    def __init__(self, decoder: Decoder) -> None:
        self.compute, self.rotary = decoder.compute, decoder.rotary
        self.window = decoder.family.sliding_window
        self.embedding_VD = decoder.model.embed_tokens.weight.detach().to(decoder.residual_type, copy=True)
        self.layers = [_Layer(block, decoder.compute) for block in decoder.model.blocks()]
        self.norm = _Norm(decoder.model.norm, decoder.compute)
        self.head = Product([decoder.head_weight], [None], decoder.compute)
        family = decoder.family
        self.key_shape = family.kv_heads or family.heads, family.channels
        """K, C: how many key heads, and the width of each."""

    @classmethod
    def of(cls, decoder: Decoder) -> Weights:
        """The copy that a living cache of this decoder holds, if no weight has changed since; else a new one."""
        state = _state(decoder)
        kept = _COPIES.get(decoder)
        copy = kept[1]() if kept is not None and kept[0] == state else None
        if copy is None:
            copy = cls(decoder)
            # Not kept alive from here: a policy in training must not pay for a second copy of itself.
            _COPIES[decoder] = (state, weakref.ref(copy))
        return copy


_State = tuple[tuple[int, int, int], ...]
_COPIES: weakref.WeakKeyDictionary[Decoder, tuple[_State, weakref.ref[Weights]]] = weakref.WeakKeyDictionary()


def _state(decoder: Decoder) -> _State:
    """Equal only if no weight has changed: address, version, and the sum of the bits as whole numbers.

    Versions alone are not enough: what is written through `.data` leaves them as they were.
    """
    return tuple((weight.data_ptr(), weight._version, _sum(weight.detach())) for weight in decoder.parameters())


def _sum(weight: Tensor) -> int:
    # Eight bytes at a time, which is as fast as memory; narrower numbers would first be made wide.
    whole, rest = weight.flatten().view(torch.uint8).tensor_split([weight.nbytes // 8 * 8])
    return int(whole.view(torch.int64).sum()) + int(rest.sum())


class _Layer:
    def __init__(self, block: Block, compute: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.shape = attention.shape
        self.compute = compute
        self.norm_before = _Norm(block.input_layernorm, compute)
        self.norm_after = _Norm(block.post_attention_layernorm, compute)
        self.queries_keys_values = _product(compute, attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _product(compute, attention.o_proj)
        self.gate_up = _product(compute, mlp.gate_proj, mlp.up_proj)
        self.down = _product(compute, mlp.down_proj)
        self.norm_heads = _head_norm(attention, compute)

    def project(self, x_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Attention.project: queries and keys of all heads at once, normalised (if asked) and rotated."""
        H, K, C = self.shape.heads, self.shape.kv_heads, self.shape.head_size
        all_NHC = self.queries_keys_values(x_ND).view(len(x_ND), H + 2 * K, C)
        turned_NHC = all_NHC[:, : H + K]
        if self.norm_heads is not None:
            turned_NHC = self.norm_heads(turned_NHC)
        turned_NHC = _turn(turned_NHC, cos, sin)
        return turned_NHC[:, :H], turned_NHC[:, H:], all_NHC[:, H + K :]


class _Norm:
    """RMSNorm, with torch's own operator: the same numbers in fewer calls."""

    def __init__(self, norm: RMSNorm, compute: torch.dtype) -> None:
        self.compute, self.epsilon = compute, norm.epsilon
        self.weight = norm.weight.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], self.weight, self.epsilon).to(self.compute)


class _HeadNorm:
    """RMSNorm of each head, with the queries' weights for the first heads and the keys' for the others."""

    def __init__(self, queries: _Norm, keys: _Norm, heads: int, kv_heads: int) -> None:
        self.plain = queries
        self.weight_HC = torch.cat([queries.weight.expand(heads, -1), keys.weight.expand(kv_heads, -1)])

    def __call__(self, x_NHC: Tensor) -> Tensor:
        wide = x_NHC.to(torch.promote_types(x_NHC.dtype, torch.float32))
        normed = F.rms_norm(wide, x_NHC.shape[-1:], None, self.plain.epsilon) * self.weight_HC
        return normed.to(x_NHC.dtype)


def _head_norm(attention: Attention, compute: torch.dtype) -> _HeadNorm | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    queries, keys = _Norm(attention.q_norm, compute), _Norm(attention.k_norm, compute)
    return _HeadNorm(queries, keys, attention.shape.heads, attention.shape.kv_heads)


def _turn(x_NHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As layers.rotate, in half the calls; cos and sin [N, 1, R], the sines of the first half negative."""
    R = cos.shape[-1]
    part = x_NHC if x_NHC.shape[-1] == R else x_NHC[..., :R]
    turned = torch.addcmul(part * cos, part.roll(R // 2, -1), sin).to(x_NHC.dtype)
    return turned if x_NHC.shape[-1] == R else torch.cat([turned, x_NHC[..., R:]], dim=-1)


def _product(compute: torch.dtype, *layers: Linear) -> Product:
    return Product([layer.merged() for layer in layers], [layer.bias for layer in layers], compute)
