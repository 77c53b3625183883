"""Where each shape of a product costs memory for good, few of them occur whatever the lengths; rows stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from llmtrainer.core import listed, products, vocab_head
from llmtrainer.core.batch import GATES, TEACHER_IDS, TEACHER_LOGP, Batch
from llmtrainer.core.drawn import Drawn
from llmtrainer.core.few_shapes import costs_by_shape, rounded
from llmtrainer.models.few_rows import with_few_shapes
from llmtrainer.models.foreign_loading import load_foreign
from tests.models.multiplied import Multiplied
from tests.models.rows import rows, shared_prompt
from tests.models.test_decoder import decoder
from tests.tolerances import BFLOAT16_RELATIVE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies 16 bits: elsewhere another library is asked, which keeps no shape."""
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: False, torch.float16: False})


def shapes(run: Callable[[int], None], lengths: range) -> int:
    with Multiplied() as found:
        for length in lengths:
            run(length)
    return len(found.shapes)


def test_a_size_is_rounded_to_one_of_few_by_a_sixteenth_at_most_and_by_nothing_when_it_is_one() -> None:
    sizes = [rounded(number) for number in range(1, 8193)]
    assert len(set(sizes)) == 8 + 24 + 16 + 16 + 16    # to 256 and on to 1,024 by 32, then 16 to each power of two
    assert all(number <= size and rounded(size) == size for number, size in enumerate(sizes, 1))
    assert max((size - number) / number for number, size in enumerate(sizes, 1) if number >= 512) < 1 / 16
    assert [rounded(number, 8) for number in (0, 1, 9, 64, 65, 129)] == [0, 8, 16, 64, 72, 136]


def test_only_16_bits_on_a_processor_that_multiplies_them_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [costs_by_shape(CPU, type) for type in (torch.bfloat16, torch.float16)] == [True, True]
    monkeypatch.setattr(products, "_SLOW", {torch.bfloat16: True, torch.float16: False})
    assert [costs_by_shape(CPU, type) for type in (torch.bfloat16, torch.float16)] == [False, True]
    assert not any(costs_by_shape(CPU, type) for type in (torch.float32, torch.float64))
    assert not costs_by_shape(torch.device("meta"), torch.bfloat16)


def test_training_on_rows_of_thirty_two_lengths_meets_the_shapes_of_one() -> None:
    model = decoder(compute=torch.bfloat16)

    def learn(length: int) -> None:
        out = model(rows([[length - 20, 20]]), ("logp",))
        assert out.logp_BT is not None and out.logp_BT.shape == (1, length)
        out.logp_BT.sum().backward()

    assert shapes(learn, range(65, 97)) == shapes(learn, range(96, 97))
    model = decoder(compute=torch.float32)
    assert shapes(learn, range(65, 97)) > 8 * shapes(learn, range(96, 97))


def test_answers_of_any_length_behind_one_prompt_meet_few_shapes() -> None:
    model = decoder(compute=torch.bfloat16)

    def learn(length: int) -> None:
        out = model(shared_prompt(40, [length, 5]), ("logp",))
        assert out.logp_BT is not None
        out.logp_BT.sum().backward()

    assert shapes(learn, range(20, 52)) == shapes(learn, range(51, 52))


def test_reading_prompts_and_answers_of_any_length_meets_few_shapes() -> None:
    model = decoder(compute=torch.bfloat16)

    def write(length: int) -> None:
        pages = model.pages(model.reading_weights(), 20, 32, 96)
        tokens_BT = torch.ones(2, length, dtype=torch.int64)
        tables = [[1, 2, 3], [4, 5, 6]]
        pages.read(tokens_BT, torch.tensor([length, length - 3]), tables, [0, 0])
        pages.read(tokens_BT[:, :1], torch.tensor([1, 1]), tables, [length, length - 3])

    # What the proof of a packed layout multiplies, once for each matrix, counts in both.
    write(64)
    # By 16 to 128 tokens in both rows, by 32 in attention, and the keys of the next token.
    assert shapes(write, range(34, 64)) <= shapes(write, range(63, 64)) + 4 * 8
    assert shapes(write, range(50, 60)) <= shapes(write, range(59, 60)) + 4 * 3


def test_any_number_of_rows_that_go_on_meets_few_shapes() -> None:
    model = decoder(compute=torch.bfloat16)

    def write(number: int) -> None:
        pages = model.pages(model.reading_weights(), 20, 32, 32)
        tables = [[1 + row] for row in range(number)]
        ones_B = torch.ones(number, dtype=torch.int64)
        pages.read(ones_B[:, None], ones_B, tables, [5] * number)

    write(16)
    linear = 5    # queries with keys and values, output, gate with up, down, head
    attention = 2 * 8    # one for each number of rows at most
    assert shapes(write, range(9, 17)) <= linear + attention


@pytest.mark.parametrize(
    "batch", [rows([[37]]), rows([[11, 26]]), shared_prompt(17, [9, 12])], ids=["one", "two", "shared"]
)
def test_a_rounded_row_comes_to_what_the_row_comes_to(batch: Batch) -> None:
    found, loud = {}, decoder(compute=torch.bfloat16)
    for name, model in (("wide", decoder(compute=torch.float32)), ("rounded", loud)):
        out = model(batch, ("logp", "entropy"))
        assert out.logp_BT is not None and out.entropy_BT is not None
        (out.logp_BT * batch.weights_BT).sum().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        found[name] = out.logp_BT.detach(), out.entropy_BT.detach(), gradient
        assert out.logp_BT.shape == batch.tokens_BT.shape
    for wide, narrow in zip(found["wide"], found["rounded"], strict=True):
        assert (wide - narrow).norm() <= 3 * BFLOAT16_RELATIVE * wide.norm()
    padded = with_few_shapes(batch, torch.bfloat16)
    assert padded.tokens_BT.shape[1] % 32 == 0 and padded.tokens_BT.shape[1] > batch.tokens_BT.shape[1]
    # What stands in the padding matters to no bit.
    padded.tokens_BT[:, batch.tokens_BT.shape[1] :] = 99
    torch.testing.assert_close(
        loud.residual(padded)[:, : batch.tokens_BT.shape[1]], loud.residual(batch), rtol=0, atol=0
    )


def test_rows_beside_each_other_and_whole_ones_stay_as_they_are() -> None:
    for batch in (rows([[37], [20]]), rows([[64]])):
        assert with_few_shapes(batch, torch.bfloat16) is batch
    assert with_few_shapes(rows([[37]]), torch.float32).tokens_BT.shape[1] == 37


def test_padding_goes_through_no_gate() -> None:
    batch = rows([[37]])
    batch.signals[GATES] = torch.ones(1, 37, 2, dtype=torch.int64)
    gates_BTG = with_few_shapes(batch, torch.bfloat16).signals[GATES]
    assert gates_BTG.shape == (1, 64, 2) and gates_BTG[:, 37:].eq(-1).all() and gates_BTG[:, :37].eq(1).all()


def test_the_head_gives_the_bits_of_the_same_positions_with_others_behind_them() -> None:
    chance = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(64, 32, generator=chance).to(torch.bfloat16)
    weight_VD, targets_N = torch.randn(80, 32, generator=chance), torch.randint(0, 80, (64,), generator=chance)
    drawn = Drawn(torch.rand(64, generator=chance).double() + 0.5, None, None)
    whole = vocab_head.log_probabilities(hidden_ND, weight_VD, targets_N, ("logp", "entropy"), drawn=drawn)
    few = Drawn(drawn.temperature_N[:37] if drawn.temperature_N is not None else None, None, None)
    part = vocab_head.log_probabilities(hidden_ND[:37], weight_VD, targets_N[:37], ("logp", "entropy"), drawn=few)
    for name, value_N in part.items():
        assert torch.equal(value_N, whole[name][:37]), name


def test_what_a_teacher_lists_is_told_and_learned_in_few_shapes_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(50, 16, generator=random)
    told: dict[int, list[torch.Tensor]] = {}

    def learn(length: int) -> None:
        batch, draw = rows([[length]]), torch.Generator().manual_seed(length)
        hidden = torch.randn(1, length, 16, generator=draw).bfloat16().requires_grad_()
        signals = listed.told_by(hidden.detach(), weight_VD, batch, 3)
        ids_NK = signals[TEACHER_IDS].flatten(0, 1)
        weight = weight_VD.clone().requires_grad_()
        found = listed.log_probabilities(hidden[0], weight, ids_NK, 1.0, 1024)
        sum(value.sum() for value in found.values()).backward()    # type: ignore[union-attr]
        assert hidden.grad is not None and weight.grad is not None
        told[length] = [*found.values(), signals[TEACHER_LOGP], hidden.grad, weight.grad]

    assert shapes(learn, range(65, 97)) == shapes(learn, range(96, 97))
    rounded_up = told[70]
    monkeypatch.setattr(listed, "padding", lambda number, device, compute: 0)
    learn(70)
    for one, other in zip(rounded_up, told[70], strict=True):
        assert (one - other).norm() <= BFLOAT16_RELATIVE * other.norm()


def test_a_class_of_transformers_meets_few_shapes_and_its_rows_stay_the_same(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=320, max_position_embeddings=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, wide = load_foreign(tmp_path, torch.bfloat16).eval(), load_foreign(tmp_path, torch.float32).eval()
    found: dict[int, torch.Tensor] = {}

    def learn(length: int) -> None:
        out = model(rows([[length - 20, 20]]), ("logp",))
        assert out.logp_BT is not None and out.logp_BT.shape == (1, length)
        out.logp_BT.sum().backward()
        found[length] = out.logp_BT.detach()

    assert shapes(learn, range(65, 97)) == shapes(learn, range(96, 97))
    exact = wide(rows([[50, 20]]), ("logp",)).logp_BT
    assert exact is not None and (found[70] - exact).norm() <= BFLOAT16_RELATIVE * exact.norm()
