"""The complete, frozen description of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.refusal import all_keys
from llmtrainer.base.text import nearest
from llmtrainer.base.units import Duration, Every
from llmtrainer.core.environment import Environment
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import EngineConfig, Family, Reward, Rule
from llmtrainer.core.schedule import Schedule
from llmtrainer.core.suite import Suite
from llmtrainer.evals.perplexity import Perplexity  # noqa: F401  a default below needs no kind named
from llmtrainer.generation.sampler import SamplerKind
from llmtrainer.generation.samplers.own import Own
from llmtrainer.generation.sampling import Sampling
from llmtrainer.objectives.causal_lm import CausalLM
from llmtrainer.optim.groups import Group
from llmtrainer.optim.rules.adamw import AdamW
from llmtrainer.optim.schedules.cosine import Cosine
from llmtrainer.parallel.engines.single import Single
from llmtrainer.training.dataset import KNOWN_ELSEWHERE, Dataset
from llmtrainer.training.tracking import Tracker

Precision = Literal["auto", "bfloat16", "float16", "float32", "float64"]


GUARDS = (
    "preflight", "zero_targets", "end_token", "truncation", "padding", "duplicates", "context", "vocabulary", "memory",
    "equal_answers", "empty_answers", "labels",
)  # fmt: skip
"""Names of the preflight's guards, as `allow` takes them; the first stands for all."""


def _several(value: Any) -> Any:
    """A text is a list of one; commas divide it."""
    return tuple(piece.strip() for piece in value.split(",")) if isinstance(value, str) else value


class TokenizerChoice(Config):
    """Which vocabulary: a folder, or one trained on the run's own training text."""

    shorthand: ClassVar[str] = "path"

    path: str | None = None
    """A folder with tokenizer.json, or a hub id: `Qwen/Qwen3-0.6B`, `Qwen/Qwen3-0.6B@main`."""

    vocabulary: int | None = Field(default=None, ge=256)
    """Train a byte-level BPE with this many entries on data.train, once, into the cache."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerChoice:
        if (self.path is None) == (self.vocabulary is None):
            raise UserError(
                "a tokenizer is either a folder or a size to train",
                fix="tokenizer.path=runs/tokenizer, or tokenizer.vocabulary=4096",
            )
        return self


class Ema(Config):
    """An exponential moving average of the weights: a second model, often a better one than the last step's. Costs
    one more copy of the trainable weights in memory and in every checkpoint, where it is the model folder `ema`."""

    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """How much of the average each step keeps: 0.999 looks back over about the last 1,000 steps."""

    warmup: bool = True
    """Look back less far at first, keeping at most (1 + step) / (10 + step), so that the first weights are soon
    forgotten."""

    every: int = Field(default=1, ge=1)
    """Take in the weights after every so many steps. The average looks back over as many steps as before."""


class Optim(Config):
    """How weights change."""

    known_elsewhere: ClassVar[Mapping[str, str]] = KNOWN_ELSEWHERE

    rule: Rule = AdamW()
    """The update rule and its hyperparameters."""

    schedule: Schedule = Cosine()
    """The learning rate over the run."""

    groups: tuple[Group, ...] = ()
    """Parameters by name pattern with their own weight decay or rate. Norms and biases never decay by default."""

    clip: float | None = Field(default=1.0, gt=0.0)
    """Largest global gradient norm; the norm is logged before clipping. `null`: no clipping."""

    ema: Ema | None = None
    """Keep a moving average of the weights as well, such as `{decay: 0.999}`."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not a number: stop names the first bad parameter and ends the run; skip leaves
    the weights as they are and goes on, at most 10 steps in a row. The schedule counts a skipped step."""


class Reference(Config):
    """The frozen model that an objective compares the policy with."""

    shorthand: ClassVar[str] = "start_from"

    start_from: str | None = None
    """A run directory, a checkpoint, a Hugging Face folder or a hub id. Left out: the policy as the run began, also
    when the run continues: the model of `model.start_from`; beside it the adapter, if the run continues one."""

    cached: bool = False
    """Ask it once for every row, before the first step, and keep what it said in the cache, by content: later runs,
    epochs and larger data read it there, and a model of its own leaves memory. For rows on disk."""


class Teacher(Config):
    """The frozen model that a distilled policy learns from: one with the same tokenizer."""

    shorthand: ClassVar[str] = "start_from"
    known_elsewhere: ClassVar[Mapping[str, str]] = {
        "teacher_model_name_or_path": "teacher.start_from=FOLDER", "lmbda": "data.kind=prompts",
        "seq_kd": "data.kind=prompts",
    }  # fmt: skip

    start_from: str | None = None
    """A run directory, a checkpoint, a Hugging Face folder or a hub id."""

    top_k: int = Field(default=64, ge=1)
    """So many ids are compared one by one at each place, those the teacher holds for likeliest; all the others
    together as one more."""

    cached: bool = False
    """Ask it once for every row, before the first step, and keep what it said in the cache, by content: 12 bytes for
    each of top_k ids of each target. The teacher then leaves memory. For rows on disk."""


class Rollouts(Config):
    """How answers of the policy's own are gathered, where the objective learns from such."""

    known_elsewhere: ClassVar[Mapping[str, str]] = {
        "num_generations": "rollout.group_size=8", "n": "rollout.group_size=8",
        "max_completion_length": "rollout.sampling.max_new_tokens=256", "num_iterations": "rollout.epochs=1",
        "reward_funcs": "rollout.rewards=[{kind: numeric}]",
    }  # fmt: skip

    group_size: int = Field(default=8, ge=1)
    """Answers to each prompt. What compares answers with each other needs 2 at least."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the answers of a rollout. One pass in one step: every answer is learned by the very policy that
    wrote it."""

    answers_per_step: int | None = Field(default=None, ge=1)
    """Answers of one optimizer step over all ranks: the learning knob, a divisor of data.prompts_per_step x
    group_size. Left out: all answers of a rollout."""

    sampling: Sampling = Sampling(max_new_tokens=256)
    """How the policy writes: temperature, filters, length, stop strings."""

    rewards: tuple[Reward, ...] = ()
    """What answers are worth: rewards by kind, added up by their weights, each reported under its name."""

    environment: Environment | None = None
    """Who answers the policy for several turns, such as `{kind: callback, function: "game:play", max_turns: 3}`: an
    answer is then a conversation. What it gives for turns is added to `rewards`. Left out: single answers."""

    sampler: SamplerKind = Own()
    """Who writes the answers, and with how much memory."""

    weights: Literal["shared", "copied"] = "shared"
    """Whose weights the sampler reads: those that are trained, or a copy that is renewed before every rollout. Both
    write the same answers; every answer carries the hash of its weights, and others than the trained are refused."""

    max_staleness: int | None = Field(default=None, ge=0)
    """Let a process of its own write and score answers while this one trains, for rewards that take long: every rollout
    is written by the weights as they were so many steps before it is learned. 0: by those that learn it, to the bit as
    without that process. Left out: no other process."""

    reward_workers: int = Field(default=1, ge=1)
    """Rollouts that are scored at the same time, in threads, where `max_staleness` lets several be written ahead: for
    rewards that wait for somebody else and may be asked from several threads at once."""

    share_prompt: bool = True
    """Learn the prompt of a group once for all its answers, which do not see each other: the same numbers in less
    time."""

    redraw: int = Field(default=0, ge=0)
    """So many more rounds of prompts may be drawn to replace groups all of whose answers earned the same, which teach
    nothing (dynamic sampling, arXiv:2503.14476, section 3.2). 0: such groups stay, with advantage 0."""

    mix_reference: float = Field(default=0.0, ge=0.0, le=1.0)
    """After every rollout the reference takes this share of the policy: reference = (1 - share) reference + share
    policy. 0: it stays as the run began."""


class Evaluate(Config):
    """What is measured on the way."""

    every: Every = Every.parse("never")
    """How often, and always at the end: `100 steps`, `1B tokens`, `never`."""

    suites: tuple[Suite, ...] = ()
    """Evaluations by kind, reported one by one under their names."""

    ema: bool = False
    """Measure the moving average of the weights (`optim.ema`), and let it write the samples."""

    held_out_rows: int = Field(default=1024, ge=1)
    """At most so many rows of the held-out split, the same ones each time."""

    prompts: tuple[str, ...] = ()
    """Texts to continue; the samples go to samples/ in the run directory."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Length of a sample in tokens."""


class Save(Config):
    """When a checkpoint is written and which are kept. The last step is always saved."""

    every: Every = Every.parse("1000 steps")
    """How often: `200 steps`, `10 min`, `never`."""

    keep_newest: int = Field(default=2, ge=1)
    """So many newest checkpoints stay."""

    keep_best: int = Field(default=2, ge=0)
    """So many checkpoints with the lowest score stay as well, if there is an evaluation."""

    by: str | None = None
    """The score: a name in an evaluation event, such as `held_out/loss`. By default the first loss there."""

    background: bool = True
    """Write while training goes on. Changes no number."""


class Log(Config):
    """What is told while the run goes on."""

    every: Every = Every.parse("1 steps")
    """How often a step is written to events.jsonl."""

    peak_flops: float | None = Field(default=None, gt=0.0)
    """Floating-point operations per second of one device at its best, for MFU. By default from a table; unknown
    devices have no MFU."""

    spread: bool = False
    """Also write every number of a step of which its mean says too little to spread.jsonl: the gap between the scores
    of each pair of a reward model. Evaluations do so in any case, with a histogram, in plots/."""

    trackers: tuple[Tracker, ...] = ()
    """Where the figures are shown besides, by kind: `trackers=[{kind: tensorboard}, {kind: wandb, project: mine}]`.
    One that fails is switched off and the run goes on."""


class Recipe(Config):
    """The complete description of one run. Two equal recipes on equal data give equal weights."""

    words: ClassVar[tuple[str, ...]] = ()
    known_elsewhere: ClassVar[Mapping[str, str]] = KNOWN_ELSEWHERE

    run: str = "runs/run"
    """The run directory: everything this run writes."""

    model: Family
    """The shape of the model, or `start_from` a folder with one."""

    tokenizer: TokenizerChoice
    """The vocabulary."""

    data: Dataset
    """What the model reads, and how much per step."""

    beside: Dataset | None = None
    """Rows that the other objective of `objective.kind=mix` learns in every step, beside those of `data`: text that a
    model must not forget, for example. How many is theirs to say: `beside.sequences_per_step=8`."""

    objective: Objective = CausalLM()
    """What the model learns to do."""

    reference: Reference = Reference()
    """What the policy is compared with, where the objective asks for it: by default the policy as the run began."""

    teacher: Teacher = Teacher()
    """Whom the policy learns from, where the objective distils: `teacher=runs/large`."""

    rollout: Rollouts = Rollouts()
    """How the policy's own answers are gathered and what they are worth, where the objective learns from them."""

    optim: Optim = Optim()
    """How weights change."""

    engine: EngineConfig = Single()
    """Where and how a step is computed."""

    precision: Precision = "auto"
    """Type of the computation; the weights themselves are float32 or wider. auto: bfloat16 where the processor
    multiplies it natively, else float32. A processor that does not computes products of 16 bits in float32 and rounds
    them: about as fast as float32, not as exact."""

    duration: Duration = Duration.parse("1 epochs")
    """How long: `2000 steps`, `20B tokens`, `2 epochs`, `90 min`."""

    evaluate: Evaluate = Evaluate()
    """What is measured on the way."""

    save: Save = Save()
    """When a checkpoint is written and which are kept."""

    log: Log = Log()
    """What is told on the way."""

    seed: int = Field(default=0, ge=0)
    """Everything random is a function of this number and the step."""

    resume: str = "auto"
    """auto: continue if the run directory has a checkpoint. never: refuse to. Or the path of a checkpoint."""

    cache: str = ".llmtrainer/cache"
    """Where prepared data and trained vocabularies are kept, by content."""

    allow: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    """Keys that may differ from the recipe a continued run began with, such as `optim.schedule`; and guards of the
    preflight that may trip: zero_targets, end_token, truncation, padding, duplicates, context, vocabulary, memory; of
    comparisons also equal_answers, empty_answers, labels; or all of them: preflight."""

    @model_validator(mode="after")
    def _allows_what_there_is(self) -> Recipe:
        keys = all_keys(type(self), self.plain())
        for name in self.allow:
            # A key below a part may be that of a kind that the run began with: only what is nearly right is refused.
            if name in GUARDS or name in keys or any(key.startswith(f"{name}.") for key in keys):
                continue
            near = nearest(name, [*GUARDS, *keys], cutoff=0.8)
            if near is not None or "." not in name:
                raise UserError(
                    f"`allow` names `{name}`, which is neither a guard nor a key",
                    why=f"guards: {', '.join(GUARDS)}",
                    fix=f"did you mean `{near}`?" if near else "remove it, or write the key with its dots: optim.rule",
                )
        return self

    @model_validator(mode="after")
    def _has_what_it_measures(self) -> Recipe:
        if self.evaluate.ema and self.optim.ema is None:
            raise UserError(
                "evaluate.ema asks for a moving average of the weights, and none is kept",
                fix="optim.ema.decay=0.999, or evaluate.ema=false",
            )
        return self
