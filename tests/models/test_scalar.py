"""Scores and values: read behind the last token, wherever a sequence stands; saved and loaded as transformers does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core import vocab_head
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import Head
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.hugging_face import to_config
from llmtrainer.models.weights import load_policy, save_tensors, save_weights, tensors
from llmtrainer.optim.groups import Group, group
from tests.models import theirs
from tests.tolerances import FLOAT64_LOGITS, TRANSFORMERS_FLOAT64_LOGITS
from tests.worlds import ragged_documents, row_batch, tiny_model

LENGTHS = [5, 19, 3, 28, 2]


@pytest.fixture(autouse=True)
def _without_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def scoring(compute: torch.dtype = torch.float64, **head: object) -> Decoder:
    """A tiny reward model whose head is not small."""
    policy = tiny_model(compute, head={"kind": "score", "std": 1.0, **head})
    return policy.eval()


def read_whole(documents: list[list[int]]) -> Batch:
    """One text a row, of which every token is read."""
    return row_batch([[*document, 0] for document in documents])


def by_hand(policy: Decoder, document: list[int]) -> float:
    """The score of a text from the whole model's hidden state behind its last token, one text at a time."""
    assert policy.score is not None
    return float(policy.hidden(read_whole([document]))[0, -1] @ policy.score.weight[0])


def packed(documents: list[list[int]]) -> Batch:
    """All texts in one row, without padding."""
    rows = [read_whole([document]) for document in documents]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows], dim=1)

    number_BT = torch.cat([torch.full_like(row.document_BT, n) for n, row in enumerate(rows)], dim=1)
    return Batch(
        joined("tokens_BT"), joined("targets_BT"), joined("weights_BT"), number_BT, joined("position_BT"), number_BT,
        torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


def padded_left(batch: Batch) -> Batch:
    """The same rows, their padding moved to the left."""
    shift_B = (batch.document_BT < 0).sum(1).tolist()

    def moved(value_BT: Tensor) -> Tensor:
        return torch.stack([row.roll(shift) for row, shift in zip(value_BT, shift_B, strict=True)])

    return replace(batch, **{
        name: moved(getattr(batch, name))
        for name in ("tokens_BT", "targets_BT", "weights_BT", "document_BT", "position_BT", "sequence_BT")
    })  # fmt: skip


def shared_prompt(prompt: list[int], answers: list[list[int]]) -> Batch:
    """One row: the prompt but for its last token, then for each answer that token again and the answer."""
    tokens, targets, sequence, position = [], [], [], []
    tokens += prompt[:-1]
    targets += prompt[1:]
    sequence += [-1] * (len(prompt) - 1)
    position += range(len(prompt) - 1)
    for number, answer in enumerate(answers):
        read = [prompt[-1], *answer]
        tokens += read
        targets += [*answer, 0]
        sequence += [number] * len(read)
        position += range(len(prompt) - 1, len(prompt) + len(answer))
    T = len(tokens)
    weights_BT = torch.tensor([[float(s >= 0) for s in sequence]])
    return Batch(
        torch.tensor([tokens]), torch.tensor([targets]), weights_BT, torch.zeros(1, T, dtype=torch.int32),
        torch.tensor([position], dtype=torch.int32), torch.tensor([sequence], dtype=torch.int32), torch.zeros(1).long(),
    )  # fmt: skip


def test_a_score_is_read_behind_the_last_token_under_any_padding_and_packing() -> None:
    policy, documents = scoring(), ragged_documents(LENGTHS)
    right = torch.tensor([by_hand(policy, document) for document in documents], dtype=torch.float64)
    assert right.std() > 0.1
    batch = read_whole(documents)
    cuts = {"padded right": batch, "padded left": padded_left(batch), "packed": packed(documents)}
    for name, cut in cuts.items():
        found = policy(cut, ("score",)).score_S
        assert found is not None and found.shape == (5,)
        assert float((found - right).abs().max()) <= FLOAT64_LOGITS, name


def test_answers_that_share_a_prompt_have_the_scores_that_they_have_alone() -> None:
    policy = scoring()
    prompt, *answers = ragged_documents([11, 7, 0, 15])
    right = torch.tensor([by_hand(policy, [*prompt, *answer]) for answer in answers], dtype=torch.float64)
    found = policy(shared_prompt(prompt, answers), ("score",)).score_S
    assert found is not None and float((found - right).abs().max()) <= FLOAT64_LOGITS


def test_sequences_numbered_otherwise_than_they_stand_keep_their_scores() -> None:
    policy, documents = scoring(), ragged_documents(LENGTHS)
    batch = packed(documents)
    backwards = replace(batch, sequence_BT=len(documents) - 1 - batch.sequence_BT)
    scores, turned = (policy(item, ("score",)).score_S for item in (batch, backwards))
    assert scores is not None and turned is not None and torch.equal(scores.flip(0), turned)


def test_words_beside_a_score_are_those_without_it() -> None:
    policy = tiny_model(torch.float64, head={"kind": "value", "trunk": "shared"}).eval()
    batch = packed(ragged_documents(LENGTHS))
    alone, beside = policy(batch, ("logp",)), policy(batch, ("logp", "score", "value"))
    assert beside.score_S is not None and beside.logp_BT is not None and alone.logp_BT is not None
    assert float((beside.logp_BT - alone.logp_BT).abs().max()) <= FLOAT64_LOGITS


def test_a_value_stands_at_each_target_that_counts_and_nowhere_else() -> None:
    policy = tiny_model(torch.float64, head={"kind": "value", "trunk": "shared", "std": 1.0}).eval()
    batch = row_batch(ragged_documents(LENGTHS))
    batch.weights_BT[1, :4] = 0.0
    found = policy(batch, ("value",)).value_BT
    assert found is not None and policy.score is not None
    right = (policy.hidden(batch) @ policy.score.weight[0]) * (batch.weights_BT > 0)
    assert float((found - right).abs().max()) <= FLOAT64_LOGITS
    assert torch.equal(found == 0, batch.weights_BT == 0)


def test_where_only_a_score_is_wanted_no_product_with_the_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_model(head={"kind": "value", "trunk": "shared"})
    assert policy.lm_head is not None      # it could be used

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the vocabulary's head worked")

    monkeypatch.setattr(vocab_head, "log_probabilities", refuse)
    out = policy(row_batch(ragged_documents(LENGTHS)), ("score", "value"))
    assert out.score_S is not None and out.logp_BT is None
    with pytest.raises(AssertionError, match="worked"):
        policy(row_batch(ragged_documents(LENGTHS)), ("score", "logp"))


def test_a_rank_without_sequences_takes_part_and_changes_nothing() -> None:
    policy = scoring()
    empty = replace(
        row_batch([[1, 2]]), weights_BT=torch.zeros(1, 1), document_BT=torch.full((1, 1), -1, dtype=torch.int32),
        sequence_BT=torch.full((1, 1), -1, dtype=torch.int32),
    )
    with torch.enable_grad():
        score_S = policy(empty, ("score",)).score_S
        assert score_S is not None and score_S.shape == (0,)
        score_S.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_scores_are_float32_where_the_model_computes_in_16_bits_and_their_head_is_not_rounded() -> None:
    policy, documents = scoring(torch.bfloat16), ragged_documents(LENGTHS)
    found = policy(packed(documents), ("score",)).score_S
    assert found is not None and found.dtype == torch.float32
    assert not torch.equal(found, found.to(torch.bfloat16).float())


def test_a_reward_model_has_no_head_for_the_vocabulary_and_says_so() -> None:
    policy = scoring()
    assert "lm_head.weight" not in dict(policy.named_parameters())
    batch = row_batch([[1, 2, 3]])
    for ask in (lambda: policy(batch, ("logp",)), lambda: policy.cache(1, 4)):
        with pytest.raises(UserError, match="gives a score and no next token"):
            ask()
    with pytest.raises(UserError, match="no head for a score"):
        tiny_model()(batch, ("score",))


def test_first_weights_are_zero_or_normal_or_scaled_down_and_a_function_of_the_seed() -> None:
    one, other, small, zero = (
        tiny_model(head={"kind": "score", **settings}, hidden_size=256).score
        for settings in ({}, {}, {"scale": 0.1}, {"init": "zero"})
    )  # fmt: skip
    assert one is not None and other is not None and small is not None and zero is not None
    assert torch.equal(one.weight, other.weight) and torch.allclose(small.weight, one.weight * 0.1)
    assert not zero.weight.any()
    assert float(one.weight.std()) == pytest.approx(1 / math.sqrt(257), rel=0.2)
    wide = tiny_model(head={"kind": "score", "std": 3.0}, hidden_size=256).score
    assert wide is not None and torch.allclose(wide.weight, one.weight * 3 * math.sqrt(257))


def test_the_head_has_its_own_rate_and_decay_by_its_name() -> None:
    policy = tiny_model(head={"kind": "ordinal", "classes": 4})
    own = [Group(match="score.cuts", rate=3.0), Group(match="score.*", rate=10.0, decay=0.0)]
    found = {
        name: (item["rate_multiplier"], item["decay_multiplier"])
        for item in group(policy.named_parameters(), own) for name in item["param_names"]
    }  # fmt: skip
    assert found["score.weight"] == (10.0, 0.0) and found["score.cuts"] == (3.0, 0.0)
    assert found["model.layers.0.mlp.up_proj.weight"] == (1.0, 1.0)


def test_cut_points_begin_around_0_and_stay_ordered_whatever_is_learned() -> None:
    """K = 5 classes: (0 .. 3) - (5 / 2 - 1)."""
    policy = tiny_model(torch.float64, head={"kind": "ordinal", "classes": 5})
    head = policy.score
    assert head is not None and head.cuts is not None and head.cut_points_K is not None
    assert head.cut_points_K.tolist() == [-1.5, -0.5, 0.5, 1.5]
    head.cuts.normal_(0.0, 5.0, generator=torch.Generator().manual_seed(0))
    assert bool((head.cut_points_K.diff() > 0).all())
    out = policy(row_batch([[1, 2, 3]]), ("score", "cut_points"))
    assert out.cut_points_K is not None and torch.equal(out.cut_points_K, head.cut_points_K)


@pytest.mark.parametrize(
    "shape", [{}, {"tied_head": True}, {"query_key_norm": True}, {"sliding_window": 8}], ids=str
)
def test_transformers_loads_a_saved_reward_model_and_gives_the_same_scores(
    shape: dict[str, object], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="it is the oracle: the class that others load it with")
    policy = tiny_model(torch.float64, head={"kind": "score", "std": 1.0}, **shape).eval()
    save_weights(policy, tmp_path, end=300, pad=301)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    assert model.config.num_labels == 1
    documents = ragged_documents(LENGTHS)
    longest = max(map(len, documents))
    exact = theirs.in_float64(model)
    for left in (False, True):
        rows = [
            [301] * (longest - len(ids)) + ids if left else ids + [301] * (longest - len(ids)) for ids in documents
        ]
        ids_BT = torch.tensor(rows)
        mask_BT = (ids_BT != 301).long()
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        wanted = exact(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits[:, 0]
        found = policy(packed(documents), ("score",)).score_S
        assert found is not None
        assert float((found - wanted).abs().max()) <= TRANSFORMERS_FLOAT64_LOGITS, left


def test_transformers_own_reward_model_loads_with_its_head_and_gives_its_scores(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="writes the folder that is read")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=301,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, torch.float64).eval()
    assert policy.family.head is not None and policy.family.head.kind == "score"
    documents = ragged_documents(LENGTHS)
    found = policy(packed(documents), ("score",)).score_S
    assert found is not None
    for score, ids in zip(found, documents, strict=True):
        wanted = model(torch.tensor([ids])).logits[0, 0]
        assert abs(float(score - wanted)) <= TRANSFORMERS_FLOAT64_LOGITS


def test_a_class_of_several_labels_is_refused_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="writes the folder that is read")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=3
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="num_labels is 3"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    "head", [{"kind": "score"}, {"kind": "ordinal", "classes": 4}, {"kind": "value", "trunk": "shared"}], ids=str
)
def test_a_folder_read_back_has_the_same_head_and_the_same_bytes(head: dict[str, object], tmp_path: Path) -> None:
    policy = tiny_model(head=head)
    save_weights(policy, tmp_path / "one")
    again = load_policy(tmp_path / "one")
    assert again.family.head == Head.model_validate(head)
    assert set(tensors(again)) == set(tensors(policy)) and again.worded == policy.worded
    save_weights(again, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_where_texts_end_in_the_padding_id_other_libraries_are_told_of_no_padding(tmp_path: Path) -> None:
    """Their class looks for the last token that is no padding: it would read the score before the end token."""
    policy = scoring()
    same, other = (to_config(policy.family, 320, end=300, pad=pad) for pad in (300, 301))
    assert same["pad_token_id"] is None and other["pad_token_id"] == 301
    assert same["architectures"] == ["LlamaForSequenceClassification"] and same["id2label"] == {"0": "LABEL_0"}
    save_tensors(tensors(policy), same, tmp_path)
    assert load_policy(tmp_path, torch.float64).score is not None
