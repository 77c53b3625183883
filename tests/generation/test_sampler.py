"""Answers for training: what is scheduled changes nothing, and their log-probabilities are the trainer's own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import NEVER, Batch
from llmtrainer.core.weights_version import weights_version
from llmtrainer.data.collate import Row, collate
from llmtrainer.generation.blocks import Blocks
from llmtrainer.generation.continuous import Batching
from llmtrainer.generation.continuous import Row as Growing
from llmtrainer.generation.drawing import Drawing
from llmtrainer.generation.loop import complete
from llmtrainer.generation.sampler import Sampled, alone, drawn_signals, require_version, score
from llmtrainer.generation.samplers.own import Own, OwnSampler
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.adapters.lora import Lora
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from tests.generation.test_loop import Spoken, Tokens
from tests.tolerances import FLOAT64_LOGITS

PROMPT_LENGTHS = (1, 7, 23, 12)
PLAIN = Sampling(max_new_tokens=20)
TOKENS = Tokens(vocabulary=60)
SCHEDULES: list[dict[str, Any]] = [
    {"max_rows": 1}, {"block": 4, "max_tokens": 48}, {"block": 1, "max_tokens": 80, "max_rows": 5},
]  # fmt: skip
"""The longest row has 43 tokens: 48 hold one such row, and others are put back in its favour."""


def decoder(compute: torch.dtype = torch.float64, **shape: object) -> Decoder:
    family = Llama.model_validate(
        {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context_length": 96, "init_std": 0.3, **shape}
    )
    made = family.build(64, compute)
    made.initialise(0)
    return made


def prompts() -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randint(4, 60, (length,), generator=chance).tolist() for length in PROMPT_LENGTHS]


def repeated(each: int) -> list[list[int]]:
    return [prompt for prompt in prompts() for _ in range(each)]


def opened(policy: Decoder, weights: Any = "shared", mode: Any = "exact", **config: Any) -> OwnSampler:
    return Own(**config).open(policy, TOKENS, policy, weights, mode)


def said(sampled: Sequence[Sampled]) -> list[tuple[tuple[int, ...], str]]:
    return [(one.tokens, one.finish) for one in sampled]


FILTERS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.3},
    {"suppress": (9,), "min_new_tokens": 8, "stop_ids": (11,)}, {"temperature": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_answers_are_those_of_the_plain_loop_in_the_order_asked(setting: dict[str, Any]) -> None:
    policy, sampling = decoder(), PLAIN.model_copy(update=setting)
    done = complete(policy, repeated(3), sampling, TOKENS, seed=5)
    assert said(opened(policy).sample(prompts(), 3, sampling, 5)) == [(one.tokens, one.finish) for one in done]


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 9}, {"query_key_norm": True, "rotary_share": 0.5}], ids=str)
@pytest.mark.parametrize("compute", [torch.float64, torch.float32], ids=str)
def test_neither_rows_at_once_nor_blocks_nor_the_bound_on_memory_change_a_token_or_a_bit_of_its_log_probability(
    compute: torch.dtype, shape: dict[str, Any]
) -> None:
    policy = decoder(compute, **shape)
    first = opened(policy).sample(prompts(), 3, PLAIN, 5)
    assert {one.finish for one in first} == {"end", "length"}
    for config in SCHEDULES:
        sampler = opened(policy, **config)
        again = sampler.sample(prompts(), 3, PLAIN, 5)
        assert said(again) == said(first), config
        for one, other in zip(first, again, strict=True):
            assert np.array_equal(one.logp, other.logp), config
        if "max_tokens" in config:
            assert sampler.traffic.put_back > 0
            assert sampler.traffic.most_blocks * config["block"] <= config["max_tokens"]


def test_a_stop_string_ends_the_same_rows_as_in_the_plain_loop() -> None:
    policy, tokenizer = decoder(), Spoken(vocabulary=60, end=59)
    sampling = Sampling(max_new_tokens=25, min_new_tokens=2, stop=("A", "QB", "X"), suppress=(9,))
    done = complete(policy, repeated(2), sampling, tokenizer, seed=2)
    assert {one.finish for one in done} >= {"stop", "length"}
    for config in ({}, {"block": 4, "max_tokens": 56}):
        found = Own(**config).open(policy, tokenizer, policy).sample(prompts(), 2, sampling, 2)
        assert said(found) == [(one.tokens, one.finish) for one in done]


def test_a_prompt_is_read_once_for_all_its_answers_and_its_whole_blocks_are_shared() -> None:
    sampler = opened(decoder(), block=4)
    sampler.sample([list(range(4, 24))], 6, PLAIN.model_copy(update={"max_new_tokens": 3, "min_new_tokens": 3}), 1)
    assert (sampler.traffic.prompts_read, sampler.traffic.tokens_read) == (1, 20)
    # 20 tokens are 5 whole blocks; each of 6 answers needs one more.
    assert sampler.traffic.most_blocks == 5 + 6


def test_a_row_that_ends_makes_room_at_once_and_in_the_end_every_block_is_free() -> None:
    policy, sampling = decoder(), PLAIN
    rows = [Growing(number, prompt, 20) for number, prompt in enumerate(repeated(3))]
    blocks = Blocks(40, 4)
    batching = Batching(policy.pages(policy.reading_weights(), 41, 4, 43), blocks, 4)
    for start in range(0, len(rows), 3):
        batching.add(rows[start].prompt, rows[start : start + 3])
    drawing, lengths = Drawing(sampling, TOKENS, rows, 5, range(len(rows))), []

    def choose(running: list[Growing], logits_BV: torch.Tensor) -> list[bool]:
        lengths.append(len(running))
        return drawing.choose(running, logits_BV)

    with torch.no_grad():
        batching.run(choose)
    # By hand: four places, and whoever ends is followed in the next round by the first row that waits.
    waiting, left, expected = [len(row.tokens) for row in rows], list[int](), []
    while waiting or left:
        left, waiting = left + waiting[: 4 - len(left)], waiting[4 - len(left) :]
        expected.append(len(left))
        left = [number - 1 for number in left if number > 1]
    assert lengths == expected and max(lengths) == 4
    assert blocks.free == 40


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [{}, {"top_k": 8, "temperature": 1.2}], ids=str)
def test_in_exact_mode_the_first_inner_step_has_a_ratio_of_exactly_1(
    compute: torch.dtype, setting: dict[str, Any]
) -> None:
    policy = decoder(compute)
    sampled = opened(policy).sample(prompts(), 2, PLAIN.model_copy(update=setting), 3)
    for prompt, one in zip(repeated(2), sampled, strict=True):
        batch = alone(prompt, one, 64)
        if not setting:    # the same row as the data's own collator makes it
            counts = np.array([0.0] * len(prompt) + [1.0] * len(one.tokens), dtype=np.float32)
            ids = np.array([*prompt, *one.tokens])
            batch = collate([Row(ids, np.zeros(len(ids), dtype=np.int32), 0, counts)])
            batch.signals[NEVER] = torch.arange(60, 64)
        logp_BT = policy(batch, ("logp",)).logp_BT
        assert logp_BT is not None and logp_BT.requires_grad
        old = torch.tensor(one.logp).to(logp_BT.dtype)
        assert torch.equal((logp_BT[0, len(prompt) - 1 :] - old).exp(), torch.ones_like(old))
        assert logp_BT.detach()[0, : len(prompt) - 1].eq(0.0).all()


def test_a_batch_scored_as_it_is_trained_has_a_ratio_of_exactly_1_whatever_is_in_it() -> None:
    policy = decoder(torch.bfloat16)
    sampled = opened(policy, mode="fast").sample(prompts(), 2, PLAIN, 3)
    rows = []
    for place, (prompt, one) in enumerate(zip(repeated(2), sampled, strict=True)):
        ids = np.array([*prompt, *one.tokens])
        rows.append(Row(ids, np.zeros(len(ids), dtype=np.int32), place))
    batch = collate(rows)
    (old_BT,) = score(policy, [batch])
    new_BT = policy(batch, ("logp",)).logp_BT
    assert new_BT is not None and torch.equal(new_BT, old_BT)


def test_a_log_probability_depends_on_no_neighbour_no_padding_and_no_micro_batch() -> None:
    policy = decoder()
    sampled = opened(policy).sample(prompts(), 2, PLAIN, 3)
    rows = []
    for place, (prompt, one) in enumerate(zip(repeated(2), sampled, strict=True)):
        ids = np.array([*prompt, *one.tokens])
        rows.append(Row(ids, np.zeros(len(ids), dtype=np.int32), place))
    def batch_of(part: list[Row]) -> Batch:
        return replace(collate(part), signals={NEVER: torch.arange(60, 64)})

    for parts in ([rows], [rows[:3], rows[3:]], [[row] for row in rows]):
        found = [
            logp_BT[number, len(prompts()[row.place // 2]) - 1 : row.inputs]
            for part, logp_BT in zip(parts, score(policy, [batch_of(part) for part in parts]), strict=True)
            for number, row in enumerate(part)
        ]
        for logp_T, one in zip(found, sampled, strict=True):
            assert float((logp_T - torch.tensor(one.logp)).abs().max()) < 1e-12


@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_log_probabilities_are_of_what_was_drawn_from_in_sampling_and_in_training(setting: dict[str, Any]) -> None:
    policy, sampling = decoder(), PLAIN.model_copy(update=setting)
    sampled = opened(policy).sample(prompts(), 2, sampling, 3)
    for prompt, one in zip(repeated(2), sampled, strict=True):
        np.testing.assert_allclose(one.logp, one.sampled_logp, rtol=0, atol=FLOAT64_LOGITS)
        hidden_TD = policy.hidden(replace(alone(prompt, one.tokens)))[0, len(prompt) - 1 :]
        logits_TV = (hidden_TD @ policy.head_weight.t()).detach().numpy()
        for place, token in enumerate(one.tokens):
            kept = kept_by_definition(logits_TV[place], sampling, place)
            bits = np.ones(64, dtype=bool)
            if (packed := one.kept_bits(64)) is not None:
                bits = np.unpackbits(packed[place], bitorder="little").astype(bool)
            bits[one.never] = False
            if sampling.temperature:
                assert np.array_equal(bits, kept)
            scaled = logits_TV[place] / (sampling.temperature or 1.0)
            expected = scaled[token] - np.log(np.exp(scaled[bits]).sum())
            assert one.logp[place] == pytest.approx(expected, abs=FLOAT64_LOGITS)


def kept_by_definition(logits: np.ndarray, sampling: Sampling, place: int) -> np.ndarray:
    """The ids that may be drawn, worked out one after the other."""
    possible = [number for number in range(60) if number not in sampling.suppress]
    if place < sampling.min_new_tokens:
        possible = [number for number in possible if number not in (TOKENS.end, *sampling.stop_ids)]
    weight = {number: np.exp(logits[number] / (sampling.temperature or 1.0)) for number in possible}
    order = sorted(possible, key=lambda number: -weight[number])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weight[number] for number in order)
    nucleus, mass = [], 0.0
    for number in order:
        if mass < sampling.top_p * total:
            nucleus.append(number)
        mass += weight[number]
    inside = [number for number in nucleus if weight[number] >= sampling.min_p * weight[order[0]]]
    return np.isin(np.arange(64), inside)


def test_answers_in_one_batch_have_the_log_probabilities_that_they_have_alone() -> None:
    policy, sampling = decoder(), PLAIN.model_copy(update={"top_p": 0.8, "temperature": 0.9, "min_new_tokens": 3})
    sampled = opened(policy).sample(prompts(), 1, sampling, 3)
    rows, placed = [], []
    for place, (prompt, one) in enumerate(zip(prompts(), sampled, strict=True)):
        ids = np.array([*prompt, *one.tokens])
        rows.append(Row(ids, np.zeros(len(ids), dtype=np.int32), place))
        placed.append((place, len(prompt) - 1, one))
    batch = collate(rows)
    shape = (batch.tokens_BT.shape[0], batch.tokens_BT.shape[1])
    targets = [((row, slice(first, first + len(one.tokens))), one) for row, first, one in placed]
    (logp_BT,) = score(policy, [replace(batch, signals=drawn_signals(targets, shape, 64))])
    for row, first, one in placed:
        found = logp_BT[row, first : first + len(one.tokens)].numpy()
        np.testing.assert_allclose(found, one.logp, rtol=0, atol=FLOAT64_LOGITS)


def test_the_ids_that_were_sampled_are_the_ids_that_are_trained() -> None:
    # Letters that a tokenizer would join or split another way when it read the text again.
    policy, tokenizer = decoder(), Spoken(vocabulary=60, end=59)
    sampled = Own().open(policy, tokenizer, policy).sample(prompts(), 3, PLAIN, 8)
    for prompt, one in zip(repeated(3), sampled, strict=True):
        batch = alone(prompt, one, 64)
        counted = batch.weights_BT[0] > 0
        assert tuple(batch.targets_BT[0][counted].tolist()) == one.tokens
        assert batch.tokens_BT[0].tolist() == [*prompt, *one.tokens][:-1]
        assert len(one.logp) == len(one.tokens)


def test_without_the_kept_ids_the_ratio_would_be_wrong() -> None:
    policy = decoder()
    for one, prompt in zip(opened(policy).sample(prompts(), 1, PLAIN.model_copy(update={"top_k": 5}), 3), prompts(),
                           strict=True):
        (naive,) = score(policy, [alone(prompt, one.tokens)])
        assert (np.exp(naive[0, len(prompt) - 1 :].numpy() - one.logp) < 0.999).mean() > 0.9


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}], ids=str
)
def test_penalties_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        opened(decoder()).sample(prompts(), 1, Sampling.model_validate(setting), 3)


def test_a_bound_that_cannot_hold_one_answer_is_refused_with_one_that_can() -> None:
    with pytest.raises(UserError, match="does not fit") as refused:
        opened(decoder(), block=4, max_tokens=44).sample(prompts(), 1, PLAIN, 3)
    fix = int(str(refused.value.fix).partition("=")[2])
    assert len(opened(decoder(), block=4, max_tokens=fix).sample(prompts(), 1, PLAIN, 3)) == 4


def stepped(policy: Decoder) -> None:
    """As much of a training step as matters here."""
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight), alpha=0.05)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_shared_and_copied_weights_write_the_same_and_a_skipped_sync_is_noticed(adapted: bool) -> None:
    policy = decoder()
    if adapted:
        adapter = Lora(rank=2)
        adapter.insert(policy)
        torch.manual_seed(0)
        for weight in policy.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
    shared, copied = opened(policy), opened(policy, "copied")
    for step in range(3):
        one, other = (sampler.sample(prompts(), 2, PLAIN, step) for sampler in (shared, copied))
        assert said(one) == said(other)
        require_version([*one, *other], weights_version(policy))
        before = said(shared.sample(prompts(), 2, PLAIN, 9))
        stepped(policy)
        assert said(shared.sample(prompts(), 2, PLAIN, 9)) != before
        late = copied.sample(prompts(), 2, PLAIN, 9)    # nobody called sync
        assert said(late) == before
        with pytest.raises(UserError, match="does not hold the trainer's weights"):
            require_version(late, weights_version(policy))
        copied.sync()
        assert copied.version == shared.version == weights_version(policy)


def test_sampling_leaves_the_policy_in_training_with_its_gradients() -> None:
    policy = decoder()
    policy.train()
    policy.head_weight.grad = torch.ones_like(policy.head_weight)
    opened(policy).sample(prompts(), 2, PLAIN, 3)
    assert policy.training and policy.head_weight.grad.eq(1.0).all()
    assert all(weight.grad is None for weight in policy.parameters() if weight is not policy.head_weight)


def test_twenty_rollouts_in_a_row_need_the_memory_of_one() -> None:
    policy, process = decoder(torch.float32), psutil.Process()
    # 513 blocks of 64 tokens, 64 numbers of 4 bytes each, in two layers: 16 MiB.
    sampler = opened(policy, block=64, max_tokens=2**15)

    def rollout(seed: int) -> None:
        sampler.sample(prompts(), 1, PLAIN.model_copy(update={"max_new_tokens": 2}), seed)
        stepped(policy)

    for seed in range(3):
        rollout(seed)
    before, numbers = process.memory_info().rss, bytes_of_tensors()
    for seed in range(20):
        rollout(seed)
    # Blocks that no row came to need are no part of the first figure, so the second is asked too.
    assert process.memory_info().rss - before < 32 * 2**20
    assert bytes_of_tensors() == numbers


def bytes_of_tensors() -> int:
    """Of all that Python can reach."""
    gc.collect()
    return sum(one.untyped_storage().nbytes() for one in gc.get_objects() if type(one) is torch.Tensor)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_a_class_of_transformers_is_sampled_from_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="classes of transformers need transformers")
    from llmtrainer.models.foreign_loading import load_foreign
    from tests.models.test_foreign import WORLDS, folder_of

    policy = load_foreign(folder_of(WORLDS[name](), tmp_path), torch.float64)
    tokenizer, sampling = Tokens(vocabulary=320, end=1), Sampling(max_new_tokens=6, top_k=50)
    done = complete(policy.eval(), repeated(2), sampling, tokenizer, seed=4)
    for weights in ("shared", "copied"):
        sampler = Own(block=4, max_tokens=64).open(policy, tokenizer, policy, weights)  # type: ignore[arg-type]
        found = sampler.sample(prompts(), 2, sampling, 4)
        assert said(found) == [(one.tokens, one.finish) for one in done]
        for one in found:
            np.testing.assert_allclose(one.logp, one.sampled_logp, rtol=0, atol=FLOAT64_LOGITS)
