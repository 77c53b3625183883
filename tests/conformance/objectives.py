"""What the tests of all objectives share: settings of every kind, and steps that carry every signal there is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from llmtrainer.base.kinds import kinds_in
from llmtrainer.core import batch as signals
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.vocab_head import WANTS
from llmtrainer.models.decoder import Decoder
from tests.objectives.rollouts import rollout_of
from tests.worlds import ragged_documents, row_batch, tiny_model

Settings = dict[str, object]

VARIANTS: dict[str, list[Settings]] = {
    "causal_lm": [{"label_smoothing": 0.2, "z_loss": 1e-2}],
    "dpo": [
        {"beta": 0.3, "label_smoothing": 0.1, "average": "mean", "gamma": 0.2, "nll_weight": 0.5, "sampo": True},
        {"loss": "robust", "label_smoothing": 0.1, "divergence": "jensen_shannon"}, {"loss": "hinge"}, {"loss": "ipo"},
        {"loss": "exo_pair", "label_smoothing": 0.1}, {"loss": "sppo_hard", "divergence": "forward_kl"},
        {"loss": "nca_pair"}, {"loss": "apo_zero"}, {"loss": "apo_down"}, {"loss": "kto_pair"},
        {"reference_free": True}, {"balance": True},
    ],
    "simpo": [{"beta": 1.5, "gamma": 0.3, "label_smoothing": 0.1, "nll_weight": 0.5}],
    "cpo": [{"beta": 0.3, "label_smoothing": 0.1, "nll_weight": 0.5}, {"loss": "ipo"}],
    "grpo": [
        {
            "loss": "dapo", "clip_low": 0.1, "clip_high": 0.3, "delta": 1.5, "kl": 0.1, "kl_estimator": "k2",
            "kl_in": "reward", "entropy": 0.01, "max_new_tokens": 40, "overlong": 8, "skip_unfinished": True,
            "skip_even_groups": True, "scale": "sample", "level": "sequence", "average": "sum", "advantage": "group",
            "correction": {"weights": "token", "cap": 1.5, "reject": "k3", "bounds": (0.0, 0.4)},
        },
        {"loss": "bnpo", "kl": 0.1}, {"loss": "dr_grpo", "max_new_tokens": 40}, {"loss": "gspo"}, {"loss": "luspo"},
        {"loss": "cispo"}, {"loss": "sapo", "gate": (0.9, 1.2)}, {"loss": "rloo"}, {"loss": "reinforce_pp"},
        {"loss": "vespo", "gamma": ((1.0, 2.0), (2.0, 1.0))}, {"correction": {"bypass": True, "reject": "sequence"}},
        {"advantage": "group_whitened"},
    ],
    "ppo": [
        {
            "clip_low": 0.1, "clip_high": 0.3, "delta": 1.5, "value_weight": 0.5, "value_clip": 0.1, "huber": 0.2,
            "entropy": 0.01, "gamma": 0.9, "lam": 0.8, "kl": 0.1, "kl_estimator": "k3", "kl_target": 1.0,
            "kl_horizon": 100, "missing_end_penalty": 1.0, "rewards": "running", "whiten_rewards": True,
            "whiten_advantages": False, "bootstrap": True, "correction": {"weights": "sequence", "cap": 1.5},
        },
        {"kl": 0.0, "rewards": "batch"}, {"value_clip": None},
    ],
    "distill": [
        {"coefficient": 0.3, "divergence": "jensen_shannon", "mixture": 0.2}, {"temperature": 2.0, "coefficient": 1.0},
        {"divergence": "reverse_kl"}, {"divergence": "cross_entropy"},
    ],
    "mix": [
        {"main": {"kind": "grpo", "kl": 0.1}, "beside": {"kind": "causal_lm", "z_loss": 1e-2}, "weight": 0.3},
        {"main": {"kind": "dpo"}, "beside": {"kind": "causal_lm", "z_loss": 1e-2}, "weight": 0.0},
        {"main": {"kind": "ppo"}}, {"beside": {"kind": "kto"}},
    ],
    "orpo": [{"beta": 0.3}],
    "kto": [{"beta": 0.3, "liked_weight": 1.5, "disliked_weight": 0.5}, {"loss": "apo_zero"}, {"point": "own"}],
    "ordinal": [],
    "reward": [{"beta": 0.7, "gamma": 0.2, "margin": True, "centre": 0.01}],
    "segments": [{"beta": 0.5, "gamma": 0.1, "mean": True, "reference": False}],
}
"""Beside a kind's defaults: together every field with something else than its default."""

TRIED = [
    {"kind": kind, **more} for kind in kinds_in("llmtrainer.objectives") for more in [{}, *VARIANTS.get(kind, [])]
]


def name_of(settings: Settings) -> str:
    return "+".join(f"{value}" if name in ("kind", "loss") else name for name, value in settings.items())


TOKENS = (3, 2, 35, 4)
ROLLOUT = rollout_of(
    [1.0, 0.0, 0.5, 0.2], [0, 0, 1, 1], lengths=TOKENS, reference_logp=tuple(np.full(n, -1.2) for n in TOKENS),
    values=tuple(np.full(n, 0.3) for n in TOKENS),
)  # fmt: skip


class World:
    """Answers to prompts, two to each, and everything that anybody could say of them beforehand."""

    # Uneven on purpose, and 1 among them: with equal rows the mean of means is the mean, and nothing is proved.
    LENGTHS = (5, 19, 3, 1, 28, 2, 16, 4, 11, 30, 7, 1)

    def __init__(self, settings: Settings | None = None, dropout: float = 0.0) -> None:
        self.temperature = float(str((settings or {}).get("temperature", 1.0)))
        draw = random.Random(45)
        self.documents = ragged_documents([length + 2 for length in self.LENGTHS])
        self.weights = [draw.choice([0.5, 1.0, 2.0]) for _ in self.documents]
        longest = max(self.LENGTHS) + 2
        random_numbers = torch.Generator().manual_seed(46)
        self.noise = torch.randn(8, len(self.documents), longest, generator=random_numbers, dtype=torch.float64)
        self.teacher = torch.randn(len(self.documents), longest, 5, generator=random_numbers, dtype=torch.float64)
        self.policy = Together(tiny_model(torch.float64, dropout=dropout))
        with torch.no_grad():
            whole = self.policy(self.batch(0, len(self.documents)), ("logp",)).logp_BT
        assert whole is not None
        self.logp = whole

    def batch(self, first: int, stop: int) -> Batch:
        """Rows first..stop of the step; both even, since two rows answer the same prompt."""
        rows = slice(first, stop)
        batch = row_batch(self.documents[rows], self.weights[rows], first)
        weights = batch.weights_BT.clone()
        weights[:, :2] = 0.0    # the prompt
        return replace(batch, weights_BT=weights, signals=self.signals(rows, batch.tokens_BT.shape[1]))

    def signals(self, rows: slice, T: int) -> dict[str, Tensor]:
        place_S = torch.arange(rows.start, rows.stop)
        if not hasattr(self, "logp"):
            return {}
        near = self.logp[rows, :T], self.noise[:, rows, :T]
        teacher_BTK = self.teacher[rows, :T].log_softmax(-1)[..., :4]
        return {
            signals.GROUP: (place_S - rows.start) // 2, signals.ROW: place_S, signals.LIKED: (place_S % 3 != 1).float(),
            signals.MARGIN: (place_S // 2).float() / 4, signals.KL: torch.full(place_S.shape, 0.3),
            signals.LOW: place_S % 3, signals.HIGH: place_S % 3 + 1 + place_S % 2,
            signals.REFERENCE: near[0] + 0.2 * near[1][0], signals.OLD: near[0] + 0.2 * near[1][1],
            signals.ROLLOUT: near[0] + 0.3 * near[1][2], signals.ADVANTAGE: near[1][3],
            signals.OLD_VALUE: near[1][4], signals.RETURN: near[1][4] + 0.3 * near[1][5],
            signals.BESIDE: (place_S // 2 % 3 == 1).float(),
            signals.TEACHER_LOGP: teacher_BTK, signals.TEACHER_TEMPERATURE: torch.tensor(self.temperature),
            signals.TEACHER_IDS: torch.arange(4).expand(teacher_BTK.shape) * 7 + place_S[:, None, None],
        }

    def step(self, sizes: Sequence[int]) -> list[Batch]:
        """The step in micro-batches of so many prompts each."""
        batches, first = [], 0
        for size in sizes:
            batches.append(self.batch(first, first + 2 * size))
            first += 2 * size
        assert first == len(self.documents)
        return batches

    def empty(self) -> Batch:
        """Rows of padding alone, with no sequence, and signals as long as that."""
        batch = self.batch(0, 2)
        shape = batch.tokens_BT.shape
        nothing = {
            name: value[:0] if name.endswith("_S") else value * 0 if value.dim() else value
            for name, value in batch.signals.items()
        }
        return replace(
            batch, weights_BT=torch.zeros(shape), document_BT=torch.full(shape, -1, dtype=torch.int32),
            sequence_BT=torch.full(shape, -1, dtype=torch.int32), signals=nothing,
        )  # fmt: skip


class Together(nn.Module):
    """A decoder with a score and a value read off its hidden states by fixed directions."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        size = decoder.family.hidden_size
        self.direction = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        out: Outputs = self.decoder(batch, tuple(name for name in wants if name in WANTS))
        counting_BT = (batch.weights_BT > 0).double()
        if "value" in wants:
            out = replace(out, value_BT=self.decoder.hidden(batch) @ self.direction * counting_BT)
        if "score" in wants:
            read_BT = self.decoder.hidden(batch) @ self.direction.flip(0)
            out = replace(out, score_S=batch.mean_by_sequence(read_BT))
        if "cut_points" in wants:
            out = replace(out, cut_points_K=torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64))
        return out
