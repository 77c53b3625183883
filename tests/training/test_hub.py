"""Hub ids: what is fetched and what never is, which commit, and what a person reads when it cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.errors import UserError
from llmtrainer.base.rundir import RunDir
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.tokenizer import load_tokenizer, padded_vocabulary
from llmtrainer.training import hub as hub_module
from llmtrainer.training.hub import Located, locate
from llmtrainer.training.models import locate_model
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from llmtrainer.training.use import Evaluation, evaluate
from tests.training.hub_server import COMMITS, Hub, serving

ROOT = Path(__file__).parents[2]
READ = """
import json, sys
from llmtrainer.base.errors import UserError
{code}
"""


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(world / "tokenizer")
    tokenizer.save(folder)
    policy = Llama(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=32).build(
        padded_vocabulary(tokenizer.vocabulary)
    )
    policy.initialise(5)
    save_weights(policy, folder, shard_bytes=40_000)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ("pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors", "onnx/model.onnx", "README.md")
    with serving(Hub({"maker/model": {**files, **dict.fromkeys(others, b"never")}})) as hub:
        yield hub


Ask = Callable[..., Any]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """What Python code prints as JSON in a process that reads the hub's variables: the library does at import."""

    def run(code: str, endpoint: str, **variables: str) -> Any:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", READ.format(code=code)], cwd=tmp_path, env=environment, text=True,
            capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


LOCATE = """
from llmtrainer.training.hub import locate
told = []
for name, weights in {asked!r}:
    try:
        found = locate(name, weights=weights)
        told.append([str(found.folder), found.origin])
    except UserError as error:
        told.append([error.what, error.where, error.why, error.fix])
print(json.dumps(told))
"""


def locating(*asked: tuple[str, bool]) -> str:
    return LOCATE.format(asked=asked)


def test_a_model_is_fetched_with_its_tokenizer_and_without_code_and_pickles(
    hub: Hub, ask: Ask, folder: Path, tmp_path: Path
) -> None:
    asked = locating(("maker/model", True))
    [[found, origin]], told = ask(asked, hub.address)
    assert origin == f"maker/model@{COMMITS['main']}" and origin in told
    assert Path(found).is_relative_to(tmp_path / "home"), "HF_HOME says where"
    assert sorted(path.name for path in Path(found).iterdir()) == sorted(path.name for path in folder.iterdir())
    assert len(list(folder.glob("model-*.safetensors"))) > 1, "this test must hold shards"
    for path in folder.iterdir():
        assert (Path(found) / path.name).read_bytes() == path.read_bytes()
    assert sorted(hub.fetched) == sorted(path.name for path in folder.iterdir())
    # And it is found again without the hub.
    again, _ = ask(asked, hub.address, HF_HUB_OFFLINE="1")
    assert again == [[found, origin]] and len(hub.fetched) == len(list(folder.iterdir()))


def test_a_tokenizer_is_fetched_without_weights_and_what_the_hub_does_not_have_is_told_apart(
    hub: Hub, ask: Ask
) -> None:
    names = ("maker/model@older", False), ("maker/modle", True), ("maker/model@gone", True)
    [[_, origin], unknown, without], _ = ask(locating(*names), hub.address)
    assert origin == f"maker/model@{COMMITS['older']}"
    assert set(hub.fetched) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert unknown[:2] == ["`maker/modle` is neither a folder here nor a model there", hub.address]
    assert without[0] == "`maker/model` has no revision `gone`"


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"])
def test_without_the_hub_the_endpoint_and_a_way_out_are_told(ask: Ask, variables: dict[str, str]) -> None:
    nowhere = "http://127.0.0.1:9"      # the port of a service that discards what it gets: nothing listens
    [[what, where, why, fix]], _ = ask(locating(("maker/model", True)), nowhere, **variables)
    assert what == "`maker/model` is no folder here, and it could not be fetched"
    assert where == nowhere and why
    assert "HF_ENDPOINT=" in fix and "download the model by hand" in fix


def test_a_model_by_its_id_is_evaluated_and_trained_further_and_its_commit_is_recorded(
    recipe: Callable[..., Recipe], folder: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / COMMITS["main"]
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("llmtrainer.training.hub._snapshot", lambda *_: snapshot)
    hub_module._fetched.cache_clear()
    data = str(world / "text" / "000.txt")
    found = evaluate(Evaluation(model="maker/model", data=data, precision="float32"))
    assert found.loss == evaluate(Evaluation(model=str(folder), data=data, precision="float32")).loss
    assert found.model == str(snapshot), "the path names the commit"
    train(recipe("tokenizer=maker/model", "model={start_from: maker/model}", "duration=1 steps"))
    manifest = json.loads((RunDir(tmp_path / "run").newest_checkpoint() / "manifest.json").read_text())
    assert manifest["parent"] == f"maker/model@{COMMITS['main']}"
    # The run goes on from its own checkpoint: the hub is asked for nothing but the vocabulary.
    hub_module._fetched.cache_clear()
    asked: list[bool] = []
    real = hub_module._fetched
    monkeypatch.setattr("llmtrainer.training.hub._fetched", lambda *of: (asked.append(of[2]), real(*of))[1])
    assert train(recipe("tokenizer=maker/model", "model={start_from: maker/model}", "duration=2 steps")).step == 2
    assert asked == [False]
    real.cache_clear()


def test_a_folder_that_exists_wins_and_only_two_plain_words_are_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmtrainer.training.hub._fetched", lambda *asked: asked)
    (tmp_path / "maker/here").mkdir(parents=True)
    assert locate("maker/here", weights=True) == Located(Path("maker/here"), "maker/here")
    local = ["./maker/model", "../maker/model", "/maker/model", "~/model", "model", "a/b/c", "runs/x@", "a//b"]
    assert [locate(name, weights=True).folder for name in local] == [Path(name) for name in local]
    assert locate(Path("maker/model"), weights=True).folder == Path("maker/model")
    asked = {"Qwen/Qwen3-0.6B": None, "a/b@main": "main", "a/b@refs/pr/3": "refs/pr/3", "HuggingFaceTB/SmolLM2": None}
    for name, revision in asked.items():
        assert locate(name, weights=False) == (name.partition("@")[0], revision, False)


def test_the_average_of_a_run_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmtrainer.training.hub._fetched", lambda *asked: pytest.fail("the hub was asked"))
    monkeypatch.setattr(RunDir, "newest_checkpoint", lambda run: run.path / "newest")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert locate_model("run/ema") == Located(Path("run/newest/ema"), "run/ema")


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="nobody/nothing") as caught:
        locate("nobody/nothing", weights=True)
    assert "llmtrainer[hf]" in str(caught.value.fix)
