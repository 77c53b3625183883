"""Scores of a trained reward model: the same whatever stands beside a text, and the rows it was trained on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.example import Example, Message
from llmtrainer.core.rollout import Answer
from llmtrainer.data.collate import Row, end_to_end
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training import scoring
from llmtrainer.training.scoring import Judge, open_judge, scores_of
from tests.tolerances import FLOAT32_LOSS
from tests.worlds import ragged_documents, tiny_model

LENGTHS = [5, 30, 2, 17, 60, 9, 30, 1]


@pytest.fixture(scope="module")
def policy() -> Decoder:
    return tiny_model(head={"kind": "score", "std": 1.0})


def padded_by_hand(policy: Decoder, rows: list[list[int]], left: bool) -> np.ndarray:
    """Scores of rows of one length in one batch, by the model's own hidden states and masks of documents."""
    longest = max(map(len, rows))
    B = len(rows)
    tokens, owner = torch.zeros(B, longest, dtype=torch.int64), torch.full((B, longest), -1, dtype=torch.int32)
    position, last = torch.zeros(B, longest, dtype=torch.int32), []
    for b, row in enumerate(rows):
        start = longest - len(row) if left else 0
        span = slice(start, start + len(row))
        tokens[b, span], owner[b, span] = torch.tensor(row), 0
        position[b, span] = torch.arange(len(row), dtype=torch.int32)
        last.append(span.stop - 1)
    sequence = torch.where(owner >= 0, torch.arange(B, dtype=torch.int32)[:, None], -1)
    batch = Batch(tokens, tokens, torch.zeros(B, longest), owner, position, sequence, torch.arange(B))
    policy.eval()
    with torch.no_grad():
        hidden = policy.hidden(batch)[torch.arange(B), torch.tensor(last)]
        assert policy.score is not None
        return (hidden @ policy.score.weight[0]).double().numpy()


def test_padding_side_and_packing_do_not_change_a_score(policy: Decoder) -> None:
    rows = ragged_documents(LENGTHS)
    found = scores_of(policy, rows)
    assert found.dtype == np.float64 and found.std() > 0.1
    for left in (False, True):
        assert np.abs(found - padded_by_hand(policy, rows, left)).max() <= 10 * FLOAT32_LOSS
    for budget in (1, 40, 100):
        assert np.abs(found - scores_of(policy, rows, budget)).max() <= 10 * FLOAT32_LOSS


def test_the_order_of_the_rows_changes_no_bit_of_a_score(policy: Decoder) -> None:
    rows = ragged_documents(LENGTHS)
    found = scores_of(policy, rows, 64)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        assert np.array_equal(scores_of(policy, [rows[i] for i in order], 64), found[order])
    assert np.array_equal(scores_of(policy, [*rows, *rows], 64), np.concatenate([found, found]))


def test_rows_in_another_order_are_read_in_the_same_batches(policy: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no bit can differ, whatever the machine's products do with other neighbours."""
    rows, read = ragged_documents(LENGTHS), list[list[int]]()

    def noted(group: list[Row]) -> Batch:
        batch = end_to_end(group)
        read.append(batch.tokens_BT[0].tolist())
        return batch

    monkeypatch.setattr(scoring, "end_to_end", noted)
    scores_of(policy, rows, 64)
    first = list(read)
    read.clear()
    scores_of(policy, [*rows[3:], *rows[:3], rows[5]], 64)
    assert read == first and len(first) > 2 and all(len(tokens) <= 64 for tokens in first)
    assert sum(map(len, first)) == sum(map(len, rows))      # every token is read, once


def test_swapping_the_answers_of_a_pair_negates_its_margin(policy: Decoder) -> None:
    rows = ragged_documents([7, 12, 3, 20])
    scores, swapped = scores_of(policy, rows), scores_of(policy, [rows[i] for i in (1, 0, 3, 2)])
    assert np.array_equal(scores[0::2] - scores[1::2], -(swapped[0::2] - swapped[1::2]))


def test_scoring_leaves_the_model_in_its_mode_and_hears_no_dropout(policy: Decoder) -> None:
    dropping = tiny_model(head={"kind": "score"}, dropout=0.5)
    dropping.train()
    rows = ragged_documents(LENGTHS)
    assert np.array_equal(scores_of(dropping, rows), scores_of(dropping, rows)) and dropping.training


def test_what_cannot_be_scored_is_refused(policy: Decoder) -> None:
    with pytest.raises(UserError, match="a text of 0 tokens"):
        scores_of(policy, [[1, 2], []])
    with pytest.raises(UserError, match="a text of 129 tokens"):
        scores_of(policy, [[1] * 129])
    with pytest.raises(UserError, match="gives no score"):
        scores_of(tiny_model(), [[1]])
    assert scores_of(policy, []).shape == (0,)


@pytest.fixture(scope="module")
def judge(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("judge")
    save_weights(tiny_model(head={"kind": "score", "std": 1.0}, context_length=512), folder)
    load_tokenizer(world / "tokenizer").save(folder)
    return open_judge(folder, template="alpaca")


def answer(text: str, finish: str = "end") -> Answer:
    return Answer((Message("user", "abc def"),), text, (), finish)


def test_an_answer_is_shown_as_training_showed_it(judge: Judge) -> None:
    chat = Chat(judge.opened.tokenizer, "alpaca")
    row = chat.row(Example((Message("user", "abc def"), Message("assistant", "fed cba")))).tokens
    assert judge.row(answer("fed cba")) == row
    assert judge([answer("fed cba"), answer("x")])[0] == pytest.approx(float(judge.scores([row])[0]), abs=1e-5)


def test_an_answer_that_broke_off_has_no_token_that_ends_it(judge: Judge) -> None:
    whole, broken = judge.row(answer("fed cba")), judge.row(answer("fed cba", "length"))
    assert whole[: len(broken)] == broken and judge.opened.tokenizer.end in whole[len(broken) :]


def test_texts_may_stand_as_they_are(judge: Judge) -> None:
    tokenizer = judge.opened.tokenizer
    plain = Judge(judge.opened, None)
    read, written = tokenizer.encode("abc def"), tokenizer.encode_continuation("fed")
    assert plain.row(answer("fed")) == (*read, *written, tokenizer.end)
    assert plain.row(answer("fed", "length"))[-1] != tokenizer.end


def test_a_prompt_of_tokens_is_refused(judge: Judge) -> None:
    with pytest.raises(UserError, match="a prompt of tokens cannot be shown"):
        judge([Answer((), "text", (1, 2), "end")])
