"""Update rules against hand arithmetic and torch's own, and what every rule owes an engine."""

from __future__ import annotations

import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Rule
from llmtrainer.optim import rules
from llmtrainer.optim.groups import Group, group
from llmtrainer.optim.rules.adafactor import Adafactor
from llmtrainer.optim.rules.adamw import AdamW
from llmtrainer.optim.rules.lion import Lion
from llmtrainer.optim.rules.muon import RMS, Muon, orthogonalised
from tests.tolerances import ADAMW_WEIGHT, FLOAT64_GRADIENT_RELATIVE, MUON_SINGULAR_VALUES, MUON_UPDATE_RELATIVE

KINDS = [module.name for module in pkgutil.iter_modules(rules.__path__)]  # a new file is tested unasked
IMPLEMENTATIONS = ["fused", "foreach", "plain"]


def tiny(seed: int = 0) -> nn.Module:
    """The smallest module with an embedding, hidden matrices of all shapes, a norm, a bias and a head."""
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False))
    return nn.ModuleDict({"embed": nn.Embedding(7, 6), "model": nn.ModuleDict({"layers": hidden}),
                          "head": nn.Linear(6, 7, bias=False)})  # fmt: skip


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(7, (12,), generator=generator)
    read = model.get_submodule("head")(model.get_submodule("model.layers")(model.get_submodule("embed")(ids)))
    return nn.functional.cross_entropy(read, (3 * ids + 1) % 7)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rate: float = 1e-2, first: int = 0) -> float:
    loss = torch.zeros(())
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        for entry in optimizer.param_groups:
            entry["lr"] = rate * entry["rate_multiplier"]
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def numpy_adamw(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    *,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> np.ndarray:
    """arXiv:1711.05101, algorithm 2, line by line, in float64."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        mean_hat, square_hat = mean / (1 - beta1**t), square / (1 - beta2**t)
        weight = weight - rate * decay * weight - rate * mean_hat / (np.sqrt(square_hat) + eps)
    return weight


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adamw_is_the_papers_algorithm(implementation: str) -> None:
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(5, 4)), [random.normal(size=(5, 4)) for _ in range(6)]
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    rule = AdamW.model_validate({"betas": (0.8, 0.97), "weight_decay": 0.3, "implementation": implementation})
    optimizer = rule.build(group([("matrix", parameter)]))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    expected = numpy_adamw(start, gradients, rate=1e-2, beta1=0.8, beta2=0.97, eps=1e-8, decay=0.3)
    assert np.abs(parameter.detach().numpy() - expected).max() < 5 * ADAMW_WEIGHT  # 6 float32 updates near 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adamw_equals_torch_with_hand_made_groups(implementation: str) -> None:
    ours, theirs = tiny(), tiny()
    rule = AdamW.model_validate({"implementation": implementation})
    run(ours, rule.build(group(ours.named_parameters())), 5)
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for entry in oracle.param_groups:
        entry["rate_multiplier"] = 1.0
    run(theirs, oracle, 5)
    for name, expected in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], expected, rtol=0, atol=ADAMW_WEIGHT)


def test_foreach_and_plain_adamw_have_the_same_bits() -> None:
    one, other = tiny(), tiny()
    run(one, AdamW(implementation="foreach").build(group(one.named_parameters())), 4)
    run(other, AdamW(implementation="plain").build(group(other.named_parameters())), 4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_shrinks_matrices_and_spares_vectors(kind: str) -> None:
    model = tiny()
    before = weights(model)
    optimizer = Rule.model_validate({"kind": kind}).build(group(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for entry in optimizer.param_groups:
        entry["lr"] = 0.5
    optimizer.step()
    for name, after in weights(model).items():
        factor = 1.0 - 0.5 * 0.1 if after.ndim == 2 else 1.0
        torch.testing.assert_close(after, before[name] * factor, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_groups_own_decay_counts_for_every_parameter(kind: str) -> None:
    model = tiny()
    before = weights(model)
    groups = group(model.named_parameters(), [Group(match="*", decay=0.5)])
    optimizer = Rule.model_validate({"kind": kind}).build(groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for entry in optimizer.param_groups:
        entry["lr"] = 0.5
    optimizer.step()
    for name, after in weights(model).items():
        torch.testing.assert_close(after, before[name] * (1.0 - 0.5 * 0.5 * 0.1), rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_all_state_lies_in_one_place(kind: str) -> None:
    model = tiny()
    optimizer = Rule.model_validate({"kind": kind}).build(group(model.named_parameters()))
    run(model, optimizer, 1)
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_halves_the_rate_equals_half_the_rate(kind: str) -> None:
    slow, half = tiny(), tiny()
    rule = Rule.model_validate({"kind": kind})
    run(slow, rule.build(group(slow.named_parameters(), [Group(match="*", rate=0.5)])), 3, rate=1e-2)
    run(half, rule.build(group(half.named_parameters())), 3, rate=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_arrives_with_the_step(kind: str) -> None:
    model = tiny()
    before = weights(model)
    optimizer = Rule.model_validate({"kind": kind}).build(group(model.named_parameters()))
    loss_of(model, 0).backward()
    optimizer.step()  # nobody has set a rate
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_learns(kind: str) -> None:
    model = tiny()
    optimizer = Rule.model_validate({"kind": kind}).build(group(model.named_parameters()))
    start = run(model, optimizer, 1)
    assert run(model, optimizer, 60, rate=3e-2) < 0.5 * start


@pytest.mark.parametrize("kind", KINDS)
def test_updates_have_the_masters_type(kind: str) -> None:
    model = tiny().double()
    optimizer = Rule.model_validate({"kind": kind}).build(group(model.named_parameters()))
    run(model, optimizer, 2)
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert kept and {value.dtype for value in kept} == {torch.float64}


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalising_brings_all_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Singular values from 1 down to 1/20: without iterations the smallest would be far from 1.
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(0.05, 1.0, min(shape))) @ right
    result = orthogonalised(matrix, 5, dtype).float()
    values = torch.linalg.svdvals(result)
    assert MUON_SINGULAR_VALUES[0] < values.min() and values.max() < MUON_SINGULAR_VALUES[1]
    assert ((left.T @ result @ right.T).diag() > MUON_SINGULAR_VALUES[0]).all()  # the same directions


def quintic_of_singular_values(matrix: np.ndarray, iterations: int) -> np.ndarray:
    """What the matrix iteration must give: it acts on each singular value alone, as a polynomial in numbers."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("iterations", [1, 5])
def test_orthogonalising_is_the_quintic_of_each_singular_value(shape: tuple[int, int], iterations: int) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    expected = quintic_of_singular_values(matrix, iterations)
    result = orthogonalised(torch.from_numpy(matrix), iterations, torch.bfloat16).numpy()
    assert np.abs(result - expected).max() < FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_published_update(nesterov: bool) -> None:
    random = np.random.default_rng(0)
    weight, gradients = random.normal(size=(4, 7)), [random.normal(size=(4, 7)) for _ in range(3)]
    parameter = nn.Parameter(torch.tensor(weight))
    rule = Muon(nesterov=nesterov, momentum=0.8, weight_decay=0.3)
    optimizer = rule.build(group([("model.layers.0.weight", parameter)]))
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.8 * momentum + 0.2 * gradient
        direction = 0.2 * gradient + 0.8 * momentum if nesterov else momentum
        weight = (1 - 1e-2 * 0.3) * weight
        weight = weight - 1e-2 * 0.2 * np.sqrt(7) * quintic_of_singular_values(direction, 5)
        parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    assert np.abs(parameter.detach().numpy() - weight).max() < FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_muon_orthogonalises_in_bfloat16_where_the_device_multiplies_it(
    asked: Any, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrainer.core.precision.multiplies_bfloat16", lambda device: natively)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        "llmtrainer.optim.rules.muon.orthogonalised", lambda matrix, iterations, dtype: seen.append(dtype) or matrix
    )
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    Muon(orthogonalise_in=asked).build(group([("model.layers.0.weight", parameter)])).step()
    assert seen == [torch.bfloat16 if asked == "bfloat16" or (asked == "auto" and natively) else torch.float32]


def test_orthogonalising_nothing_gives_nothing() -> None:
    assert not orthogonalised(torch.zeros(3, 5), 5, torch.float32).any()


def test_orthogonalising_float64_has_float64s_digits() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 8, dtype=torch.float64)
    scaled = orthogonalised(matrix * (1 + 1e-13), 5, torch.bfloat16)
    torch.testing.assert_close(scaled, orthogonalised(matrix, 5, torch.bfloat16), rtol=0, atol=1e-10)


def muon_of_torch(model: nn.Module, **settings: Any) -> torch.optim.Muon:
    hidden = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    oracle = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **settings)
    oracle.param_groups[0]["rate_multiplier"] = 1.0
    return oracle


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_moves_hidden_matrices_as_torchs_muon_does(nesterov: bool) -> None:
    ours, theirs = tiny(), tiny()
    optimizer = Muon(nesterov=nesterov).build(group(ours.named_parameters()))
    oracle = muon_of_torch(theirs, nesterov=nesterov)
    for step in range(4):
        # The same gradients for both: with each its own, the AdamW part would drive them apart.
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for entry in [*optimizer.param_groups, *oracle.param_groups]:
            entry["lr"] = 1e-2
        optimizer.step()
        oracle.step()
    for name, expected in weights(theirs).items():
        if ".layers." in name and expected.ndim == 2:
            torch.testing.assert_close(
                weights(ours)[name], expected, rtol=0, atol=4 * 1e-2 * RMS * MUON_UPDATE_RELATIVE
            )


def test_muon_moves_everything_else_as_adamw_does() -> None:
    ours, theirs = tiny(), tiny()
    beside = AdamW(betas=(0.7, 0.9), weight_decay=0.2)
    first = Muon(beside=beside).build(group(ours.named_parameters()))
    second = beside.build(group(theirs.named_parameters()))
    for optimizer, model in ((first, ours), (second, theirs)):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for entry in optimizer.param_groups:
                entry["lr"] = 1e-2
            optimizer.step()
    expected = weights(theirs)
    same = {name for name, weight in weights(ours).items() if torch.equal(weight, expected[name])}
    matrices = {name for name, weight in expected.items() if ".layers." in name and weight.ndim == 2}
    assert same == set(expected) - matrices


def test_muons_updates_have_the_size_of_adamws() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(64, 192))
    optimizer = Muon(weight_decay=0.0).build(group([("model.layers.0.weight", parameter)]))
    parameter.grad = torch.randn(64, 192)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(RMS, rel=0.25)


def test_muon_without_a_hidden_matrix_is_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match="no matrix is hidden"):
        Muon(hidden=("*.blocks.*",)).build(group(model.named_parameters()))


def test_muon_says_that_it_needs_whole_matrices() -> None:
    assert AdamW.elementwise and not Muon.elementwise


def test_lion_takes_the_known_step() -> None:
    # Direction: sign(0.9 * -0.2 + 0.1 * 0.5) = -1. Weight: 1 * (1 - 0.1 * 0.1) + 0.1 = 1.09. Then the momentum:
    # 0.99 * -0.2 + 0.01 * 0.5 = -0.193.
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = Lion(betas=(0.9, 0.99), weight_decay=0.1).build(group([("weight", weight)]))
    optimizer.state[weight]["exp_avg"] = torch.full_like(weight, -0.2)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(1.09, rel=1e-15)
    assert float(optimizer.state[weight]["exp_avg"]) == pytest.approx(-0.193, rel=1e-15)


def test_lion_in_several_pieces_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = tiny(), tiny()
    run(whole, Lion().build(group(whole.named_parameters())), 3)
    monkeypatch.setattr("llmtrainer.optim.rules.lion._TOGETHER", 60)
    run(pieces, Lion().build(group(pieces.named_parameters())), 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True))


def test_lion_is_the_papers_program_over_many_steps() -> None:
    random = np.random.default_rng(0)
    weight, gradients = random.normal(size=(5, 4)), [random.normal(size=(5, 4)) for _ in range(8)]
    parameter, momentum = nn.Parameter(torch.tensor(weight)), np.zeros((5, 4))
    optimizer = Lion(betas=(0.8, 0.95), weight_decay=0.3).build(group([("matrix", parameter)]))
    for gradient in gradients:
        weight = weight - 1e-2 * (np.sign(0.8 * momentum + 0.2 * gradient) + 0.3 * weight)
        momentum = 0.95 * momentum + 0.05 * gradient
        parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    assert np.abs(parameter.detach().numpy() - weight).max() < FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("implementation", ["foreach", "plain"])
@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
def test_adafactor_is_the_papers_algorithm(shape: tuple[int, ...], implementation: str) -> None:
    random = np.random.default_rng(0)
    weight, gradients = random.normal(size=shape), [random.normal(size=shape) for _ in range(5)]
    parameter = nn.Parameter(torch.tensor(weight))
    rule = Adafactor.model_validate({"weight_decay": 0.3, "implementation": implementation})
    optimizer = rule.build(group([("tensor", parameter)], [Group(match="*", decay=1.0)]))
    rows, columns, squares = 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        keep = 1.0 - step**-0.8
        if len(shape) == 2:  # algorithm 4
            rows = keep * rows + (1 - keep) * (gradient**2).mean(1, keepdims=True)
            columns = keep * columns + (1 - keep) * (gradient**2).mean(0, keepdims=True)
            squares = rows * columns / np.mean(rows)
        else:  # algorithm 5
            squares = keep * squares + (1 - keep) * gradient**2
        update = gradient / np.sqrt(squares)
        update = update / max(1.0, np.sqrt((update**2).mean()))
        relative = max(1e-3, np.sqrt((weight**2).mean())) * min(0.05, step**-0.5)
        weight = (1 - 0.05 * 0.3) * weight - relative * update
        parameter.grad = torch.tensor(gradient)
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()
    assert np.abs(parameter.detach().numpy() - weight).max() < FLOAT64_GRADIENT_RELATIVE
