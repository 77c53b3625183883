"""Bad input costs nothing: what, where, why, fix on stderr, exit code 2, and the files as they were."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrainer.apps.cli import main
from llmtrainer.base.rundir import RunDir
from llmtrainer.training import checkpoint

RECIPE = """
run: {run}
model: {{hidden_size: 32, layers: 1, heads: 2, intermediate_size: 64, context_length: 32}}
tokenizer: {{vocabulary: 300}}
data: {{train: {text}, sequence_length: 32, tokens_per_batch: 64, sequences_per_step: 2}}
optim: {{schedule: {{kind: constant, warmup: 0 steps}}}}
precision: float32
duration: 3 steps
cache: {cache}
"""


class Place:
    """A folder with a text, a recipe, and a run of three steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text"
        self.text.mkdir()
        (self.text / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(run=folder / "run", text=self.text, cache=folder / "cache"))

    def train(self, *overrides: str) -> int:
        return main(["train", str(self.recipe), *overrides])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def missing_file(place: Place) -> list[str]:
    return ["train", str(place.recipe), f"data.train={place.folder}/nowhere"]


def missing_recipe(place: Place) -> list[str]:
    return ["train", str(place.folder / "nowhere.yaml")]


def wrong_key(place: Place) -> list[str]:
    return ["train", str(place.recipe), "optim.schedule.peek=1"]


def truncated_gz(place: Place) -> list[str]:
    packed = gzip.compress(b'{"text": "' + os.urandom(4000).hex().encode() + b'"}\n' * 2)
    (place.text / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    return ["train", str(place.recipe)]


def foreign_bytes(place: Place) -> list[str]:
    (place.text / "b.txt").write_bytes(b"good text\n\xff\xfe bad text")
    return ["train", str(place.recipe)]


def broken_json(place: Place) -> list[str]:
    (place.text / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return ["train", str(place.recipe)]


def other_vocabulary(place: Place) -> list[str]:
    for size in (300, 310):
        main(["train-tokenizer", str(place.text), str(place.folder / f"t{size}"), f"vocabulary={size}"])
    main(["prepare", str(place.text), str(place.folder / "store"), f"tokenizer={place.folder / 't300'}"])
    return [
        "train", str(place.recipe), f"data.train={place.folder / 'store'}",
        f"tokenizer={{path: {place.folder / 't310'}}}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (missing_file, "nowhere"),
        (missing_recipe, "nowhere.yaml"),
        (wrong_key, "`peak`"),
        (truncated_gz, "b.jsonl.gz"),
        (foreign_bytes, "b.txt"),
        (broken_json, "b.jsonl, line 2"),
        (other_vocabulary, "another tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_refused_with_four_parts_and_exit_code_2(
    place: Place, capfd: pytest.CaptureFixture[str], break_it: Callable[[Place], list[str]], said: str
) -> None:
    words = break_it(place)
    capfd.readouterr()
    assert main(words) == 2
    told = capfd.readouterr().err
    assert said in told and "fix" in told and "Traceback" not in told
    assert not RunDir(place.folder / "run").step_folders()


def test_a_data_folder_that_changed_between_two_runs_is_refused_and_the_run_is_as_it_was(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    # A vocabulary of its own, so that only the text differs.
    main(["train-tokenizer", str(place.text), str(place.folder / "t"), "vocabulary=300"])
    tokenizer = f"tokenizer={{path: {place.folder / 't'}}}"
    assert place.train(tokenizer) == 0
    (place.text / "a.txt").write_text("all of it is different now\n" * 60)
    capfd.readouterr()
    assert place.train(tokenizer, "duration=5 steps") == 2
    told = capfd.readouterr().err
    assert "data changed" in told and "model.start_from" in told
    newest = RunDir(place.folder / "run").newest_checkpoint()
    assert newest.name == "step-00000003" and checkpoint.verify(newest) is None


def test_a_disk_that_fills_while_saving_ends_the_run_and_keeps_the_last_checkpoint(
    place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from llmtrainer.training import saving

    assert place.train("duration=2 steps") == 0
    real = saving.save_file

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "save_file", full)
    capfd.readouterr()
    assert place.train("duration=4 steps") == 2
    assert "disk is full" in capfd.readouterr().err
    newest = RunDir(place.folder / "run").newest_checkpoint()
    assert newest.name == "step-00000002" and checkpoint.verify(newest) is None
    monkeypatch.setattr(saving, "save_file", real)
    assert place.train("duration=4 steps") == 0
    assert RunDir(place.folder / "run").newest_checkpoint().name == "step-00000004"
