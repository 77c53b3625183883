"""One layer of a decoder and the stack of them; what is computed before attention, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtrainer.models.attention import Attention, AttentionShape
from llmtrainer.models.layers import Embedding, GatedMLP, RMSNorm
from llmtrainer.models.lora import Beside

if TYPE_CHECKING:
    from llmtrainer.models.families.llama import Llama

Drop = Callable[[Tensor, int], Tensor]
"""Dropout of a tensor at a numbered site of the network."""


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, family: Llama, *, master: torch.dtype) -> None:
        super().__init__()
        D, epsilon = family.hidden_size, family.norm_epsilon
        self.input_layernorm = RMSNorm(D, epsilon, master=master)
        self.self_attn = Attention(shape_of(family), master=master)
        self.post_attention_layernorm = RMSNorm(D, epsilon, master=master)
        self.mlp = GatedMLP(D, family.mlp_size, bias=family.mlp_bias, master=master)

    def forward(self, work: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        """Do what is computed with its parameters; a call of the module, so that an engine can bring them first."""
        return work(x_BTD)


class Stack(nn.Module):
    """Embedding, blocks and the last norm, under the names the field has given them."""

    def __init__(self, family: Llama, vocabulary: int, *, master: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocabulary, family.hidden_size, master=master)
        self.layers = nn.ModuleList(Block(family, master=master) for _ in range(family.layers))
        self.norm = RMSNorm(family.hidden_size, family.norm_epsilon, master=master)

    def blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block


def project(
    block: Block, x_BTD: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype, turned: bool,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first part of a block: queries, keys and values. `turned`: see core/products.py."""
    return block.self_attn.project(block.input_layernorm(x_BTD, compute), (cos, sin), turned, beside)


def finish(block: Block, x_BTD: Tensor, attended_BTHC: Tensor, compute: torch.dtype, turned: bool) -> Tensor:
    """The rest of a block, without dropout. `turned`: see core/products.py."""
    x_BTD = x_BTD + block.self_attn.o_proj(attended_BTHC.flatten(2))
    return x_BTD + block.mlp(block.post_attention_layernorm(x_BTD, compute), turned)


def finish_with_dropout(
    block: Block, index: int, x_BTD: Tensor, attended_BTHC: Tensor, compute: torch.dtype, drop: Drop | None,
    beside: Beside | None,
) -> Tensor:  # fmt: skip
    """The rest of a block with dropout of its own, of its adapters, or both."""
    drop = drop or _kept
    x_BTD = x_BTD + drop(block.self_attn.o_proj(attended_BTHC.flatten(2), beside), 2 * index + 1)
    normed = block.post_attention_layernorm(x_BTD, compute)
    return x_BTD + drop(block.mlp(normed, beside=beside), 2 * index + 2)


def _kept(x_BTD: Tensor, site: int) -> Tensor:
    return x_BTD


def shape_of(family: Llama) -> AttentionShape:
    return AttentionShape(
        hidden_size=family.hidden_size, heads=family.heads, kv_heads=family.kv_heads or family.heads,
        head_size=family.channels, bias=family.attention_bias, output_bias=family.output_bias,
        query_key_norm=family.query_key_norm, norm_epsilon=family.norm_epsilon,
    )
