"""evaluate, generate and plot on a tiny model that lies in a folder, and the models they open."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.base.config import load
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import EventLog
from llmtrainer.core.batch import Batch
from llmtrainer.evals.perplexity import Perplexity
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.weights import save_weights
from llmtrainer.tokenizer.tokenizer import FileTokenizer, padded_vocabulary
from llmtrainer.tokenizer.train import train_vocabulary
from llmtrainer.training.console import voice
from llmtrainer.training.models import load_model, load_tokenizer, model_folder, open_model
from llmtrainer.training.use import Evaluation, Generation, Plot, evaluate, generate, plot
from llmtrainer.training.writing import text_after, visible
from tests.tolerances import FLOAT32_LOSS, FLOAT64_NATS

CONTEXT = 32
LINES = [f"def step_{number}(value):\n    return value + {number}  # \u4f60\u597d\n" for number in range(60)]
TEXT = "".join(LINES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model whose logits are far from flat, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_vocabulary(iter([TEXT]), 320)
    tokenizer.save(folder)
    family = Llama(hidden_size=32, layers=2, heads=4, kv_heads=2, context_length=CONTEXT, init_std=0.3)
    policy = family.build(padded_vocabulary(tokenizer.vocabulary), torch.float32)
    policy.initialise(5)
    save_weights(policy, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files: one document, and three records of which one is empty and one is longer than the context."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(LINES[0])
    records = [LINES[1], "", TEXT[:400]]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return folder


def nats_by_hand(folder: Path, text: str) -> list[float]:
    """Every token after the first, each by a forward pass over its own prefix, in float64."""
    policy, tokenizer = load_model(folder, "float64"), load_tokenizer(folder)
    ids = tokenizer.encode(text)
    found = []
    for place in range(1, len(ids)):
        start = 0
        while place > start + CONTEXT:
            start += CONTEXT // 2
        seen = torch.tensor([ids[start:place]])
        T = seen.shape[1]
        targets = torch.tensor([ids[start + 1 : place + 1]])
        weights = torch.zeros(1, T)
        weights[0, -1] = 1.0
        zeros = torch.zeros(1, T, dtype=torch.int32)
        batch = Batch(
            tokens_BT=seen, targets_BT=targets, weights_BT=weights, document_BT=zeros,
            position_BT=torch.arange(T, dtype=torch.int32)[None], sequence_BT=zeros, place_B=torch.zeros(1).long(),
        )
        with torch.no_grad():
            logp_BT = policy(batch, ("logp",)).logp_BT
        assert logp_BT is not None
        found.append(-float(logp_BT[0, -1]))
    return found


def test_a_models_loss_is_the_mean_surprise_worked_out_token_by_token(model: Path, data: Path) -> None:
    texts = [LINES[0], LINES[1], "", TEXT[:400]]
    nats = [value for text in texts for value in nats_by_hand(model, text)]
    size = sum(len(text.encode()) for text in texts)
    found = evaluate(Evaluation(model=str(model), data=str(data), precision="float64")).json()
    assert found["loss"] == pytest.approx(math.fsum(nats) / len(nats), abs=FLOAT64_NATS)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=FLOAT64_NATS)
    assert found["bits_per_byte"] == pytest.approx(math.fsum(nats) / math.log(2) / size, abs=FLOAT64_NATS)
    assert (found["tokens"], found["bytes"], found["documents"]) == (len(nats), size, 4)
    assert (found["model"], found["data"], found["precision"]) == (str(model), str(data), "float64")
    json.dumps(found, allow_nan=False)


def test_the_loss_is_that_of_transformers_on_the_same_folder(model: Path, data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = torch.tensor([load_tokenizer(model).encode(LINES[0])])
    assert ids.shape[1] <= CONTEXT + 1
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits    # its own loss is computed in float32
    expected = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    found = evaluate(Evaluation(model=str(model), data=str(data / "a.txt"), precision="float64"))
    # Its rotary tables and norms are float32 whatever the model is.
    assert found.loss == pytest.approx(expected, abs=FLOAT32_LOSS)


def test_items_are_the_documents_in_order_and_their_sums_are_the_whole(model: Path, data: Path) -> None:
    wish = Evaluation(model=str(model), data=str(data), precision="float64", items=True, per_token=True)
    found = evaluate(wish).json()
    first, second, empty, long = found["items"]
    assert [(Path(item["file"]).name, item["record"]) for item in found["items"]] == [
        ("a.txt", 1), ("b.jsonl", 1), ("b.jsonl", 2), ("b.jsonl", 3),
    ]
    assert (empty["loss"], empty["tokens"]) == (None, 0)
    assert first["nats"][0] is None
    assert first["nats"][1:] == pytest.approx(nats_by_hand(model, LINES[0]), abs=FLOAT64_NATS)
    assert "".join(long["pieces"]) == TEXT[:400]
    assert len(long["pieces"]) == len(long["ids"]) == len(long["nats"])
    whole = math.fsum(item["loss"] * item["tokens"] for item in (first, second, long))
    assert whole == pytest.approx(found["loss"] * found["tokens"], rel=FLOAT64_NATS)


def test_the_memory_knob_changes_no_figure(model: Path, data: Path) -> None:
    def figures(**knobs: int) -> dict[str, Any]:
        told = evaluate(Evaluation(model=str(model), data=str(data), precision="float64", **knobs)).json()
        return {name: told[name] for name in ("loss", "perplexity", "bits_per_byte", "tokens")}

    assert figures(tokens_per_batch=CONTEXT) == pytest.approx(figures(), rel=FLOAT64_NATS)


def test_only_the_first_documents_are_read_if_so_many_are_asked_for(model: Path, data: Path) -> None:
    found = evaluate(Evaluation(model=str(model), data=str(data), documents=1)).json()
    assert (found["documents"], found["bytes"]) == (1, len(LINES[0].encode()))


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes_where_that_is_allowed(model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    whole.write_text('{"text": "alpha beta"}\n')
    cut.write_text('{"text": "alpha beta"}\n{"text": "gam')
    with pytest.raises(UserError) as error:
        evaluate(Evaluation(model=str(model), data=str(cut)))
    assert "allow_truncated=true for prepare and evaluate" in str(error.value.fix)
    found = evaluate(Evaluation(model=str(model), data=str(cut), allow_truncated=True))
    assert found.loss == evaluate(Evaluation(model=str(model), data=str(whole))).loss


def test_a_compressed_file_gives_the_figures_of_the_file_itself(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT[:300])
    with gzip.open(tmp_path / "x.txt.gz", "wt") as file:
        file.write(TEXT[:300])
    plain, packed = (
        evaluate(Evaluation(model=str(model), data=str(tmp_path / name))).json()["loss"]
        for name in ("x.txt", "x.txt.gz")
    )
    assert plain == packed


def test_suites_are_told_under_their_names_and_need_no_data(model: Path, data: Path) -> None:
    suite = Perplexity(name="short", path=str(data / "a.txt"))
    found = evaluate(Evaluation(model=str(model), suites=(suite,), precision="float64")).json()
    assert (found["loss"], found["tokens"], found["items"]) == (None, None, None)
    hand = nats_by_hand(model, LINES[0])
    assert found["suites"]["short"]["loss"] == pytest.approx(math.fsum(hand) / len(hand), abs=FLOAT64_NATS)


def test_two_suites_of_one_name_are_refused(model: Path, data: Path) -> None:
    suites = (Perplexity(path=str(data)), Perplexity(path=str(data)))
    with pytest.raises(UserError, match="two suites are called `perplexity`"):
        evaluate(Evaluation(model=str(model), suites=suites))


def test_an_evaluation_of_nothing_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(Evaluation(model=str(model)))


def test_tokens_without_their_documents_are_refused(model: Path, data: Path) -> None:
    with pytest.raises(UserError, match="per_token needs items"):
        evaluate(Evaluation(model=str(model), data=str(data), per_token=True))


def test_an_evaluation_reads_well(model: Path, data: Path) -> None:
    told = evaluate(Evaluation(model=str(model), data=str(data), items=True))
    text = told.text()
    assert f"loss           {told.loss:.4f}   nats a token" in text
    assert "4 documents" in text
    assert text.splitlines()[-2].endswith("b.jsonl, record 2")
    assert max(map(len, text.splitlines()[1:5])) <= 80


def test_generation_with_one_seed_is_one_text_and_with_another_another(model: Path) -> None:
    def written(seed: int) -> Any:
        return generate(Generation(model=str(model), prompt="def ", max_new_tokens=12, seed=seed)).json()["completions"]

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_greedy_generation_is_the_likeliest_token_by_a_forward_pass_without_cache(model: Path) -> None:
    wish = Generation(model=str(model), prompt="def step", max_new_tokens=8, temperature=0.0, precision="float64")
    (found,) = generate(wish).json()["completions"]
    policy, tokenizer = load_model(model, "float64"), load_tokenizer(model)
    ids = tokenizer.encode("def step")
    for token in found["ids"]:
        T = len(ids)
        zeros = torch.zeros(1, T, dtype=torch.int32)
        batch = Batch(
            tokens_BT=torch.tensor([ids]), targets_BT=torch.zeros(1, T).long(), weights_BT=torch.ones(1, T),
            document_BT=zeros, position_BT=torch.arange(T, dtype=torch.int32)[None], sequence_BT=zeros,
            place_B=torch.zeros(1).long(),
        )
        with torch.no_grad():
            logits_V = (policy.hidden(batch)[0, -1] @ policy.head_weight.T)[: tokenizer.vocabulary]
        assert token == int(logits_V.argmax())
        ids.append(token)
    assert (found["tokens"], found["finish"]) == (8, "length")
    assert found["prompt"] + found["text"] == tokenizer.decode(ids, skip_control=True)


def test_samples_are_written_side_by_side_and_differ(model: Path) -> None:
    told = generate(Generation(model=str(model), prompt="def ", max_new_tokens=9, samples=3, temperature=1.5))
    found = told.json()["completions"]
    assert len({completion["text"] for completion in found}) == 3
    assert all(set(completion) >= {"prompt", "text", "tokens", "finish"} for completion in found)
    assert told.text().startswith("--- 1 of 3\ndef ")


def test_a_file_of_prompts_is_continued_as_each_would_be_alone(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    prompts = ["def ", "return value", "def step_1("]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    wish = Generation(model=str(model), prompts=str(file), max_new_tokens=6, temperature=0.0, samples=2, rows_at_once=4)
    found = generate(wish).json()["completions"]
    assert [completion["prompt"] for completion in found] == [text for text in prompts for _ in range(2)]
    for text, completion in zip(prompts, found[::2], strict=True):
        alone = generate(Generation(model=str(model), prompt=text, max_new_tokens=6, temperature=0.0))
        assert alone.json()["completions"] == [completion]


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "prompts": "b"}], ids=["neither", "both"])
def test_generation_needs_either_a_prompt_or_a_file(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"nothing to continue|both given"):
        generate(Generation(model="m", **given))


def test_a_stop_string_cuts_the_text_and_a_control_tokens_name_is_its_id(model: Path) -> None:
    plain = {"model": str(model), "prompt": "def step", "max_new_tokens": 14, "temperature": 0.0}
    (whole,) = generate(Generation(**plain)).json()["completions"]
    stop = whole["text"][5:8]
    (cut,) = generate(Generation(**plain, stop=(stop,))).json()["completions"]
    assert (cut["text"], cut["finish"]) == (whole["text"][: whole["text"].index(stop)], "stop")
    assert cut["ids"] == whole["ids"][: cut["tokens"]]
    control = {number: name for name, number in load_tokenizer(model).control.items()}
    place = next(place for place, number in enumerate(whole["ids"]) if number in control)
    (ended,) = generate(Generation(**plain, stop=(control[whole["ids"][place]],))).json()["completions"]
    assert (ended["ids"], ended["finish"]) == (whole["ids"][: place + 1], "stop")


def test_logprobs_are_told_for_every_token_and_only_on_request(model: Path) -> None:
    wish = {"model": str(model), "prompt": "def step", "max_new_tokens": 5, "temperature": 0.0, "precision": "float64"}
    assert "logprobs" not in generate(Generation(**wish)).json()["completions"][0]
    (found,) = generate(Generation(**wish, logprobs=2)).json()["completions"]
    ids, told = found["ids"], found["logprobs"]
    assert told["sampled"] == [0.0] * 5
    assert [tops[0]["id"] for tops in told["top"]] == ids
    assert [tops[0]["logprob"] for tops in told["top"]] == told["model"]
    assert all(tops[1]["logprob"] <= tops[0]["logprob"] < 0.0 for tops in told["top"])
    json.dumps(found, allow_nan=False)


def test_the_end_token_ends_a_text_and_is_not_shown(tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    tokenizer = train_vocabulary(iter([TEXT]), 320)
    tokenizer.save(folder)
    policy = Llama(hidden_size=8, layers=1, heads=1, context_length=CONTEXT).build(320, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(0.1)
        policy.head_weight[tokenizer.end] = 1.0    # every hidden state is positive: the end is always likeliest
    save_weights(policy, folder)
    (found,) = generate(Generation(model=str(folder), prompt="def", temperature=0.0)).json()["completions"]
    assert (found["text"], found["tokens"], found["finish"]) == ("", 1, "end")


@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "to a stop string"])
def test_a_person_sees_the_text_as_it_grows_and_only_once(
    model: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    wish = dict(model=str(model), prompt="def ", max_new_tokens=15, temperature=1.0, seed=3)
    stop = {"stop": (generate(Generation(**wish)).json()["completions"][0]["text"][9:11],)} if stopped else {}
    settings = Generation(**wish, **stop)
    expected = generate(settings)
    assert expected.completions[0].finish == ("stop" if stopped else "length")
    monkeypatch.setattr("sys.stdout", Terminal())
    with voice():
        told = generate(settings)
    assert told.json()["completions"] == expected.json()["completions"]
    assert "".join(written) == visible(expected.text()) + "\n"
    assert len(written) > 5, "in one piece, not as it grows"
    assert told.text() == "", "the command line would print it a second time"


@pytest.mark.parametrize("manner", [{"json": True}, {"quiet": True}, None], ids=["json", "quiet", "library"])
def test_nothing_is_streamed_where_stdout_is_not_for_people(
    model: Path, manner: dict[str, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    wish = Generation(model=str(model), prompt="def ", max_new_tokens=3)
    if manner is None:
        told = generate(wish)
    else:
        with voice(**manner):
            told = generate(wish)
    assert terminal.getvalue() == ""
    assert told.text().startswith("def ")


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them() -> None:
    assert visible("a\x1b[31m\tb\n\x7f\x9bc\r\u4f60") == "a\\x1b[31m\tb\n\\x7f\\x9bc\\x0d\u4f60"


def test_a_continuation_keeps_the_blank_that_a_decoder_drops_at_the_start_of_a_text() -> None:
    class Words:
        def decode(self, ids: list[int], *, skip_control: bool = False) -> str:
            return "".join([" the", " cat"][number] for number in ids).removeprefix(" ")

    assert text_after(Words(), [0], [1]) == " cat"    # type: ignore[arg-type]


def test_the_tokenizers_own_begin_stands_before_prompts_and_documents(model: Path, tmp_path: Path) -> None:
    # The same model behind a tokenizer whose template begins every text with <|bos|>, as transformers reads it.
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (begin,) = (token["id"] for token in description["added_tokens"] if token["content"] == "<|bos|>")
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [begin], "tokens": ["<|bos|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    network = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    (tmp_path / "text.txt").write_text(LINES[0][:20])
    ids = theirs(LINES[0][:20], return_tensors="pt").input_ids
    assert ids[0, 0] == begin
    measured = evaluate(Evaluation(model=str(folder), data=str(tmp_path / "text.txt"), precision="float32"))
    assert measured.tokens == ids.shape[1] - 1
    with torch.no_grad():
        assert measured.loss == pytest.approx(float(network(ids, labels=ids).loss), abs=FLOAT32_LOSS)
    prompt = theirs("def step", return_tensors="pt")
    written = network.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    settings = {"prompt": "def step", "temperature": 0.0, "max_new_tokens": 8, "precision": "float32"}
    ours = generate(Generation(model=str(folder), **settings)).completions[0]
    assert written.tolist()[: len(ours.ids)] == list(ours.ids)
    assert ours.text == theirs.decode(ours.ids, skip_special_tokens=True)


def test_a_prompt_without_text_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate(Generation(model=str(model), prompt=""))


def checkpoint(run: Path, step: int, model: Path, **facts: Any) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(model, folder)
    (folder / "manifest.json").write_text(json.dumps({"step": step, **facts}))
    return folder


def test_a_run_directory_stands_for_its_newest_whole_checkpoint(model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint(run, 5, model)
    newest = checkpoint(run, 40, model)
    (run / "checkpoints" / ".step-00000050.partial").mkdir()
    (run / "checkpoints" / "step-00000060").mkdir()    # no manifest: not whole
    assert model_folder(run) == newest
    found = evaluate(Evaluation(model=str(run), data=str(data)))
    assert found.model == str(newest)


def test_auto_computes_in_the_type_of_the_training(model: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", 5, model, precision="float64")
    assert open_model(tmp_path / "run").precision == "float64"
    assert open_model(tmp_path / "run").policy.compute == torch.float64
    assert open_model(tmp_path / "run", "float32").precision == "float32"
    assert open_model(model).precision == "float32", "a folder that does not say"


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="no checkpoint in this run directory"):
        open_model(tmp_path)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(model: Path, tmp_path: Path) -> None:
    train_vocabulary(iter([TEXT]), 340).save(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 340 ids and the model rows for 320"):
        open_model(model, tokenizer=str(tmp_path))


def test_a_model_opens_with_dropout_off_and_its_own_tokenizer(model: Path) -> None:
    opened = open_model(model)
    assert not opened.policy.training
    assert isinstance(opened.tokenizer, FileTokenizer)
    assert opened.tokenizer.fingerprint == load_tokenizer(model).fingerprint


def test_bare_words_fill_model_and_data_and_runs() -> None:
    assert load(Evaluation, None, ["items=true"], ["m", "d"]) == Evaluation(model="m", data="d", items=True)
    assert load(Generation, None, [], ["m", "x = 1"]).prompt == "x = 1"
    assert load(Plot, None, [], ["a", "b"]).runs == ("a", "b")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("start", step=0)
        for step in (1, 2, 3, 4, 3, 4, 5):    # stopped after 4, continued from 2
            log.append("step", step=step, tokens=step * 100, loss=float(9 - step), learning_rate=1e-3 * step,
                       grad_norm=1.0, seconds=0.5, tokens_per_second=200.0, mfu=None)
            if step == 2:
                log.append("evaluate", step=2, **{"held_out/loss": 7.5})
            if step == 4:
                log.append("resume", step=2)
        log.append("evaluate", step=5, **{"held_out/loss": 5.5, "news/loss": 6.5})
    yield tmp_path


def test_plot_writes_a_png_with_a_panel_for_everything_that_was_measured(run: Path) -> None:
    found = plot(Plot(runs=(str(run),))).json()
    assert found["path"] == str(run / "plots" / "curves.png")
    assert found["panels"] == ["Loss", "Learning rate", "Gradient norm", "Speed", "Evaluation: loss"]
    assert (run / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in (run / "plots").iterdir()] == ["curves.png"], "nothing half written stays"


def test_several_runs_are_drawn_into_one_picture_where_asked(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "both.png"
    assert plot(Plot(runs=(str(run), str(run)), out=str(out))).path == str(out)
    assert out.is_file()
    assert plot(Plot(runs=(str(run), str(run)), x="minutes")).path == str(run / "plots" / "comparison.png")


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("start", step=0)
    with pytest.raises(UserError, match="no step to draw"):
        plot(Plot(runs=(str(tmp_path),)))


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_model_that_is_not_there_is_refused_by_its_own_name(verb: str) -> None:
    settings = {"evaluate": Evaluation(model="absent", data="text"), "generate": Generation(model="absent", prompt="a")}
    with pytest.raises(UserError, match="no model `absent`") as caught:
        {"evaluate": evaluate, "generate": generate}[verb](settings[verb])    # type: ignore[operator]
    assert "hub id" in (caught.value.fix or "")


def test_a_model_that_is_only_read_takes_two_bytes_a_number_and_has_the_same_bits(model: Path) -> None:
    opened, trainable = open_model(model, "bfloat16", "cpu").policy, load_model(model, "bfloat16")
    types = {name: parameter.dtype for name, parameter in opened.named_parameters()}
    assert {types[name] for name in types if "norm" not in name} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    tokens_BT = torch.tensor([[1, 7, 30, 9, 200, 40]])
    logits = [one.read(tokens_BT, torch.tensor([6]), one.cache(1, 8)) for one in (opened, trainable)]
    assert torch.equal(*logits)
