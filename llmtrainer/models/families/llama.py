"""The dense pre-norm decoder with rotary positions: Llama, Mistral and Qwen by fields."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Family
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.layers import intermediate_size
from llmtrainer.models.rotary import RopeScaling


class Llama(Family):
    """RMSNorm, grouped-query attention with rotary positions, a gated MLP; no bias unless asked for."""

    hidden_size: int = Field(default=256, gt=0)
    """Width D of the residual stream."""
    layers: int = Field(default=4, gt=0)
    """Blocks of attention and MLP."""
    heads: int = Field(default=4, gt=0)
    """Query heads of a block."""
    kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads; each serves heads / kv_heads query heads. None: as many as `heads`."""
    head_size: int | None = Field(default=None, gt=0)
    """Channels of a head. None: hidden_size / heads."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Width of the gated MLP. None: 8/3 of hidden_size, rounded up to a multiple of 256."""
    context_length: int = Field(default=512, gt=0)
    """Longest row in tokens that the model is meant to read."""
    rope_theta: float = Field(default=10_000.0, gt=0.0)
    """Base of the rotary frequencies; larger turns slower and reaches further."""
    rope_scaling: RopeScaling | None = None
    """Reading further than the first training did: {kind: linear | dynamic | yarn | llama3, ...}. None: plain."""
    rotary_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a head's channels that rotate with the position; the rest carry no position."""
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    """Added to the mean square before its root."""
    tied_head: bool = False
    """Whether the head uses the embedding's rows instead of its own."""
    query_key_norm: bool = False
    """Whether queries and keys are RMS-normalised per head, before rotation (arXiv:2302.05442)."""
    attention_bias: bool = False
    """Whether queries, keys and values have a bias."""
    output_bias: bool = False
    """Whether the projection after attention has a bias."""
    mlp_bias: bool = False
    """Whether the MLP's three matrices have biases."""
    sliding_window: int | None = Field(default=None, gt=0)
    """Tokens that a query may look back on, its own included. None: all of its document."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of zeroed elements after the embedding, attention and MLP, while training."""
    fp32_residual: bool = False
    """Whether the residual stream stays float32 where the model computes in 16 bits."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of new matrices; those that write into the residual stream get init_std / sqrt(2 L)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(
                f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly",
                fix=f"kv_heads one of {[n for n in range(1, self.heads + 1) if self.heads % n == 0]}",
            )
        if self.head_size is None and self.hidden_size % self.heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is no multiple of heads={self.heads}",
                fix=f"head_size={self.hidden_size // self.heads}, or a hidden_size that {self.heads} divides",
            )
        size = self.channels * self.rotary_share
        if size != int(size) or size % 2:
            raise UserError(
                f"rotary_share={self.rotary_share} of {self.channels} channels is {size:g}",
                why="channels rotate in pairs, so it must be an even whole number",
                fix=f"rotary_share={2 * max(1, round(size / 2)) / self.channels:g}",
            )
        if size == 2 and self.rope_scaling is not None and self.rope_scaling.grows_beyond is not None:
            raise UserError(
                f"rope_scaling `{self.rope_scaling.kind}` needs more than 2 channels that rotate",
                why="a single pair of channels has no slower frequency to stretch", fix="head_size=64",
            )
        return self

    @property
    def channels(self) -> int:
        """Channels C of a head."""
        return self.head_size or self.hidden_size // self.heads

    @property
    def rotary_size(self) -> int:
        """Channels R of a head that rotate."""
        return int(self.channels * self.rotary_share)

    @property
    def mlp_size(self) -> int:
        """Width F of the gated MLP."""
        return self.intermediate_size or intermediate_size(self.hidden_size)

    def load(self, folder: Path, compute: torch.dtype, *, frozen: bool = False) -> Decoder:
        from llmtrainer.models.weights import load_policy  # which reads a family out of config.json

        return load_policy(folder, compute, frozen=frozen)

    def build(self, vocabulary: int, compute: torch.dtype = torch.float32) -> Decoder:
        """A decoder with unset weights: `initialise(seed)` or load them. Under torch.device("meta") it costs no
        memory. `vocabulary` is the number of embedding rows; `compute` the type of products and activations."""
        return Decoder(self, vocabulary, compute)
