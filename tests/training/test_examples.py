"""Runs on conversations: several files, named sets, the template, losses, and resuming where a run was stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import read_events, steps
from llmtrainer.base.rundir import RunDir
from llmtrainer.data.packed import Store
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.assemble import engine_of, rows_of, tokenizer_of
from llmtrainer.training.check import check
from llmtrainer.training.datasets.examples import Examples
from llmtrainer.training.prepare import Preparation, prepare
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.run import train
from tests.tolerances import FLOAT32_LOSS
from tests.training.test_resume import curve, hashes, train_until

RECIPE = """
run: {folder}/run
model: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64, context_length: 64, dropout: 0.1}}
tokenizer: {world}/tokenizer
data:
  kind: examples
  train: [{folder}/a.jsonl, {folder}/b.json]
  evaluate: {{first: {folder}/c.jsonl, second: {folder}/d.jsonl}}
  template: chatml
  sequence_length: 64
  tokens_per_batch: 128
  sequences_per_step: 7
  workers: 1
optim:
  schedule: {{peak: 3e-3, warmup: 0 steps}}
precision: float32
duration: 9 steps
evaluate: {{every: 4 steps}}
save: {{every: 3 steps, keep_newest: 2, keep_best: 1}}
cache: {folder}/cache
seed: 11
"""

Make = Callable[..., Recipe]


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [
        ("".join(draw.choices("abcdefgh ", k=draw.randint(3, 12))), "".join(draw.choices("abcd", k=draw.randint(1, 8))))
        for _ in range(count)
    ]


def as_messages(asked: str, answered: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Four sets in three forms."""

    def lines(name: str, records: list[Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    lines("a.jsonl", [as_messages(*pair) for pair in pairs(20, 1)])
    told = [{"instruction": asked, "input": "", "output": answered} for asked, answered in pairs(13, 2)]
    (tmp_path / "b.json").write_text(json.dumps(told))
    lines("c.jsonl", [as_messages(*pair) for pair in pairs(5, 3)])
    turns = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}
        for asked, answered in pairs(4, 4)
    ]
    lines("d.jsonl", turns)
    return tmp_path


@pytest.fixture
def recipe(files: Path, world: Path) -> Make:
    path = files / "recipe.yaml"
    path.write_text(RECIPE.format(world=world, folder=files))
    return lambda *overrides: load(Recipe, path, overrides=overrides)


def store_of(recipe: Recipe) -> Store:
    engine, _ = engine_of(recipe)
    folder, tokenizer = tokenizer_of(recipe)
    return rows_of(recipe, folder, tokenizer, engine).train.store


def test_a_setting_that_a_prepared_store_was_not_made_with_is_refused(recipe: Make) -> None:
    store = f"data.train={store_of(recipe()).path}"
    assert store_of(recipe(store, "data.sequence_length=100", "data.tokens_per_batch=200")).documents == 33
    for setting in ("learn=everything", "too_long=cut", "gate=gate", "bad_records=drop"):
        with pytest.raises(UserError, match=f"`data.{setting.partition('=')[0]}` is given") as caught:
            store_of(recipe(store, f"data.{setting}"))
        assert "prepare the conversations again" in str(caught.value.fix)
    with pytest.raises(UserError, match=r"`data\.cut_end` was set and nothing read it"):
        train(recipe(store, "data.cut_end=leave_out"))


def test_the_training_set_is_the_union_and_each_named_set_is_reported(
    recipe: Make, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(recipe())
    assert set(done.figures) == {"first/loss", "second/loss"}
    store = store_of(recipe())
    assert store.documents == 33
    assert [(Path(source["path"]).name, source["documents"]) for source in store.manifest["sources"]] == [
        ("a.jsonl", 20), ("b.json", 13)
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert "format messages (known by `messages`)" in told and "format instruction" in told
    assert f"user: {pairs(20, 1)[0][0]}" in told and "33  records in all, which became 33 rows" in told
    events = [event for event in read_events(files / "run" / "events.jsonl") if event["kind"] == "evaluate"]
    assert [event["step"] for event in events] == [4, 8, 9] and all("second/loss" in event for event in events)


def test_bare_names_lie_in_the_folder_of_test_sets(recipe: Make, files: Path) -> None:
    data = recipe("data.evaluate=[c.jsonl, d.jsonl]", f"data.test_dataset_dir={files}").data
    assert isinstance(data, Examples)
    done = train(recipe("data.evaluate=[c.jsonl, d.jsonl]", f"data.test_dataset_dir={files}", "duration=1 steps"))
    assert set(done.figures) == {"c/loss", "d/loss"}
    named = train(recipe("duration=1 steps", f"run={files}/named")).figures
    assert [done.figures["c/loss"], done.figures["d/loss"]] == [named["first/loss"], named["second/loss"]]


def test_stopping_in_the_middle_of_an_epoch_changes_no_bit(recipe: Make, files: Path) -> None:
    # 33 rows, 7 a step: neither step 2 nor step 7 ends an epoch.
    train(recipe(f"run={files / 'whole'}"))
    train_until(recipe(), 2)
    train_until(recipe(), 7)
    train(recipe())
    assert hashes(files / "run", 9) == hashes(files / "whole", 9) and curve(files / "run") == curve(files / "whole")


STEPS = """
import sys
import llmtrainer as lt
with lt.open_trainer(lt.load(lt.Recipe, sys.argv[1], overrides=sys.argv[2:])) as trainer:
    for info in trainer.steps(): print(info.progress.step, flush=True)
"""


def test_a_run_that_is_killed_in_the_middle_of_an_epoch_ends_like_one_that_never_was(
    recipe: Make, files: Path, world: Path
) -> None:
    """kill -9, while a checkpoint is saved after every step; 33 rows, 7 a step: no step up to 33 ends an epoch."""
    settings = ("duration=36 steps", "save.every=1 steps", "evaluate.every=never")
    train(recipe(*settings, f"run={files / 'whole'}"))
    run = RunDir(files / "run")
    command = [sys.executable, "-c", STEPS, str(files / "recipe.yaml"), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(4)]
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and all(line.strip().isdigit() for line in lines)
    newest = max(int(folder.name[5:]) for folder in run.whole_checkpoints())
    assert 0 < newest < 33 and newest * 7 % 33, "it is in the middle of an epoch"
    train(recipe(*settings))
    assert hashes(files / "run", 36) == hashes(files / "whole", 36) and curve(files / "run") == curve(files / "whole")


BUILDER = """
import sys
import llmtrainer as lt
from llmtrainer.training import prepare_examples as module
from llmtrainer.training.assemble import engine_of, rows_of, tokenizer_of
write = module.write_examples
def counted(*arguments, **settings):
    print("made", flush=True)
    return write(*arguments, **settings)
module.write_examples = counted
recipe = lt.load(lt.Recipe, sys.argv[1], overrides=["data.evaluate={}"])
engine, _ = engine_of(recipe)
print(rows_of(recipe, *tokenizer_of(recipe), engine).train.store.path, flush=True)
"""


def test_two_processes_that_want_the_same_rows_make_them_once(recipe: Make, files: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(files / "recipe.yaml")]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)
    ]
    told = [child.communicate(timeout=120)[0].split() for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert sum(words.count("made") for words in told) == 1 and told[0][-1] == told[1][-1]
    found = Store(told[0][-1])
    found.verify()
    alone = store_of(recipe("data.evaluate={}", f"cache={files}/alone"))
    assert found.fingerprint == alone.fingerprint and found.path.name == alone.path.name


def test_only_answers_are_learned_and_the_count_is_of_what_is_read(recipe: Make, files: Path) -> None:
    store = store_of(recipe())
    tokenizer = tokenizer_of(recipe())[1]
    for document, (asked, answered) in enumerate([*pairs(20, 1), *pairs(13, 2)]):
        tokens, weights = store.read(document).tolist(), store.weights(document)
        assert weights is not None
        text = tokenizer.decode(tokens)
        assert text == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
        learned = [token for token, weight in zip(tokens, weights, strict=True) if weight]
        assert tokenizer.decode(learned) == f"{answered}<|im_end|>"


def test_another_template_is_refused_by_name_when_a_run_goes_on(recipe: Make, files: Path) -> None:
    template = files / "mine.jinja"
    text = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    end = "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    template.write_text(text + end)
    train_until(recipe(f"data.template={template}"), 2)
    template.write_text(text.replace("}}<|im_end|>", "}}<|im_end|>\n") + end)
    with pytest.raises(UserError, match="changed since") as error:
        train(recipe(f"data.template={template}"))
    assert "fingerprint" in str(error.value.why)
    with pytest.raises(UserError, match=r"differs .* in `data.template`"):
        train(recipe("data.template=chatml"))
    template.write_text(text + end)
    assert train(recipe(f"data.template={template}")).step == 9


def test_a_changed_set_is_refused_and_evaluation_sets_may_change(recipe: Make, files: Path) -> None:
    train_until(recipe(), 2)
    assert set(train(recipe(f"data.evaluate={{third: {files}/c.jsonl}}", "duration=4 steps")).figures) == {"third/loss"}
    (files / "b.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
    with pytest.raises(UserError, match="the data changed"):
        train(recipe("duration=5 steps"))


def test_a_checkpoint_is_a_chat_model_for_transformers(recipe: Make, files: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    train(recipe("duration=1 steps"))
    folder = RunDir(files / "run").newest_checkpoint()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "dd"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\ndd<|im_end|>\n"
    )
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id[0] == theirs.convert_tokens_to_ids("<|im_end|>")
    assert settings.eos_token_id[1] == theirs.eos_token_id


def test_what_is_in_the_cache_is_used_until_anything_that_decides_it_changes(
    recipe: Make, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = store_of(recipe()).path
    assert "were prepared" in capsys.readouterr().err
    assert store_of(recipe("data.evaluate={}", "data.workers=2", "seed=5")).path == first
    assert "are prepared already" in capsys.readouterr().err
    changed = ["data.sequence_length=63", "data.too_long=cut", "data.template=role_end", "data.bad_records=drop"]
    paths = {store_of(recipe(change)).path for change in changed}
    (files / "a.jsonl").write_text(json.dumps(as_messages("x", "y")))
    assert len(paths | {store_of(recipe()).path, first}) == 6


def test_a_store_that_was_prepared_before_is_taken_and_one_of_another_template_is_not(
    recipe: Make, files: Path, world: Path
) -> None:
    settings = Preparation(
        data=f"{files}/a.jsonl,{files}/b.json", out=str(files / "store"), tokenizer=str(world / "tokenizer"),
        format="auto", template="chatml", max_length=64, workers=1,
    )  # fmt: skip
    told = prepare(settings).json()
    assert told["fates"] == {"kept": 33} and told["records"] == told["documents"] == 33
    assert told["formats"] == ["instruction", "messages"] and told["reused"] is False
    assert prepare(settings).json() == {**told, "reused": True}
    assert store_of(recipe(f"data.train={files}/store")).fingerprint == store_of(recipe()).fingerprint
    with pytest.raises(UserError, match="another chat template"):
        store_of(recipe(f"data.train={files}/store", "data.template=role_end"))
    with pytest.raises(UserError, match="made of text"):
        store_of(recipe(f"data.train={world}/store"))


def test_settings_for_conversations_are_refused_where_plain_text_is_prepared(world: Path, tmp_path: Path) -> None:
    settings = {"data": str(world / "text"), "out": str(tmp_path / "store"), "tokenizer": str(world / "tokenizer")}
    with pytest.raises(UserError, match="`max_length` is for conversations"):
        prepare(Preparation(**settings, max_length=9))    # type: ignore[arg-type]
    with pytest.raises(UserError, match="no kind `mesages`"):
        prepare(Preparation(**settings, format="mesages"))    # type: ignore[arg-type]


def test_more_losses_than_allowed_stop_a_run_before_its_first_step(recipe: Make, files: Path) -> None:
    with pytest.raises(UserError, match="records would be dropped") as error:
        train(recipe("data.sequence_length=24"))
    assert "too long" in str(error.value.why) and "a.jsonl, line" in str(error.value.why)
    allowed = ("data.max_dropped_share=1", "data.evaluate={}", "duration=1 steps")
    assert train(recipe("data.sequence_length=24", *allowed)).step == 1
    # What is in the cache by now does not get around the limit.
    with pytest.raises(UserError, match="records would be dropped"):
        train(recipe("data.sequence_length=24", f"run={files}/other"))


def test_a_row_that_is_kept_beyond_the_context_of_a_loaded_model_is_refused_by_name(
    recipe: Make, files: Path, world: Path
) -> None:
    policy = Llama(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=40).build(330)
    policy.initialise(9)
    save_weights(policy, files / "base")
    load_tokenizer(world / "tokenizer").save(files / "base")
    with (files / "a.jsonl").open("a") as file:
        file.write(json.dumps(as_messages("abcdefgh " * 40, "ok")) + "\n")
    keep = ("data.too_long=keep", "data.tokens_per_batch=1024", "data.evaluate={}", "duration=1 steps")
    start = f"model={{start_from: {files}/base}}"
    with pytest.raises(UserError, match="a guard: context") as error:
        train(recipe(start, *keep))
    assert "the model's context is 40" in str(error.value.why)
    assert train(recipe(start, *keep, "allow=[context]")).step == 1
    few = ("data.tokens_per_batch=64", "allow=[context]", f"run={files}/few")
    assert train(recipe(start, *keep, *few)).step == 1
    losses = [steps(Path(folder) / "events.jsonl")[0]["loss"] for folder in (recipe().run, files / "few")]
    assert losses[0] == pytest.approx(losses[1], rel=FLOAT32_LOSS)    # a longer row is a micro-batch alone
    measured = [setting for setting in keep if "evaluate" not in setting] + [f"run={files}/measured"]
    long = (*measured, f"data.train={files}/c.jsonl", f"data.evaluate={{long: {files}/a.jsonl}}")
    with pytest.raises(UserError, match="the evaluation set long has rows beyond the model's context") as error:
        train(recipe(start, *long))
    assert "context is 40" in str(error.value.why) and "row 21 of" in str(error.value.where)
    assert train(recipe(start, *long, "allow=[context]")).step == 1
    assert train(recipe(start, "data.evaluate={}", "duration=1 steps", "data.sequence_length=41",
                        f"run={files}/short")).step == 1    # fmt: skip


def test_a_template_that_rewrites_earlier_turns_makes_one_row_of_a_conversation_where_the_last_answer_is_learned(
    recipe: Make, files: Path
) -> None:
    template = files / "forgets.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
        "({{ m.reasoning_content }}){% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = [("a", "bb"), ("c", "dd"), ("e", "ff")]
    messages = [
        message for asked, answered in said for message in (
            {"role": "user", "content": asked}, {"role": "assistant", "content": answered, "thinking": "hm"},
        )
    ]  # fmt: skip
    (files / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    given = (f"data.template={template}", f"data.train={files}/a.jsonl", "data.evaluate={}", "data.sequence_length=96")
    tokenizer = tokenizer_of(recipe())[1]
    all_of_them, last = store_of(recipe(*given)), store_of(recipe(*given, "data.learn=last_answer"))
    assert all_of_them.documents == 3 and last.documents == 1
    tokens, weights = last.read(0).tolist(), last.weights(0)
    assert weights is not None and tokens == all_of_them.read(2).tolist()
    learned = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert tokenizer.decode(learned) == "(hm)ff<|im_end|>"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("data.tokens_per_batch=63", "below data.sequence_length"),
        ("data.tokens_per_step=70", "say the same thing twice"),
        ("data.evaluate=[x/c.jsonl, y/c.jsonl]", "two evaluation sets have one name"),
        ("data.evaluate={held_out: c.jsonl}", "two evaluation sets are called `held_out`"),
        ("data.policy=split", "unknown key `data.policy`"),
        ("data.format=mesages", "did you mean `messages`"),
        ("data.cut_side=left", "`data.cut_side` was set and nothing read it"),
        ("tokenizer={vocabulary: 320}", "a vocabulary is learned from text"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: Make, change: str, what: str) -> None:
    with pytest.raises(UserError, match=what.replace("[", r"\[")):
        train(recipe(change, *(["data.held_out=0.2"] if "held_out" in change else []), "duration=1 steps"))


def test_rows_are_held_out_by_share_and_dry_runs_work(recipe: Make) -> None:
    result = check(recipe("data.held_out=0.2", "evaluate.held_out_rows=3"))
    assert result.exit_code == 0, result.text()
    told = {item.name: item.detail for item in result.checks}
    assert "held_out/loss" in told["evaluate"] and "first/loss" in told["evaluate"]


def test_keys_of_documents_lead_to_conversations_where_they_mean_those(recipe: Make) -> None:
    with pytest.raises(UserError) as error:
        recipe("data.kind=documents")
    assert "data.kind=examples" in str(error.value) or "Documents has" in str(error.value)
