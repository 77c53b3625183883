"""Policy gradients from groups of answers, SmolLM2-135M, by llmtrainer and by TRL's GRPOTrainer: steps a second.

The work: 4 questions a step, 4 answers of at most 64 tokens to each at temperature 1, one optimizer step on all 16,
bfloat16 with float32 masters, AdamW at a constant rate of 1e-6, no reference, the same reward: whether the right number
stands in the answer. Answers differ from side to side, as their random numbers do; their lengths are told.
"""

from __future__ import annotations

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

PROMPTS, GROUP, LENGTH, RATE = 4, 4, 64, 1e-6


def holds_the_number(answer: Any) -> float:
    """The reward of either side: 1 where the right number stands in the text."""
    return 1.0 if answer.facts["answer"] in answer.text else 0.0


def ours(settings: Figures) -> Iterator[Figures]:
    import torch

    import llmtrainer as lt

    torch.set_num_threads(settings["threads"])
    recipe = lt.load(lt.Recipe, settings["recipe"])
    with lt.open_trainer(recipe) as trainer:
        steps = trainer.steps()
        for _ in range(settings["warm"]):
            next(steps)
        yield {}
        while True:
            started = time.perf_counter()
            told = [next(steps).metrics for _ in range(settings["steps"])]
            spent = time.perf_counter() - started
            yield {
                "rate": settings["steps"] / spent, "seconds_per_step": spent / settings["steps"],
                "length": sum(step["rollout/length"] for step in told) / len(told),
                "reward": sum(step["reward/mean"] for step in told) / len(told),
                "seconds_sampling": sum(step["rollout/seconds"] for step in told) / len(told),
            }


def trl(settings: Figures) -> Iterator[Figures]:
    import torch

    torch.set_num_threads(settings["threads"])
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    callback, told = clock()
    lengths: list[float] = []

    def reward(completions: Any, answer: Any, **_: Any) -> list[float]:
        both = zip(completions, answer, strict=True)
        return [1.0 if right in written[0]["content"] else 0.0 for written, right in both]

    with open(settings["data"], encoding="utf-8") as file:
        rows = Dataset.from_list([json.loads(line) for line in file])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    asked = GRPOConfig(
        settings["scratch"], per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_steps=1,
        max_completion_length=LENGTH, bf16=settings["narrow"],
        use_cpu=settings["use_cpu"], report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, gradient_checkpointing=False, beta=0.0, temperature=1.0, seed=0, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, optim="adamw_torch_fused",
    )  # fmt: skip

    class Told(GRPOTrainer):    # type: ignore[misc]
        def log(self, logs: Any, *others: Any, **named: Any) -> None:
            lengths.extend([logs["completions/mean_length"]] if "completions/mean_length" in logs else [])
            merged = {**logs, **{name: values[-1] for name, values in self._metrics["train"].items() if values}}
            lengths.extend([merged["completions/mean_length"]] if "completions/mean_length" in merged else [])
            super().log(logs, *others, **named)

    trainer = Told(
        model, reward_funcs=reward, args=asked, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.args.max_steps = settings["warm"]
    trainer.train()
    yield {}
    while True:
        told.seconds.clear()
        lengths.clear()
        trainer.args.max_steps = settings["steps"]
        trainer.train()
        spent = sum(told.seconds) / len(told.seconds)
        yield {"rate": 1.0 / spent, "seconds_per_step": spent, "length": sum(lengths) / max(len(lengths), 1)}


def prepare(folder: Path, wish: Any) -> Figures:
    """Questions and our recipe, for both sides."""
    data = folder / "prompts.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for n in range(64):
            question = f"What is {n} + {n * 7 + 3}? Answer with the number."
            file.write(json.dumps({"prompt": [{"role": "user", "content": question}], "answer": str(8 * n + 3)}) + "\n")
    parts: Figures = {
        "data": {"kind": "prompts", "train": str(data), "prompts_per_step": PROMPTS, "tokens_per_batch": 4096},
        "objective": {"kind": "grpo"},
        "rollout": {
            "group_size": GROUP, "sampling": {"max_new_tokens": LENGTH},
            "rewards": [{"kind": "function", "function": "grpo:holds_the_number"}],
        },
    }
    recipe = recipes.written(folder, "grpo", wish, RATE, **parts)
    return {**recipes.settings_of(folder, wish, data), "recipe": recipe}


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, default=os.environ.get("SMOLLM2"), help="folder of SmolLM2-135M")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    wish = parser.parse_args()
    if wish.side:
        turns.serve(ours if wish.side == "ours" else trl, wish.settings)
        return
    wish.model = smollm2.folder_of(wish.model, wish.peer_python)
    with tempfile.TemporaryDirectory() as scratch:
        short = turns.steps(wish, 2, 2) if wish.quick else turns.steps(wish, 2, 4)
        given = {**prepare(Path(scratch), wish), **short}
        peers = {"trl": wish.peer_python}
        result = turns.in_turn("SmolLM2-135M, GRPO", "steps/s", peers, __file__, given, wish)
    turns.tell({
        **result, "work": "SmolLM2-135M, GRPO, 4 prompts x 4 answers x 64 tokens a step, no reference",
        "compiled": not wish.eager, "threads": wish.threads,
    })


if __name__ == "__main__":
    main()
