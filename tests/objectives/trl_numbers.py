"""What TRL 1.16 says of a few answers: run by hand where TRL is installed, `python tests/objectives/trl_numbers.py`.

Its trainers' own loss functions are called on log-probabilities in place of a model, in float64, so that nothing else
of TRL runs. What it prints is tests/objectives/trl_1_16.json, which test_trl.py holds our objectives to.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

# Better and worse answers in turn, ragged on purpose; log-probabilities of each token.
POLICY = [[-1.0, -2.3, -0.4], [-4.0, -0.3], [-0.2, -0.9, -1.7, -0.6], [-2.1, -0.8, -1.1]]
REFERENCE = [[-1.5, -2.5, -0.3], [-3.5, -0.5], [-0.4, -1.2, -1.3, -0.9], [-1.6, -1.0, -0.7]]
OLD = [[-1.3, -2.2, -0.9], [-3.9, -0.2], [-0.3, -0.5, -1.6, -0.65], [-1.4, -0.9, -1.15]]
ROLLOUT = [[-1.4, -2.2, -1.9], [-3.8, -0.3], [-0.3, -0.6, -1.5, -0.65], [-1.4, -0.7, -1.15]]
ADVANTAGE = [1.2, -0.7, 0.4, -1.1]
LIKED = [True, False, True, False]
KL_POINT = 0.15
STUDENT = [[1.0, 2.0, 0.0, -1.0], [0.3, -0.2, 0.9, 0.1]]
TEACHER = [[2.0, 1.0, 0.0, 0.5], [-0.4, 0.2, 1.5, 0.0]]

DPO = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.1}, "nca_pair": {},
    "robust": {"label_smoothing": 0.1}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {}, "sigmoid_norm": {},
    "forward_kl": {"f_divergence_type": "forward_kl", "loss_types": ["sigmoid"]},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_types": ["sigmoid"]},
}  # fmt: skip
GRPO = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {}, "sapo": {}, "vespo": {}, "cispo": {"epsilon_high": 1.5},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "luspo": {"importance_sampling_level": "sequence"}, "delta": {"loss_type": "grpo", "delta": 1.3},
    "kl": {"loss_type": "bnpo", "beta": 0.1}, "truncated": {"loss_type": "bnpo", "correction": "token_truncate"},
    "masked": {"loss_type": "bnpo", "correction": "sequence_mask"},
}  # fmt: skip


def main() -> None:
    import torch

    torch.set_default_dtype(torch.float64)
    found = {**dpo(), **cpo(), **kto(), **grpo(), **rloo(), **distillation()}
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items()]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


def padded(rows: list[list[float]]) -> Any:
    import torch

    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def mask_of(rows: list[list[float]]) -> Any:
    import torch

    width = max(map(len, rows))
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def told(loss: Any, logp: Any, order: list[int] | None = None) -> dict[str, Any]:
    """The loss, and its gradient by each answer's tokens, answers in the order above."""
    import torch

    (slope,) = torch.autograd.grad(loss, logp)
    rows = range(len(POLICY)) if order is None else [order.index(row) for row in range(len(POLICY))]
    gradient = [slope[row, : len(POLICY[index])].tolist() for index, row in enumerate(rows)]
    return {"loss": float(loss.detach()), "gradient": gradient}


def trainer(**fields: Any) -> Any:
    """What a trainer's loss asks of itself."""
    plain = SimpleNamespace(
        gather_for_metrics=lambda x: x, gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1,
        device="cpu", unwrap_model=lambda x: x, sync_gradients=True,
    )  # fmt: skip
    metrics = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        accelerator=plain, model=SimpleNamespace(training=True), aux_loss_enabled=False, _metrics=metrics,
        _total_train_tokens=0, _tp_size=1, **fields,
    )  # fmt: skip


def outputs(logp: Any) -> Any:
    import torch

    zero = torch.zeros_like(logp.detach())
    return SimpleNamespace(log_probs=logp, entropy=zero, mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=zero)


def dpo() -> dict[str, Any]:
    import torch
    from trl import DPOTrainer

    order, found = [0, 2, 1, 3], {}     # TRL's batch: all better answers, then all worse ones
    policy, reference, mask = ([rows[i] for i in order] for rows in (POLICY, REFERENCE, mask_of(POLICY).tolist()))
    reference_sums = torch.tensor([sum(row) for row in reference])
    prompt_and_answer = torch.cat([torch.zeros(4, 1, dtype=torch.long), torch.tensor(mask)], dim=1)
    for name, more in DPO.items():
        logp = padded(policy).requires_grad_()
        fields = {
            "ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_types": [name],
            "loss_weights": [1.0], "beta": 0.3, "label_smoothing": 0.0, "use_weighting": False, **more,
        }  # fmt: skip
        inputs = {
            "input_ids": prompt_and_answer, "attention_mask": prompt_and_answer, "completion_mask": prompt_and_answer,
            "ref_chosen_logps": reference_sums[:2], "ref_rejected_logps": reference_sums[2:],
        }  # fmt: skip
        loss = DPOTrainer._compute_loss(trainer(**fields), lambda logp=logp, **_: outputs(logp), inputs, False)
        found[f"dpo/{name}"] = told(loss, logp, order)
    return found


def cpo() -> dict[str, Any]:
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    found, lengths = {}, torch.tensor([len(row) for row in POLICY])
    for name in ("sigmoid", "hinge", "ipo", "simpo"):
        logp = padded(POLICY).requires_grad_()
        sums = logp.sum(1) / (lengths if name in ("ipo", "simpo") else 1)
        self = trainer(
            alpha=0.0, beta=2.0 if name == "simpo" else 0.3, simpo_gamma=0.5, loss_type=name, label_smoothing=0.0
        )
        found[f"cpo/{name}"] = told(CPOTrainer.cpo_loss(self, sums[0::2], sums[1::2])[0].mean(), logp)
    logp = padded(POLICY).requires_grad_()
    means = logp.sum(1) / lengths
    # It rounds to float32 on the way, whatever it is given.
    losses = ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), means[0::2], means[1::2])[0]
    found["orpo"] = told(-losses.mean(), logp)
    return found


def kto() -> dict[str, Any]:
    import torch
    from trl.experimental.kto import KTOTrainer

    found, mask = {}, torch.cat([torch.zeros(4, 1, dtype=torch.long), mask_of(POLICY)], dim=1)
    for name in ("kto", "apo_zero_unpaired"):
        logp = padded(POLICY).requires_grad_()
        self = trainer(
            calculate_KL=name == "kto", precompute_ref_logps=True, loss_type=name, beta=0.3, desirable_weight=1.5,
            undesirable_weight=0.5, _compute_kl_logps=lambda model, batch: torch.full((4,), KL_POINT),
        )  # fmt: skip
        batch = {
            "label": torch.tensor(LIKED), "ref_logps": torch.tensor([sum(row) for row in REFERENCE]),
            "ref_KL_logps": torch.zeros(4), "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        }  # fmt: skip
        loss = KTOTrainer._compute_loss(self, lambda logp=logp, **_: outputs(logp), batch, False)
        found[f"kto/{name}"] = told(loss, logp)
    return found


def grpo() -> dict[str, Any]:
    import torch
    from trl import GRPOTrainer

    found, mask = {}, mask_of(POLICY)
    nothing = torch.zeros(mask.shape)
    gap = (padded(OLD) - padded(ROLLOUT)) * mask
    whole = gap.sum(1, keepdim=True).exp()
    weights = {"token_truncate": gap.exp().clamp(max=1.2), "sequence_mask": whole * ((whole > 0.5) & (whole < 2.0))}
    for name, more in GRPO.items():
        logp = padded(POLICY).requires_grad_()
        fields = {
            "loss_type": name, "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28,
            "beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "max_completion_length": 8,
            "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "use_vllm": "correction" in more,
            "vllm_importance_sampling_correction": True, "get_gamma_weights": GRPOTrainer.get_gamma_weights, **more,
        }  # fmt: skip
        self = trainer(
            args=SimpleNamespace(
                delta=more.get("delta"), use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
            ),
            _get_per_token_logps_and_entropies=lambda *_, logp=logp, **__: (logp, nothing, None), **fields,
        )  # fmt: skip
        inputs = {
            "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
            "advantages": torch.tensor(ADVANTAGE), "old_per_token_logps": padded(OLD),
            "ref_per_token_logps": padded(REFERENCE), "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        if "correction" in more:
            inputs["importance_sampling_ratio"] = weights[more["correction"]]
        found[f"grpo/{name}"] = told(GRPOTrainer._compute_loss(self, None, inputs), logp)
    return found


def rloo() -> dict[str, Any]:
    import torch
    from trl import RLOOTrainer

    mask, logp = mask_of(POLICY), padded(POLICY).requires_grad_()
    self = trainer(
        epsilon_low=0.2, epsilon_high=0.28,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp.detach()), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGE), "old_logps": torch.tensor([sum(row) for row in OLD]),
    }  # fmt: skip
    return {"rloo": told(RLOOTrainer._compute_loss(self, None, inputs), logp)}


def distillation() -> dict[str, Any]:
    import torch
    from trl.experimental.gkd import GKDTrainer

    found = {}
    for beta in (0.0, 0.3, 1.0):
        for temperature in (1.0, 2.0):
            student = torch.tensor([STUDENT]).requires_grad_()
            loss = GKDTrainer.generalized_jsd_loss(
                student, torch.tensor([TEACHER]), torch.ones(1, 2, dtype=torch.long), beta, temperature
            )
            (slope,) = torch.autograd.grad(loss, student)
            found[f"gkd/{beta}/{temperature}"] = {"loss": float(loss.detach()), "gradient": slope[0].tolist()}
    return found


if __name__ == "__main__":
    main()
