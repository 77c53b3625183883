"""A folder that we wrote is read by transformers with the same ids, whatever the shape of the model in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.rundir import RunDir
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.hugging_face import to_config
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.models import tokenizer_class
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train

TEXTS = ["x = 12345 + 67", "cafe\u0301 \u6625\u7720\u4e0d\u89c9\u6653\u5904\u5904", "a  b\n\n\tc's 'string'", "<|pad|>"]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", dict(sliding_window=8)),
    "biases of queries, keys and values": ("llama", dict(attention_bias=True)),
    "norms of queries and keys": ("qwen3", dict(query_key_norm=True)),
    "biases and a window": ("llmtrainer", dict(attention_bias=True, sliding_window=8)),
}


@pytest.mark.parametrize(("model_type", "fields"), SHAPES.values(), ids=SHAPES.keys())
def test_beside_a_model_of_any_shape_auto_tokenizer_gives_our_ids(
    world: Path, tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(world / "tokenizer")
    ours.save(tmp_path)
    config = to_config(Llama(**fields), ours.vocabulary, tokenizer_class=tokenizer_class(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config["model_type"] == model_type
    logging.disable(logging.WARNING)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    assert [theirs(text, split_special_tokens=True).input_ids for text in TEXTS] == ours.encode_batch(TEXTS)


def test_beside_a_model_called_qwen2_it_would_not(world: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(world / "tokenizer")
    ours.save(tmp_path)
    config = to_config(Llama(attention_bias=True), ours.vocabulary, tokenizer_class="Qwen2Tokenizer")
    assert config["model_type"] == "qwen2", "its own tokenizer splits so anyway"
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text, split_special_tokens=True).input_ids for text in TEXTS] != ours.encode_batch(TEXTS)


def test_a_checkpoint_of_a_run_with_biases_is_a_model_that_transformers_loads_with_its_tokenizer(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    train(recipe("model.attention_bias=true", "duration=1 steps", "save.every=1 steps"))
    folder = RunDir(tmp_path / "run").newest_checkpoint()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.model.layers[0].self_attn.o_proj.bias.any()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXTS[0]).input_ids == load_tokenizer(folder).encode(TEXTS[0])
    assert train(recipe("model.attention_bias=true", "duration=2 steps")).step == 2
