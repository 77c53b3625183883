"""One number off a hidden state: behind the last token of a sequence, or at each position that counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core import vocab_head
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import Head
from llmtrainer.core.randomness import derive

WANTS = ("score", "value", "cut_points")
"""What a policy with a scalar head can be asked for: fields of Outputs without their shape."""


class ScalarHead(nn.Module):
    """hidden state [D] -> one number, without a bias: only differences of scores mean anything. The name of its weight
    is that of transformers' classes of sequences with one label. Its parameters are masters, float32 or wider."""

    def __init__(self, size: int, cuts: int, *, master: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, size, dtype=master, device=device))
        self.cuts = nn.Parameter(torch.empty(cuts, dtype=master, device=device)) if cuts else None
        """The first cut point, then the logarithm of the distance from each to the next: whatever is learned, the cut
        points stay in their order."""

    def initialise(self, seed: int, head: Head) -> None:
        """First values as a function of the seed. Cut points stand 1 apart around 0: k - ((K + 1) / 2 - 1)."""
        with torch.no_grad():
            if head.init == "zero":
                self.weight.zero_()
            else:
                std = 1.0 / math.sqrt(self.weight.shape[1] + 1) if head.std is None else head.std
                random = torch.Generator().manual_seed(derive(seed, "initialise", "score.weight"))
                # Drawn in float32 on the CPU, as all first weights: the same on every device.
                self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, std, generator=random) * head.scale)
            if self.cuts is not None:
                self.cuts.zero_()
                self.cuts[0] = 1.0 - (len(self.cuts) + 1) / 2

    def forward(self, x_ND: Tensor) -> Tensor:
        """One number of each row [N], in the type of the weight."""
        # Not a product with a matrix: a row's number must not depend on how many rows there are.
        return (x_ND.to(self.weight.dtype) * self.weight).sum(-1)

    @property
    def cut_points_K(self) -> Tensor | None:
        if self.cuts is None:
            return None
        return torch.cat([self.cuts[:1], self.cuts[1:].exp()]).cumsum(0)


class Scoring(Protocol):
    """A policy that may have a scalar head."""

    @property
    def score(self) -> ScalarHead | None: ...

    @property
    def critic(self) -> Scoring | None: ...

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs: ...

    def trunk(self, batch: Batch) -> Tensor:
        """Hidden states [B, T, D], perhaps before their last norm."""
        ...

    def normed(self, x_ND: Tensor) -> Tensor:
        """What a scalar head reads, of some of the trunk's states: float32 or wider."""
        ...

    def words(self, batch: Batch, x_BTD: Tensor, wants: tuple[str, ...]) -> Outputs:
        """What the vocabulary's head says of the trunk's states."""
        ...


def read(policy: Scoring, batch: Batch, wants: tuple[str, ...]) -> Outputs:
    """Everything wanted, of which some is a scalar head's. The vocabulary's head works only if something of it is
    wanted. UserError where the policy has no scalar head."""
    words = tuple(name for name in wants if name not in WANTS)
    if policy.critic is not None and "value" in wants:
        out = policy.forward(batch, tuple(name for name in wants if name != "value")) if len(wants) > 1 else Outputs()
        return replace(out, value_BT=policy.critic.forward(batch, ("value",)).value_BT)
    head = _head(policy, wants)
    x_BTD = policy.trunk(batch)
    score_S = value_BT = None
    if "score" in wants:
        score_S = head(policy.normed(x_BTD.flatten(0, 1).index_select(0, last_places(batch))))
    if "value" in wants:
        chosen_N = vocab_head.weighted_positions(batch)
        value_BT = _spread(head(policy.normed(vocab_head.gather(x_BTD, chosen_N))), chosen_N, batch)
    out = policy.words(batch, x_BTD, words) if words else Outputs()
    cut_points_K = head.cut_points_K if "cut_points" in wants else None
    return replace(out, score_S=score_S, value_BT=value_BT, cut_points_K=cut_points_K)


def no_words() -> UserError:
    """What to say where a next token is asked of a model that gives a score."""
    return UserError(
        "this model gives a score and no next token", why="a reward model has no head for the vocabulary",
        fix="name the model that it was trained from",
    )


def _head(policy: Scoring, wants: tuple[str, ...]) -> ScalarHead:
    head = policy.score
    kind = "value" if "value" in wants else "ordinal" if "cut_points" in wants else "score"
    if head is None or ("cut_points" in wants and head.cuts is None):
        raise UserError(
            f"the model has no head for a {kind}", where="model.head",
            why="a vocabulary's head says which token follows, and no more", fix=f"model.head.kind={kind}",
        )
    return head


def _spread(value_N: Tensor, chosen_N: Tensor | None, batch: Batch) -> Tensor:
    """Values of the chosen positions in their places, 0 elsewhere."""
    if chosen_N is None:
        return value_N.view(batch.targets_BT.shape)
    return value_N.new_zeros(batch.targets_BT.numel()).index_copy(0, chosen_N, value_N).view(batch.targets_BT.shape)


def last_places(batch: Batch) -> Tensor:
    """Flat place of the last token that is read of each trained sequence: [S], wherever padding and other sequences
    stand. Rows that are to be scored as a whole have to be read to their end, the token that closes them included."""
    sequence_N = batch.sequence_BT.flatten().long()
    owned_N = ((sequence_N >= 0) & (batch.document_BT.flatten() >= 0)).nonzero().squeeze(1)
    last_S = torch.full((batch.sequences,), -1, dtype=torch.int64, device=sequence_N.device)
    return last_S.scatter_reduce(0, sequence_N[owned_N], owned_N, "amax")
