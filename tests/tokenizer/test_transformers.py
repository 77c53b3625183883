"""transformers.AutoTokenizer reads what we save, with the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrainer.tokenizer.split import CONTROL_NAMES
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from tests.tokenizer.conftest import hostile

READ = """
import json, sys
from transformers import AutoTokenizer
strings = json.load(open(sys.argv[1], encoding="utf-8"))
read = {}
for place, folder in enumerate(sys.argv[3:]):
    strings = strings if place == 0 else strings[-100:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in strings]
    read[folder] = {
        "length": len(tokenizer), "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
        "special": sorted(tokenizer.all_special_ids),
        "as_text": [tokenizer(text, split_special_tokens=True).input_ids for text in strings],
        "by_default": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "skipped": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    }
json.dump(read, open(sys.argv[2], "w", encoding="utf-8"))
"""
MODEL_TYPES = (None, "llama", "mistral", "qwen3")
"""With a model beside it, AutoTokenizer may choose a class by the model's type, and that class a split
rule."""


def test_auto_tokenizer_in_a_new_process_gives_our_ids(trained: FileTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    strings = [text for text in hostile(1_000, seed=2) if text]
    strings += [f"before {name} after" for name in CONTROL_NAMES]
    (tmp_path / "strings").write_text(json.dumps(strings))
    folders = {str(tmp_path / str(model_type)): model_type for model_type in MODEL_TYPES}
    for folder, model_type in folders.items():
        trained.save(Path(folder))
        if model_type is not None:
            (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}))
    run = [sys.executable, "-c", READ, str(tmp_path / "strings"), str(tmp_path / "read"), *folders]
    subprocess.run(run, check=True, capture_output=True)
    read = json.loads((tmp_path / "read").read_text(encoding="utf-8"))
    assert list(read) == list(folders)
    for place, (folder, theirs) in enumerate(read.items()):
        strings = strings if place == 0 else strings[-100:]
        ours = load_tokenizer(folder)
        allowed = [ours.encode(text, allowed="all") for text in strings]
        assert theirs["length"] == ours.vocabulary
        assert (theirs["end"], theirs["pad"]) == (ours.end, ours.pad)
        assert theirs["special"] == sorted(ours.control.values())
        assert theirs["as_text"] == ours.encode_batch(strings)
        assert theirs["by_default"] == allowed
        assert theirs["decoded"] == [ours.decode(ids) for ids in allowed] == strings
        assert theirs["skipped"] == [ours.decode(ids, skip_control=True) for ids in allowed]


def test_our_loader_needs_no_transformers(trained: FileTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from llmtrainer.tokenizer.tokenizer import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).encode('def f(x):'), 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        run, check=True, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == f"{trained.encode('def f(x):')} False"
