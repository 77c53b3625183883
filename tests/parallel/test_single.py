"""The engine of one process: clip, step, skip, save, continue."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.base.part import forget_reads, unread
from llmtrainer.core.arrangement import Arranged, Arrangement
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.protocols import EngineConfig, Rule
from llmtrainer.optim import rules
from llmtrainer.optim.groups import group
from llmtrainer.parallel import device, loss_scale
from llmtrainer.parallel.engines.single import Single, SingleEngine
from tests.tolerances import CLIPPED_NORM_RELATIVE, FLOAT64_GRADIENT_RELATIVE, SCALED_GRADIENT_RELATIVE

KINDS = [module.name for module in pkgutil.iter_modules(rules.__path__)]  # a new file is tested unasked
SETTINGS = [{"kind": kind} for kind in KINDS] + [
    {"kind": "adamw", "implementation": "foreach"},
    {"kind": "adamw", "implementation": "plain"},
    {"kind": "adamw_8bit", "smallest": 1},
    {"kind": "adafactor", "implementation": "foreach"},
]


class TinyPolicy(nn.Module):
    """An embedding, one hidden matrix with a bias, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6)])})
        self.head = nn.Linear(6, 11, bias=False)
        self.to(dtype)

    def forward(self, batch: Batch, wants: tuple[str, ...]) -> Outputs:
        hidden = torch.tanh(self.layers.get_submodule("layers.0")(self.embed(batch.tokens_BT)))
        return Outputs(logp_BT=self.head(hidden).log_softmax(-1).gather(-1, batch.targets_BT[..., None])[..., 0])


def rows(step: int, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (count, 9), generator=generator)
    shape = (count, 8)
    weights = (torch.rand(shape, generator=generator) < 0.7).float()
    sequence = torch.arange(count, dtype=torch.int32)[:, None].expand(shape)
    return Batch(
        tokens_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        weights_BT=weights,
        sequence_BT=sequence,
        document_BT=torch.zeros(shape, dtype=torch.int32),
        position_BT=torch.arange(8).expand(shape).int(),
        place_B=torch.arange(count),
    )


def loss_of(engine: SingleEngine, batch: Batch) -> Tensor:
    out = engine.forward(batch, ("logp",))
    assert out.logp_BT is not None
    return -(batch.weights_BT * out.logp_BT).sum()


def started(rule: dict[str, Any], precision: str = "float32", **engine: Any) -> tuple[SingleEngine, TinyPolicy]:
    policy = TinyPolicy(torch.float64 if precision == "float64" else torch.float32)
    made = Single(device="cpu", **engine).start(precision)
    made.prepare(policy, Rule.model_validate(rule), group(policy.named_parameters()))
    return made, policy


def train(engine: SingleEngine, first: int, last: int, clip: float | None = 0.5) -> list[float]:
    norms = []
    for step in range(first, last):
        engine.backward(loss_of(engine, rows(step)))
        norms.append(float(engine.clip(clip)))
        engine.step(1e-2 / (1 + step))
    return norms


def gradient(policy: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def weights(policy: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Clipping


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "float16", "float64"])
def test_the_norm_is_that_before_clipping_and_the_gradients_end_at_the_limit(precision: str, pieces: int) -> None:
    engine, policy = started({"kind": "adamw"}, precision)
    expected = TinyPolicy(torch.float64)
    for step in range(pieces):
        with engine.micro(last=step == pieces - 1):
            engine.backward(loss_of(engine, rows(step)))
        out = expected(rows(step), ("logp",))
        (-(rows(step).weights_BT * out.logp_BT).sum()).backward()
    norm = engine.clip(0.25)
    assert float(norm) == pytest.approx(float(gradient(expected).norm()), rel=1e-5)
    assert float(norm) > 0.25
    assert float(gradient(policy).double().norm()) == pytest.approx(0.25, rel=CLIPPED_NORM_RELATIVE)


def test_clipping_keeps_the_direction_to_float64s_digits() -> None:
    engine, policy = started({"kind": "adamw"}, "float64")
    engine.backward(loss_of(engine, rows(0)))
    before = gradient(policy)
    engine.clip(0.25)
    expected = before * (0.25 / before.norm())
    assert float((gradient(policy) - expected).abs().max() / expected.abs().max()) < FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize("limit", [None, 1e6])
def test_gradients_within_the_limit_keep_their_bits(limit: float | None) -> None:
    engine, policy = started({"kind": "adamw"})
    engine.backward(loss_of(engine, rows(0)))
    before = gradient(policy)
    engine.clip(limit)
    assert torch.equal(gradient(policy), before)


def test_the_clipped_gradient_is_the_one_that_is_applied() -> None:
    # Adam forgets the size of a gradient, so the proof is its memory of it.
    engine, policy = started({"kind": "adamw"})
    engine.backward(loss_of(engine, rows(0)))
    engine.clip(0.125)
    clipped = policy.head.weight.grad
    assert clipped is not None
    expected = 0.1 * clipped.clone()  # beta1 = 0.9, from zero
    engine.step(1e-3)
    torch.testing.assert_close(engine.state()["optimizer.head.weight.exp_avg"], expected)


def test_large_finite_gradients_have_a_finite_norm() -> None:
    engine, policy = started({"kind": "adamw"})
    engine.backward(policy.head.weight.sum() * 1e30)  # squares would overflow float32
    assert float(engine.clip(1.0)) == pytest.approx(1e30 * math.sqrt(66), rel=1e-6)
    assert float(gradient(policy).double().norm()) == pytest.approx(1.0, rel=CLIPPED_NORM_RELATIVE)


@pytest.mark.parametrize("planted", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_reported_and_not_spread(planted: float) -> None:
    engine, policy = started({"kind": "adamw"})
    engine.backward(loss_of(engine, rows(0)))
    assert policy.head.weight.grad is not None and policy.embed.weight.grad is not None
    policy.head.weight.grad[0, 0] = planted
    before = policy.embed.weight.grad.clone()
    assert not math.isfinite(float(engine.clip(0.25)))
    assert torch.equal(policy.embed.weight.grad, before)
    engine.discard()
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_step_without_clip_is_a_defect() -> None:
    engine, _ = started({"kind": "adamw"})
    engine.backward(loss_of(engine, rows(0)))
    with pytest.raises(AssertionError, match="clip comes first"):
        engine.step(1e-3)
    engine.clip(None)
    with pytest.raises(AssertionError, match="already clipped"):
        engine.clip(None)
    engine.backward(loss_of(engine, rows(1)))  # a new gradient, so the old norm is none of it
    engine.clip(None)
    engine.step(1e-3)
    with pytest.raises(AssertionError, match="clip comes first"):
        engine.step(1e-3)


def test_scaling_the_loss_before_or_the_gradient_after_is_the_same() -> None:
    before, policy = started({"kind": "adamw"})
    targets = float(sum(rows(step).weights_BT.sum() for step in range(3)))
    for step in range(3):
        before.backward(loss_of(before, rows(step)) / targets)
    after, other = started({"kind": "adamw"})
    for step in range(3):
        after.backward(loss_of(after, rows(step)))
    difference = (gradient(policy) - gradient(other) / targets).abs().max()
    assert difference / gradient(policy).abs().max() < 4 * SCALED_GRADIENT_RELATIVE
    assert float(before.clip(None)) == pytest.approx(float(after.clip(None)) / targets, rel=SCALED_GRADIENT_RELATIVE)


# float16


def test_a_planted_inf_skips_the_step_and_halves_the_scale() -> None:
    engine, policy = started({"kind": "adamw"}, "float16")
    train(engine, 0, 2)
    kept, state = weights(policy), copied(engine.state())
    engine.backward(loss_of(engine, rows(2)))
    assert policy.head.weight.grad is not None
    policy.head.weight.grad[3, 1] = math.inf
    engine.clip(1.0)
    assert engine.step(1e-2) is False
    assert equal(kept, weights(policy))
    assert all(parameter.grad is None for parameter in policy.parameters())
    scale, count = engine.state()["engine.loss_scale"], engine.state()["engine.good_updates"]
    assert (float(scale), int(count)) == (float(state["engine.loss_scale"]) / 2, 0)
    unchanged = {name: value for name, value in state.items() if "engine" not in name}
    assert equal(unchanged, {name: value for name, value in engine.state().items() if "engine" not in name})
    assert train(engine, 2, 3) and not equal(kept, weights(policy))  # and it goes on


def test_the_loss_scale_leaves_no_trace_in_float32_gradients() -> None:
    # A power of two moves exponents only: gradients, norm and weights keep every bit.
    scaled, policy = started({"kind": "adamw"}, "float16")
    plain, other = started({"kind": "adamw"}, "float32")
    assert train(scaled, 0, 4) == train(plain, 0, 4)
    assert equal(weights(policy), weights(other))


def test_the_scale_doubles_after_enough_good_updates_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    engine, _ = started({"kind": "adamw"}, "float16")
    scales = []
    for step in range(7):
        train(engine, step, step + 1)
        scales.append(float(engine.state()["engine.loss_scale"]) / 2.0**16)
    assert scales == [1, 1, 2, 2, 2, 4, 4]


def test_at_a_scale_of_one_a_bad_gradient_is_no_overflow_but_an_error() -> None:
    scale = loss_scale.LossScale(scale=2.0)
    scale.overflowed()
    with pytest.raises(UserError, match="even with a loss scale of 1"):
        scale.overflowed()


def test_the_scale_stops_growing_where_float16_has_no_use_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 1)
    scale = loss_scale.LossScale(scale=loss_scale.LARGEST / 2)
    for _ in range(3):
        scale.updated()
    assert scale.scale == loss_scale.LARGEST


def test_the_scale_and_its_count_continue_where_they_were() -> None:
    old = loss_scale.LossScale()
    old.overflowed()
    old.updated()
    new = loss_scale.LossScale()
    new.load_state(old.state())
    assert new == old == loss_scale.LossScale(scale=2.0**15, good_updates=1)


def test_only_float16_rescales() -> None:
    assert [started({"kind": "adamw"}, precision)[0].rescales for precision in ("float16", "bfloat16", "float32")] == [
        True,
        False,
        False,
    ]


# Saving and continuing


@pytest.mark.parametrize("precision", ["float32", "float16", "float64"])
@pytest.mark.parametrize("rule", SETTINGS, ids=str)
def test_a_continued_run_has_the_same_bits(rule: dict[str, Any], precision: str) -> None:
    if rule["kind"] == "muon":
        rule = {**rule, "hidden": ["layers.*"]}
    whole, policy = started(rule, precision)
    train(whole, 0, 3)
    kept, state = weights(policy), copied(whole.state())
    norms = train(whole, 3, 6)

    continued, other = started(rule, precision)
    train(continued, 7, 9)  # leave something to overwrite
    other.load_state_dict(kept)
    continued.load_state(state)
    assert equal(state, continued.state())
    assert train(continued, 3, 6) == norms
    assert equal(weights(policy), weights(other))
    assert equal(whole.state(), continued.state())


def test_state_names_its_tensors_by_parameter() -> None:
    engine, _ = started({"kind": "adamw"})
    train(engine, 0, 1)
    names = ["embed.weight", "layers.layers.0.weight", "layers.layers.0.bias", "head.weight"]
    kept = ["exp_avg", "exp_avg_sq", "step"]
    expected = {f"optimizer.{name}.{what}" for name in names for what in kept}
    assert engine.state().keys() == expected | {"engine.updates"}


def test_loaded_state_is_a_copy() -> None:
    engine, _ = started({"kind": "adamw"})
    train(engine, 0, 2)
    state = copied(engine.state())
    given = copied(state)
    engine.load_state(given)
    train(engine, 2, 3)
    assert equal(given, state)


def test_a_state_from_before_the_first_step_loads_as_a_fresh_start() -> None:
    fresh, policy = started({"kind": "adamw"})
    state = copied(fresh.state())
    assert state.keys() == {"engine.updates"}
    used, other = started({"kind": "adamw"})
    train(used, 0, 2)
    other.load_state_dict(policy.state_dict())
    used.load_state(state)
    assert train(used, 0, 2) == train(fresh, 0, 2)
    assert equal(weights(policy), weights(other))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("optimizer.head.weight.exp_avg"), "lacks 1 tensor"),
        (lambda state: [state.pop(name) for name in list(state) if "optimizer" in name], "lacks 12 tensors"),
        (
            lambda state: state.update({"optimizer.other.weight.exp_avg": torch.zeros(2)}),
            "no place for, 1 tensor",
        ),
        (
            lambda state: state.update({"optimizer.head.weight.momentum": torch.zeros(2)}),
            "no place for, 1 tensor",
        ),
        (
            lambda state: state.update({"optimizer.head.weight.exp_avg": torch.zeros(6, 11)}),
            "in another form 1",
        ),
        (
            lambda state: state.update({"optimizer.head.weight.exp_avg": torch.zeros(11, 6).half()}),
            "in another form 1",
        ),
        (lambda state: state.update({"optimizer.head.weight.step": torch.zeros(1)}), "in another form 1"),
        (lambda state: state.pop("engine.updates"), "not this engine's"),
        (lambda state: state.update({"engine.loss_scale": torch.ones(())}), "not this engine's"),
        (lambda state: state.update({"engine.updates": torch.tensor(0)}), "says that it holds none"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_and_changes_nothing(change: Any, said: str) -> None:
    engine, _ = started({"kind": "adamw"})
    train(engine, 0, 2)
    state, before = copied(engine.state()), copied(engine.state())
    change(state)
    with pytest.raises(UserError, match=said):
        engine.load_state(state)
    assert equal(before, engine.state())


def test_a_state_of_another_rule_is_refused() -> None:
    adamw, _ = started({"kind": "adamw"})
    train(adamw, 0, 1)
    muon, _ = started({"kind": "muon", "hidden": ["layers.*"]})
    with pytest.raises(UserError, match=r"lacks 1 tensor\b") as caught:
        muon.load_state(adamw.state())
    assert caught.value.where == "optimizer.layers.layers.0.weight.momentum_buffer"


def test_a_parameter_that_never_had_a_gradient_is_no_gap() -> None:
    def with_spare() -> tuple[SingleEngine, TinyPolicy]:
        policy = TinyPolicy()
        policy.spare = nn.Parameter(torch.ones(3, 3))
        engine = Single(device="cpu").start("float32")
        engine.prepare(policy, Rule.model_validate({}), group(policy.named_parameters()))
        return engine, policy

    whole, policy = with_spare()
    train(whole, 0, 2)
    state, kept = copied(whole.state()), weights(policy)
    continued, other = with_spare()
    continued.backward(other.spare.sum())  # here it had one, and must forget it
    continued.clip(None)
    continued.step(1e-3)
    other.load_state_dict(kept)
    continued.load_state(state)
    assert equal(state, continued.state())
    assert train(whole, 2, 4) == train(continued, 2, 4)


# The rest of the seam


def test_the_rate_of_each_group_is_the_given_one_times_its_own() -> None:
    policy = TinyPolicy()
    engine = Single(device="cpu").start("float32")
    groups = group(policy.named_parameters())
    groups[0]["rate_multiplier"] = 0.0
    engine.prepare(policy, Rule.model_validate({}), groups)
    before = weights(policy)
    train(engine, 0, 1)
    moved = {name for name, weight in weights(policy).items() if not torch.equal(weight, before[name])}
    assert moved == {"layers.layers.0.bias"}


def test_gradients_accumulate_until_the_step_and_are_gone_after_it() -> None:
    engine, policy = started({"kind": "adamw"})
    engine.backward(loss_of(engine, rows(0)))
    one = gradient(policy)
    engine.backward(loss_of(engine, rows(0)))
    torch.testing.assert_close(gradient(policy), 2 * one)
    engine.clip(None)
    assert engine.step(1e-3) is True
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_one_process_sums_to_itself() -> None:
    engine, _ = started({"kind": "adamw"})
    assert (engine.rank, engine.world_size, engine.sum({"tokens": 3})) == (0, 1, {"tokens": 3.0})


def test_float32_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        started({"kind": "adamw"}, "float32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_are_set_when_asked_for() -> None:
    wanted = torch.get_num_threads() + 1
    Single(threads=wanted).start("float32")
    assert torch.get_num_threads() == wanted


@pytest.mark.parametrize("device", ["nonsense", "cuda:63", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError) as caught:
        Single(device=device).start("float32")
    assert caught.value.fix == "engine.device=auto"


def test_compiling_without_a_compiler_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        Single(device="cpu", compile=True).start("float32")
    Single(device="cpu").start("float32")


def test_compile_goes_through_torch_and_keeps_the_parameters_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/c++")
    engine, policy = started({"kind": "adamw"}, compile=True)
    train(engine, 0, 1)
    assert compiled == [policy] and "optimizer.head.weight.exp_avg" in engine.state()


def test_the_kind_of_an_engine_is_its_file() -> None:
    assert type(EngineConfig.model_validate({"kind": "single", "threads": 2})) is Single


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"attention": "sdpa"}, "attention"),
        ({"kernels": "torch"}, "kernels"),
        ({"recompute_every": 2}, "recompute_every"),
    ],
)
def test_a_policy_that_does_not_choose_how_it_computes_is_refused_by_the_settings_name(
    setting: dict[str, Any], name: str
) -> None:
    with pytest.raises(UserError, match=f"TinyPolicy .* engine.{name}"):
        started({"kind": "adamw"}, **setting)


def test_the_policy_is_asked_for_what_the_recipe_says_on_the_device() -> None:
    class Choosing(TinyPolicy):
        def arrange(self, asked: Arrangement) -> Arranged:
            self.asked = asked
            return Arranged({"attention": "sdpa"}, ("said once",))

    policy = Choosing()
    config = Single(device="cpu", attention="flex", fallback=True, recompute_every=3, recompute="mlp")
    told = config.start("float32").prepare(policy, Rule.model_validate({}), group(policy.named_parameters()))
    assert policy.asked == Arrangement("flex", "auto", True, 3, "mlp")
    assert told == Arranged({"attention": "sdpa"}, ("said once",))
    assert unread(config) == []


@pytest.mark.parametrize("idle", ["recompute", "fallback"])
def test_a_setting_that_means_nothing_alone_stays_unread(idle: str) -> None:
    config = Single.model_validate({"device": "cpu", "recompute": "mlp", "fallback": True} | (
        {"attention": "flex"} if idle == "recompute" else {"recompute_every": 1}
    ))
    forget_reads(config)
    config.start("float32")
    assert unread(config) == [idle]


def test_graphs_that_cannot_run_are_refused_by_name_or_left_out_and_told() -> None:
    with pytest.raises(UserError, match="CUDA graphs cannot run here") as caught:
        Single(device="cpu", cuda_graphs=True).start("float32")
    assert caught.value.where == "engine.cuda_graphs" and "cpu" in (caught.value.why or "")
    engine = Single(device="cpu", cuda_graphs=True, fallback=True).start("float32")
    policy = TinyPolicy()
    told = engine.prepare(policy, Rule.model_validate({"kind": "adamw"}), group(policy.named_parameters())).fallbacks
    assert told == ("the model runs without CUDA graphs: the device is cpu",)


def test_with_graphs_the_policy_is_asked_to_be_recorded_once_it_is_arranged() -> None:
    """With a fake: graphs need a card."""
    asked: list[str] = []

    class Recorded(TinyPolicy):
        def arrange(self, given: Arrangement) -> Arranged:
            asked.append("arrange")
            return Arranged()

        def record(self, recorder: Any) -> tuple[str, ...]:
            asked.append(type(recorder).__name__)
            return ("said of graphs",)

    rule = Rule.model_validate({"kind": "adamw"})
    for policy in (Recorded(), TinyPolicy()):
        engine = SingleEngine(torch.device("cpu"), "float32", cuda_graphs=True)
        if isinstance(policy, Recorded):
            assert engine.prepare(policy, rule, group(policy.named_parameters())).fallbacks == ("said of graphs",)
        else:
            with pytest.raises(UserError, match="TinyPolicy cannot be recorded"):
                engine.prepare(policy, rule, group(policy.named_parameters()))
    assert asked == ["arrange", "Graphs"]


def test_deterministic_kernels_are_asked_for_as_long_as_the_engine_is_open() -> None:
    engine = Single(device="cpu", deterministic=True).start("float32")
    assert torch.are_deterministic_algorithms_enabled()
    engine.close()
    assert not torch.are_deterministic_algorithms_enabled()
    Single(device="cpu").start("float32").close()
    assert not torch.are_deterministic_algorithms_enabled()
