"""Reading token by token: keys and values of what was read, per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrainer.models.attention import attend_cached, cached_blocks

if TYPE_CHECKING:
    from llmtrainer.models.decoder import Decoder


class Cache:
    """Keys and values [B, K, S, C] of every layer, S the capacity, with the weights that made them.

    Rows may have different lengths; a row's tokens lie without gaps from place 0. Right padding is never
    written.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        family = decoder.family
        self.capacity = capacity
        self.weights = _in_compute_type(decoder)
        device = decoder.head_weight.device
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = (rows, family.kv_heads or family.heads, capacity, family.channels)
        # Zeros, not unset memory: a masked key has probability 0, but 0 * NaN would still be NaN.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=decoder.compute, device=device) for _ in range(family.layers)]
            for _ in range(2)
        )

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """See Decoder.read."""
        decoder, model = self.weights, self.weights.model
        B, T = tokens_BT.shape
        lengths_B = lengths_B.to(self.lengths_B.device)
        after_B = self.lengths_B + lengths_B
        assert int(after_B.max()) <= self.capacity, f"the cache holds {self.capacity} tokens a row"
        assert int(lengths_B.min()) >= 0 and int(lengths_B.max()) <= T
        place_BT = self.lengths_B[:, None] + torch.arange(T, device=lengths_B.device)
        real_BT = place_BT < after_B[:, None]
        row_N, column_N = real_BT.nonzero(as_tuple=True)
        place_N = place_BT[row_N, column_N]
        # Padding may stand beyond the capacity, where no rotary table and no key is.
        place_BT = place_BT.clamp(max=self.capacity - 1)
        rotary = decoder.rotary(place_BT, self.capacity)
        window = decoder.family.sliding_window
        blocks = cached_blocks(self.lengths_B, T, window, self.capacity)
        x_BTD = model.embed_tokens(tokens_BT).to(decoder.residual_type)
        for index, block in enumerate(model.blocks()):
            attention = block.self_attn
            q_BTHC, k_BTKC, v_BTKC = attention.project(block.input_layernorm(x_BTD, decoder.compute), rotary)
            self.keys[index][row_N, :, place_N] = k_BTKC[row_N, column_N]
            self.values[index][row_N, :, place_N] = v_BTKC[row_N, column_N]
            attended = attend_cached(q_BTHC, self.keys[index], self.values[index], blocks)
            x_BTD = x_BTD + attention.o_proj(attended.flatten(2))
            x_BTD = x_BTD + block.mlp(block.post_attention_layernorm(x_BTD, decoder.compute))
        last_BD = x_BTD[torch.arange(B, device=x_BTD.device), (lengths_B - 1).clamp(min=0)]
        self.lengths_B = after_B
        logits_BV = F.linear(model.norm(last_BD, decoder.compute), decoder.head_weight.to(decoder.compute))
        return logits_BV.to(torch.promote_types(decoder.compute, torch.float32))


def _in_compute_type(decoder: Decoder) -> Decoder:
    """The same decoder with matrices already cast, so that no step casts them again."""
    with torch.device("meta"):
        copy = decoder.family.build(decoder.vocabulary, decoder.compute)
    weights = {
        name: value.detach() if value.ndim == 1 else value.detach().to(decoder.compute)
        for name, value in decoder.named_parameters()
    }
    copy.load_state_dict(weights, assign=True)
    return copy.eval()
