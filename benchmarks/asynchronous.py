"""A reward that waits: rollouts that another process writes ahead, against one thing after the other."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import turns

PROMPTS, GROUP, LENGTH = 4, 4, 16
STALENESS = 4
WAYS = {
    "ours": (f"rollout.max_staleness={STALENESS}", f"rollout.reward_workers={STALENESS}"),
    "one_worker": (f"rollout.max_staleness={STALENESS}",),
    "synchronous": (),
}


def waits(answers: Sequence[Any]) -> list[float]:
    """As a judge that is asked over a network: nothing is computed here meanwhile."""
    time.sleep(answers[0].facts["seconds"])
    return [answer.text.count("a") / max(len(answer.text), 1) for answer in answers]


def prepare(folder: Path, wait: float, steps: int) -> Path:
    """A tiny vocabulary, questions and a recipe."""
    import llmtrainer as lt

    lines = [f"{number} and {number * 7} are a {number * 8}" for number in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(512):
            file.write(json.dumps({"prompt": f"{number} and {number * 7}", "seconds": wait}) + "\n")
    words = [f"data={folder}/text.txt", f"out={folder}/tokenizer", "vocabulary=512"]
    lt.train_tokenizer(lt.load(lt.TokenizerTraining, overrides=words))
    path = folder / "recipe.yaml"
    path.write_text(f"""\
model: {{hidden_size: 64, layers: 2, heads: 4, intermediate_size: 128, context_length: 64}}
tokenizer: {folder}/tokenizer
cache: {folder}/cache
data:
  {{kind: prompts, train: {folder}/prompts.jsonl, template: completion, prompts_per_step: {PROMPTS},
    sequence_length: 64, tokens_per_batch: 1024}}
objective: {{kind: grpo, correction: {{bypass: true}}}}
rollout:
  group_size: {GROUP}
  sampling: {{max_new_tokens: {LENGTH}, min_new_tokens: {LENGTH}}}
  rewards: [{{kind: function, function: "asynchronous:waits", per: batch}}]
optim: {{schedule: {{kind: constant, peak: 1e-3, warmup: 0 steps}}}}
precision: float32
duration: {steps} steps
save: {{every: never}}
""")
    return path


def seconds(recipe: Path, run: Path, ways: Sequence[str]) -> tuple[float, float]:
    """Of a whole run, and of the part after its first step: before it, another process begins."""
    import llmtrainer as lt

    began, first = time.perf_counter(), 0.0
    with lt.open_trainer(lt.load(lt.Recipe, recipe, overrides=[*ways, f"run={run}"])) as trainer:
        for _ in trainer.steps():
            first = first or time.perf_counter()
    ended = time.perf_counter()
    return ended - began, ended - first


def main() -> None:
    parser = turns.parser(__doc__ or "")
    parser.add_argument("--wait", type=float, default=0.5, help="seconds that the rewards of a rollout take")
    parser.add_argument("--steps", type=int, help="of each run; 30 if quick, else 60")
    wish = parser.parse_args()
    steps, runs = wish.steps or (30 if wish.quick else 60), dict[str, list[float]]()
    after = dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = prepare(Path(scratch), wish.wait, steps)
        for turn in range(turns.rounds(wish)):
            for name, ways in WAYS.items():
                asked = [*ways, f"engine.threads={wish.threads}"]
                whole, rest = seconds(recipe, Path(scratch) / f"{name}-{turn}", asked)
                runs.setdefault(name, []).append(steps / whole)
                after.setdefault(name, []).append(rest)
                turns.say(f"turn {turn + 1}, {name}: {whole:.1f} s, {rest:.1f} s of them after the first step")
    rates = {name: statistics.median(found) for name, found in runs.items()}
    ratio = rates["ours"] / rates["synchronous"]
    spent = {name: statistics.median(found) for name, found in after.items()}
    turns.tell({
        "work": f"GRPO of a tiny model, {steps} steps of {PROMPTS} prompts x {GROUP} answers x {LENGTH} tokens, a "
        f"reward that waits {wish.wait:g} s for each rollout, max_staleness {STALENESS}",
        "unit": "steps/s", "ours": rates["ours"], "peers": {"synchronous": rates["synchronous"]},
        "ratios": {"synchronous": ratio}, "ratio": ratio, "runs": runs, "threads": wish.threads,
        "ratio_after_the_first_step": spent["synchronous"] / spent["ours"],
        "ratio_of_one_reward_worker": rates["one_worker"] / rates["synchronous"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
