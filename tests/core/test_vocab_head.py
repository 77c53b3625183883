"""The chunked head is the dense one: values, gradients, chunks, empty batches, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrainer.core import products, vocab_head
from llmtrainer.core.batch import KEPT, TEMPERATURE, Batch
from llmtrainer.core.drawn import Drawn
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT32_GRADIENT, FLOAT64_LOGITS

N, V, D = 64, 96, 16
ALL = ("logp", "entropy", "log_partition", "mean_logp")


def inputs(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(n, D, generator=random, dtype=torch.float64)
    weight = torch.randn(V, D, generator=random, dtype=torch.float64)
    targets = torch.randint(0, V, (n,), generator=random)
    master = torch.promote_types(dtype, torch.float32)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).to(master).requires_grad_(), targets


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = hidden.double() @ weight.double().t()
    logp = logits.log_softmax(-1)
    return {
        "logp": logp.gather(1, targets[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_partition": logits.logsumexp(-1),
        "mean_logp": logp.mean(-1),
    }


def gradients(found: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    # Every output gets a gradient of its own at every position, so that none can hide behind another.
    random = torch.Generator().manual_seed(6)
    total = sum((value.double() * torch.randn(value.shape, generator=random, dtype=torch.float64)).sum()
                for value in found.values())
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize(
    "wants", [("logp",), ("entropy",), ("mean_logp",), ("logp", "log_partition"), ALL], ids="+".join
)
@pytest.mark.parametrize("chunk", [1, 7, 63, 64, None], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, FLOAT64_LOGITS), (torch.float32, FLOAT32_GRADIENT)], ids=["float64", "float32"],
)
def test_values_and_gradients_are_the_dense_ones_for_every_chunk(
    dtype: torch.dtype, tolerance: float, chunk: int | None, wants: tuple[str, ...]
) -> None:
    hidden, weight, targets = inputs(dtype)
    found = vocab_head.log_probabilities(hidden, weight, targets, wants, chunk)
    expected = {name: value for name, value in dense(hidden, weight, targets).items() if name in wants}
    assert list(found) == [name for name in ALL if name in wants]
    for name, value in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance)
    ours, theirs = (gradients(which, hidden, weight) for which in (found, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_reduces_in_float32_and_sums_chunks_in_the_master_type(
    dtype: torch.dtype, chunk: int
) -> None:
    hidden, weight, targets = inputs(dtype)
    found = vocab_head.log_probabilities(hidden, weight, targets, ALL, chunk)
    expected = dense(hidden, weight, targets)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        error = (found[name].double() - value).abs().max() / value.abs().max()
        assert error < BFLOAT16_RELATIVE
    hidden_grad, weight_grad = gradients(found, hidden, weight)
    assert hidden_grad.dtype == dtype and weight_grad.dtype == torch.float32
    for our, their in zip((hidden_grad, weight_grad), gradients(expected, hidden, weight), strict=True):
        assert float((our.double() - their.double()).norm() / their.double().norm()) < BFLOAT16_RELATIVE


@pytest.mark.parametrize("chunk", [7, None], ids=str)
def test_rows_that_only_pad_the_head_do_not_count_in_the_mean(chunk: int | None) -> None:
    hidden, weight, targets = inputs()
    found = vocab_head.log_probabilities(hidden, weight, targets, ("mean_logp",), chunk, ids=90)["mean_logp"]
    expected = (hidden @ weight.t()).log_softmax(-1)[:, :90].mean(-1)  # padding is in the softmax, as ever
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_LOGITS)
    of_each = [torch.autograd.grad(value.square().sum(), (hidden, weight)) for value in (found, expected)]
    for our, their in zip(*of_each, strict=True):
        torch.testing.assert_close(our, their, rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    hidden, weight, targets = inputs()
    logp = vocab_head.log_probabilities(hidden, weight, targets)["logp"]
    (first,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_a_second_backward_gives_the_same_gradient() -> None:
    hidden, weight, targets = inputs()
    logp = vocab_head.log_probabilities(hidden, weight, targets)["logp"]
    first = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(logp.sum(), (hidden, weight))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same_one(trained: str) -> None:
    hidden, weight, targets = inputs()
    whole = dict(zip(("hidden", "weight"), gradients(dense(hidden, weight, targets), hidden, weight), strict=True))
    frozen = {"hidden": hidden, "weight": weight}
    for name, value in frozen.items():
        value.requires_grad_(name == trained)
    found = vocab_head.log_probabilities(hidden, weight, targets, ALL, 7)
    random = torch.Generator().manual_seed(6)
    total = sum((value * torch.randn(value.shape, generator=random, dtype=torch.float64)).sum()
                for value in found.values())
    assert isinstance(total, Tensor)
    (ours,) = torch.autograd.grad(total, frozen[trained])
    torch.testing.assert_close(ours, whole[trained], rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(torch.float32)
    found = vocab_head.log_probabilities(hidden * 1e4, weight, targets, ALL, 7)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert all(bool(torch.isfinite(value).all()) for value in gradients(found, hidden, weight))


def batch(weights: Tensor, targets: Tensor) -> Batch:
    zeros = torch.zeros(weights.shape, dtype=torch.int32)
    return Batch(targets, targets, weights, zeros, zeros, zeros, torch.arange(weights.shape[0]))


def test_the_head_is_called_on_weighted_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    weights = torch.zeros(4, 16)
    weights[0, 3], weights[2, 5:8], weights[3, 15] = 1.0, 2.0, 0.5
    seen: list[int] = []
    real = vocab_head.log_probabilities

    def spy(hidden_ND: Tensor, *rest: Any) -> dict[str, Tensor]:
        seen.append(hidden_ND.shape[0])
        return real(hidden_ND, *rest)

    monkeypatch.setattr(vocab_head, "log_probabilities", spy)
    out = vocab_head.score(hidden.view(4, 16, D), weight, batch(weights, targets.view(4, 16)), ("logp",))
    assert seen == [5]
    expected = dense(hidden, weight, targets)["logp"].view(4, 16) * (weights != 0)
    torch.testing.assert_close(out.logp_BT, expected, rtol=0, atol=FLOAT64_LOGITS)
    assert out.entropy_BT is None and out.log_partition_BT is None


def test_a_batch_without_a_target_gives_zeros_and_finite_zero_gradients() -> None:
    hidden, weight, targets = inputs()
    out = vocab_head.score(hidden.view(4, 16, D), weight, batch(torch.zeros(4, 16), targets.view(4, 16)), ALL)
    for value in (out.logp_BT, out.entropy_BT, out.log_partition_BT):
        assert value is not None and torch.equal(value, torch.zeros(4, 16, dtype=torch.float64))
    assert out.logp_BT is not None
    for gradient in torch.autograd.grad(out.logp_BT.sum(), (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_a_policy_cannot_compute_is_a_defect_of_the_caller() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(AssertionError, match="value"):
        vocab_head.score(hidden.view(4, 16, D), weight, batch(torch.ones(4, 16), targets.view(4, 16)), ("value",))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, targets = inputs(n=512)
    largest = {}
    for chunk in (512, 64, 16):
        with Largest() as tracked:
            found = vocab_head.log_probabilities(hidden, weight, targets, ("logp",), chunk)
            torch.autograd.grad(found["logp"].sum(), (hidden, weight))
        largest[chunk] = tracked.elements
    # The smallest chunk is below the size of hidden itself.
    assert largest == {512: 512 * V, 64: max(64 * V, 512 * D), 16: 512 * D}


def test_the_arithmetic_for_the_compiler_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes most of a minute; what is compiled is checked here as it stands.
    monkeypatch.setattr(torch, "compile", lambda part, dynamic: part)
    hidden, weight, targets = inputs()
    plain, fused = (
        vocab_head.log_probabilities(hidden, weight, targets, ALL, 7, arithmetic)
        for arithmetic in (vocab_head.PLAIN, vocab_head.compiled())
    )
    for name in ALL:
        torch.testing.assert_close(fused[name], plain[name], rtol=0, atol=FLOAT64_LOGITS)
    for one, other in zip(gradients(fused, hidden, weight), gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)


def test_slices_within_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    whole = vocab_head.log_probabilities(hidden, weight, targets, ALL)
    monkeypatch.setattr(vocab_head, "_SLICE_ROWS", 5)
    monkeypatch.setattr(vocab_head, "_SLICE_BYTES", 1)
    monkeypatch.setattr(vocab_head, "_TILE_ELEMENTS", 2 * V)
    sliced = vocab_head.log_probabilities(hidden, weight, targets, ALL)
    for name in ALL:
        torch.testing.assert_close(sliced[name], whole[name], rtol=0, atol=FLOAT64_LOGITS)
    for one, other in zip(gradients(sliced, hidden, weight), gradients(whole, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)


def drawn(n: int = N) -> tuple[Drawn, Tensor, Tensor]:
    """A temperature and kept ids of each position, no id out of three, and the same as (temperature [N], kept [N, V])
    in plain numbers."""
    random = torch.Generator().manual_seed(8)
    temperature_N = 0.5 + torch.rand(n, generator=random, dtype=torch.float64)
    kept_NV = torch.rand(n, V, generator=random) < 0.3
    kept_NV[torch.arange(n), inputs(n=n)[2]] = True
    weights = 2 ** torch.arange(8)
    bits_NW = (kept_NV.view(n, -1, 8) * weights).sum(-1).to(torch.uint8)
    never_K = torch.tensor([number for number in range(V) if not kept_NV[:, number].any()] or [])
    return Drawn(temperature_N, never_K.long(), bits_NW), temperature_N, kept_NV


@pytest.mark.parametrize("chunk", [7, 64], ids=str)
def test_values_and_gradients_are_of_the_distribution_that_targets_were_drawn_from(chunk: int) -> None:
    hidden, weight, targets = inputs()
    how, temperature_N, kept_NV = drawn()
    wants = ("logp", "entropy", "log_partition")
    found = vocab_head.log_probabilities(hidden, weight, targets, wants, chunk, drawn=how)
    scaled_NV = (hidden @ weight.t()) / temperature_N[:, None]
    every = scaled_NV.masked_fill(~kept_NV, -torch.inf).log_softmax(-1)
    expected = {
        "logp": every.gather(1, targets[:, None])[:, 0],
        "entropy": -(every.exp() * every.masked_fill(~kept_NV, 0.0)).sum(-1),
        "log_partition": scaled_NV.masked_fill(~kept_NV, -torch.inf).logsumexp(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=FLOAT64_LOGITS)
    for our, their in zip(*(gradients(which, hidden, weight) for which in (found, expected)), strict=True):
        torch.testing.assert_close(our, their, rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)


def test_ids_that_are_never_drawn_have_no_part_and_no_gradient() -> None:
    hidden, weight, targets = inputs()
    targets = targets % 90
    how = Drawn(None, torch.arange(90, V), None)
    found = vocab_head.log_probabilities(hidden, weight, targets, ("logp",), drawn=how)
    expected = {"logp": (hidden @ weight[:90].t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]}
    torch.testing.assert_close(found["logp"], expected["logp"], rtol=0, atol=FLOAT64_LOGITS)
    of_each = [gradients(which, hidden, weight) for which in (found, expected)]
    for our, their in zip(*of_each, strict=True):
        torch.testing.assert_close(our, their, rtol=FLOAT64_LOGITS, atol=FLOAT64_LOGITS)
    assert of_each[0][1][90:].eq(0.0).all()


@pytest.mark.parametrize("natively", [True, False])
def test_in_sixteen_bits_the_temperature_divides_what_is_already_float32(
    natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: not natively})
    hidden, weight, targets = inputs(torch.bfloat16)
    how, temperature_N, kept_NV = drawn()
    found = vocab_head.log_probabilities(hidden, weight, targets, ("logp",), 7, drawn=how)["logp"]
    # A processor that multiplies 16 bits gives logits of 16 bits; elsewhere they are not rounded at all.
    factors = hidden, weight.to(torch.bfloat16).t()
    logits_NV = factors[0] @ factors[1] if natively else factors[0].float() @ factors[1].float()
    logits_NV = logits_NV.float() / temperature_N[:, None].float()
    expected = logits_NV.masked_fill(~kept_NV, -torch.inf).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_GRADIENT)
    hidden_grad, weight_grad = gradients({"logp": found}, hidden, weight)
    assert hidden_grad.dtype == torch.bfloat16 and weight_grad.isfinite().all()


@pytest.mark.parametrize("own", [False, True], ids=["gathered", "own logits"])
def test_signals_say_how_the_targets_of_a_batch_were_drawn(own: bool) -> None:
    hidden, weight, targets = inputs(n=12)
    how, temperature_N, _ = drawn(12)
    weights_BT = torch.ones(2, 6)
    weights_BT[0, :2] = 0.0
    zeros_BT = torch.zeros(2, 6, dtype=torch.int32)
    batch = Batch(
        targets.view(2, 6), targets.view(2, 6), weights_BT, zeros_BT, zeros_BT, zeros_BT, torch.arange(2),
        signals={TEMPERATURE: temperature_N.view(2, 6), KEPT: how.kept_NW.view(2, 6, -1)},  # type: ignore[union-attr]
    )
    expected = vocab_head.log_probabilities(hidden, weight, targets, drawn=how)["logp"].view(2, 6) * weights_BT
    if own:
        chosen_N = vocab_head.weighted_positions(batch)
        logits_NV = vocab_head.gather((hidden @ weight.t()).view(2, 6, V), chosen_N)
        out = vocab_head.score_logits(logits_NV, batch, chosen_N, ("logp",))
    else:
        out = vocab_head.score(hidden.view(2, 6, D), weight, batch, ("logp",))
    assert out.logp_BT is not None
    torch.testing.assert_close(out.logp_BT, expected, rtol=0, atol=FLOAT64_LOGITS)
