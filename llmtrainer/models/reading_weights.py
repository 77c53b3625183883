"""A decoder's weights as they are read with: a copy in the compute type, in fewer and larger products."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.core.products import widened
from llmtrainer.models.prepacked import Product

if TYPE_CHECKING:
    from llmtrainer.models.attention import Attention
    from llmtrainer.models.block import Block
    from llmtrainer.models.decoder import Decoder
    from llmtrainer.models.layers import Linear, RMSNorm


class ReadingWeights:
    """A copy of a decoder's weights in its compute type, made for reading: queries, keys and values are one
    product, gate and up another, and matrices are laid out as the processor wants them."""

    def __init__(self, decoder: Decoder) -> None:
        self.compute, self.rotary = _held(decoder.compute), decoder.rotary
        self.window = decoder.family.sliding_window
        self.embedding_VD = decoder.model.embed_tokens.weight.detach().to(decoder.residual_type, copy=True)
        self.layers = [_Layer(block, decoder.compute) for block in decoder.model.blocks()]
        self.norm = _Norm(decoder.model.norm, self.compute)
        self.head = Product([decoder.head_weight], [None], decoder.compute)
        self.packed = self.head.packed or any(layer.packed for layer in self.layers)
        """Whether a matrix is packed. The library of packed products keeps half a megabyte for each shape it meets, in
        float32 too (measured without AVX-512)."""
        family = decoder.family
        self.key_shape = family.kv_heads or family.heads, family.channels
        """K, C: how many key heads, and the width of each."""

    @classmethod
    def of(cls, decoder: Decoder) -> ReadingWeights:
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
_COPIES: weakref.WeakKeyDictionary[Decoder, tuple[_State, weakref.ref[ReadingWeights]]] = weakref.WeakKeyDictionary()


def _state(decoder: Decoder) -> _State:
    """Equal only if no weight has changed: address, version, and the sum of the bits as whole numbers.

    Versions alone are not enough: what is written through `.data` leaves them as they were.
    """
    return tuple((weight.data_ptr(), weight._version, _sum(weight.detach())) for weight in decoder.parameters())


def _sum(weight: Tensor) -> int:
    # Eight bytes at a time, which is as fast as memory; narrower numbers would first be made wide.
    whole, rest = weight.flatten().view(torch.uint8).tensor_split([weight.nbytes // 8 * 8])
    return int(whole.view(torch.int64).sum()) + int(rest.sum())


def _held(compute: torch.dtype) -> torch.dtype:
    """The type that is read in: float32 where products of the narrower one would be computed in it anyway (see
    core/products.py). The weights are rounded to the narrower type all the same."""
    return widened(torch.empty(0, dtype=compute)).dtype


class _Layer:
    def __init__(self, block: Block, compute: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.shape, held = attention.shape, _held(compute)
        self.norm_before = _Norm(block.input_layernorm, held)
        self.norm_after = _Norm(block.post_attention_layernorm, held)
        self.queries_keys_values = _product(compute, attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _product(compute, attention.o_proj)
        self.gate_up = _product(compute, mlp.gate_proj, mlp.up_proj)
        self.down = _product(compute, mlp.down_proj)
        self.norm_heads = _head_norm(attention, held)
        products = (self.queries_keys_values, self.output, self.gate_up, self.down)
        self.packed = any(product.packed for product in products)

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
