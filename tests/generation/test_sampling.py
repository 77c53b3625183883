"""From logits to the next token, against formulas and against transformers."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.generation.sampling import (
    Sampling,
    choose,
    distribution,
    draw,
    greedy,
    penalised,
    suppressed,
    uniform,
)
from tests.tolerances import FLOAT64_PROBABILITY

DRAWS = 20_000
OCCURRED = torch.tensor([[2, 0, 1, 0, 0, 3, 1, 0]], dtype=torch.int32)
"""How often each id of LOGITS occurred; ids 5 and 6 have negative logits."""
LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, -20.0]], dtype=torch.float64)
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=3.0),
    Sampling(top_k=3),
    Sampling(top_p=0.7),
    Sampling(temperature=1.5, top_k=5, top_p=0.9),
    Sampling(min_p=0.2),
    Sampling(temperature=2.0, top_k=6, top_p=0.95, min_p=0.4),
    Sampling(repetition_penalty=1.5),
    Sampling(presence_penalty=0.9),
    Sampling(frequency_penalty=0.4),
    Sampling(repetition_penalty=1.2, presence_penalty=-0.3, frequency_penalty=0.2, temperature=0.7, top_p=0.8),
    Sampling(suppress=(0, 3)),
    Sampling(temperature=0.8, top_k=3, suppress=(0,)),
]


def by_hand(logits: Tensor, sampling: Sampling) -> numpy.ndarray:
    """The definition, one number after the other."""
    weights = {}
    for number, (value, times) in enumerate(zip(logits.tolist(), OCCURRED[0].tolist(), strict=True)):
        if times:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
            value -= sampling.presence_penalty
        value -= sampling.frequency_penalty * times
        if number not in sampling.suppress:
            weights[number] = math.exp(value / sampling.temperature)
    ordered = sorted(weights, key=lambda number: -weights[number])
    ordered = ordered[: sampling.top_k or None]
    total = sum(weights[number] for number in ordered)
    kept, mass = [], 0.0
    for number in ordered:
        if mass >= sampling.top_p:
            break
        kept.append(number)
        mass += weights[number] / total
    kept = [number for number in kept if weights[number] >= sampling.min_p * weights[kept[0]]]
    probability = numpy.zeros(len(logits))
    probability[kept] = [weights[number] for number in kept]
    return probability / probability.sum()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_twenty_thousand_draws_follow_the_analytic_distribution(sampling: Sampling) -> None:
    expected = by_hand(LOGITS[0], sampling)
    uniform_B = torch.tensor([uniform(7, row, 0) for row in range(DRAWS)], dtype=torch.float64)
    logits_BV = penalised(LOGITS, sampling, OCCURRED).expand(DRAWS, -1)
    drawn, logprob_B = choose(logits_BV, sampling, uniform_B)
    assert logprob_B.numpy() == pytest.approx(numpy.log(expected[drawn.numpy()]), abs=FLOAT64_PROBABILITY)
    observed = torch.bincount(drawn, minlength=LOGITS.shape[1]).numpy()
    assert not observed[expected == 0].any()
    # Cells that expect fewer than five draws say nothing in a chi-square; they are one cell together.
    large = expected * DRAWS >= 5
    cells = [*zip(observed[large], expected[large] * DRAWS, strict=True)]
    if (rest := expected[~large].sum() * DRAWS) > 0:
        cells.append((observed[~large].sum(), rest))
    seen, wanted = zip(*cells, strict=True)
    assert stats.chisquare(seen, numpy.array(wanted) * sum(seen) / sum(wanted)).pvalue > 0.001


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_distribution_is_the_definition(sampling: Sampling) -> None:
    logits_BV = penalised(LOGITS, sampling, OCCURRED)
    found = distribution(suppressed(logits_BV, sampling.suppress), sampling)[0]
    assert numpy.abs(found.numpy() - by_hand(LOGITS[0], sampling)).max() < FLOAT64_PROBABILITY


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 10, 1.0), (1.0, 0, 0.8), (1.3, 20, 0.6)]
)
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    theirs_BV = process.TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k:
        theirs_BV = process.TopKLogitsWarper(top_k)(None, theirs_BV)
    if top_p < 1:
        theirs_BV = process.TopPLogitsWarper(top_p)(None, theirs_BV)
    ours_BV = distribution(logits_BV, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert (ours_BV - theirs_BV.softmax(1)).abs().max() < FLOAT64_PROBABILITY


@pytest.mark.parametrize("factor", [1.3, 0.8])
def test_the_order_of_penalties_and_filters_is_that_of_transformers(factor: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    random = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(6, 50, generator=random, dtype=torch.float64) * 3
    ids_BT = torch.randint(0, 50, (6, 12), generator=random)
    chain = process.LogitsProcessorList(
        [
            process.RepetitionPenaltyLogitsProcessor(factor),
            process.SuppressTokensLogitsProcessor([4, 5]),
            process.TemperatureLogitsWarper(1.4),
            process.TopKLogitsWarper(25),
            process.TopPLogitsWarper(0.9),
            process.MinPLogitsWarper(0.1),
        ]
    )
    sampling = Sampling(
        repetition_penalty=factor, suppress=(4, 5), temperature=1.4, top_k=25, top_p=0.9, min_p=0.1
    )
    count_BV = torch.stack([torch.bincount(ids_T, minlength=50) for ids_T in ids_BT])
    ours_BV = distribution(suppressed(penalised(logits_BV, sampling, count_BV), sampling.suppress), sampling)
    assert (ours_BV - chain(ids_BT, logits_BV).softmax(1)).abs().max() < FLOAT64_PROBABILITY


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_with_equal_logits_keeps_the_fewest_lowest_ids(top_p: float) -> None:
    # Logits from bfloat16 are often equal; 0.9 needs more ids than are put in order first.
    logits_BV = torch.randn(3, 5_000, generator=torch.Generator().manual_seed(2)).bfloat16().double()
    found = distribution(logits_BV, Sampling(top_p=top_p)) > 0
    for row, logits_V in zip(found, logits_BV.numpy(), strict=True):
        weights = numpy.exp(logits_V) / numpy.exp(logits_V).sum()
        ordered = numpy.argsort(-logits_V, kind="stable")
        before = numpy.cumsum(weights[ordered]) - weights[ordered]
        assert row.nonzero()[:, 0].tolist() == sorted(ordered[before < top_p].tolist())


@pytest.mark.parametrize("V", [64, 1000, 1024])
def test_draws_from_many_ids_are_where_the_running_sum_says(V: int) -> None:
    random = torch.Generator().manual_seed(V)
    probability_BV = torch.rand(500, V, generator=random, dtype=torch.float64)
    probability_BV[probability_BV < 0.6] = 0.0
    probability_BV /= probability_BV.sum(1, keepdim=True)
    uniform_B = torch.rand(500, generator=random, dtype=torch.float64)
    uniform_B[:2] = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    running = numpy.cumsum(probability_BV.numpy(), axis=1)
    numbers = uniform_B.tolist()
    expected = [int(numpy.searchsorted(row, one, side="right")) for row, one in zip(running, numbers, strict=True)]
    expected[1] = int(probability_BV[1].nonzero()[-1])
    assert draw(probability_BV, uniform_B).tolist() == expected
    # In float32 the sums are rounded, and a draw may land beside it, but never on what is impossible.
    narrow = draw(probability_BV.float(), uniform_B)
    assert (probability_BV.gather(1, narrow[:, None]) > 0).all()


def test_temperature_zero_is_greedy_and_takes_the_lowest_of_equal_ids() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, 5.0, 1.0], [3.0, 1.0, 2.0, 3.0], [-9.0, -8.0, -8.5, -9.0]])
    sampling = Sampling(temperature=0.0)
    assert greedy(logits_BV).tolist() == [1, 0, 1]
    for number in (0.0, 0.5, 0.999):
        assert choose(logits_BV, sampling, torch.full((3,), number))[0].tolist() == [1, 0, 1]
    assert distribution(logits_BV, sampling).argmax(1).tolist() == [1, 0, 1]
    assert distribution(logits_BV, sampling).sum(1).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_give_numbers(temperature: float) -> None:
    probability_BV = distribution(torch.tensor([[3e4, 2e4, -3e4]]), Sampling(temperature=temperature))
    expected = [1.0, 0.0, 0.0] if temperature < 1 else [1 / 3] * 3
    assert probability_BV[0].tolist() == pytest.approx(expected)


def test_padding_rows_of_the_vocabulary_and_suppressed_ids_are_never_chosen() -> None:
    # 64 rows of which 50 are tokens; the padding rows are the most likely ones by far.
    logits_BV = torch.zeros(10_000, 64)
    logits_BV[:, 50:] = 30.0
    uniform_B = torch.tensor([uniform(1, row, 3) for row in range(10_000)], dtype=torch.float64)
    drawn, _ = choose(logits_BV, Sampling(suppress=(7,)), uniform_B, vocabulary=50)
    assert set(drawn.tolist()) == set(range(50)) - {7}
    drawn, _ = choose(logits_BV, Sampling(temperature=0.0, suppress=(0,)), uniform_B, vocabulary=50)
    assert drawn.unique().tolist() == [1]
    assert logits_BV[0, 50:].tolist() == [30.0] * 14  # the caller's logits stay as they are


def test_a_draw_never_lands_on_an_impossible_id_at_either_end() -> None:
    probability_BV = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number, expected in ((0.0, 1), (0.49999, 1), (0.5, 3), (1.0 - 2.0**-53, 3)):
        assert draw(probability_BV, torch.tensor([number], dtype=torch.float64)).tolist() == [expected]
    # Float32 softmax rows sum to a little less than 1, and a number may fall into the gap.
    short_BV = torch.tensor([[0.0, 0.5, 0.49, 0.0]])
    assert draw(short_BV, torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)).tolist() == [2]


def test_equal_logits_at_the_border_of_top_k_stay_together() -> None:
    probability_BV = distribution(torch.tensor([[1.0, 0.0, 0.0, -1.0]]), Sampling(top_k=2))
    assert (probability_BV > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("top_p", [1e-9, 0.3])
def test_top_p_always_keeps_the_most_likely_id(top_p: float) -> None:
    assert distribution(LOGITS, Sampling(top_p=top_p)).argmax() == 0
    assert (distribution(LOGITS, Sampling(top_p=top_p)) > 0).sum() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits_BV = torch.zeros(2, 4)
    logits_BV[1, 2] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="no number for the next token"):
            choose(logits_BV, Sampling(temperature=temperature), torch.zeros(2))
    with pytest.raises(UserError, match="no number for the next token"):
        choose(torch.zeros(1, 2), Sampling(suppress=(0, 1)), torch.zeros(1))


def test_suppressing_an_id_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="suppress names id 9"):
        choose(torch.zeros(1, 9), Sampling(suppress=(9,)), torch.zeros(1))


def test_uniform_numbers_are_uniform_and_a_function_of_seed_row_and_position() -> None:
    numbers = [uniform(3, row, position) for row in range(100) for position in range(100)]
    assert stats.kstest(numbers, "uniform").pvalue > 0.001
    assert min(numbers) >= 0.0 and max(numbers) < 1.0
    assert uniform(3, 1, 2) == uniform(3, 1, 2)
    assert len({uniform(*place) for place in ((3, 1, 2), (3, 2, 1), (4, 1, 2), (3, 12, 0), (3, 1, 20))}) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"stop": ("",)},
    ],
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((UserError, ValidationError)):
        Sampling.model_validate(wrong)


def test_a_temperature_that_rounds_to_0_is_0_and_penalties_stay_numbers() -> None:
    logits_BV = LOGITS.float()
    expected = distribution(logits_BV, Sampling(temperature=0.0))
    assert torch.equal(distribution(logits_BV, Sampling(temperature=1e-50)), expected)
    for wrong in ({"presence_penalty": 1e39}, {"frequency_penalty": -1e39}, {"repetition_penalty": 1e-60}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Sampling(**wrong)
