"""Fine-tuning's loss and gradients are those of transformers on the same rows, padded there and packed here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrainer.core.objective import Objective, count, loss_of
from llmtrainer.data.budget_source import BudgetSource
from llmtrainer.models.weights import save_weights, tensors
from tests.data.worlds import make_store
from tests.models import theirs
from tests.tolerances import FLOAT64_LOGITS, SFT_GRADIENT_RELATIVE, TRANSFORMERS_FLOAT32_LOSS
from tests.worlds import VOCABULARY, tiny_model

LENGTHS = [40, 3, 17, 90, 9, 31, 64]
IGNORED = -100


@pytest.mark.parametrize("shape", [{}, {"tied_head": True}, {"attention_bias": True, "output_bias": True}], ids=str)
def test_packed_micro_batches_have_the_loss_and_gradients_of_transformers_on_padded_rows(
    tmp_path: Path, shape: dict[str, bool]
) -> None:
    random = np.random.default_rng(5)
    rows = [random.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    # A prompt that is read, an answer, and where there is room a second question and answer.
    asked = [[place < length // 3 or length // 2 <= place < 2 * length // 3 for place in range(length)]
             for length in LENGTHS]    # fmt: skip
    weights = [[0.0 if read else 1.0 for read in row] for row in asked]
    ours = tiny_model(torch.float64, **shape).eval()
    save_weights(ours, tmp_path / "model")

    model = theirs.loaded(tmp_path / "model", "LlamaForCausalLM")
    longest = max(LENGTHS)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in LENGTHS])
    labels = torch.tensor([
        [IGNORED if read else token for token, read in zip(row, reads, strict=True)] + [IGNORED] * (longest - len(row))
        for row, reads in zip(rows, asked, strict=True)
    ])  # fmt: skip
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    # Its own loss rounds the logits to float32; the same definition on its exact logits does not.
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted.backward()
    assert abs(out.loss.item() - wanted.item()) < TRANSFORMERS_FLOAT32_LOSS

    store = make_store(tmp_path / "store", rows, weights=weights)
    source = BudgetSource(
        store, sequence_length=100, sequences_per_step=len(rows), tokens_per_batch=100, seed=2, prefetch=False
    )
    batches = source.batches(0)
    assert len(batches) > 2 and any(batch.sequences > 1 for batch in batches)
    objective, found = Objective.model_validate({"kind": "causal_lm"}), 0.0
    for batch in batches:
        loss = loss_of(objective.terms(ours(batch, objective.wants), batch), count(batches))
        loss.backward()
        found += loss.item()
    assert abs(found - wanted.item()) < FLOAT64_LOGITS
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert gradients.keys() == tensors(ours).keys()
    for name, value in ours.named_parameters():
        right = gradients[name]
        assert value.grad is not None and right is not None
        assert (value.grad - right).abs().max() <= SFT_GRADIENT_RELATIVE * right.abs().max(), name
