"""Activations that are computed again change memory and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrainer.core.arrangement import Arrangement
from llmtrainer.models import decoder as decoder_module
from llmtrainer.models.attention import PATHS
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.recompute import again
from tests.models.rows import rows

BATCH = replace(rows([[60, 90], [140]]), dropout_key=7)
PLANS: list[dict[str, Any]] = [dict(recompute_every=k, recompute=what) for k in (1, 2, 3) for what in ("layer", "mlp")]


def decoder(layers: int = 4, **fields: Any) -> Decoder:
    made = Llama(hidden_size=32, layers=layers, heads=4, kv_heads=2, **fields).build(320, torch.float32)
    made.initialise(0)
    return made


def outcome(model: Decoder) -> list[Tensor]:
    logp = model(BATCH, ("logp",)).logp_BT
    return [logp.detach(), *torch.autograd.grad(logp.sum(), list(model.parameters()))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_loss_and_gradients_keep_their_bits(path: str, dropout: float) -> None:
    model = decoder(dropout=dropout)
    model.arrange(Arrangement(attention=path))
    kept = outcome(model)
    for plan in PLANS:
        model.arrange(Arrangement(attention=path, **plan))
        for one, other in zip(kept, outcome(model), strict=True):
            assert torch.equal(one, other), plan


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_compiled_pieces_are_computed_again_with_the_same_bits(
    plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    model = decoder()
    model.compile_pieces()
    kept = outcome(model)
    model.arrange(Arrangement(**plan))
    assert all(torch.equal(one, other) for one, other in zip(kept, outcome(model), strict=True))


def saved_bytes(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that wait for backward, weights not counted, each storage once."""
    model = decoder(layers=8, dropout=0.1)
    model.arrange(Arrangement(**plan))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    def again_counting_inputs(function: Any, *inputs: Any) -> Tensor:
        # What a checkpoint starts from is held by a closure, which the hooks do not see.
        for x in inputs:
            if isinstance(x, Tensor):
                pack(x)
        return again(function, *inputs)

    monkeypatch.setattr(decoder_module, "again", again_counting_inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(BATCH, ("logp",))   # held, so that no storage is freed and counted under another's place
    assert out.logp_BT is not None
    return sum(found.values())


def test_recomputed_blocks_keep_less_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved_bytes({}, monkeypatch)
    shares = {str(plan): saved_bytes(plan, monkeypatch) / whole for plan in PLANS[:3]}
    every, mlps, second = (shares[str(PLANS[i])] for i in (0, 1, 2))
    assert every <= 0.7, "30 % less is the least that all blocks must save"
    assert every < mlps < 1.0 and every < second < 1.0, shares
