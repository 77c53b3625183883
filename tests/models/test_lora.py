"""Low-rank adapters: what they compute, what they keep, and what stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.randomness import dropout
from llmtrainer.models.adapters.dora import Dora
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.lora import Beside, LowRank
from llmtrainer.models.recompute import Recompute
from llmtrainer.models.weights import narrow, tensors
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE, FLOAT64_LOGITS
from tests.worlds import ragged_documents, row_batch, tiny_model

KINDS = {"lora": Lora, "dora": Dora}


def rows() -> Batch:
    return row_batch(ragged_documents([17, 9, 12]))


def adapted(kind: str, compute: torch.dtype = torch.float64, *, fill: bool = True, **fields: object) -> Decoder:
    """A tiny model with adapters that already do something."""
    policy = tiny_model(compute, attention_bias=True)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    KINDS[kind].model_validate({"rank": 3, "alpha": 6.0, **fields}).insert(policy)
    initialise(policy, 5)
    if fill:
        random = torch.Generator().manual_seed(2)
        for low in lows(policy):
            low.lora_B.data.normal_(0.0, 0.1, generator=random)
            if low.lora_magnitude_vector is not None:
                low.lora_magnitude_vector.data *= 1.0 + 0.2 * torch.rand(
                    low.lora_magnitude_vector.shape, generator=random, dtype=compute
                )
    return policy


def lows(policy: Decoder) -> Iterator[LowRank]:
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        yield linear.adapter


def one_by_one(
    x_BTD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], turned: bool
) -> tuple[Tensor, ...]:
    """As joint_linear, without joining."""
    cast = (None if bias is None else bias.to(x_BTD.dtype) for bias in biases)
    return tuple(F.linear(x_BTD, weight.to(x_BTD.dtype), bias) for weight, bias in zip(weights, cast, strict=True))


def gradients(policy: Decoder, batch: Batch) -> dict[str, Tensor]:
    policy.zero_grad()
    logp_BT = policy(batch, ("logp",)).logp_BT
    assert logp_BT is not None
    (logp_BT * torch.arange(1.0, logp_BT.numel() + 1).view_as(logp_BT)).sum().backward()
    return {name: value.grad.clone() for name, value in policy.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_a_model_with_adapters_is_its_base_bit_for_bit(
    kind: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some libraries round a matrix of three otherwise than each of them: the base, too, multiplies them one by one.
    monkeypatch.setattr("llmtrainer.models.attention.joint_linear", one_by_one)
    batch = rows()
    policy = tiny_model(compute, attention_bias=True)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    base = policy.hidden(batch)
    again = adapted(kind, compute, fill=False)
    assert torch.equal(again.hidden(batch), base)
    assert len(adapters(again)) == 14 and all(bool((low.lora_A != 0).any()) for low in lows(again))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_give_the_hidden_states_of_the_model_whose_matrices_follow_the_formula(
    kind: str, rslora: bool
) -> None:
    policy = adapted(kind, rslora=rslora)
    scale = 6.0 / (3.0**0.5 if rslora else 3.0)
    plain = tiny_model(torch.float64, attention_bias=True)
    for name, value in plain.named_parameters():
        value.data.copy_(dict(policy.named_parameters())[name])
    matrices = dict(plain.named_modules())
    for name, linear in adapters(policy).items():
        low = linear.adapter
        assert low is not None
        weight = linear.weight + scale * low.lora_B @ low.lora_A
        if low.lora_magnitude_vector is not None:
            weight = low.lora_magnitude_vector[:, None] * weight / weight.square().sum(1, keepdim=True).sqrt()
        matrices[name].weight.data.copy_(weight)
    batch = rows()
    difference = (policy.hidden(batch) - plain.hidden(batch)).abs().max()
    assert difference < FLOAT64_LOGITS
    assert (policy.hidden(batch) - adapted(kind, fill=False).hidden(batch)).abs().max() > 0.1


def by_autograd(low: LowRank, x: Tensor, weight: Tensor, bias: Tensor | None, beside: Beside | None) -> Tensor:
    """The definition, operator by operator."""
    read = x if beside is None else dropout(x, low.rate, beside.key, beside.place, low.site)
    added = low.scale * (read @ low.lora_A.T @ low.lora_B.T)
    y = x @ weight.T if bias is None else x @ weight.T + bias
    if low.lora_magnitude_vector is None:
        return y + added
    norm = (weight + low.scale * low.lora_B @ low.lora_A).norm(dim=1).detach()
    share = low.lora_magnitude_vector / norm
    return y + (share - 1.0) * (read @ weight.T) + share * added


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_the_backward_by_hand_is_the_one_of_autograd(magnitude: bool, bias: bool, rate: float) -> None:
    random = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    weight, low_bias = draw(7, 5), draw(7) if bias else None
    low = LowRank(weight, 3, 1.7, rate=rate, site=9, magnitude=magnitude, master=torch.float64)
    low.initialise(1, weight)
    low.lora_B.data.copy_(draw(7, 3))
    if low.lora_magnitude_vector is not None:
        low.lora_magnitude_vector.data.mul_(1.3)
    beside = Beside(11, torch.tensor([0, 4])) if rate else None
    x, along = draw(2, 6, 5).requires_grad_(), draw(2, 6, 7)
    leaves = [x, *low.parameters()]
    ours, theirs = low(x, weight, low_bias, beside), by_autograd(low, x, weight, low_bias, beside)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64_GRADIENT_RELATIVE, atol=FLOAT64_GRADIENT_RELATIVE)
    for found, right in zip(
        torch.autograd.grad(ours, leaves, along), torch.autograd.grad(theirs, leaves, along), strict=True
    ):
        assert (found - right).abs().max() <= FLOAT64_GRADIENT_RELATIVE * right.abs().max()


@pytest.mark.parametrize("targets", [(), ("up_proj",), ("down_proj", "gate_proj")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mlp_as_one_function_has_the_gradients_of_its_layers_one_by_one(
    kind: str, targets: tuple[str, ...]
) -> None:
    policy = adapted(kind, targets=targets, dropout=0.2)
    mlp = next(policy.model.blocks()).mlp
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    beside = Beside(3, torch.tensor([7, 8]))
    leaves = [x, *(value for value in mlp.parameters() if value.requires_grad)]
    along = torch.linspace(-1.0, 1.0, x.numel(), dtype=torch.float64).view_as(x)

    def layer(linear: object, x: Tensor) -> Tensor:
        low = linear.adapter  # type: ignore[attr-defined]
        weight = linear.weight.detach()  # type: ignore[attr-defined]
        return x @ weight.T if low is None else by_autograd(low, x, weight, None, beside)

    gate = layer(mlp.gate_proj, x)
    theirs = layer(mlp.down_proj, gate * torch.sigmoid(gate) * layer(mlp.up_proj, x))
    ours = mlp(x, beside=beside)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64_GRADIENT_RELATIVE, atol=FLOAT64_GRADIENT_RELATIVE)
    for found, right in zip(
        torch.autograd.grad(ours, leaves, along), torch.autograd.grad(theirs, leaves, along), strict=True
    ):
        assert (found - right).abs().max() <= FLOAT64_GRADIENT_RELATIVE * right.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_get_gradients(kind: str) -> None:
    found = gradients(adapted(kind), rows())
    policy = adapted(kind)
    wanted = {name for name, value in policy.named_parameters() if value.requires_grad}
    assert set(found) == wanted and all(".adapter.lora_" in name for name in wanted)
    assert all(bool(value.any()) for value in found.values())


class Sizes(TorchDispatchMode):
    """Numbers in the largest result of any operator that is no view of its input."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_a_gated_mlp_in_tiles_has_the_same_gradients_and_never_a_whole_product(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = (tiny_model(torch.float64) if kind == "none" else adapted(kind)).model.layers[0].mlp
    tokens, (width, inputs) = 160, mlp.gate_proj.weight.shape
    x_BTD = torch.randn(4, tokens // 4, inputs, dtype=torch.float64)
    leaves = [x_BTD.requires_grad_(), *(x for x in mlp.parameters() if x.requires_grad)]

    def outcome() -> tuple[list[Tensor], int]:
        y_BTD = mlp(x_BTD)
        with Sizes() as sizes:
            found = torch.autograd.grad((y_BTD * torch.arange(y_BTD.numel()).view_as(y_BTD).sin()).sum(), leaves)
        return [y_BTD.detach(), *found], sizes.largest

    whole, largest = outcome()
    assert largest == tokens * width
    for tile in (7, tokens - 1, 1):
        monkeypatch.setattr("llmtrainer.models.gated.TILE", tile)
        tiled, largest = outcome()
        assert kind == "dora" or largest < tokens * width
        for one, other in zip(tiled, whole, strict=True):
            assert float((one - other).norm() / other.norm()) < FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("kind", KINDS)
def test_activations_computed_again_give_the_same_gradients_with_dropout(kind: str) -> None:
    batch, policy = rows(), adapted(kind, dropout=0.3)
    kept = gradients(policy, batch)
    policy.recompute = Recompute(1, "layer")
    for name, value in gradients(policy, batch).items():
        assert torch.equal(value, kept[name])


def test_dropout_of_adapters_is_a_function_of_the_key_the_place_and_the_layer() -> None:
    policy, batch = adapted("lora", dropout=0.5), rows()
    one = policy.hidden(batch)
    assert torch.equal(one, policy.hidden(batch))
    documents = ragged_documents([17, 9, 12])
    third = policy.hidden(row_batch(documents[2:], first=2))
    torch.testing.assert_close(third[0, :12], one[2, :12], rtol=0, atol=FLOAT64_LOGITS)
    assert not torch.allclose(policy.hidden(row_batch(documents, first=1)), one)
    sites = [low.site for low in lows(policy)]
    assert len(set(sites)) == len(sites) and min(sites) > 2 * policy.family.layers
    policy.eval()
    torch.testing.assert_close(policy.hidden(batch), adapted("lora").hidden(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_token_by_token_gives_what_the_whole_row_gives(kind: str) -> None:
    policy = adapted(kind).eval()
    document = ragged_documents([12])[0]
    cache = policy.cache(1, 12)
    logits_V = policy.read(torch.tensor([document[:12]]), torch.tensor([12]), cache)[0]
    hidden = policy.hidden(row_batch([document]))[0, -1]
    assert (logits_V - policy.head_weight @ hidden).abs().max() < FLOAT64_LOGITS


def test_a_frozen_base_is_kept_in_the_type_it_is_multiplied_in_and_gives_the_same_bits() -> None:
    wide, narrowed, batch = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16), rows()
    narrow(narrowed)
    for name, value in narrowed.named_parameters():
        value.copy_(tensors(wide)[name])
    assert torch.equal(narrowed.hidden(batch), wide.hidden(batch))
    assert {value.dtype for value in narrowed.parameters() if value.ndim == 2} == {torch.bfloat16}
    bytes_of = {model: sum(value.nbytes for value in model.parameters()) for model in (wide, narrowed)}
    assert bytes_of[narrowed] < 0.51 * bytes_of[wide]
    Lora(rank=2).insert(narrowed)
    initialise(narrowed, 0)
    assert torch.equal(narrowed.hidden(batch), wide.hidden(batch))
    assert {value.dtype for value in narrowed.parameters() if value.requires_grad} == {torch.float32}


def test_a_target_that_names_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean `q_proj`"):
        Lora(targets=("q_porj",)).insert(tiny_model())
    with pytest.raises(UserError, match="the head have none"):
        Lora(targets=("lm_head",)).insert(tiny_model())


def test_targets_choose_by_the_end_of_a_name_or_by_a_pattern() -> None:
    policy = tiny_model()
    Lora(targets=("q_proj", "model.layers.1.mlp.*")).insert(policy)
    names = {name.removeprefix("model.layers.") for name in adapters(policy)}
    assert names == {"0.self_attn.q_proj", "1.self_attn.q_proj", *(f"1.mlp.{x}_proj" for x in ("gate", "up", "down"))}


def test_noise_on_embeddings_is_there_while_training_and_at_no_other_time() -> None:
    policy, batch = tiny_model(torch.float64), rows()
    plain = policy.hidden(batch)
    policy.neftune = 5.0
    noisy = policy.hidden(batch)
    assert not torch.allclose(noisy, plain) and torch.equal(noisy, policy.hidden(batch))
    assert torch.equal(policy.eval().hidden(batch), plain)


@pytest.mark.filterwarnings("ignore")     # the compiler's own
@pytest.mark.parametrize(("kind", "any_length"), [("lora", False), ("dora", True)])
def test_compiled_pieces_hold_adapters_too(kind: str, any_length: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as any compiler would have it; without the minutes of C++. With lengths as symbols, as
    # a run has them, where the formula is the longer one: tracing takes four times as long.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **_: compiler(part, backend="aot_eager", dynamic=any_length))
    batch, policy = rows(), adapted(kind, torch.float32)
    plain = gradients(policy, batch)
    policy.compile_pieces()
    for name, value in gradients(policy, batch).items():
        assert (value - plain[name]).abs().max() <= 1e-4 * plain[name].abs().max(), name
