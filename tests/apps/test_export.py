"""export: what transformers loads from the folder is the model that was exported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtrainer.apps.cli import main
from llmtrainer.apps.export import Export, export
from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import load_policy, save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training import publishing as module
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from llmtrainer.training.use import Generation, generate
from tests.tolerances import TRANSFORMERS_FLOAT64_LOGITS

transformers = pytest.importorskip("transformers")

RECIPE = """
run: {run}
model: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64, context_length: 64, rope_theta: 500}}
tokenizer: {{vocabulary: 320}}
data: {{train: {text}, sequence_length: 32, tokens_per_batch: 128, sequences_per_step: 4}}
optim: {{schedule: {{peak: 1e-2, warmup: 0 steps}}}}
precision: float32
duration: 6 steps
cache: {cache}
"""
TEXTS = ["cat sat", "  return 1\n", "\u4e2d\u6587 caf\u00e9 \U0001f600", "it's 12345", "<|endoftext|> x <|im_start|>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on made-up words."""
    folder = tmp_path_factory.mktemp("trained")
    draw = random.Random(2)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(60)]
    (folder / "text").mkdir()
    for number in range(30):
        (folder / "text" / f"{number}.txt").write_text(" ".join(draw.choices(words, k=120)))
    recipe = RECIPE.format(run=folder / "run", text=folder / "text", cache=folder / "cache")
    (folder / "recipe.yaml").write_text(recipe)
    train(load(Recipe, folder / "recipe.yaml"))
    return folder / "run"


def logits_of_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def logits_of_ours(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """Of the last position; float64."""
    cache = decoder.cache(1, len(ids))
    with torch.no_grad():
        return decoder.eval().read(torch.tensor([ids]), torch.tensor([len(ids)]), cache)[0]


def model_folder(folder: Path, tokenizer: FileTokenizer | None, **shape: Any) -> Path:
    """A model with random weights, biases and norms included, in a folder as others save it."""
    fields = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64, **shape}
    decoder = Llama.model_validate(fields).build(320)
    decoder.initialise(1)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    save_weights(decoder, folder, end=1, pad=1)
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


def test_transformers_computes_the_same_from_an_exported_run(run: Path, tmp_path: Path) -> None:
    told = export(Export(model=str(run), out=str(tmp_path / "out")))
    assert told.path == str(tmp_path / "out") and told.precision == "float32" and told.differences == []
    ours = load_tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(told.path)
    for text in TEXTS:
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end, ours.pad)
    ids = ours.encode("abc def gh a bcd")
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    wanted = logits_of_ours(load_policy(checkpoint, torch.float64), ids)
    assert (logits_of_transformers(tmp_path / "out", ids)[-1] - wanted).abs().max() < TRANSFORMERS_FLOAT64_LOGITS


def test_transformers_writes_the_same_greedy_text_from_an_exported_run(run: Path, tmp_path: Path) -> None:
    export(Export(model=str(run), out=str(tmp_path / "out")))
    settings = {"prompt": "abc def", "temperature": 0.0, "max_new_tokens": 20, "precision": "float32"}
    ours = generate(Generation(model=str(run), **settings)).completions[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    prompt = tokenizer("abc def", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert written.tolist()[: len(ours.ids)] == list(ours.ids)
    assert tokenizer.decode(written, skip_special_tokens=True) == ours.text


def test_weights_are_rounded_once_to_the_type_that_was_asked_for(run: Path, tmp_path: Path) -> None:
    told = export(Export(model=str(run), out=str(tmp_path / "out"), precision="bfloat16", shard_bytes=20_000))
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    stored = {name: value for file in shards for name, value in load_file(file).items()}
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    masters = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == masters.keys() and told.tensors == len(masters)
    for name, value in masters.items():
        torch.testing.assert_close(stored[name], value.to(torch.bfloat16), rtol=0, atol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(told.path, dtype="auto")
    assert model.dtype is torch.bfloat16
    assert export(Export(model=told.path, out=str(tmp_path / "again"))).precision == "bfloat16"


SHAPES: list[dict[str, Any]] = [{}, {"query_key_norm": True}, {"sliding_window": 16}, {"attention_bias": True}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto_tokenizer_keeps_our_rule_beside_every_class_of_model(run: Path, tmp_path: Path, shape: Any) -> None:
    # Beside a `qwen2`, transformers takes Qwen2's rule instead: biases without output bias are that class's mark.
    ours = load_tokenizer(sorted((run / "checkpoints").iterdir())[-1])
    source = model_folder(tmp_path / "in", ours, **shape)
    export(Export(model=str(source), out=str(tmp_path / "out"), check=True))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    texts = [*TEXTS, "x = 2024 == 12345678", "def f():\n        return 1\n"]
    assert [theirs(text, split_special_tokens=True)["input_ids"] for text in texts] == ours.encode_batch(texts)
    ids = ours.encode("abc def gh") * 5
    far = logits_of_transformers(tmp_path / "out", ids)[-1] - logits_of_ours(load_policy(source, torch.float64), ids)
    assert far.abs().max() < TRANSFORMERS_FLOAT64_LOGITS


def test_template_generation_settings_and_further_ends_are_the_sources(run: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(sorted((run / "checkpoints").iterdir())[-1])
    source = model_folder(tmp_path / "in", ours)
    (source / "chat_template.jinja").write_bytes("{{ messages }}\r\n\u4e2d".encode())
    (source / "generation_config.json").write_bytes(b'{"temperature": 0.6, "do_sample": true}')
    config = json.loads((source / "config.json").read_text())
    ends = [ours.end, ours.control["<|im_end|>"]]
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": ends, "use_cache": True}))
    told = export(Export(model=str(source), out=str(tmp_path / "out")))
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos_token_id"] == ends
    assert "use_cache: true, left out" in told.differences


def test_a_folder_that_says_nothing_of_roles_is_told_them(run: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(sorted((run / "checkpoints").iterdir())[-1])
    source = model_folder(tmp_path / "in", ours)
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").unlink()
    export(Export(model=str(source), out=str(tmp_path / "out")))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token == "<|pad|>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ours.end, "pad_token_id": ours.pad}


def test_what_lies_at_out_is_replaced_only_if_asked_and_only_if_it_is_a_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(Export(model=str(run), out=str(out)))
    (out / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="there is something already") as caught:
        export(Export(model=str(run), out=str(out)))
    assert "overwrite=true" in str(caught.value.fix) and (out / "note.txt").exists()
    export(Export(model=str(run), out=str(out), overwrite=True))
    assert not (out / "note.txt").exists()
    with pytest.raises(UserError, match="there is something already"):
        export(Export(model=str(out), out=str(out), overwrite=True))
    for other in (run, tmp_path):
        before = sorted(other.rglob("*"))
        with pytest.raises(UserError, match="there is something already"):
            export(Export(model=str(run), out=str(other), overwrite=True))
        assert sorted(other.rglob("*")) == before


@pytest.mark.parametrize("part", ["weights", "rope_theta", "merges", "template"])
def test_an_export_that_is_not_the_model_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    ours = load_tokenizer(sorted((run / "checkpoints").iterdir())[-1])
    source = model_folder(tmp_path / "in", ours)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write = module._write_generation

    def damage(before: Path, config: dict[str, Any], folder: Path) -> None:
        write(before, config, folder)
        name, old, new = {
            "weights": ("model.safetensors", b"", b""),
            "rope_theta": ("config.json", b'"rope_theta": 10000.0', b'"rope_theta": 20000.0'),
            "merges": ("tokenizer_config.json", b'"eos_token": "<|endoftext|>"', b'"eos_token": "<|im_end|>"'),
            "template": ("chat_template.jinja", b"messages", b"message"),
        }[part]
        data = (folder / name).read_bytes()
        changed = data.replace(old, new) if old else data[:-1] + bytes([data[-1] ^ 1])
        assert changed != data
        (folder / name).write_bytes(changed)

    monkeypatch.setattr(module, "_write_generation", damage)
    with pytest.raises(UserError):
        export(Export(model=str(source), out=str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("shape", [{"rotary_share": 0.5}, {"attention_bias": True, "sliding_window": 8}], ids=str)
def test_a_model_that_no_class_of_transformers_computes_is_refused(
    run: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    ours = load_tokenizer(sorted((run / "checkpoints").iterdir())[-1])
    source = model_folder(tmp_path / "in", ours, **shape)
    with pytest.raises(UserError, match="no class of transformers computes this model"):
        export(Export(model=str(source), out=str(tmp_path / "out")))


def test_the_command_tells_the_path_as_json_and_the_lines_to_load_it_as_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "out")
    assert main(["export", str(run), str(tmp_path / "other")]) == 0
    assert f'AutoTokenizer.from_pretrained("{tmp_path / "other"}")' in capsys.readouterr().out
