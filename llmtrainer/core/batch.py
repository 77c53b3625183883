"""The rows of one forward pass, and what the policy made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmtrainer.core.objective import Term

GATES = "gates_BTG"
"""A signal: for each token the number of its gate in every group of a mixture of adapters, -1 for none; int64."""
GROUP = "group_S"
"""A signal: which comparison of the batch each trained sequence belongs to, int64, ascending from 0. The sequences of a
comparison stand side by side, the best first."""
ROW = "row_S"
"""A signal: which document of the store each trained sequence is, int64."""
LIKED = "liked_S"
"""A signal: 1 where the sequence was liked and 0 where not, float32."""
MARGIN = "margin_S"
"""A signal: by how much the best sequence of a comparison is better, said of each of its sequences, float32."""
LOW, HIGH = "low_S", "high_S"
"""Signals: the classes that a graded sequence may belong to, from low to high, the latter not included; int64."""
REFERENCE = "reference_logp_BT"
"""A signal: what the frozen reference says of each target, as Outputs.logp_BT."""
OLD = "old_logp_BT"
"""A signal: what the policy that wrote the answers says of each target, in its place, as Outputs.logp_BT."""
ROLLOUT = "rollout_logp_BT"
"""A signal: what the sampler itself said of each target when it drew it, as Outputs.logp_BT. Where sampler and trainer
are the same code it equals `old_logp_BT`."""
NEVER = "never_K"
"""A signal: ids that no target was drawn from, int64. Log-probabilities are then of a distribution over the others."""
KEPT = "kept_BTW"
"""A signal: which ids the target of each token was drawn from, those never left aside, as bits of bytes, the lowest bit
first: uint8. Log-probabilities are then of a distribution over these ids alone."""
TEMPERATURE = "temperature_BT"
"""A signal: what logits were divided by before the target was drawn, above 0, float64. Log-probabilities are then of
logits divided by it."""
ADVANTAGE = "advantage_BT"
"""A signal: how much better each token was than expected, float32."""
OLD_VALUE = "old_value_BT"
"""A signal: what the critic expected from each position on when the answers were written, as Outputs.value_BT."""
RETURN = "return_BT"
"""A signal: what was earned from each position on, which the critic is to expect, float32."""
KL = "kl_S"
"""A signal: an estimate in nats of how far the policy has left the reference, the point that the log-ratio of each
sequence is compared with (KTO's z0), float32. Worked out over the whole step before its first forward."""
BESIDE = "beside_S"
"""A signal: 1 where the sequence belongs to the objective beside the main one and 0 where to that, float32. Where a run
mixes two objectives, every batch of every rank has it."""
TEACHER_IDS = "teacher_ids_BTK"
"""A signal: K different ids that a teacher holds for likeliest at each target's place, int64."""
TEACHER_LOGP = "teacher_logp_BTK"
"""A signal: the teacher's log-probabilities of those ids, float32. What is missing to 1 is the exact mass of all the
other ids; a K as large as the vocabulary leaves nothing out."""
TEACHER_TEMPERATURE = "teacher_temperature"
"""A signal: the temperature of those log-probabilities, one number; 1 where it is missing."""


@dataclass(frozen=True)
class Batch:
    """Rows B of T tokens. A row holds one document or several, then padding.

    What a position may see follows from `document_BT` and `sequence_BT` alone; there is no attention mask.
    """

    tokens_BT: Tensor
    """Ids the model reads, int64."""
    targets_BT: Tensor
    """The id that follows each token in its document, int64. Already shifted: nobody shifts again."""
    weights_BT: Tensor
    """How much each target counts, float32: 0 prompt, border or padding, 1 normal, above 1 critical."""
    document_BT: Tensor
    """Which document of its row a token belongs to, int32, ascending from 0; -1 is padding."""
    position_BT: Tensor
    """Place of a token in its document, int32; restarts at 0 with every document."""
    sequence_BT: Tensor
    """Which trained sequence (0..S-1 over the whole batch) a token belongs to, int32. -1: shared by several
    sequences of its document, or padding."""
    place_B: Tensor
    """Place of each row in its optimizer step, int64: what dropout masks are a function of, so that they do
    not depend on micro-batches or ranks."""
    dropout_key: int = 0
    """Derived from (seed, step) by the trainer."""
    signals: dict[str, Tensor] = field(default_factory=dict)
    """What somebody knows before the forward pass, by name: `ref_logp_BT`, `advantage_BT`."""
    shard: int = -1
    """Which part of its step the rows are (core/share.py); -1: of no step, but a trial."""
    place_BT: Tensor | None = None
    """Place in the step of the sequence that each token belongs to, int64, where a row holds several that were cut
    apart from each other; None: the row's. Dropout is then a function of it and of the token's position."""

    @property
    def places(self) -> tuple[Tensor, Tensor | None]:
        """What random numbers beside a token are a function of: the place of its sequence in the step, and, where
        that differs along a row, the token's position in it."""
        return (self.place_B, None) if self.place_BT is None else (self.place_BT, self.position_BT)

    @property
    def input_tokens(self) -> int:
        """Real tokens read, padding not counted."""
        return int((self.document_BT >= 0).sum())

    @property
    def sequences(self) -> int:
        """S, the number of trained sequences."""
        return int(self.sequence_BT.max()) + 1 if self.sequence_BT.numel() else 0

    def to(self, device: torch.device | str) -> Self:
        # A copy to the host is waited for: nothing else would tell when its numbers are there.
        on_the_way = torch.device(device).type != "cpu"
        moved: dict[str, Any] = {
            item.name: getattr(self, item.name).to(device, non_blocking=on_the_way)
            for item in fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        return replace(self, **moved, signals={name: value.to(device) for name, value in self.signals.items()})

    def with_signals(self, signals: Mapping[str, Tensor]) -> Self:
        """The same rows, with more known about them."""
        return replace(self, signals={**self.signals, **signals})

    def sum_by_sequence(self, value_BT: Tensor) -> Tensor:
        """Weighted sum of a per-token value over each trained sequence: [S]."""
        owned_BT = self.sequence_BT >= 0
        total_S = value_BT.new_zeros(self.sequences)
        weighted_N = (value_BT * self.weights_BT.to(value_BT.dtype))[owned_BT]
        return total_S.index_add(0, self.sequence_BT[owned_BT].long(), weighted_N)

    def mean_by_sequence(self, value_BT: Tensor) -> Tensor:
        """Weighted mean of a per-token value over each trained sequence: [S]; 0 where no token counts."""
        weight_S = self.sum_by_sequence(torch.ones_like(value_BT))
        return self.sum_by_sequence(value_BT) / weight_S.clamp(min=torch.finfo(value_BT.dtype).tiny)

    def part(self, chosen_S: Tensor) -> Self:
        """The batch with these sequences alone: all others count nothing, and the chosen are numbered anew."""
        number_S = torch.where(chosen_S, chosen_S.cumsum(0) - 1, -1)
        number_BT = torch.cat([number_S.new_full((1,), -1), number_S])[self.sequence_BT.long() + 1]
        signals = {
            name: value[: len(chosen_S)][chosen_S] if name.endswith("_S") else value
            for name, value in self.signals.items()
        }
        if GROUP in signals:
            signals[GROUP] = torch.unique(signals[GROUP], return_inverse=True)[1]
        return replace(
            self, weights_BT=self.weights_BT * (number_BT >= 0), sequence_BT=number_BT.to(self.sequence_BT.dtype),
            signals=signals,
        )

    def by_token(self, value_S: Tensor) -> Tensor:
        """Each sequence's number at each of its tokens, 0 at what belongs to none: [B, T]."""
        return torch.cat([value_S.new_zeros(1), value_S])[self.sequence_BT.long() + 1]


@dataclass(frozen=True)
class Outputs:
    """What the policy computed because the objective wanted it."""

    logp_BT: Tensor | None = None
    """Log-probability of each target, float32 or wider; exactly 0 where the target's weight is 0."""
    entropy_BT: Tensor | None = None
    """Entropy of the next-token distribution in nats; 0 where the target's weight is 0."""
    log_partition_BT: Tensor | None = None
    """Logarithm of the softmax's denominator, for z-loss; 0 where the target's weight is 0."""
    mean_logp_BT: Tensor | None = None
    """Mean log-probability over all ids, for label smoothing; 0 where the target's weight is 0."""
    listed_logp_BTK: Tensor | None = None
    """Log-probabilities of the ids of the signal `teacher_ids_BTK`, at the teacher's temperature."""
    rest_logp_BT: Tensor | None = None
    """Logarithm of the mass of all other ids at that temperature; -inf where there are none."""
    score_S: Tensor | None = None
    """One number for each trained sequence, read behind its last real token; float32 or wider."""
    value_BT: Tensor | None = None
    """What the critic expects from each position on, float32 or wider; 0 where the target's weight is 0."""
    cut_points_K: Tensor | None = None
    """Where the line of scores is cut into K + 1 classes, ascending."""
    aux: tuple[Term, ...] = ()
    """The model's own Terms."""
