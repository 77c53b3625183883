"""Direct preference optimisation of SmolLM2-135M by llmtrainer and by TRL's DPOTrainer: pairs a second.

The work: pairs of answers to a prompt, cut at 512 tokens, 2 pairs a step, bfloat16 with float32 masters, AdamW at a
constant rate of 1e-6, beta 0.1, the reference computed live on both sides. Both begin with the same weights and read
the same pairs in the same order. Ours is asked twice: with the prompt in front of each answer, as TRL has it, and with
the prompt read once for both.
"""

from __future__ import annotations

import itertools
import json
import math
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

PAIRS, LENGTH, RATE, BETA = 2, 512, 1e-6, 0.1


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
            spent = time.perf_counter() - started
            yield {"rate": PAIRS * settings["steps"] / spent, "tokens_per_pair": tokens / PAIRS / settings["steps"]}


def trl(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    callback, told = clock()

    class InOrder(DPOTrainer):    # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with open(settings["data"], encoding="utf-8") as file:
        rows = Dataset.from_list([json.loads(line) for line in file])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    asked = DPOConfig(
        settings["scratch"], per_device_train_batch_size=PAIRS, max_steps=1, max_length=LENGTH, bf16=settings["narrow"],
        use_cpu=settings["use_cpu"],
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, beta=BETA,
        seed=0, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = InOrder(model, args=asked, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    trainer.args.max_steps = settings["warm"]
    trainer.train()
    yield {"first_loss": told.losses[0]}
    while True:
        told.seconds.clear()
        trainer.args.max_steps = settings["steps"]
        trainer.train()
        yield {"rate": PAIRS * len(told.seconds) / sum(told.seconds)}


def prepare(folder: Path, wish: Any, steps: int) -> Figures:
    """Pairs and our recipes, for all sides."""
    data = folder / "pairs.jsonl"
    with data.open("w", encoding="utf-8") as file:
        # As many as a turn learns, so that every turn of every side is about the same pairs.
        file.writelines(_rows(wish.data, PAIRS * steps))
    rows = {
        "kind": "preferences", "train": str(data), "format": "texts", "shuffle": False, "sequence_length": LENGTH,
        "max_prompt_length": LENGTH - 1, "tokens_per_batch": 2 * PAIRS * LENGTH, "pairs_per_step": PAIRS,
        "max_dropped_share": 1.0,
    }  # fmt: skip
    parts: Figures = {"objective": {"kind": "dpo", "beta": BETA}, "allow": ["preflight"]}
    return recipes.settings_of(folder, wish, data) | {
        name: recipes.written(folder, name, wish, RATE, data={**rows, "share_prompt": share}, **parts)
        for name, share in {"two_rows": False, "shared": True}.items()
    }


def _rows(data: Path | None, count: int) -> list[str]:
    if data is not None:
        lines = data.read_text(encoding="utf-8").splitlines()[:count]
        found = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
        return [json.dumps(pair) + "\n" for pair in found]
    from llmtrainer.data.document import Reading
    from llmtrainer.data.open import find
    from llmtrainer.data.records import records

    reading = Reading(whole=True)
    asked_of = (itertools.islice(records(source, reading), 4) for source in find("stdlib:questions"))
    found = [record.value for some in asked_of for record in some]
    asked = [[message["content"] for message in value["messages"]] for value in found[: count + 1]]
    # The answer to the question before is the worse one.
    return [
        json.dumps({"prompt": question, "chosen": answer, "rejected": other}) + "\n"
        for (question, answer), (_, other) in zip(asked[1:], asked, strict=False)
    ]


def compared(way: str, wish: Any, settings: Figures) -> Figures:
    """Ours and TRL in turn."""
    given = {**settings, "recipe": settings[way]}
    work = f"SmolLM2-135M, DPO, {way}"
    return turns.in_turn(work, "pairs/s", {"trl": wish.peer_python}, __file__, given, wish)


def require_log_2(result: Figures) -> Figures:
    """The losses of the first step, where policy and reference are the same on either side."""
    found = turns.fact(result, "first_loss")
    for side, loss in {"ours": found["ours"], **found["peers"]}.items():
        if abs(loss - math.log(2.0)) > 1e-3:
            turns.refuse(f"the first loss of {side} is {loss:.5f}, not log 2", "its policy is not its reference")
    return found


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M")
    parser.add_argument("--data", help="JSONL of prompt, chosen, rejected; else BENCH_DATA/pairs.jsonl, else questions")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve(ours if wish.side == "ours" else trl, wish.settings)
        return
    wish.model, wish.data = smollm2.folder_of(wish.model, wish.peer_python), recipes.data_of(wish, "pairs.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        short = turns.steps(wish, 2, 2) if wish.quick else turns.steps(wish, 2, 5)
        settings = {**prepare(Path(scratch), wish, short["steps"]), **short}
        plain, shared = (compared(way, wish, settings) for way in ("two_rows", "shared"))
    ratios = {"trl": plain["ratio"], "trl_shared_prompt": shared["ratio"]}
    turns.tell({
        **plain, "work": "SmolLM2-135M, DPO on 2 pairs a step, live reference, AdamW", "ratios": ratios,
        "ratio": min(ratios.values()), "ours_shared": shared["ours"],
        "runs": {"two_rows": plain["runs"], "shared": shared["runs"]},
        "peak_memory_ratio_shared": shared["peak_memory_ratio"], "first_loss": require_log_2(plain),
        "compiled": not wish.eager, "threads": wish.threads,
    })


if __name__ == "__main__":
    main()
