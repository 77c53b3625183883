"""The stack of a decoder: tokens in, what the objective wants out; and reading token by token with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrainer.core import vocab_head
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.products import prefers_turned
from llmtrainer.core.protocols import Adapter, Head
from llmtrainer.core.randomness import derive, dropout, embedding_noise
from llmtrainer.models import kernels, paths, proof, scalar
from llmtrainer.models.attention import Attention, AttentionShape, Path, RotaryTable
from llmtrainer.models.cache import Cache
from llmtrainer.models.few_rows import with_few_shapes
from llmtrainer.models.layers import Embedding, GatedMLP, Linear, RMSNorm
from llmtrainer.models.lora import Beside, LowRank
from llmtrainer.models.paged import Pages
from llmtrainer.models.reading_weights import ReadingWeights
from llmtrainer.models.rotary import Rotary
from llmtrainer.models.scalar import ScalarHead
from llmtrainer.models.visible import Visible

if TYPE_CHECKING:
    from llmtrainer.models.families.llama import Llama

Drop = Callable[[Tensor, int], Tensor]
"""Dropout of a tensor at a numbered site of the network."""


class Recompute(NamedTuple):
    """Which activations are computed again in backward instead of being kept."""

    every: int = 1
    """Of every so-manyth block, the first included."""
    what: Literal["layer", "mlp"] = "layer"
    """The whole block, or what follows its attention."""


def call(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return function(*inputs)


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


class Decoder(nn.Module):
    """A dense decoder. Its parameters are masters: float32, or float64 where it computes in float64."""

    def __init__(self, family: Llama, vocabulary: int, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        master = _master(compute)
        self.family = family
        self.vocabulary = vocabulary
        """Rows of the embedding and of the head, padding rows included."""
        self.ids: int | None = None
        """How many of those rows stand for an id of the tokenizer; None: all."""
        self.context_length = family.context_length
        self.compute = compute
        self.path: str | None = None
        """Attention path by name; None: the fastest for the device."""
        self.chunk: int | None = None
        """Positions whose logits exist at one time; None: chosen by memory."""
        self.model = Stack(family, vocabulary, master=master)
        self.lm_head = (
            None if family.tied_head else Linear(family.hidden_size, vocabulary, bias=False, master=master)
        )
        self.score: ScalarHead | None = None
        self.critic: Decoder | None = None
        """A model of its own that values what this one writes."""
        self.worded = True
        """Whether it has the vocabulary's head."""
        if family.head is not None and not family.head.apart:
            self.attach(family.head)
        self._window, self._dropout = family.sliding_window, family.dropout
        self.residual_type = torch.promote_types(compute, torch.float32) if family.fp32_residual else compute
        self._rotary = Rotary(family.rotary_size, family.rope_theta, family.rope_scaling)
        self._pieces = _PLAIN
        self._unproven = False
        self.adapter: Adapter | None = None
        """What stands beside its matrices, put there by `Adapter.insert`; None: nothing."""
        self.neftune = 0.0
        """Size of the noise on embeddings while training."""
        self.recompute: Recompute | None = None
        """What is computed again in backward; None: nothing, every activation is kept."""

    @property
    def module(self) -> nn.Module:
        return self

    def adaptable_layers(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer but the head, by name; those of a critic are not this model's."""
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module is not self.lm_head and not name.startswith("critic."):
                yield name, module

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding's where the head is tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def attach(self, head: Head) -> None:
        """Put a scalar head without values on the stack, in place of the vocabulary's or beside it."""
        weight = self.head_weight
        self.family = self.family.model_copy(update={"head": head})
        self.score = ScalarHead(self.family.hidden_size, head.cuts, master=_master(self.compute), device=weight.device)
        if head.instead:
            self.lm_head, self.worded = None, False

    def initialise(self, seed: int) -> None:
        """Fill the weights as a function of (seed, parameter name).

        Matrices are normal with `init_std`; those that write into the residual stream with init_std / sqrt(2 L),
        so that its variance does not grow with depth. Norms are 1, biases 0.
        """
        narrow = self.family.init_std / math.sqrt(2 * self.family.layers)
        if self.score is not None and self.family.head is not None:
            self.score.initialise(seed, self.family.head)
        for name, parameter in self.named_parameters():
            if parameter.is_meta or name.startswith("score."):
                continue
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                    continue
                std = narrow if name.endswith(("o_proj.weight", "down_proj.weight")) else self.family.init_std
                random = torch.Generator().manual_seed(derive(seed, "initialise", name))
                # Drawn in float32 on the CPU: every device and compute type starts from the same weights.
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=random))

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        if not set(wants).isdisjoint(scalar.WANTS):
            return scalar.read(self, batch, wants)
        return self.words(batch, self.residual(batch), wants)

    def words(self, batch: Batch, x_BTD: Tensor, wants: tuple[str, ...]) -> Outputs:
        """What the vocabulary's head says of the residual stream. UserError where there is none."""
        self.require_words()
        chosen_N = vocab_head.weighted_positions(batch)
        # The last norm and the head see the positions that count, and no other.
        hidden_ND = self.model.norm(vocab_head.gather(x_BTD, chosen_N), self.compute)
        return vocab_head.score_gathered(
            hidden_ND, self.head_weight, batch, chosen_N, wants, self.chunk, self._pieces.arithmetic, self.ids
        )

    def require_words(self) -> None:
        """Raises UserError where the model has no vocabulary's head."""
        if not self.worded:
            raise scalar.no_words()

    def hidden(self, batch: Batch) -> Tensor:
        """What the head reads: [B, T, D] in the compute type."""
        return self.model.norm(self.residual(batch), self.compute)

    def trunk(self, batch: Batch) -> Tensor:
        """What a head reads, before its norm: [B, T, D]."""
        return self.residual(batch)

    def normed(self, x_ND: Tensor) -> Tensor:
        """What a scalar head reads of the trunk: not rounded, float32 or wider."""
        return self.model.norm(x_ND, torch.promote_types(self.compute, torch.float32))

    def residual(self, batch: Batch) -> Tensor:
        """The residual stream after the last block: [B, T, D]."""
        T, batch = batch.tokens_BT.shape[1], with_few_shapes(batch, self.compute)
        visible = Visible.of(batch, self._window)
        attend = paths.PATHS[self.path or paths.default_for(batch.tokens_BT.device, self.compute)]
        wide = torch.promote_types(self.compute, torch.float32)
        rotary = self._rotary.of_documents(batch.position_BT, batch.tokens_BT.shape[1], wide)
        rate = self._dropout if self.training else 0.0
        place, position_BT = batch.places

        def drop(x_BTD: Tensor, site: int) -> Tensor:
            return dropout(x_BTD, rate, batch.dropout_key, place, site, position_BT)

        beside = self._beside(batch)
        x_BTD = self.model.embed_tokens(batch.tokens_BT).to(self.residual_type)
        if self.neftune and self.training:
            x_BTD = embedding_noise(x_BTD, self.neftune, batch.dropout_key, batch.document_BT, place, position_BT)
        x_BTD = drop(x_BTD, 0)
        if self._unproven and torch.is_grad_enabled():
            self._prove_pieces(x_BTD, attend, visible, rotary)
        for index, block in enumerate(self.model.blocks()):
            layer = partial(self._layer, block, index, attend, visible, rotary, drop if rate else None, beside)
            if self.recompute is not None and index % self.recompute.every == 0:
                kept_less = partial(layer, after_attention=again)
                layer = partial(again, layer) if self.recompute.what == "layer" else kept_less
            x_BTD = block(layer, x_BTD)
        return x_BTD if x_BTD.shape[1] == T else x_BTD[:, :T]

    def _layer(
        self, block: Block, index: int, attend: Path, visible: Visible, rotary: RotaryTable, drop: Drop | None,
        beside: Beside | None, x_BTD: Tensor, after_attention: Callable[..., Tensor] = call,
    ) -> Tensor:
        pieces = self._pieces
        if beside is None:
            attended = attend(*pieces.project(block, x_BTD, *rotary, self.compute, pieces.turned), visible)
        else:
            attended = attend(*_project(block, x_BTD, *rotary, self.compute, False, beside), visible)
        if drop is None and beside is None:
            return after_attention(pieces.finish, block, x_BTD, attended, self.compute, pieces.turned)
        return after_attention(_finish_with_dropout, block, index, x_BTD, attended, self.compute, drop, beside)

    def _beside(self, batch: Batch) -> Beside | None:
        """What this batch tells adapters; None where they need to know nothing."""
        if self.adapter is None:
            return None
        gates_BTE = self.adapter.gates(batch)
        dropping = self.training and any(isinstance(part, LowRank) and part.rate > 0.0 for part in self.modules())
        if gates_BTE is None and not dropping:
            return None
        return Beside(batch.dropout_key if dropping else None, *batch.places, gates_BTE)

    def arrange(self, asked: Arrangement) -> Arranged:
        """Compute as an engine asks, on the device where the weights are by now.

        Each choice is first run once against its definition. Raises UserError if it cannot run here or is wrong.
        """
        family, device = self.family, self.head_weight.device
        path, told = paths.choose(asked.attention, device, self.compute, asked.fallback)
        whose, more = kernels.choose(asked.kernels, device, self.compute, asked.fallback)
        proof.require_attention(path, shape_of(family), family.sliding_window, device, self.compute)
        sizes = family.hidden_size, family.channels
        proof.require_kernels(whose, sizes, family.norm_epsilon, device, self.compute)
        self.path = path
        for module in self.modules():
            if isinstance(module, (Attention, GatedMLP, RMSNorm)):
                module.kernels = kernels.kernels(whose)
        if self.critic is not None:
            self.critic.arrange(asked)
        every = asked.recompute_every
        self.recompute = None if every is None else Recompute(every, asked.recompute)
        return Arranged({"attention": path, "kernels": whose}, told + more)

    def compile_pieces(self, mode: str | None = None) -> None:
        """Compile what lies between attention and attention, and the head's arithmetic, at the next forward.

        mode: torch.compile's, for the pieces of blocks; the head overwrites its logits, so graphs are not for it.

        Attention itself stays as it is: which keys it needs differs from batch to batch, and nothing is
        compiled again for that. Other last digits than without; needs a C++ compiler on a CPU.
        """
        turned = prefers_turned(self.head_weight.device, self.compute)
        # Sizes are dynamic from the start: kernels then depend on no history of shapes, and a resumed run has
        # the bits of one that was not interrupted.
        self._pieces = _Pieces(
            torch.compile(_project, dynamic=True, mode=mode), torch.compile(_finish, dynamic=True, mode=mode),
            proof.proven(vocab_head.compiled(turned), self.compute), turned,
        )
        self._unproven = True

    def _prove_pieces(self, x_BTD: Tensor, attend: Path, visible: Visible, rotary: RotaryTable) -> None:
        """Compare a block's compiled pieces with what they were compiled from, at the first step."""
        self._unproven = False
        blocks, pieces = list(self.model.blocks()), self._pieces
        block = next(filter(_trains, blocks), blocks[0])
        x_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)
        with torch.no_grad():
            attended = attend(*_project(block, x_BTD, *rotary, self.compute, False), visible)
        attended.requires_grad_(x_BTD.requires_grad or _trains(block.self_attn))
        leaves = [x for x in (x_BTD, attended, *block.parameters()) if x.requires_grad]
        proof.require_same(
            "what precedes attention", lambda: pieces.project(block, x_BTD, *rotary, self.compute, pieces.turned),
            lambda: _project(block, x_BTD, *rotary, self.compute, False), leaves, self.compute,
        )  # fmt: skip
        proof.require_same(
            "what follows attention", lambda: [pieces.finish(block, x_BTD, attended, self.compute, pieces.turned)],
            lambda: [_finish(block, x_BTD, attended, self.compute, False)], leaves, self.compute,
        )  # fmt: skip

    def cache(self, rows: int, capacity: int) -> Cache:
        """Room for `capacity` tokens in each of `rows` rows, none read yet.

        Holds the weights as they are now in the compute type: after a training step, make a new cache.
        """
        self.require_words()
        if self.adapter is not None:
            self.adapter.require_one()
        return Cache(self, rows, capacity)

    def reading_weights(self, own: bool = False) -> ReadingWeights:
        """What is read with: the weights as they are now. own: a copy of its own, whoever else holds one."""
        if self.adapter is not None:
            self.adapter.require_one()
        return ReadingWeights(self) if own else ReadingWeights.of(self)

    def pages(self, weights: ReadingWeights, count: int, size: int, longest: int) -> Pages:
        """Room for `count` blocks of `size` tokens, the first of which stays empty, for rows that never have more
        than `longest` tokens."""
        return Pages(weights, count, size, longest)

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, lengths_B: Tensor, cache: Cache) -> Tensor:
        """Append the first `lengths_B` of each row's new tokens to that row, and return float32 (or wider)
        logits [B, V] of what follows its last one. A row of length 0 stays as it is; its logits mean nothing."""
        return cache.read(tokens_BT, lengths_B)

    def rotary(self, position_BT: Tensor, longest: int) -> RotaryTable:
        """Rotary factors of positions below `longest`, which these texts may grow to; float32 or wider."""
        return self._rotary(position_BT, longest, torch.promote_types(self.compute, torch.float32))


def _master(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _project(
    block: Block, x_BTD: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype, turned: bool,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first part of a block: queries, keys and values. `turned`: see core/products.py."""
    return block.self_attn.project(block.input_layernorm(x_BTD, compute), (cos, sin), turned, beside)


def _finish(block: Block, x_BTD: Tensor, attended_BTHC: Tensor, compute: torch.dtype, turned: bool) -> Tensor:
    """The rest of a block, without dropout. `turned`: see core/products.py."""
    x_BTD = x_BTD + block.self_attn.o_proj(attended_BTHC.flatten(2))
    return x_BTD + block.mlp(block.post_attention_layernorm(x_BTD, compute), turned)


def _finish_with_dropout(
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


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The function's value, of which nothing is kept for backward but the inputs: it is computed again there.
    Nothing in a block draws random numbers, so the second time gives the same bits."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class _Pieces(NamedTuple):
    project: Callable[[Block, Tensor, Tensor, Tensor, torch.dtype, bool], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Block, Tensor, Tensor, torch.dtype, bool], Tensor]
    arithmetic: vocab_head.Arithmetic
    turned: bool


_PLAIN = _Pieces(_project, _finish, vocab_head.PLAIN, False)


def shape_of(family: Llama) -> AttentionShape:
    return AttentionShape(
        hidden_size=family.hidden_size, heads=family.heads, kv_heads=family.kv_heads or family.heads,
        head_size=family.channels, bias=family.attention_bias, output_bias=family.output_bias,
        query_key_norm=family.query_key_norm, norm_epsilon=family.norm_epsilon,
    )
