"""Eight-bit means: what a code stands for, how far AdamW drifts, and what is saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmtrainer.core.protocols import Rule
from llmtrainer.optim.codes import BLOCK, blocks, decode, encode, meanings
from llmtrainer.optim.groups import group
from llmtrainer.optim.rules.adamw import AdamW
from llmtrainer.optim.rules.adamw_8bit import AdamW8bit
from tests.tolerances import ADAMW_WEIGHT, EIGHT_BIT_DRIFT

NUMBERS = 5 * BLOCK + 37


def numbers(signed: bool, scale: float = 3e-3) -> Tensor:
    """Over many powers of ten, as gradients are."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(NUMBERS, generator=random) * torch.rand(NUMBERS, generator=random) ** 6 * scale
    return values if signed else values.square()


def means_by_hand(signed: bool) -> list[float]:
    """The dynamic tree, from the string of digits of each code."""
    values = []
    for code in range(256):
        digits = f"{code:08b}"
        sign, digits = (-1.0 if digits[0] == "1" else 1.0, digits[1:]) if signed else (1.0, digits)
        zeros = len(digits) - len(digits.lstrip("0"))
        fraction = digits[zeros + 1 :]
        if zeros == len(digits):
            values.append(0.0 if signed else 0.55e-8)
        elif zeros == 0 and set(fraction) == {"1"}:
            values.append(sign)
        else:
            middle = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
            values.append(sign * 10.0**-zeros * (0.1 + 0.9 * middle))
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_the_papers_dynamic_tree(signed: bool) -> None:
    assert meanings(signed).tolist() == pytest.approx(means_by_hand(signed), rel=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_the_nearest_code_of_its_block(signed: bool) -> None:
    values = numbers(signed)
    codes, scale = encode(values, signed=signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert scale.dtype == torch.float32 and scale.shape == (blocks(NUMBERS),) == (6,)
    of_each = values.abs().split(BLOCK)
    assert torch.equal(scale, torch.stack([part.max() for part in of_each]))
    decoded = decode(codes, scale, torch.float32, signed=signed)
    relative = values / scale.repeat_interleave(BLOCK)[:NUMBERS]
    error = (decoded - values).abs() / scale.repeat_interleave(BLOCK)[:NUMBERS]
    nearest = (relative[:, None] - meanings(signed)).abs().amin(1)
    # Rounding to 11 binary digits first may choose the other neighbour, where both are as good but for that.
    assert bool((error <= nearest + relative.abs() * 2**-10 + 2**-24).all())


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_decoded_is_encoded_to_itself(signed: bool) -> None:
    values = decode(*encode(numbers(signed), signed=signed), torch.float32, signed=signed)
    again = decode(*encode(values, signed=signed), torch.float32, signed=signed)
    assert torch.equal(values, again)


def test_an_outlier_spoils_its_own_block_alone() -> None:
    values = torch.full((2 * BLOCK,), 1e-6)
    values[3] = 1e6
    decoded = decode(*encode(values, signed=True), torch.float32, signed=True)
    assert decoded[3] == 1e6 and not decoded[4:BLOCK].any()
    assert torch.equal(decoded[BLOCK:], values[BLOCK:])


def test_a_mean_square_never_becomes_nothing_and_nothing_stays_nothing() -> None:
    values = torch.zeros(2 * BLOCK)
    values[0], values[1] = 1.0, 1e-20
    decoded = decode(*encode(values, signed=False), torch.float32, signed=False)
    assert bool((decoded[:BLOCK] > 0).all()) and not decoded[BLOCK:].any()
    assert not decode(*encode(torch.zeros(9), signed=True), torch.float32, signed=True).any()


class Wide(nn.Module):
    """An embedding, a matrix that is large enough for codes, and vectors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(70, 64)
        self.hidden = nn.Linear(64, 70, bias=True)
        self.to(dtype)


def trained(rule: Rule, steps: int, dtype: torch.dtype = torch.float32, rate: float = 1e-2) -> tuple[Wide, Tensor]:
    """The model after some steps of a quadratic loss with noise, and the matrix it began with."""
    model = Wide(dtype)
    start = model.hidden.weight.detach().clone()
    optimizer = rule.build(group(model.named_parameters()))
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.grad = (parameter.detach() + 0.3 * noise).to(dtype)
        for entry in optimizer.param_groups:
            entry["lr"] = rate
        optimizer.step()
    return model, start


def test_with_everything_in_float_it_is_adamw() -> None:
    ours, _ = trained(AdamW8bit(keep_float=("*",)), 10)
    theirs, _ = trained(AdamW(), 10)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * ADAMW_WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_drift_from_adamw_by_a_small_share_of_the_way(dtype: torch.dtype) -> None:
    (ours, start), (theirs, _) = trained(AdamW8bit(), 100, dtype), trained(AdamW(), 100, dtype)
    ends = [model.hidden.weight.detach() for model in (ours, theirs)]
    way, drift = float((ends[1] - start).norm()), float((ends[0] - ends[1]).norm())
    assert 0.0 < drift < EIGHT_BIT_DRIFT * way
    torch.testing.assert_close(ours.embed_tokens.weight, theirs.embed_tokens.weight, rtol=0, atol=1e-5)


def test_the_same_gradients_give_the_same_bits() -> None:
    (one, _), (other, _) = trained(AdamW8bit(), 20), trained(AdamW8bit(), 20)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = trained(AdamW8bit(), 5)
    monkeypatch.setattr("llmtrainer.optim.rules.adamw_8bit._SLICE", 2 * BLOCK)
    sliced, _ = trained(AdamW8bit(), 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sliced.parameters(), strict=True))


def state_of(rule: Rule, parameter: nn.Parameter, name: str) -> dict[str, Tensor]:
    optimizer = rule.build(group([(name, parameter)]))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return dict(optimizer.state[parameter])


def test_embeddings_and_small_tensors_keep_float_means() -> None:
    rule = AdamW8bit(smallest=4096)
    forms = {
        name: state_of(rule, nn.Parameter(torch.zeros(shape)), name)["exp_avg"].dtype
        for name, shape in [("layer", (64, 64)), ("layer.small", (63, 65)), ("model.embed_tokens.weight", (64, 64))]
    }
    assert forms == {
        "layer": torch.uint8, "layer.small": torch.float32, "model.embed_tokens.weight": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "bytes_each"),
    [("adamw", 8), ("lion", 4), ("muon", 4), ("adamw_8bit", 2 + 8 / BLOCK), ("adafactor", 8 / 512)],
)
def test_a_matrix_costs_the_bytes_of_state_that_the_manual_says(kind: str, bytes_each: float) -> None:
    parameter = nn.Parameter(torch.zeros(512, 512))
    state = state_of(Rule.model_validate({"kind": kind}), parameter, "model.layers.0.weight")
    kept = sum(value.nbytes for value in state.values() if value.ndim)
    assert kept / parameter.numel() == bytes_each
