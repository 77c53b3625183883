"""A stack whose forward and backward are recorded once and replayed learns what it would learn without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmtrainer.base.errors import UserError
from llmtrainer.core.arrangement import Arrangement
from llmtrainer.core.batch import Batch
from llmtrainer.core.graphs import Graphs
from llmtrainer.models import varlen
from llmtrainer.models.decoder import Decoder
from tests.models.recorder import Recorder
from tests.models.rows import rows, shared_prompt
from tests.models.test_decoder import decoder
from tests.tolerances import FLOAT64_LOGITS

CUDA = torch.cuda.is_available()
PLAIN = [rows([[64], [64]], seed=seed) for seed in range(4)]
PACKED = [rows([lengths], 96, seed=seed) for seed, lengths in enumerate(([50, 46], [9, 40, 47], [96, 0], [30, 30, 20]))]
BRANCHING = [shared_prompt(20, lengths, seed) for seed, lengths in enumerate(([20, 24], [30, 14], [40, 4], [4, 40]))]


def flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, **others: Any
) -> Tensor:
    """Flash attention's contract: documents end to end, some of them empty, none longer than `longest`."""
    parts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert stop - start <= longest
        one = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        parts.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no CUDA device"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # Real flash kernels have no float64: on CUDA too, documents end to end are computed by a stand-in.
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    monkeypatch.setattr(varlen, "_torch_has_it", lambda: True)
    varlen.kernel.cache_clear()
    yield request.param
    varlen.kernel.cache_clear()


def pair(device: str, path: str, **fields: Any) -> tuple[Decoder, Decoder, Any]:
    """A model, the same model recorded, and its recorder."""
    models = [decoder(**fields).to(device) for _ in range(2)]
    for model in models:
        model.path = path
    recorder = Graphs() if device == "cuda" else Recorder()
    models[1].record(recorder)
    return *models, recorder


def gradients(model: Decoder, batches: list[Batch]) -> list[Tensor]:
    """What all the batches leave in the parameters, one after the other."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = (model(batch.to(model.head_weight.device), ("logp",)).logp_BT * batch.weights_BT.to(
            model.head_weight.device)).sum()
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(x.grad for x in model.parameters() if x.grad is not None)]


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64_LOGITS)


@pytest.mark.parametrize(
    ("path", "batches"),
    [("sdpa", PLAIN), ("sdpa", PACKED), ("sdpa", BRANCHING), ("reference", PACKED), ("varlen", PACKED),
     ("fused", PLAIN), ("fused", PACKED), ("fused", BRANCHING)],
)  # fmt: skip
def test_every_step_leaves_the_gradients_it_leaves_without(path: str, batches: list[Batch], device: str) -> None:
    if device == "cuda" and path in ("varlen", "fused") and batches is PACKED:
        pytest.skip("the stand-in for flash kernels waits for the bounds")
    plain, recorded, recorder = pair(device, path)
    for batch in batches:
        require_same(gradients(recorded, [batch]), gradients(plain, [batch]))
        with torch.no_grad():
            for one in (plain, recorded):
                for parameter in one.parameters():
                    parameter -= 0.1 * parameter.grad
    assert device == "cuda" or recorder.recorded == 2, "forward and backward of one size"


def test_gradients_of_several_micro_batches_add_up(device: str) -> None:
    plain, recorded, _ = pair(device, "sdpa")
    for _ in range(3):
        require_same(gradients(recorded, PLAIN), gradients(plain, PLAIN))


def test_a_batch_between_another_ones_forward_and_backward_leaves_it_alone(device: str) -> None:
    found = []
    for model in pair(device, "sdpa")[:2]:
        gradients(model, PLAIN[:1])
        for _ in range(2):
            model.zero_grad()
            sums = [model(batch.to(device), ("logp",)).logp_BT.sum() for batch in PLAIN[:3]]
            (sums[0] * sums[1] - sums[2]).backward()
        found.append([x.grad for x in model.parameters()])
    require_same(*found)


def test_a_forward_without_backward_stops_nothing(device: str) -> None:
    plain, recorded, recorder = pair(device, "sdpa")
    for _ in range(3):
        recorded(PLAIN[0].to(device), ("logp",))
    assert device == "cuda" or recorder.recorded == 2
    require_same(gradients(recorded, PLAIN[:2]), gradients(plain, PLAIN[:2]))
    with torch.no_grad():
        logp = [model(PLAIN[2].to(device), ("logp",)).logp_BT for model in (plain, recorded)]
    require_same(logp[:1], logp[1:])


def test_what_is_drawn_anew_each_time_is_not_recorded_and_that_is_told(device: str) -> None:
    plain, recorded, recorder = pair(device, "sdpa", dropout=0.2)
    (told,) = recorded.record(recorder)
    assert "dropout" in told
    for _ in range(3):
        require_same(gradients(recorded, PLAIN[:1]), gradients(plain, PLAIN[:1]))
    assert device == "cuda" or recorder.recorded == 0


def test_a_path_that_differs_from_batch_to_batch_is_refused() -> None:
    model = decoder()
    model.arrange(Arrangement(attention="blocks"))
    with pytest.raises(UserError, match="`blocks` cannot be recorded") as caught:
        model.record(Recorder())
    assert caught.value.where == "engine.cuda_graphs"


def test_frozen_parts_have_no_gradient_and_the_others_the_same(device: str) -> None:
    plain, recorded, _ = pair(device, "sdpa")
    for model in (plain, recorded):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        model.record(Graphs() if device == "cuda" else Recorder())
    for _ in range(3):
        require_same(gradients(recorded, PLAIN[:2]), gradients(plain, PLAIN[:2]))


def test_a_result_outlives_the_next_batch_and_hinders_none(device: str) -> None:
    _, recorded, recorder = pair(device, "sdpa")
    held, others = [], [rows([[48], [48]], seed=seed) for seed in range(3)]
    for batch in (*PLAIN[:3], *others):
        x_BTD = recorded.residual(batch.to(device))
        x_BTD.sum().backward()
        held.append((x_BTD, x_BTD.detach().clone()))
    assert all(torch.equal(x_BTD, then) for x_BTD, then in held)
    assert device == "cuda" or recorder.recorded == 4, "both sizes, although what was made of them is still there"


def test_gradients_of_every_size_take_the_memory_of_one(device: str) -> None:
    _, recorded, _ = pair(device, "sdpa")
    for batch in (*PLAIN[:2], *(rows([[48], [48]], seed=seed) for seed in range(2))):
        recorded(batch.to(device), ("logp",)).logp_BT.sum().backward()
    stack = recorded._recorded
    assert stack is not None
    first, second = stack._recordings.values()
    for recording in (first, second):
        recording.forward()
    places = [[x.data_ptr() for x in one.backward() if x is not None] for one in (second, first)]
    assert places[0] == places[1] and len(set(places[0])) > 10
