"""Fine-tuning SmolLM2-135M on conversations by llmtrainer and by TRL's SFTTrainer: useful tokens a second.

The work: conversations of an instruction set in the model's own chat template, cut at 512 tokens, 8 a step, every
token learned, bfloat16 with float32 masters, AdamW at a constant rate of 1e-5. Useful tokens are those that are no
padding. Both sides begin with the same weights and read the same rows in the same order. TRL is asked twice: a row
for each conversation, as it does by default, and with its packing, 8 rows of 512 tokens a step; against the latter
our steps are as large. Our conversations always lie end to end, without padding, and see only themselves.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smollm2
import turns
from trainer_clock import clock
from turns import Figures

import recipes

BATCH, LENGTH, RATE, ROWS = 8, 512, 1e-5, 400
LARGEST_DIFFERENCE = 1e-3
"""Nats a token, of the first step's loss on either side, relative to the loss."""


def ours(settings: Figures) -> Iterator[Figures]:
    import torch

    import llmtrainer as lt

    torch.set_num_threads(settings["threads"])
    recipe = lt.load(lt.Recipe, settings["recipe"])
    with lt.open_trainer(recipe) as trainer:
        steps = trainer.steps()
        losses = [next(steps).loss for _ in range(settings["warm"])]
        yield {"first_loss": losses[0]}
        while True:
            started, tokens = time.perf_counter(), 0
            for _ in range(settings["steps"]):
                tokens += next(steps).tokens
            yield {"rate": tokens / (time.perf_counter() - started), "tokens_per_step": tokens / settings["steps"]}


def trl(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokens: list[int] = []
    callback, told = clock()

    class Counted(SFTTrainer):    # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            return super().compute_loss(model, inputs, *others, **named)

    with open(settings["data"], encoding="utf-8") as file:
        rows = Dataset.from_list([{"messages": json.loads(line)["messages"]} for line in file])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    asked = SFTConfig(
        settings["scratch"], per_device_train_batch_size=BATCH, max_steps=1, max_length=LENGTH, bf16=settings["narrow"],
        use_cpu=settings["use_cpu"],
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, packing=settings["packing"],
        gradient_checkpointing=False, assistant_only_loss=False, seed=0, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = Counted(model, asked, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    trainer.args.max_steps = settings["warm"]
    trainer.train()
    yield {"first_loss": told.losses[0]}
    while True:
        told.seconds.clear()
        tokens.clear()
        trainer.args.max_steps = settings["steps"]
        trainer.train()
        yield {"rate": sum(tokens) / sum(told.seconds), "tokens_per_step": sum(tokens) / len(tokens)}


def prepare(folder: Path, wish: Any) -> Figures:
    """Conversations and our recipe, for all sides."""
    data = folder / "rows.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(_rows(wish.data))
    rows = {
        "kind": "examples", "train": str(data), "format": "messages", "learn": "everything", "shuffle": False,
        "sequence_length": LENGTH, "too_long": "cut", "cut_end": "leave_out", "tokens_per_batch": BATCH * LENGTH,
        "max_dropped_share": 1.0,
    }  # fmt: skip
    sizes = {"rows": {"sequences_per_step": BATCH}, "packed": {"tokens_per_step": BATCH * LENGTH}}
    return recipes.settings_of(folder, wish, data) | {
        name: recipes.written(folder, name, wish, RATE, data={**rows, **size}, allow=["preflight"])
        for name, size in sizes.items()
    }


def _rows(data: Path | None) -> list[str]:
    if data is not None:
        lines = data.read_text(encoding="utf-8").splitlines()[:ROWS]
        return [json.dumps({"messages": json.loads(line)["messages"]}) + "\n" for line in lines]
    from llmtrainer.data.document import Reading
    from llmtrainer.data.open import find
    from llmtrainer.data.records import records

    reading = Reading(whole=True)
    found = (record.value for source in find("stdlib:questions") for record in records(source, reading))
    return [json.dumps(value) + "\n" for value in itertools.islice(found, ROWS)]


def compared(name: str, wish: Any, settings: Figures, packing: bool) -> Figures:
    """Ours and TRL in turn."""
    given = {**settings, "recipe": settings["packed" if packing else "rows"], "packing": packing}
    how = "packed" if packing else "a row each"
    work = f"SmolLM2-135M, conversations {how}"
    return turns.in_turn(work, "useful tokens/s", {name: wish.peer_python}, __file__, given, wish)


def require_one_work(result: Figures) -> Figures:
    """The losses that both sides told of the first step."""
    found = turns.fact(result, "first_loss")
    for peer, loss in found["peers"].items():
        if abs(loss - found["ours"]) > LARGEST_DIFFERENCE * loss:
            turns.refuse(f"the first loss is {found['ours']:.5f} here and {loss:.5f} at {peer}", "this is not one work")
    return found


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M")
    parser.add_argument("--data", help="JSONL of messages; else BENCH_DATA/sft.jsonl, else questions about Python")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve(ours if wish.side == "ours" else trl, wish.settings)
        return
    wish.model, wish.data = smollm2.folder_of(wish.model, wish.peer_python), recipes.data_of(wish, "sft.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        short = turns.steps(wish, 2, 2) if wish.quick else turns.steps(wish, 2, 4)
        settings = {**prepare(Path(scratch), wish), **short}
        plain = compared("trl", wish, settings, packing=False)
        packed = compared("trl_packing", wish, settings, packing=True)
    told = require_one_work(plain)
    ratios = {**plain["ratios"], **packed["ratios"]}
    turns.tell({
        **plain, "work": "SmolLM2-135M, 8 conversations a step, all tokens learned, AdamW",
        "peers": {**plain["peers"], **packed["peers"]}, "ratios": ratios, "ratio": min(ratios.values()),
        "ours_packed": packed["ours"], "runs": {"rows": plain["runs"], "packed": packed["runs"]},
        "peak_memory": {"rows": plain["peak_memory"], "packed": packed["peak_memory"]},
        "peak_memory_ratio_packed": packed["peak_memory_ratio"], "first_loss": told, "compiled": not wish.eager,
        "threads": wish.threads,
    })


if __name__ == "__main__":
    main()
