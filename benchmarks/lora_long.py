"""Adapters on one long row, by llmtrainer and by TRL with PEFT: tokens a second, and peak memory.

The work: SmolLM2-135M in bfloat16, frozen, with LoRA of rank 16 on every linear layer but the head; steps of one row
of 8,192 tokens of one text, every token learned, AdamW at a constant rate of 1e-4. TRL computes its loss in chunks,
as it does by default. `--recompute both` (the default) lets both sides compute activations again in backward;
`ours` only us, so that TRL keeps them, which is faster for it and takes its memory.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sft
import smollm2
import turns
from trainer_clock import clock
from turns import Figures

import recipes

LENGTH, RANK, ALPHA, RATE = 8192, 16, 32, 1e-4
LARGEST_DIFFERENCE = 0.01
"""Nats a token: the sides draw different adapters, which add nothing at the first step."""


def trl(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    callback, told = clock()

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["precision"]))
    asked = SFTConfig(
        settings["scratch"], per_device_train_batch_size=1, max_steps=settings["warm"], max_length=LENGTH,
        bf16=settings["narrow"], use_cpu=settings["use_cpu"], report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        optim="adamw_torch_fused", gradient_checkpointing=settings["recompute"] == "both",
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"text": Path(settings["data"]).read_text(encoding="utf-8")}] * 64)
    trainer = SFTTrainer(
        model, asked, train_dataset=rows, processing_class=tokenizer, peft_config=adapter, callbacks=[callback]
    )
    trainer.train()
    yield {"first_loss": told.losses[0]}
    while True:
        told.seconds.clear()
        trainer.args.max_steps = settings["steps"]
        trainer.train()
        yield {"rate": LENGTH * len(told.seconds) / sum(told.seconds)}


def prepare(folder: Path, wish: Any) -> Figures:
    """One text and our recipe, for both sides."""
    from llmtrainer.data.open import documents, find

    text = "\n".join(document.text for document in itertools.islice(documents(find(wish.data or "stdlib:train")), 40))
    data = folder / "text.txt"
    data.write_text(text[:80_000], encoding="utf-8")
    parts: Figures = {
        "model": {"start_from": str(wish.model), "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA}},
        "data": {
            "train": str(data), "sequence_length": LENGTH, "sequences_per_step": 1, "tokens_per_batch": LENGTH,
            "shuffle": False,
        },
        "engine": {"kind": "single", "device": wish.device, "compile": not wish.eager, "recompute_every": 1},
    }
    recipe = recipes.written(folder, "recipe", wish, RATE, **parts)
    return {**recipes.settings_of(folder, wish, data), "recipe": recipe, "recompute": wish.recompute}


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M")
    parser.add_argument("--data", help="a text of 8,193 tokens or more; else this Python's own library")
    parser.add_argument("--recompute", choices=("both", "ours"), default="both", help="who computes activations again")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve(sft.ours if wish.side == "ours" else trl, wish.settings)
        return
    wish.model = smollm2.folder_of(wish.model, wish.peer_python)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**prepare(Path(scratch), wish), **turns.steps(wish, 1, 1 if wish.quick else 2)}
        work = f"SmolLM2-135M, LoRA of rank {RANK}, one row of {LENGTH:,} tokens"
        result = turns.in_turn(work, "tokens/s", {"trl": wish.peer_python}, __file__, settings, wish)
    told = turns.fact(result, "first_loss")
    if abs(told["peers"]["trl"] - told["ours"]) > LARGEST_DIFFERENCE:
        turns.refuse(f"the first losses differ: {told}", "this is not one work")
    turns.tell({
        **result, "first_loss": told, "recompute": wish.recompute, "compiled": not wish.eager, "threads": wish.threads,
    })


if __name__ == "__main__":
    main()
