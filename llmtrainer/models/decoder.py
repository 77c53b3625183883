"""The stack of a decoder: tokens in, what the objective wants out; and reading token by token with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from llmtrainer.core import vocab_head
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.graphs import Record
from llmtrainer.core.products import prefers_turned
from llmtrainer.core.protocols import Adapter, Head
from llmtrainer.core.randomness import derive, dropout, embedding_noise
from llmtrainer.models import kernels, paths, proof, scalar
from llmtrainer.models.attention import Attention, Path, RotaryTable
from llmtrainer.models.block import Block, Drop, Stack, finish, finish_with_dropout, project, shape_of
from llmtrainer.models.cache import Cache
from llmtrainer.models.few_rows import with_few_shapes
from llmtrainer.models.layers import GatedMLP, Linear, RMSNorm
from llmtrainer.models.lora import Beside, LowRank
from llmtrainer.models.paged import Pages
from llmtrainer.models.reading_weights import ReadingWeights
from llmtrainer.models.recompute import Recompute, again, call
from llmtrainer.models.recorded import RecordedStack
from llmtrainer.models.rotary import Rotary
from llmtrainer.models.scalar import ScalarHead
from llmtrainer.models.visible import Visible

if TYPE_CHECKING:
    from llmtrainer.models.families.llama import Llama

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
        self._recorded: RecordedStack | None = None
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
        T = batch.tokens_BT.shape[1]
        batch = with_few_shapes(batch, self.compute, always=self._recorded is not None)
        visible = Visible.of(batch, self._window)
        wide = torch.promote_types(self.compute, torch.float32)
        rotary = self._rotary.of_documents(batch.position_BT, batch.tokens_BT.shape[1], wide)
        rate = self._dropout if self.training else 0.0
        place, position_BT = batch.places

        def drop(x_BTD: Tensor, site: int) -> Tensor:
            return dropout(x_BTD, rate, batch.dropout_key, place, site, position_BT)

        beside = self._beside(batch)
        noisy = self.neftune > 0.0 and self.training
        varies = rate > 0.0 or beside is not None or noisy or self._unproven
        if self._recorded is not None and torch.is_grad_enabled() and not varies:
            x_BTD = self._recorded(batch.tokens_BT, visible, rotary)
            return x_BTD if x_BTD.shape[1] == T else x_BTD[:, :T]
        x_BTD = self._embedded(batch.tokens_BT)
        if noisy:
            x_BTD = embedding_noise(x_BTD, self.neftune, batch.dropout_key, batch.document_BT, place, position_BT)
        x_BTD = self._stacked(drop(x_BTD, 0), visible, rotary, drop if rate else None, beside)
        return x_BTD if x_BTD.shape[1] == T else x_BTD[:, :T]

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens_BT).to(self.residual_type)  # type: ignore[no-any-return]

    def _stacked(
        self, x_BTD: Tensor, visible: Visible, rotary: RotaryTable, drop: Drop | None = None,
        beside: Beside | None = None,
    ) -> Tensor:  # fmt: skip
        """Through all blocks."""
        attend = paths.PATHS[self.path or paths.default_for(x_BTD.device, self.compute)]
        if self._unproven and torch.is_grad_enabled():
            self._prove_pieces(x_BTD, attend, visible, rotary)
        for index, block in enumerate(self.model.blocks()):
            layer = partial(self._layer, block, index, attend, visible, rotary, drop, beside)
            if self.recompute is not None and index % self.recompute.every == 0:
                kept_less = partial(layer, after_attention=again)
                layer = partial(again, layer) if self.recompute.what == "layer" else kept_less
            x_BTD = block(layer, x_BTD)
        return x_BTD

    def _layer(
        self, block: Block, index: int, attend: Path, visible: Visible, rotary: RotaryTable, drop: Drop | None,
        beside: Beside | None, x_BTD: Tensor, after_attention: Callable[..., Tensor] = call,
    ) -> Tensor:
        pieces = self._pieces
        if beside is None:
            attended = attend(*pieces.project(block, x_BTD, *rotary, self.compute, pieces.turned), visible)
        else:
            attended = attend(*project(block, x_BTD, *rotary, self.compute, False, beside), visible)
        if drop is None and beside is None:
            return after_attention(pieces.finish, block, x_BTD, attended, self.compute, pieces.turned)
        return after_attention(finish_with_dropout, block, index, x_BTD, attended, self.compute, drop, beside)

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

    def record(self, recorder: Record) -> tuple[str, ...]:
        """Record forward and backward of the stack from the next batches on, and tell what is computed without.

        After `arrange`, with what is trained decided. Raises UserError where attention cannot be recorded.
        """
        path = self.path or paths.default_for(self.head_weight.device, self.compute)
        paths.require_recordable(path)
        parts = [self.model.embed_tokens, self.model.layers]
        if any(map(_trains, parts)):
            self._recorded = RecordedStack(
                lambda tokens_BT, visible, rotary: self._stacked(self._embedded(tokens_BT), visible, rotary),
                parts, path, self.family.channels, recorder,
            )  # fmt: skip
        random = self._dropout or self.neftune or any(isinstance(x, LowRank) and x.rate for x in self.modules())
        return ("micro-batches with dropout or noise run without CUDA graphs",) if random else ()

    def compile_pieces(self) -> None:
        """Compile what lies between attention and attention, and the head's arithmetic, at the next forward.

        Attention itself stays as it is: which keys it needs differs from batch to batch, and nothing is
        compiled again for that. Other last digits than without; needs a C++ compiler on a CPU.
        """
        turned = prefers_turned(self.head_weight.device, self.compute)
        # Sizes are dynamic from the start: kernels then depend on no history of shapes, and a resumed run has
        # the bits of one that was not interrupted.
        self._pieces = _Pieces(
            torch.compile(project, dynamic=True), torch.compile(finish, dynamic=True),
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
            attended = attend(*project(block, x_BTD, *rotary, self.compute, False), visible)
        attended.requires_grad_(x_BTD.requires_grad or _trains(block.self_attn))
        leaves = [x for x in (x_BTD, attended, *block.parameters()) if x.requires_grad]
        proof.require_same(
            "what precedes attention", lambda: pieces.project(block, x_BTD, *rotary, self.compute, pieces.turned),
            lambda: project(block, x_BTD, *rotary, self.compute, False), leaves, self.compute,
        )  # fmt: skip
        proof.require_same(
            "what follows attention", lambda: [pieces.finish(block, x_BTD, attended, self.compute, pieces.turned)],
            lambda: [finish(block, x_BTD, attended, self.compute, False)], leaves, self.compute,
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


class _Pieces(NamedTuple):
    project: Callable[[Block, Tensor, Tensor, Tensor, torch.dtype, bool], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Block, Tensor, Tensor, torch.dtype, bool], Tensor]
    arithmetic: vocab_head.Arithmetic
    turned: bool


_PLAIN = _Pieces(project, finish, vocab_head.PLAIN, False)
