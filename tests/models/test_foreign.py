"""Models of transformers' own classes: packed rows are exact, logits are theirs, what cannot be exact is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import Head
from llmtrainer.data.branches import AnswerRows, collate_comparisons
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.foreign import Foreign
from llmtrainer.models.foreign_loading import ForeignModel, load_foreign, read_foreign
from llmtrainer.models.foreign_proof import packed_row
from tests.tolerances import FOREIGN_FLOAT64
from tests.worlds import ragged_documents, row_batch

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip


def _of(config_class: str, **more: Any) -> Any:
    return getattr(transformers, config_class)(**{**SMALL, **more})


WORLDS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=64,
                                            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": lambda: _of("GPTNeoXConfig", rotary_pct=0.5),
    "gemma2": lambda: _of("Gemma2Config", sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0),
    "qwen2_moe": lambda: _of("Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                             shared_expert_intermediate_size=24),
    "phi": lambda: _of("PhiConfig", partial_rotary_factor=0.5),
    "gpt_oss": lambda: _of("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "mistral": lambda: _of("MistralConfig", sliding_window=5),
    "opt": lambda: transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                                          vocab_size=320, max_position_embeddings=64, word_embed_proj_dim=32,
                                          dropout=0.0),
}  # fmt: skip
"""Architectures of several kinds: learned positions, partial rotary, capped scores with windows, experts, a bias in
the head, sinks."""
APART: dict[str, Any] = {
    "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=320),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=320),
    "doge": lambda: _of("DogeConfig"),
    "phimoe": lambda: _of("PhimoeConfig", sliding_window=5, num_local_experts=4),
    "llama4": lambda: _of("Llama4TextConfig", intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8),
}
"""Those that mix places otherwise: by a state, a bias of every pair, masks and windows and chunks of their own."""


def folder_of(config: Any, folder: Path) -> Path:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
            else:
                parameter *= 3.0
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, ids: list[int]) -> Tensor:
    """Logits [T, V] of one document by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def packed(documents: list[list[int]]) -> Batch:
    return packed_row(documents, torch.device("cpu"))


@pytest.mark.parametrize("name", WORLDS)
def test_packed_rows_have_the_logits_of_transformers_for_every_document_alone(name: str, tmp_path: Path) -> None:
    folder = folder_of(WORLDS[name](), tmp_path / name)
    policy = load_foreign(folder, torch.float64).eval()
    documents = [ids[:-1] for ids in ragged_documents([13, 8, 11])]
    with torch.no_grad():
        found = policy.logits(packed(documents))[0]
    start = 0
    for ids in documents:
        right = theirs(folder, ids)
        assert (found[start : start + len(ids)] - right).abs().max() < FOREIGN_FLOAT64[name]
        start += len(ids)


@pytest.mark.parametrize("name", [name for name in WORLDS if name not in ("qwen2_moe", "gpt_oss")])
def test_a_document_that_changes_leaves_its_neighbours_bit_for_bit(name: str, tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS[name](), tmp_path / name), torch.float32).eval()
    documents = [ids[:-1] for ids in ragged_documents([13, 8, 11])]
    with torch.no_grad():
        before = policy.hidden(packed(documents))[0]
        after = policy.hidden(packed([documents[0], [7] * 8, documents[2]]))[0]
    assert torch.equal(before[:13], after[:13]) and torch.equal(before[21:], after[21:])
    assert not torch.equal(before[13:21], after[13:21])


@pytest.mark.parametrize("name", WORLDS)
def test_answers_behind_a_shared_prompt_have_the_logits_of_transformers_for_each_alone(
    name: str, tmp_path: Path
) -> None:
    folder = folder_of(WORLDS[name](), tmp_path / name)
    policy = load_foreign(folder, torch.float64).eval()
    prompt, *answers = ragged_documents([8, 12, 5])
    rows = tuple(np.array([*prompt, *answer]) for answer in answers)
    zeros = tuple(np.zeros(len(row), dtype=np.float32) for row in rows)
    item = AnswerRows(rows, zeros, len(prompt), 0, 0)
    batch = collate_comparisons([item, item], share=True, liked=False, margin=False)
    with torch.no_grad():
        found = policy.logits(batch)[0]
    for number in range(batch.sequences):
        right = theirs(folder, rows[number % 2].tolist())[len(prompt) - 1 :]
        assert (found[batch.sequence_BT[0] == number] - right).abs().max() < FOREIGN_FLOAT64[name]


@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_packed_is_refused_by_name_and_exact_apart(name: str, tmp_path: Path) -> None:
    folder = folder_of(APART[name](), tmp_path / name)
    with pytest.raises(UserError, match=r"packed rows are not exact in \w+ForCausalLM") as caught:
        load_foreign(folder, torch.float64)
    assert "model.apart=true" in str(caught.value)
    policy = load_foreign(folder, torch.float64, apart=True).eval()
    documents = [ids[:-1] for ids in ragged_documents([13, 8])]
    with torch.no_grad():
        found = policy.logits(packed(documents))[0]
    right = torch.cat([theirs(folder, ids) for ids in documents])
    assert (found - right).abs().max() < 1e-6


@pytest.mark.parametrize("apart", [False, True])
def test_a_class_that_looks_ahead_is_refused_by_name(apart: bool, tmp_path: Path) -> None:
    folder = folder_of(_of("BertConfig", is_decoder=False), tmp_path)
    with pytest.raises(UserError, match="BertLMHeadModel does not predict the next token") as caught:
        load_foreign(folder, apart=apart)
    assert "is_decoder" in str(caught.value.fix)


def test_a_head_that_reads_another_width_than_the_states_have_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    folder = folder_of(_of("ElectraConfig", embedding_size=24, is_decoder=True), tmp_path)
    policy = load_foreign(folder, torch.float64, apart=True).eval()
    (ids, _) = ragged_documents([13, 8])
    with torch.no_grad():
        assert (policy.logits(packed([ids]))[0] - theirs(folder, ids)).abs().max() < FOREIGN_FLOAT64["phi"]


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 12,
}  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
def test_a_short_document_beside_one_that_is_turned_by_other_angles_is_read_as_alone(
    apart: bool, tmp_path: Path
) -> None:
    config = _of("Phi3Config", original_max_position_embeddings=12, rope_scaling=LONGROPE)
    folder = folder_of(config, tmp_path)
    policy = load_foreign(folder, torch.float64, apart=apart).eval()
    documents = [ids[:-1] for ids in ragged_documents([20, 5, 13, 9])]
    right = torch.cat([theirs(folder, ids) for ids in documents])
    with torch.no_grad():
        assert (policy.logits(packed(documents))[0] - right).abs().max() < FOREIGN_FLOAT64["phi"]
        after = policy._after([ids for ids in documents])
    ends = torch.tensor([len(ids) for ids in documents]).cumsum(0) - 1
    assert (after - right[ends]).abs().max() < FOREIGN_FLOAT64["phi"]
    assert not policy.keeps_keys


def test_angles_that_follow_what_was_read_before_are_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(_of("PhiConfig", rope_scaling={"rope_type": "dynamic", "factor": 2.0}), tmp_path)
    for apart in (False, True):
        with pytest.raises(UserError, match="`dynamic`"):
            load_foreign(folder, apart=apart)


def test_layers_that_attention_cannot_tell_apart_are_named(tmp_path: Path) -> None:
    folder = folder_of(_of("Qwen3NextConfig", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                           shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2,
                           linear_key_head_dim=4, linear_value_head_dim=4,
                           layer_types=["linear_attention", "full_attention"]), tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="linear_attention"):
        load_foreign(folder)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi"])
def test_what_an_objective_wants_is_worked_out_from_transformers_logits(name: str, tmp_path: Path) -> None:
    folder = folder_of(WORLDS[name](), tmp_path / name)
    policy = load_foreign(folder, torch.float64).eval()
    assert policy.own_logits == (name == "gemma2")
    documents = ragged_documents([13, 8])
    batch = row_batch(documents)
    out = policy(batch, ("logp", "entropy", "log_partition", "mean_logp"))
    for row, ids in enumerate(documents):
        logits = theirs(folder, ids[:-1])
        logp = logits.log_softmax(-1)
        length = len(ids) - 1
        pairs = {
            "logp": logp[range(length), ids[1:]], "entropy": -(logp.exp() * logp).sum(-1),
            "log_partition": logits.logsumexp(-1), "mean_logp": logp.mean(-1),
        }  # fmt: skip
        for what, right in pairs.items():
            found = getattr(out, f"{what}_BT")[row, :length]
            assert (found - right).abs().max() < FOREIGN_FLOAT64[name], what


def test_reading_token_by_token_follows_rows_of_different_lengths(tmp_path: Path) -> None:
    folder = folder_of(WORLDS["gpt_neox"](), tmp_path)
    policy = load_foreign(folder, torch.float64).eval()
    cache = policy.cache(2, 8)
    policy.read(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1]), cache)
    cache.take([1, 0])
    logits_BV = policy.read(torch.tensor([[9, 10], [11, 0]]), torch.tensor([2, 1]), cache)
    for found, ids in zip(logits_BV, ([8, 9, 10], [5, 6, 7, 11]), strict=True):
        assert (found - theirs(folder, ids)[-1]).abs().max() < FOREIGN_FLOAT64["gpt_neox"]


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt2"])
def test_a_saved_folder_is_one_of_transformers_and_reads_back(name: str, tmp_path: Path) -> None:
    folder = folder_of(WORLDS[name](), tmp_path / "base")
    policy = load_foreign(folder, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    form = ForeignModel(policy)
    form.write({value: tensor.clone() for value, tensor in form.tensors().items()}, tmp_path / "saved")
    form.write({value: tensor.clone() for value, tensor in form.tensors().items()}, tmp_path / "again")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    again = load_foreign(folder, torch.float32)
    read_foreign(again, tmp_path / "saved")
    for value, tensor in policy.named_parameters():
        assert torch.equal(dict(again.named_parameters())[value], tensor), value
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for value, tensor in stored.named_parameters():
        assert torch.equal(dict(policy.named_parameters())[value], tensor), value


def test_sixteen_bits_compute_beside_float32_masters_or_from_narrow_frozen_ones(tmp_path: Path) -> None:
    folder = folder_of(WORLDS["gpt_neox"](), tmp_path)
    batch = row_batch(ragged_documents([13, 8]))
    wide, masters = load_foreign(folder, torch.float32).eval(), load_foreign(folder, torch.bfloat16).eval()
    frozen = load_foreign(folder, torch.bfloat16, frozen=True).eval()
    assert {value.dtype for value in masters.parameters()} == {torch.float32}
    assert {value.dtype for value in frozen.parameters()} == {torch.bfloat16}
    right = wide(batch, ("logp",)).logp_BT
    for policy in (masters, frozen):
        found = policy(batch, ("logp",)).logp_BT
        assert found is not None and right is not None and found.dtype == torch.float32
        assert (found - right).abs().max() < 0.1 * right.abs().max()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_stand_beside_any_linear_layer_of_transformers(kind: str, tmp_path: Path) -> None:
    from tests.models.test_lora import KINDS

    policy = load_foreign(folder_of(WORLDS["gpt_neox"](), tmp_path), torch.float64, frozen=True)
    batch = row_batch(ragged_documents([13, 8]))
    before = policy.hidden(batch)
    KINDS[kind](rank=2).insert(policy)
    initialise(policy, 1)
    assert torch.equal(policy.hidden(batch), before)
    names = set(adapters(policy))
    assert names == {
        f"gpt_neox.layers.{layer}.{part}" for layer in range(2)
        for part in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }  # fmt: skip
    out = policy(batch, ("logp",)).logp_BT
    assert out is not None
    out.sum().backward()
    assert {name for name, value in policy.named_parameters() if value.grad is not None} == {
        f"{name}.adapter.{part}" for name in names
        for part in ("lora_A", "lora_B", *(("lora_magnitude_vector",) if kind == "dora" else ()))
    }  # fmt: skip
    with pytest.raises(UserError, match="did you mean `dense`"):
        Lora(targets=("denze",)).insert(policy)


def test_a_folder_that_brings_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="no class for this folder that predicts the next token"):
        load_foreign(tmp_path)


def test_parameters_have_the_models_own_names(tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS["gpt2"](), tmp_path))
    assert isinstance(policy, Foreign)
    assert next(name for name, _ in policy.named_parameters()) == "transformer.wte.weight"


def test_a_class_without_linear_layers_of_torch_takes_no_adapter(tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS["gpt2"](), tmp_path), frozen=True)
    with pytest.raises(UserError, match="no linear layer"):
        Lora().insert(policy)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi"])
def test_a_score_is_that_of_the_class_for_sequences_with_one_label(name: str, tmp_path: Path) -> None:
    """A language model gets the head, is saved in that class, and comes back with the same scores."""
    head = Head.model_validate({"kind": "score", "std": 1.0})
    policy = load_foreign(folder_of(WORLDS[name](), tmp_path / "base"), torch.float64).eval()
    policy.attach(head)
    assert policy.score is not None and not policy.worded and "score.weight" in dict(policy.named_parameters())
    policy.score.initialise(0, head)
    documents = ragged_documents([5, 11, 2])
    packed = packed_row(documents, torch.device("cpu"))
    with torch.no_grad():
        found = policy(packed, ("score",)).score_S
    form = ForeignModel(policy)
    form.write(form.tensors(), tmp_path / "saved")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert model.config.num_labels == 1 and found is not None
    with torch.no_grad():
        wanted = torch.stack([model.eval()(torch.tensor([ids])).logits[0, 0] for ids in documents])
    assert float((found - wanted).abs().max()) <= FOREIGN_FLOAT64[name]
    again = load_foreign(tmp_path / "saved", torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(again(packed, ("score",)).score_S, found)    # type: ignore[arg-type]
    assert policy.score.weight.grad is None
    other = load_foreign(tmp_path / "base", torch.float64)
    other.attach(head)
    read_foreign(other, tmp_path / "saved")
    assert other.score is not None and torch.equal(other.score.weight, policy.score.weight)


def test_a_reward_model_of_transformers_classes_trains_and_does_not_write(tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS["gpt2"](), tmp_path / "base"))
    policy.attach(Head.model_validate({"kind": "score"}))
    assert policy.score is not None
    policy.score.initialise(0, Head.model_validate({"kind": "score"}))
    score_S = policy(packed_row(ragged_documents([5, 4]), torch.device("cpu")), ("score",)).score_S
    assert score_S is not None
    score_S.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    for ask in (lambda: policy(row_batch([[1, 2, 3]]), ("logp",)), lambda: policy.cache(1, 4)):
        with pytest.raises(UserError, match="gives a score and no next token"):
            ask()
    with pytest.raises(UserError, match="no head of the kind `ordinal`"):
        load_foreign(tmp_path / "base").attach(Head.model_validate({"kind": "ordinal", "classes": 3}))
