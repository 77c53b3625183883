"""The verbs: one function of one config class each. Strings only, so that listing them imports none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from llmtrainer.base.errors import UserError

if TYPE_CHECKING:
    from llmtrainer.base.config import Config
    from llmtrainer.base.result import Result


@dataclass(frozen=True)
class Verb:
    """One line of the table."""

    target: str
    """`module:function`."""
    purpose: str
    examples: tuple[str, ...]
    """Command lines without `llmtrainer`."""

    def function(self) -> Callable[[Any], Result]:      # Any: each takes its own config class
        """Import it."""
        module, _, name = self.target.partition(":")
        found: Callable[[Any], Result] = getattr(importlib.import_module(module), name)
        return found

    def config_type(self) -> type[Config]:
        """The class of the function's one parameter."""
        (found,) = (hint for key, hint in get_type_hints(self.function()).items() if key != "return")
        config_type: type[Config] = found
        return config_type


VERBS = {
    "demo": Verb(
        "llmtrainer.apps.demo:demo", "the whole life of a small model, on this Python's own library",
        ("demo", "demo seconds=60 stages=train,evaluate"),
    ),
    "train-tokenizer": Verb(
        "llmtrainer.training.prepare:train_tokenizer", "text -> a vocabulary",
        ("train-tokenizer corpus/ runs/tokenizer vocabulary=16384",),
    ),
    "prepare": Verb(
        "llmtrainer.training.prepare:prepare", "text -> a store of tokens, ready to train on",
        ("prepare corpus/ runs/store tokenizer=runs/tokenizer",),
    ),
    "plan-batches": Verb(
        "llmtrainer.apps.plan_batches:plan_batches", "how large a micro-batch must be, and how full it will be",
        ("plan-batches runs/store group_size=8 batch_size=64 max_length=2048",),
    ),
    "train": Verb(
        "llmtrainer.training.run:train", "run a recipe, or continue it where it stopped",
        ("train recipes/tiny/pretrain.yaml", "train recipes/tiny/pretrain.yaml seed=1 run=runs/seed-1"),
    ),
    "launch": Verb(
        "llmtrainer.apps.launch:launch", "a command as several processes, on one machine or many",
        ("launch --nproc 2 train recipe.yaml engine.kind=ddp",
         "launch --nproc 8 --nnodes 2 --node-rank 0 --rendezvous first:29400 train recipe.yaml engine.kind=fsdp2",
         "launch --nproc 8 --nnodes 4 --slurm train recipe.yaml engine.kind=fsdp2 > job.sh"),
    ),
    "supervise": Verb(
        "llmtrainer.apps.supervise:supervise", "a run started again when it crashes or hangs, and told why",
        ("supervise train recipe.yaml", "supervise restarts=5 launch --nproc 8 train recipe.yaml engine.kind=ddp"),
    ),
    "stop": Verb(
        "llmtrainer.apps.stop:stop", "end a run after its step, with a checkpoint, wherever it was started",
        ("stop runs/demo", "stop runs/demo reason='the disk is needed'"),
    ),
    "check": Verb(
        "llmtrainer.training.check:check", "dry run of a recipe: data, plan, one step, save, evaluate, resume",
        ("check recipes/tiny/pretrain.yaml",),
    ),
    "cache-reference": Verb(
        "llmtrainer.training.cache_reference:cache_reference",
        "what the reference or teacher of a recipe says of every row, worked out once",
        ("cache-reference dpo.yaml", "cache-reference dpo.yaml reference=runs/sft --json"),
    ),
    "evaluate": Verb(
        "llmtrainer.training.use:evaluate", "loss, perplexity and bits per byte of a model on text",
        ("evaluate runs/demo held_out.txt", "evaluate runs/demo stdlib:held_out precision=float32 --json"),
    ),
    "generate": Verb(
        "llmtrainer.training.use:generate", "continue a prompt",
        ("generate runs/demo 'def main():' temperature=0.7",),
    ),
    "export": Verb(
        "llmtrainer.apps.export:export", "a model as a Hugging Face folder, proved by reading it back",
        ("export runs/demo exported", "export runs/demo exported precision=bfloat16 check=true"),
    ),
    "add-tokens": Verb(
        "llmtrainer.apps.add_tokens:add_tokens", "a model with more control tokens, such as the roles of a template",
        ("add-tokens runs/base runs/based template=llama3",
         "add-tokens runs/base runs/based '<|user|>' '<|assistant|>'"),
    ),
    "merge": Verb(
        "llmtrainer.apps.merge:merge", "an adapter and its model as one Hugging Face folder, proved to be the same",
        ("merge runs/lora merged", "merge runs/lora merged precision=bfloat16 check=true"),
    ),
    "inspect": Verb(
        "llmtrainer.apps.inspect:inspect", "rows as the model sees them, coloured by weight",
        ("inspect recipes/tiny/pretrain.yaml step=3 rows=2", "inspect notes.txt tokenizer=runs/tokenizer"),
    ),
    "rank": Verb(
        "llmtrainer.apps.rank:rank", "answers put in order by you, as data for reward models and preferences",
        ("rank answers.jsonl ranked.jsonl", "rank four_lines.txt ranked.jsonl prompt='Write a verse.'"),
    ),
    "plot": Verb(
        "llmtrainer.training.use:plot", "curves of one or several runs as PNG",
        ("plot runs/demo", "plot runs/a runs/b"),
    ),
    "explain": Verb(
        "llmtrainer.apps.explain:explain", "value, origin, type and help of every key of a recipe",
        ("explain recipes/tiny/pretrain.yaml", "explain recipes/tiny/pretrain.yaml objective.kind"),
    ),
    "deepspeed-config": Verb(
        "llmtrainer.apps.deepspeed_config:deepspeed_config",
        "known set-ups of DeepSpeed as config files, checked without DeepSpeed",
        ("deepspeed-config ds_stage3_offload out=configs", "deepspeed-config out=configs --json"),
    ),
    "schema": Verb(
        "llmtrainer.apps.schema:schema", "JSON schema of a recipe, from which editors complete",
        ("schema > recipe.schema.json",),
    ),
    "doctor": Verb(
        "llmtrainer.apps.doctor:doctor", "versions, devices, measured speed and active fallbacks",
        ("doctor", "doctor --json"),
    ),
}


def verb_named(name: str) -> Verb:
    """The verb, or a UserError with the nearest name."""
    if name not in VERBS:
        from llmtrainer.base.text import did_you_mean

        raise UserError(
            f"there is no verb `{name}`", why=f"there are: {', '.join(VERBS)}", fix=did_you_mean(name, VERBS)
        )
    return VERBS[name]
