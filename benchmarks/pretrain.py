"""Pretraining by llmtrainer, by the Trainer of transformers and by litgpt's model: tokens a second.

The work: a Llama of 27.8 M parameters (8 layers, 512 wide, 8 query and 4 key heads, MLP 1,408, vocabulary 8,192),
steps of 8 rows of 512 tokens in bfloat16 with float32 masters, AdamW at a constant rate of 1e-4, gradients clipped
at 1. All sides read the same rows of one text in the same order and begin with the same weights; litgpt's head is
a copy of its own (it has no tied one), so it has 4.2 M more to update. A turn is a number of whole steps.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import turns
from trainer_clock import clock
from turns import Figures

ROWS, LENGTH, VOCABULARY, RATE = 8, 512, 8192, 1e-4
SHAPE = {
    "hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate_size": 1408, "context_length": 1024,
    "tied_head": True,
}  # fmt: skip
LARGEST_DIFFERENCE = 0.02
"""Nats. The sides' losses after the warm-up differ by rounding, and by one target in each row of 512: other
libraries do not learn what follows a row's last token."""


def ours(settings: Figures) -> Iterator[Figures]:
    import torch

    import llmtrainer as lt

    torch.set_num_threads(settings["threads"])
    recipe = lt.load(lt.Recipe, settings["recipe"])
    with lt.open_trainer(recipe) as trainer:
        steps = trainer.steps()
        losses = [next(steps).loss for _ in range(settings["warm"])]
        products = _products(settings["device"], getattr(torch, settings["precision"]))
        yield {"first_loss": losses[0], "last_loss": losses[-1]}
        while True:
            # Before and after, because a shared machine's speed drifts by a third within a turn.
            before = _matrix_rate(products)
            rate = _rate(lambda: next(steps), settings["steps"])
            matrix = (before + _matrix_rate(products)) / 2
            yield {"rate": rate, "matrix_share": rate * _flops() / matrix, "matrix_gflops": matrix / 1e9}


def hf_trainer(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    callback, told = clock()

    class Rows(torch.utils.data.IterableDataset):    # type: ignore[misc]
        rows = _rows(settings)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for row in self.rows:
                tokens = torch.tensor(row[:-1])
                yield {"input_ids": tokens, "labels": tokens}

    def arguments(steps: int) -> TrainingArguments:
        return TrainingArguments(
            settings["scratch"], per_device_train_batch_size=ROWS, max_steps=steps, bf16=settings["narrow"],
            use_cpu=settings["use_cpu"],
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, optim="adamw_torch_fused",
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95, adam_epsilon=1e-8,
            remove_unused_columns=False,
        )  # fmt: skip

    model, rows = LlamaForCausalLM.from_pretrained(settings["weights"], dtype=torch.float32), Rows()
    Trainer(model, arguments(settings["warm"]), train_dataset=rows, callbacks=[callback]).train()
    yield {"first_loss": told.losses[0], "last_loss": told.losses[settings["warm"] - 1]}
    while True:
        told.seconds.clear()
        Trainer(model, arguments(settings["steps"]), train_dataset=rows, callbacks=[callback]).train()
        yield {"rate": ROWS * LENGTH * len(told.seconds) / sum(told.seconds)}


def litgpt(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    import lightning
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    precision: Any = "bf16-mixed" if settings["narrow"] else "32-true"
    fabric = lightning.Fabric(accelerator=settings["device"], devices=1, precision=precision)
    fabric.launch()
    config = Config(
        block_size=SHAPE["context_length"], vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, n_layer=8, n_head=8,
        n_embd=512, n_query_groups=4, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP", intermediate_size=1408,
    )  # fmt: skip
    model = GPT(config)
    model.load_state_dict(_for_litgpt(load_file(Path(settings["weights"], "model.safetensors"))))
    model.max_seq_length = LENGTH
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    model, optimizer = fabric.setup(model, optimizer)
    rows = _rows(settings)

    def step() -> float:
        tokens = torch.tensor(list(itertools.islice(rows, ROWS)), device=settings["device"])[:, :-1]
        loss = chunked_cross_entropy(model(tokens)[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    losses = [step() for _ in range(settings["warm"])]
    yield {"first_loss": losses[0], "last_loss": losses[-1]}
    while True:
        yield {"rate": _rate(step, settings["steps"])}


def _for_litgpt(weights: dict[str, Any]) -> dict[str, Any]:
    """The same weights under litgpt's names; its query, key and value matrices are one."""
    import torch

    renamed = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    for index in range(SHAPE["layers"]):
        theirs, mine = f"transformer.h.{index}.", f"model.layers.{index}."
        queries = [weights[f"{mine}self_attn.{part}_proj.weight"] for part in "qkv"]
        renamed |= {
            f"{theirs}norm_1.weight": weights[f"{mine}input_layernorm.weight"],
            f"{theirs}attn.qkv.weight": torch.cat(queries),
            f"{theirs}attn.proj.weight": weights[f"{mine}self_attn.o_proj.weight"],
            f"{theirs}norm_2.weight": weights[f"{mine}post_attention_layernorm.weight"],
            f"{theirs}mlp.fc_1.weight": weights[f"{mine}mlp.gate_proj.weight"],
            f"{theirs}mlp.fc_2.weight": weights[f"{mine}mlp.up_proj.weight"],
            f"{theirs}mlp.proj.weight": weights[f"{mine}mlp.down_proj.weight"],
        }
    return renamed


def _rows(settings: Figures) -> Iterator[list[int]]:
    """Windows of LENGTH + 1 tokens that overlap by one, in order, over and over."""
    import numpy

    tokens = numpy.load(settings["tokens"])
    last = (len(tokens) - 1) // LENGTH
    for row in itertools.cycle(range(last)):
        yield tokens[row * LENGTH : (row + 1) * LENGTH + 1].tolist()


def _rate(step: Callable[[], Any], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return ROWS * LENGTH * steps / (time.perf_counter() - started)


def _flops() -> float:
    """To train on one token: 6 x weights in matrices + 6 x L x D x T for the causal half of attention."""
    D, F, L = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["layers"]
    width = D // SHAPE["heads"] * (SHAPE["heads"] + SHAPE["kv_heads"]) * 2
    return 6 * (L * (D * width + 3 * D * F) + VOCABULARY * D) + 6 * L * D * LENGTH


def _products(device: str, dtype: Any) -> list[tuple[Any, Any, float]]:
    """Each of the model's own products, forward, for the input's gradient and for the weight's: operands, FLOP."""
    import torch

    N, D, F = ROWS * LENGTH, SHAPE["hidden_size"], SHAPE["intermediate_size"]
    keys = D // SHAPE["heads"] * SHAPE["kv_heads"]
    found = []
    for inputs, outputs, count in ((D, D, 2), (D, keys, 2), (D, F, 2), (F, D, 1), (D, VOCABULARY, 1)):
        x, w, g = (
            torch.randn(shape, dtype=dtype, device=device)
            for shape in ((N, inputs), (outputs, inputs), (N, outputs))
        )
        found += [(a, b, 2.0 * N * inputs * outputs) for a, b in ((x, w.t()), (g, w), (g.t(), x))] * count
    return found


def _matrix_rate(products: list[tuple[Any, Any, float]]) -> float:
    """FLOP a second: the median over the products, each the median of three."""
    rates = []
    for a, b, flops in products:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            (a @ b)[0, 0].item()     # waits for the device
            seconds.append(time.perf_counter() - started)
        rates.append(flops / statistics.median(seconds))
    return statistics.median(rates)


def prepare(folder: Path, data: str | None, settings: Figures) -> Figures:
    """Tokens, tokenizer, first weights and a recipe in `folder`, for all sides."""
    import numpy

    import llmtrainer as lt
    from llmtrainer.data.open import documents, find
    from llmtrainer.data.packed import Store
    from llmtrainer.models.families.llama import Llama
    from llmtrainer.models.weights import save_weights

    text = folder / "text.txt"
    read = (document.text for document in documents(find(data or "stdlib:train")))
    with text.open("w", encoding="utf-8") as file:
        while file.tell() < 4_000_000 and (one := next(read, None)) is not None:
            file.write(one + "\n")
    training = lt.TokenizerTraining(data=str(text), out=str(folder / "tokenizer"), vocabulary=VOCABULARY - 64)
    lt.train_tokenizer(training)
    store = folder / "store"
    lt.prepare(lt.Preparation(data=str(text), out=str(store), tokenizer=str(folder / "tokenizer"), workers=1))
    opened = Store(store)
    numpy.save(folder / "tokens.npy", opened.span(0, opened.tokens).astype("int64"))
    model = Llama(**SHAPE).build(VOCABULARY)
    model.initialise(0)
    save_weights(model, folder / "weights")
    recipe = {
        "run": str(folder / "run"), "model": {"start_from": str(folder / "weights")},
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "train": str(store), "sequence_length": LENGTH, "tokens_per_step": ROWS * LENGTH,
            "tokens_per_batch": settings["tokens_per_batch"], "shuffle": False,
        },
        "optim": {
            "rule": {"kind": "adamw", "weight_decay": 0.0, "betas": [0.9, 0.95], "epsilon": 1e-8},
            "schedule": {"kind": "constant", "peak": RATE, "warmup": "0 steps"}, "clip": 1.0,
        },
        "engine": {
            "kind": "single", "device": settings["device"], "compile": settings["compile"],
            "cuda_graphs": settings["device"] == "cuda",
        },
        "precision": settings["precision"], "duration": "1000000 steps", "save": {"every": "never"},
    }  # fmt: skip
    from ruamel.yaml import YAML

    with (folder / "recipe.yaml").open("w") as file:
        YAML().dump(recipe, file)
    found = {"recipe": folder / "recipe.yaml", "weights": folder / "weights", "tokens": folder / "tokens.npy"}
    return {**settings, "scratch": str(folder / "hf"), **{name: str(path) for name, path in found.items()}}


def require_one_work(result: Figures) -> Figures:
    """The losses that every side told. SystemExit if it was not one work."""
    found = {name: turns.fact(result, name) for name in ("first_loss", "last_loss")}
    for name, told in found.items():
        for peer, loss in told["peers"].items():
            if abs(loss - told["ours"]) > LARGEST_DIFFERENCE:
                turns.refuse(f"{name} is {told['ours']:.4f} here and {loss:.4f} at {peer}", "this is not one work")
    return found


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--data", help="text; else this Python's own library")
    parser.add_argument(
        "--litgpt-python", type=Path, default=turns.PEERS.parents[2] / ".venv-litgpt" / "bin" / "python",
        help="litgpt's environment; left out if it is not there",
    )
    parser.add_argument("--tokens-per-batch", type=int, default=ROWS * LENGTH, help="of our micro-batches")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve({"ours": ours, "hf_trainer": hf_trainer, "litgpt": litgpt}[wish.side], wish.settings)
        return
    with tempfile.TemporaryDirectory() as scratch:
        settings = prepare(Path(scratch), wish.data, {
            **turns.steps(wish, *((2, 2) if wish.quick else (3, 4))), "compile": not wish.eager,
            "tokens_per_batch": wish.tokens_per_batch, "device": wish.device, "precision": wish.precision,
        })
        peers = {"hf_trainer": wish.peer_python, "litgpt": wish.litgpt_python}
        if not wish.litgpt_python.exists():
            turns.say(f"litgpt is left out: there is no {wish.litgpt_python} (make bench-install)")
            del peers["litgpt"]
        work = f"Llama 27.8M, {ROWS} x {LENGTH} tokens a step, AdamW"
        result = turns.in_turn(work, "tokens/s", peers, __file__, settings, wish)
    told = require_one_work(result)
    turns.tell({**result, **told, "compiled": not wish.eager, "threads": wish.threads})


if __name__ == "__main__":
    main()
