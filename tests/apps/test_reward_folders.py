"""Reward models as folders of others: exported, merged with their adapter, and read by transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrainer.apps.export import Export, export
from llmtrainer.apps.merge import Merge, merge
from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Head
from llmtrainer.evals.perplexity import Perplexity
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.peft_format import adapter_config, adapter_tensors, write_adapter
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.models import load_whole
from llmtrainer.training.scoring import scores_of
from llmtrainer.training.use import Evaluation, Generation, evaluate, generate
from tests.tolerances import FLOAT32_LOSS, PEFT_FLOAT64, TRANSFORMERS_FLOAT64_LOGITS
from tests.worlds import ragged_documents

ROWS = ragged_documents([5, 19, 30, 2])
SHAPE = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "context_length": 64}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["some words to learn from, " * 40], 280).save(folder)
    return load_tokenizer(folder)


def saved(folder: Path, words: FileTokenizer, head: dict[str, object] | None, **shape: object) -> Decoder:
    policy = Llama.model_validate({**SHAPE, **shape, "head": head}).build(320)
    policy.initialise(9)
    save_weights(policy, folder, end=words.end, pad=words.pad)
    words.save(folder)
    return policy


def beside(base: Path, head: dict[str, object], compute: torch.dtype = torch.float32) -> Decoder:
    """A model with adapters and a head that have learned something."""
    policy = load_policy(base, compute)
    Lora(rank=3, alpha=3.0).insert(policy)
    initialise(policy, 4)
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        linear.adapter.lora_B.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(6))
    found = Head.model_validate(head)
    policy.attach(found)
    assert policy.score is not None
    policy.score.initialise(3, found)
    return policy


def test_an_exported_reward_model_is_proved_with_the_class_that_others_load_it_with(
    words: FileTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="it is what the folder is proved with")
    policy = saved(tmp_path / "model", words, {"kind": "score"}, tied_head=True)
    made = export(Export(model=str(tmp_path / "model"), out=str(tmp_path / "out"), check=True))
    assert "AutoModelForSequenceClassification gives the same" in made.checks["score"]
    assert "AutoModelForSequenceClassification.from_pretrained" in made.text()
    again = load_policy(tmp_path / "out")
    assert scores_of(again, ROWS).tolist() == scores_of(policy, ROWS).tolist()


def test_an_exported_policy_leaves_its_critics_head_behind(words: FileTokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "model", words, {"kind": "value", "trunk": "shared"})
    made = export(Export(model=str(tmp_path / "model"), out=str(tmp_path / "out")))
    assert made.loader == "AutoModelForCausalLM"
    policy = load_policy(tmp_path / "out")
    assert policy.score is None and policy.worded and policy.family.head is None


def test_a_reward_adapter_merged_into_its_model_gives_the_same_scores(words: FileTokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "base", words, None)
    policy = beside(tmp_path / "base", {"kind": "score"})
    write_adapter(adapter_tensors(policy), adapter_config(policy, str(tmp_path / "base")), tmp_path / "adapter")
    wanted = scores_of(policy, ROWS)
    assert abs(scores_of(load_whole(tmp_path / "adapter", torch.float32), ROWS) - wanted).max() <= FLOAT32_LOSS
    merge(Merge(model=str(tmp_path / "adapter"), out=str(tmp_path / "out")))
    merged = load_policy(tmp_path / "out")
    assert not merged.worded and abs(scores_of(merged, ROWS) - wanted).max() <= 10 * FLOAT32_LOSS


@pytest.mark.parametrize(
    "head", [{"kind": "score"}, {"kind": "ordinal", "classes": 4}, {"kind": "value", "trunk": "shared"}], ids=str
)
def test_the_kind_of_a_head_beside_an_adapter_follows_from_its_weights(
    head: dict[str, object], words: FileTokenizer, tmp_path: Path
) -> None:
    saved(tmp_path / "base", words, None)
    policy = beside(tmp_path / "base", head)
    write_adapter(adapter_tensors(policy), adapter_config(policy, str(tmp_path / "base")), tmp_path / "adapter")
    again = load_whole(tmp_path / "adapter", torch.float32)
    assert isinstance(again, Decoder) and again.family.head == Head.model_validate(head)
    assert again.worded == policy.worded and scores_of(again, ROWS).tolist() == scores_of(policy, ROWS).tolist()


def test_peft_loads_a_reward_adapter_and_gives_the_same_scores(words: FileTokenizer, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle here, and no dependency")
    transformers = pytest.importorskip("transformers", reason="what peft stands beside")
    saved(tmp_path / "base", words, None)
    policy = beside(tmp_path / "base", {"kind": "score"}, torch.float64)
    write_adapter(adapter_tensors(policy), adapter_config(policy, str(tmp_path / "base")), tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float64
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double().eval()
    with torch.no_grad():
        wanted = [float(model(torch.tensor([row])).logits[0, 0]) for row in ROWS]
    assert abs(scores_of(policy, ROWS) - wanted).max() <= max(PEFT_FLOAT64, TRANSFORMERS_FLOAT64_LOGITS)


def test_a_reward_adapter_that_peft_wrote_is_read_with_its_head(words: FileTokenizer, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle here, and no dependency")
    transformers = pytest.importorskip("transformers", reason="what peft stands beside")
    saved(tmp_path / "base", words, None)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float64
    )
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double().eval()
    model.save_pretrained(tmp_path / "adapter")
    policy = load_whole(tmp_path / "adapter", torch.float64)
    with torch.no_grad():
        wanted = [float(model(torch.tensor([row])).logits[0, 0]) for row in ROWS]
    assert abs(scores_of(policy, ROWS) - wanted).max() <= TRANSFORMERS_FLOAT64_LOGITS


def test_a_reward_model_does_not_write_and_predicts_no_text(words: FileTokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "model", words, {"kind": "score"})
    (tmp_path / "text.txt").write_text("some text")
    suite = Perplexity(path=str(tmp_path / "text.txt"))
    for ask in (
        lambda: generate(Generation(model=str(tmp_path / "model"), prompt="abc")),
        lambda: evaluate(Evaluation(model=str(tmp_path / "model"), suites=(suite,))),
    ):
        with pytest.raises(UserError, match="gives a score and no next token"):
            ask()
