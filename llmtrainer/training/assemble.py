"""A Recipe becomes a Trainer, in numbered steps: the only place that sees a whole Recipe and live objects."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrainer.base.config import count_as_read, dump, unread
from llmtrainer.base.errors import UserError
from llmtrainer.base.events import EventLog
from llmtrainer.base.process import StopRequests
from llmtrainer.base.rundir import RunDir
from llmtrainer.base.units import Progress
from llmtrainer.base.version import VERSION
from llmtrainer.core.example import Message
from llmtrainer.core.precision import DTYPES, resolve
from llmtrainer.core.protocols import Annotator, Engine, Tokenizer, opening
from llmtrainer.data.lengths import lengths_in_store
from llmtrainer.data.open import documents, find
from llmtrainer.data.packed import Store
from llmtrainer.generation.loop import complete
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models import kernels, paths
from llmtrainer.models.stored import Policy
from llmtrainer.optim.groups import group
from llmtrainer.parallel.device import find_device
from llmtrainer.tokenizer.chat import Chat
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.average import MovingAverage
from llmtrainer.training.dataset import Opened, Rows, Setting
from llmtrainer.training.evaluation import Evaluations, write_samples
from llmtrainer.training.exactness import exact_facts
from llmtrainer.training.feed import Feed, feed_of
from llmtrainer.training.models import locate_model, model_folder
from llmtrainer.training.parts import Parts
from llmtrainer.training.policies import base_facts_of, base_name, form_of, policy_of
from llmtrainer.training.preflight import preflight
from llmtrainer.training.recipe import Recipe
from llmtrainer.training.resume import Resumption, continued
from llmtrainer.training.saving import Saver
from llmtrainer.training.schedule_length import schedule_length
from llmtrainer.training.shared_prompts import require_exact_sharing
from llmtrainer.training.spread import keeper, write_spread
from llmtrainer.training.throughput import flops_per_token, peak_flops
from llmtrainer.training.trainer import Trainer
from llmtrainer.training.writing import text_after

View = Callable[[Mapping[str, Any]], None]
"""Shows an event to whoever watches."""


@dataclass(frozen=True)
class Assembled:
    """A trainer at the step it continues from, and what the run says about itself."""

    trainer: Trainer
    resumption: Resumption | None
    facts: dict[str, Any]
    """Code version, precision, fingerprints: part of every checkpoint's manifest."""


def assemble(
    recipe: Recipe, log: EventLog, view: View, stop: StopRequests, *, most_documents: int | None = None
) -> Assembled:
    """Everything a run needs. Call under the run's lock. `most_documents` shortens every suite, for a dry run."""
    run = RunDir(Path(recipe.run))

    def warn(text: str) -> None:
        log.append("warning", text=text)
        view({"kind": "warning", "text": text})

    def record(rollout: Mapping[str, Any]) -> None:
        log.append("rollout", **rollout)

    _require_trackers(recipe)
    # 1. The engine decides the device, and the device what is fast.
    engine, precision = engine_of(recipe)
    require_choices(recipe, engine.device, DTYPES[precision])
    # 2. Vocabulary, text, rows.
    tokenizer_folder, tokenizer = engine.in_turn(lambda: tokenizer_of(recipe))
    rows = engine.in_turn(lambda: rows_of(recipe, tokenizer_folder, tokenizer, engine))
    facts = facts_of(recipe, precision, rows, tokenizer)
    # 3. Where the run continues, before anything large is allocated.
    same = {name: facts[name] for name in (*MUST_MATCH, *rows.facts)}
    resumption = engine.in_turn(lambda: continued(run, recipe, same, warn, engine.rank))
    # 4. The model, its optimizer, and their state.
    began = resumption.folder if resumption else None
    policy, told = trained_policy(recipe, tokenizer, engine, DTYPES[precision], rows, resumption, warn)
    average = average_of(recipe, policy, resumption, warn)
    # 5. Who gives it rows, and who says what is known of them.
    feed = feed_of(recipe, rows, policy, tokenizer, engine, DTYPES[precision], resumption, record)
    facts |= {**told, **feed.facts, **exact_facts(recipe, engine, precision, told, rows, resumption, warn)}
    # 6. How long, and at which rate.
    length = schedule_length(recipe, resumption, rows, warn)
    # 7. What is watched and kept.
    saver = Saver(
        run, recipe.save, dump(recipe), tokenizer, {**facts, "schedule_length": str(length)},
        form_of(policy, tokenizer, tokenizer_folder, base_name(recipe, began)), engine,
        parent_of(recipe, resumption), resumption.scores if resumption else {}, average, rows.chat, feed.states,
        partial(engine.readable, policy),
    )  # fmt: skip
    if engine.rank == 0:
        saver.tidy()
        saver.require_space()
    if resumption is None and rows.chat is not None and rows.train is not None:
        look_before(recipe, run, rows.train.store, rows, tokenizer, policy, engine, feed.annotators, warn)
    parts = Parts(
        seed=recipe.seed, source=feed.source, policy=policy, objective=recipe.objective, engine=engine,
        schedule=recipe.optim.schedule, schedule_length=length, duration=recipe.duration,
        clip=recipe.optim.clip, on_nonfinite=recipe.optim.on_nonfinite,
        log=log, log_every=recipe.log.every, evaluate_every=recipe.evaluate.every, save_every=recipe.save.every,
        evaluate=evaluations_of(recipe, run, rows, policy, tokenizer, engine, most_documents, average, feed).run,
        saver=saver, annotators=feed.annotators, average=average, starts_at=feed.starts_at, told=feed.told,
        before=feed.before(rows), writes_answers=rows.prompts is not None,
        first_step=lambda: require_read(recipe, began=resumption is None), view=view,
        flops_per_token=flops_per_token(policy, recipe.data.sequence_length),
        peak_flops=peak_of(recipe, engine, precision), stop=stop,
        keep=keeper(recipe.objective, recipe.log.spread, run),
    )  # fmt: skip
    progress, figures = (resumption.progress, resumption.figures) if resumption else (Progress(), {})
    return Assembled(Trainer(parts, progress, figures), resumption, facts)


def peak_of(recipe: Recipe, engine: Engine, precision: str) -> float | None:
    """Operations a second that all devices together could do; None where one's peak is unknown."""
    each = peak_flops(engine.device, precision, recipe.log.peak_flops)
    return None if each is None else each * engine.world_size


def trained_policy(
    recipe: Recipe, tokenizer: FileTokenizer, engine: Engine, compute: torch.dtype, rows: Opened,
    resumption: Resumption | None, warn: Callable[[str], None],
) -> tuple[Policy, dict[str, Any]]:
    """The policy on the engine's device with its optimizer, both as the checkpoint has them if the run continues; and
    what every checkpoint says of how it computes."""
    policy = policy_of(recipe, tokenizer, compute, resumption.folder if resumption else None)
    if rows.train is not None:
        require_gates(policy, rows.train.store, "data.train")
    if resumption is not None:
        resumption.load_weights(policy)     # while it is whole: an engine may leave each process a piece
    arranged = engine.prepare(policy, recipe.optim.rule, group(policy.named_parameters(), recipe.optim.groups))
    require_exact_sharing(rows.train, policy)
    for text in arranged.fallbacks:
        warn(text)
    if resumption is not None:
        resumption.load_state(engine)
    return policy, {**arranged.facts, **base_facts_of(recipe, resumption)}


def _require_trackers(recipe: Recipe) -> None:
    for tracker in recipe.log.trackers:
        tracker.require()
    # Their settings are read on threads of their own, which may be after the first step has asked what was read.
    count_as_read(*recipe.log.trackers)


MUST_MATCH = ("data_fingerprint", "tokenizer_fingerprint", "precision")
"""Facts that a continued run shares with the run that began."""


def facts_of(recipe: Recipe, precision: str, rows: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest of every checkpoint says about how it came to be."""
    return {
        "recipe_sha256": hashlib.sha256(dump(recipe).encode()).hexdigest(),
        "data_fingerprint": rows.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **rows.facts,
        "precision": precision,
        "code": f"llmtrainer {VERSION}, torch {torch.__version__}",
    }


def look_before(
    recipe: Recipe, run: RunDir, store: Store, rows: Opened, tokenizer: Tokenizer, policy: Policy, engine: Engine,
    annotators: Sequence[Annotator], warn: Callable[[str], None],
) -> None:
    """What is held against the rows of a fine-tuning run before its first step."""
    assert rows.chat is not None
    preflight(
        run, store, tokenizer, policy.vocabulary, recipe.objective, engine,
        ends=sorted({*rows.chat.end_ids, tokenizer.end}), context=policy.context_length,
        max_dropped_share=rows.max_dropped_share, largest=rows.largest, annotators=annotators,
        tokens_per_batch=recipe.data.tokens_per_batch, allow=recipe.allow, warn=warn,
    )  # fmt: skip


def average_of(
    recipe: Recipe, policy: Policy, resumption: Resumption | None, warn: Callable[[str], None]
) -> MovingAverage | None:
    """The moving average of the weights where the run left it; from the weights themselves where it begins."""
    if recipe.optim.ema is None:
        return None
    average = MovingAverage(policy, recipe.optim.ema)
    if resumption is not None and resumption.average.is_dir():
        average.load(policy, resumption.average)
    elif resumption is not None:
        warn("this run kept no moving average so far: it begins with the weights of the checkpoint")
    return average


def parent_of(recipe: Recipe, resumption: Resumption | None) -> str | None:
    """The checkpoint that the first checkpoint of this process descends from."""
    if resumption is not None:
        return resumption.folder.name
    return None if recipe.model.start_from is None else locate_model(recipe.model.start_from).origin


def evaluations_of(
    recipe: Recipe, run: RunDir, rows: Opened, policy: Policy, tokenizer: Tokenizer, engine: Engine,
    most_documents: int | None, average: MovingAverage | None, feed: Feed,
) -> Evaluations:
    """Held-out rows, named sets, suites and samples, with every setting read now and not at the first evaluation."""
    settings, fields, tokens = recipe.evaluate, recipe.data.texts(), recipe.evaluate.max_new_tokens
    if policy.adapter is not None and policy.adapter.gated and (settings.prompts or settings.suites):
        raise UserError(
            "prompts and suites do not say which adapters their text goes through", where="evaluate",
            why="every sample of a gated mixture names its gates", fix="evaluate.prompts=[] evaluate.suites=[]",
        )

    # A suite reads its settings when it runs, which may be hours from now. That each kind reads all of them is held by
    # a test.
    count_as_read(*settings.suites)

    def read(path: str) -> Iterator[str]:
        found = documents(find(path), fields=fields)
        return (document.text for document in itertools.islice(found, most_documents))

    def sample(progress: Progress) -> None:
        ends = () if rows.chat is None else rows.chat.end_ids
        sampling = Sampling(max_new_tokens=tokens, temperature=0.0, stop_ids=ends)
        prompts = [_asked(rows.chat, tokenizer, prompt) for prompt in settings.prompts]
        completions = complete(policy, prompts, sampling, tokenizer, seed=recipe.seed)
        told: list[Mapping[str, object]] = [
            {
                "prompt": prompt, "text": text_after(tokenizer, ids, item.tokens), "tokens": len(item.tokens),
                "finish": item.finish,
            }
            for prompt, ids, item in zip(settings.prompts, prompts, completions, strict=True)
        ]
        if engine.rank == 0:
            write_samples(run, progress, told)

    return Evaluations(
        policy, tokenizer, recipe.objective, engine, suites=settings.suites, read=read,
        measured=measured_of(recipe, rows, policy), sample=sample if settings.prompts else None,
        average=average if settings.ema else None, annotators=feed.annotators, draw=partial(write_spread, run),
        examined=feed.examined, point=feed.point,
    )  # fmt: skip


def _asked(chat: Chat | None, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the rows have it: a text to continue, or a question of a conversation."""
    if chat is not None:
        return chat.prompt((Message("user", prompt),))
    return opening(tokenizer) + tokenizer.encode(prompt)


def engine_of(recipe: Recipe) -> tuple[Engine, str]:
    """The engine, and the precision it computes in: `auto` depends on the device."""
    precision = resolve(recipe.precision, find_device(recipe.engine.device, "float32"))
    return recipe.engine.start(precision), precision


def require_choices(recipe: Recipe, device: torch.device, compute: torch.dtype) -> None:
    """Refuse attention or kernels that cannot run here now, and not once the text is tokenised."""
    # On a copy: what counts as reading these settings is the engine's doing as they say.
    if recipe.optim.clip is not None and getattr(recipe.engine.model_copy(deep=True), "step_in_backward", False):
        raise UserError(
            "gradients cannot be clipped when parameters are updated during backward",
            where="engine.step_in_backward, optim.clip", why="their norm is known when the last of them is there",
            fix="optim.clip=null, or engine.step_in_backward=false",
        )
    asked = recipe.engine.model_copy(deep=True).arrangement()
    paths.choose(asked.attention, device, compute, asked.fallback)
    kernels.choose(asked.kernels, device, compute, asked.fallback)


def tokenizer_of(recipe: Recipe) -> tuple[Path, FileTokenizer]:
    """The recipe's vocabulary; trained on the training text, once, if the recipe gives a size."""
    choice = recipe.tokenizer
    if choice.path is not None:
        folder = model_folder(choice.path, weights=False)
    else:
        assert choice.vocabulary is not None
        folder = recipe.data.learned_vocabulary(choice.vocabulary, Path(recipe.cache))
    return folder, load_tokenizer(folder)


def rows_of(recipe: Recipe, folder: Path, tokenizer: FileTokenizer, engine: Engine) -> Opened:
    """The rows of every step, and what is measured; files are prepared into the cache first."""
    setting = Setting(folder, tokenizer, engine, Path(recipe.cache), recipe.seed, _held_out_rows(recipe))
    opened = recipe.data.opened(setting)
    if recipe.beside is None:
        return opened
    beside = recipe.beside.opened(setting).train
    if beside is None:
        raise UserError("`beside` has prompts and no rows", where="beside.kind", fix="beside.kind=documents")
    return replace(opened, beside=beside, facts={**opened.facts, "beside_fingerprint": beside.fingerprint})


def _held_out_rows(recipe: Recipe) -> int:
    # Asked for only where something is held out: elsewhere it would count as read and mean nothing.
    return recipe.evaluate.held_out_rows if recipe.data.held_out else 1


def require_gates(policy: Policy, store: Store, where: str) -> None:
    """Have the rows' names of gates mean adapters of this policy. UserError where one of the two has gates and the
    other has not."""
    adapter = policy.adapter
    if adapter is not None and adapter.gated:
        if not store.gate_names:
            raise UserError(
                "the rows do not say which adapters they go through", where=where,
                why="every sample of a gated mixture names its gates, such as `t1a3`",
                fix="data.gate=KEY names the key of the records that has them; or model.adapter.kind=lora",
            )
        store.number_gates(adapter.numbers)
    elif store.gate_names:
        raise UserError(
            f"the rows name gates ({', '.join(store.gate_names[:4])}) and the model has none", where=where,
            why="only a gated mixture of adapters asks for them; they would be ignored silently",
            fix="model.adapter.kind=gated_lora, or remove data.gate (a store: prepare it again without gate)",
        )


def measured_of(recipe: Recipe, rows: Opened, policy: Policy) -> Mapping[str, Rows]:
    """What is evaluated by name, as one step each. UserError where a suite has the same name, or a row is longer than
    the model reads."""
    found = rows.measured()
    for name, measured in found.items():
        require_gates(policy, measured.store, f"the evaluation set {name}")
        if rows.chat is not None and "context" not in recipe.allow:
            _require_context(policy, measured.store, name)
    titles = [suite.title for suite in recipe.evaluate.suites]
    if twice := sorted(set(titles) & found.keys()):
        raise UserError(
            f"an evaluation set and a suite are both called `{twice[0]}`",
            why="their figures would have one name", fix="another name in data.evaluate",
        )  # fmt: skip
    return found


def _require_context(policy: Policy, store: Store, name: str) -> None:
    """Refuse an evaluation set with a row that the model cannot read; those of training the preflight looks at."""
    lengths = lengths_in_store(store) - 1
    if (longest := int(lengths.max(initial=0))) > policy.context_length:
        raise UserError(
            f"the evaluation set {name} has rows beyond the model's context",
            where=f"row {int(lengths.argmax()) + 1:,} of {store.path}",
            why=f"it reads {longest:,} tokens, the model's context is {policy.context_length:,}",
            fix=f"data.sequence_length={policy.context_length} with data.too_long=drop or cut; or, if it is meant, "
            "allow=[context]",
        )


def require_read(recipe: Recipe, began: bool) -> None:
    """Refuse a recipe that sets a field which nothing has read: an option that is ignored is a lie (S41).

    Some fields are for a run that begins (`model.init_std`) and some for one that continues (`allow`): each is
    asked for where it has a use.
    """
    elsewhere = ("allow",) if began else ("model.",)
    if ignored := [name for name in unread(recipe) if not name.startswith(elsewhere)]:
        raise UserError(
            f"`{ignored[0]}` was set and nothing read it",
            why="this combination of parts has no use for it, so it would be ignored silently"
            + (f"; so would {', '.join(ignored[1:])}" if ignored[1:] else ""),
            fix=f"remove {', '.join(ignored)} from the recipe",
        )
