"""Hooks: what optimizers see is what the formula says, with several buckets, in two processes and three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.base.config import Kind
from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import EngineConfig
from llmtrainer.core.randomness import derive
from llmtrainer.parallel.hook import Bucket, Hook
from llmtrainer.parallel.hooks.bf16 import Bf16
from llmtrainer.parallel.hooks.powersgd import Powersgd
from llmtrainer.parallel.link import Link
from llmtrainer.parallel.low_rank import Choice, orthogonal
from tests.parallel import hooked
from tests.parallel.hooked import SHAPES, gradients
from tests.processes import Processes, processes  # noqa: F401  a fixture
from tests.tolerances import FLOAT32_SUM_RELATIVE, FLOAT64_GRADIENT_RELATIVE, FLOAT64_SENT_TOTAL

SMALL = {"kind": "powersgd", "rank": 2, "min_compression": 1.0, "start_step": 2}
COMPRESSED = {"first", "cube", "second", "narrow"}
STEPS = 6


def apart(found: Tensor, expected: Any) -> float:
    """Relative to the largest number."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def by_formula(ranks: int, steps: int, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Vogels 2019, algorithms 1 and 2, in numpy: what each step sees, and the error of each rank behind it."""
    error = {(name, rank): 0.0 for name in COMPRESSED for rank in range(ranks)}
    q: dict[str, Any] = {}
    seen, left = [], []
    for step in range(steps):
        given = [{name: value.numpy() for name, value in gradients(step, rank).items()} for rank in range(ranks)]
        sums = {name: sum(each[name] for each in given) for name in SHAPES}
        for name in COMPRESSED if step >= settings["start_step"] else ():
            shape = SHAPES[name]
            whole = [(given[rank][name] + error[name, rank]).reshape(shape[0], -1) for rank in range(ranks)]
            purpose = (name, step) if settings.get("q") == "fresh" else (name,)
            draw = torch.Generator().manual_seed(derive(0, "powersgd", *purpose))
            noise = torch.randn(whole[0].shape[1], settings["rank"], generator=draw, dtype=torch.float64).numpy()
            begin = np.linalg.qr(q.get(name, noise))[0]
            p = np.linalg.qr(sum(matrix @ begin for matrix in whole))[0]
            factor = sum(matrix.T @ p for matrix in whole)
            if settings.get("q", "warm") == "warm":
                q[name] = factor
            sums[name] = (p @ factor.T).reshape(shape)
            for rank in range(ranks):
                error[name, rank] = (whole[rank] - p @ factor.T / ranks).reshape(shape)
        seen.append(sums)
        left.append({(name, rank): value for (name, rank), value in error.items()})
    return seen, left


@pytest.mark.parametrize("q", ["warm", "fixed", "fresh"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_powersgd_is_the_formula_in_every_step_and_keeps_what_it_left_out(
    ranks: int, q: str, processes: Processes  # noqa: F811
) -> None:
    settings = {**SMALL, "q": q}
    found = processes.run(ranks, hooked.exchanged, settings, STEPS)
    seen, left = by_formula(ranks, STEPS, settings)
    for rank, told in enumerate(found):
        assert told["buckets"] > 2 * STEPS
        for step in range(STEPS):
            for name in SHAPES:
                assert apart(told["seen"][step][name], seen[step][name]) <= FLOAT64_GRADIENT_RELATIVE, (rank, name)
    for step in range(SMALL["start_step"], STEPS):  # type: ignore[call-overload]
        for (name, rank), error in left[step].items():
            kept = found[0]["remembered"][step][f"engine.hook.rank{rank}.error.{name}"]
            assert apart(kept, error) <= FLOAT64_GRADIENT_RELATIVE, (rank, name)


def test_powersgd_says_its_first_steps_whole_and_sends_as_many_bytes_as_the_formula_has(
    processes: Processes,  # noqa: F811
) -> None:
    (found, _) = processes.run(2, hooked.exchanged, SMALL, 3)
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    for step in range(2):
        for name, value in found["seen"][step].items():
            assert torch.equal(value, gradients(step, 0)[name] + gradients(step, 1)[name])
        assert found["sent"][step] == {"hook/mib_sent": sum(sizes.values()) * 8 / 2**20, "hook/compression": 1.0}
    factors = sum(2 * (SHAPES[name][0] + sizes[name] // SHAPES[name][0]) for name in COMPRESSED)
    numbers = factors + sum(sizes[name] for name in SHAPES if name not in COMPRESSED)
    assert found["sent"][2]["hook/mib_sent"] == numbers * 8 / 2**20
    assert found["sent"][2]["hook/compression"] == pytest.approx(sum(sizes.values()) / numbers, rel=1e-12)


def test_what_fifty_steps_saw_and_the_errors_behind_them_are_the_sum_of_all_gradients(
    processes: Processes,  # noqa: F811
) -> None:
    found = processes.run(2, hooked.exchanged, {**SMALL, "rank": 1, "start_step": 0}, 50)
    for name in COMPRESSED:
        given = sum(gradients(step, rank)[name] for step in range(50) for rank in range(2))
        seen = sum(step[name] for step in found[0]["seen"])
        left = sum(found[0]["remembered"][-1][f"engine.hook.rank{rank}.error.{name}"] for rank in range(2))
        assert apart(seen + left, given) <= FLOAT64_SENT_TOTAL
        assert apart(seen, given) > 0.1, "the errors matter"


def test_full_rank_is_the_sum_and_a_matrix_of_rank_one_needs_no_more(processes: Processes) -> None:  # noqa: F811
    full = {**SMALL, "rank": 100, "min_compression": 0.1, "start_step": 0}
    (found, _) = processes.run(2, hooked.exchanged, full, 2, "float32")
    for step, seen in enumerate(found["seen"]):
        for name, value in seen.items():
            wanted = sum(gradients(step, rank, dtype=torch.float32)[name] for rank in range(2))
            assert apart(value, wanted) <= FLOAT32_SUM_RELATIVE
    (one, _) = processes.run(2, hooked.outer, {**SMALL, "rank": 1, "start_step": 0})
    assert apart(one["found"], one["wanted"]) <= FLOAT64_GRADIENT_RELATIVE


def test_errors_in_the_gradients_place_are_the_same_bits_as_beside_it(processes: Processes) -> None:  # noqa: F811
    beside = processes.run(2, hooked.exchanged, SMALL, STEPS)
    within = processes.run(2, hooked.exchanged, {**SMALL, "error_in_gradient": True}, STEPS)
    for one, other in zip(beside, within, strict=True):
        for before, after in zip(one["seen"] + one["remembered"], other["seen"] + other["remembered"], strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    pieces = processes.run(2, hooked.exchanged, {**SMALL, "error_in_gradient": True}, STEPS, "float64", 3)
    for name, value in pieces[0]["seen"][-1].items():
        assert apart(value, beside[0]["seen"][-1][name]) <= FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize(
    "hook", [
        SMALL, {**SMALL, "error_in_gradient": True}, {"kind": "bf16"},
        {"kind": "chain", "of": [{"kind": "fp16"}, {**SMALL, "q": "fixed"}]},
    ], ids=["beside", "within", "bf16", "chain"],
)  # fmt: skip
def test_a_run_that_was_saved_and_went_on_has_the_same_bits(
    hook: dict[str, Any], processes: Processes, tmp_path: Path  # noqa: F811
) -> None:
    for whole, again in processes.run(2, hooked.continued, hook, 4, 3, str(tmp_path / "state.safetensors")):
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_with_another_number_of_ranks_the_errors_together_stay_what_they_were(
    processes: Processes, tmp_path: Path  # noqa: F811
) -> None:
    file = str(tmp_path / "state.safetensors")
    before = processes.run(2, hooked.saved, SMALL, 4, file)[0]
    after = processes.run(3, hooked.loaded, SMALL, file)[0]
    for name in COMPRESSED:
        totals = [
            sum(state[f"engine.hook.rank{rank}.error.{name}"] for rank in range(ranks))
            for ranks, state in ((2, before), (3, after))
        ]
        assert apart(totals[1], totals[0]) <= FLOAT64_GRADIENT_RELATIVE


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits_are_cast_then_added_and_the_sums_have_their_own_type(
    kind: str, dtype: torch.dtype, processes: Processes  # noqa: F811
) -> None:
    found = processes.run(2, hooked.exchanged, {"kind": kind}, 2, "float32")
    for told in found:
        for step, seen in enumerate(told["seen"]):
            for name, value in seen.items():
                one, two = (gradients(step, rank, dtype=torch.float32)[name].to(dtype) for rank in range(2))
                assert value.dtype == torch.float32
                assert torch.equal(value, (one + two).float())
        assert told["sent"][-1]["hook/compression"] == 2.0


def test_hooks_of_a_chain_compose(processes: Processes) -> None:  # noqa: F811
    chain = {"kind": "chain", "of": [SMALL, {"kind": "bf16"}]}
    found = processes.run(2, hooked.exchanged, chain, 4)
    alone = processes.run(2, hooked.exchanged, SMALL, 4)
    assert found[0]["sent"][-1]["hook/mib_sent"] == alone[0]["sent"][-1]["hook/mib_sent"] / 4      # float64 here
    for name, value in found[0]["seen"][2].items():
        assert 0.0 < apart(value, alone[0]["seen"][2][name]) < 0.05
        assert torch.equal(value, found[1]["seen"][2][name])


def test_a_hook_by_dotted_name_halves_the_gradients_and_sees_every_number_once(
    processes: Processes,  # noqa: F811
) -> None:
    for kind, wanted in (("Halved", lambda sums: sums / 2), ("Counted", lambda sums: sums + 1.0)):
        (found, _) = processes.run(2, hooked.exchanged, {"kind": f"tests.parallel.hooked.{kind}"}, 3)
        for step, seen in enumerate(found["seen"]):
            for name, value in seen.items():
                assert torch.equal(value, wanted(gradients(step, 0)[name] + gradients(step, 1)[name]))


def test_an_error_in_a_hook_is_told_as_itself(processes: Processes) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="the third wheel"):
        processes.run(2, hooked.exchanged, {"kind": "tests.parallel.hooked.Broken"}, 1)


def test_an_overflow_skips_the_step_and_spoils_no_memory(processes: Processes) -> None:  # noqa: F811
    for told in processes.run(2, hooked.overflowed, {**SMALL, "start_step": 0}):
        assert told["updated"] == [True, False, True]
        assert all(bool(value.isfinite().all()) for value in told["state"].values())
        # The scale was halved meanwhile, and what was kept is of gradients without it.
        assert apart(told["total"], told["wanted"]) <= FLOAT32_SUM_RELATIVE


def test_what_a_backend_cannot_add_is_sent_as_it_is_and_said_once() -> None:
    class Plain(Link):
        def takes(self, dtype: torch.dtype) -> bool:
            return False

    exchange = Bf16().start(Plain(torch.device("cpu"), None, 2))
    (told,) = exchange.fallbacks
    assert "bfloat16" in told
    buffer = torch.tensor([1.0, 1.0 + 2.0**-20])
    exchange(Bucket(buffer.clone(), ("x",), (buffer,)), lambda sent: None)
    sent: list[Tensor] = []
    exchange(Bucket(buffer, ("x",), (buffer,)), lambda bucket: sent.append(bucket.buffer.clone()))
    assert torch.equal(sent[0], torch.tensor([1.0, 1.0 + 2.0**-20]))


@pytest.mark.parametrize(
    ("shape", "rate"), [
        ((2048, 2048), 32.0), ((2048, 1024), 21.33), ((5632, 2048), 46.93), ((64320, 2048), None), ((4096,), None),
        ((64, 64), None), ((2048, 32, 32), 21.33),
    ],
)  # fmt: skip
def test_what_is_compressed_and_how_much(shape: tuple[int, ...], rate: float | None) -> None:
    chosen = Powersgd()
    rank = Choice(chosen.rank, chosen.min_compression, chosen.largest_side).rank_of(shape)
    columns = torch.Size(shape[1:]).numel()
    assert (rank == 0) == (rate is None)
    if rate is not None:
        assert shape[0] * columns / (rank * (shape[0] + columns)) == pytest.approx(rate, abs=5e-3)


def test_columns_of_zeros_become_a_basis_to_begin_from() -> None:
    found = orthogonal(torch.zeros(5, 2, dtype=torch.float64))
    assert torch.allclose(found.T @ found, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "precision", "early", "key"), [
        ({"error_in_gradient": True, "error_feedback": False}, "float32", False, "error_feedback=true"),
        ({"error_in_gradient": True}, "float16", False, "error_in_gradient=false"),
        ({"error_in_gradient": True}, "float32", True, "step_in_backward=false"),
    ],
)  # fmt: skip
def test_what_a_hook_cannot_do_is_refused_in_a_chain_too(
    settings: dict[str, Any], precision: str, early: bool, key: str
) -> None:
    chain = Hook.model_validate({"kind": "chain", "of": [{"kind": "powersgd", **settings}]})
    with pytest.raises(UserError, match=key):
        chain.require(precision, early)


def test_an_engine_takes_its_hook_by_name_and_dumps_it() -> None:
    engine = EngineConfig.model_validate({"kind": "ddp", "hook": {"kind": "chain", "of": [{"kind": "bf16"}]}})
    again = EngineConfig.model_validate(engine.plain())
    assert engine == again
    assert isinstance(engine, Kind)
