"""Whom a policy is distilled from: a frozen model that says its likeliest ids at every target that counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core import listed
from llmtrainer.core.batch import GATES, TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE, Batch
from llmtrainer.core.objective import Objective
from llmtrainer.core.protocols import Engine
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.peft_format import is_adapter
from llmtrainer.models.stored import Policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.models import load_base, load_whole, model_folder, no_model, tokenizer_folder
from llmtrainer.training.recipe import Teacher
from llmtrainer.training.reference import sha256_of

FACT = "teacher_sha256"
SLICE_BYTES = 64 * 2**20
"""Size of the logits that exist at one time."""


@dataclass(frozen=True)
class LiveTeacher:
    """Annotator: the teacher reads every batch just before the policy does."""

    teacher: Policy
    sha256: str
    """Over every weight by name."""
    device: torch.device
    k: int
    temperature: float
    rows: int
    """Rows of the head that stand for ids of the policy too."""
    adds: tuple[str, ...] = (TEACHER_IDS, TEACHER_LOGP, TEACHER_TEMPERATURE)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        # Without dropout; and how a target was drawn concerns who drew it, not what the teacher would say.
        known = {name: batch.signals[name] for name in (GATES,) if name in batch.signals}
        bare = replace(batch, signals=known).to(self.device)
        hidden_BTD, weight_VD = self.teacher.hidden(bare), self.teacher.head_weight
        if not isinstance(self.teacher, Decoder):
            hidden_BTD, weight_VD = self.teacher.with_bias(hidden_BTD)
        places = max(1, SLICE_BYTES // (4 * self.rows))
        return batch.with_signals(
            listed.told_by(hidden_BTD, weight_VD[: self.rows], bare, self.k, self.temperature, places)
        )


def teacher_of(
    chosen: Teacher, objective: Objective, policy: Policy, tokenizer: FileTokenizer, engine: Engine,
    compute: torch.dtype,
) -> LiveTeacher:
    """The teacher that the recipe names. UserError where it names none, or one that speaks of other ids."""
    if chosen.start_from is None:
        raise UserError(
            "the objective learns from a teacher, and none is named", where="teacher.start_from",
            fix="teacher=FOLDER, a model with the same tokenizer",
        )
    folder = model_folder(chosen.start_from)
    if not folder.is_dir():
        raise no_model(chosen.start_from)
    teacher = load_whole(folder, compute) if is_adapter(folder) else load_base(folder, compute, frozen=True)
    _require_same_ids(teacher, folder, policy, tokenizer)
    rows = min(teacher.vocabulary, policy.vocabulary)
    if chosen.top_k > rows:
        raise UserError(
            f"teacher.top_k is {chosen.top_k:,}, and there are {rows:,} ids", where="teacher.top_k",
            fix=f"teacher.top_k={rows} compares every id",
        )
    engine.reader(teacher)      # on the engine's device, arranged as the policy is
    teacher.requires_grad_(False).eval()
    temperature = temperature_of(objective)
    return LiveTeacher(teacher, sha256_of(teacher.state_dict()), engine.device, chosen.top_k, temperature, rows)


def temperature_of(objective: Objective) -> float:
    """At which temperature the objective asks its teacher, itself or a part of it."""
    found = {float(getattr(part, "temperature", 1.0)) for part in _taught(objective)}
    if len(found) != 1:
        raise UserError(
            "two objectives ask one teacher at two temperatures", where="objective",
            why=f"they are {', '.join(f'{one:g}' for one in sorted(found))}", fix="give both the same temperature",
        )
    return found.pop()


def _taught(objective: Objective) -> Iterator[Objective]:
    """The parts of an objective that read a teacher, itself if it is made of none."""
    parts = [part for name in type(objective).model_fields if isinstance(part := getattr(objective, name), Objective)]
    if not parts:
        if TEACHER_IDS in objective.reads:
            yield objective
        return
    for part in parts:
        yield from _taught(part)


def names_of(tokenizer: FileTokenizer) -> dict[int, str]:
    """What each id is called. Which of them ends a text may differ between a model and what was made of it."""
    described = json.loads(tokenizer.files()["tokenizer.json"])
    words = described["model"]["vocab"]
    found = {id: name for name, id in words.items()} if isinstance(words, dict) else dict(
        enumerate(name for name, _ in words)
    )
    return found | {one["id"]: one["content"] for one in described.get("added_tokens") or ()}


def _require_same_ids(teacher: Policy, folder: Path, policy: Policy, tokenizer: FileTokenizer) -> None:
    """UserError where the teacher has no words, or its ids mean other text."""
    if not isinstance(teacher, Decoder) and teacher.own_logits:
        raise UserError(
            f"{type(teacher.model).__name__} makes logits in a way of its own", where="teacher.start_from",
            why="what it says of a whole batch would have to exist at one time", fix="name another teacher",
        )
    if not teacher.worded:
        raise UserError(
            "this teacher says nothing of words: it has a score in place of the vocabulary's head",
            where="teacher.start_from", fix="name a language model",
        )
    its = tokenizer_folder(folder)
    if (its / "tokenizer.json").is_file():
        mine, theirs = (names_of(each) for each in (tokenizer, load_tokenizer(its)))
        if other := sorted(id for id in mine.keys() & theirs.keys() if mine[id] != theirs[id]):
            raise UserError(
                "the teacher has another tokenizer than the policy", where="teacher.start_from",
                why=f"id {other[0]:,} is `{theirs[other[0]]}` to the teacher and `{mine[other[0]]}` to the policy, and "
                f"so are {len(other) - 1:,} more of {len(mine):,}",
                fix="name a teacher with the same tokenizer",
            )
    elif teacher.vocabulary != policy.vocabulary:
        raise UserError(
            f"the teacher has {teacher.vocabulary:,} embedding rows and the policy {policy.vocabulary:,}",
            where="teacher.start_from", why="its folder has no tokenizer that would say whether they mean the same",
            fix="put its tokenizer.json beside it, or name a teacher with as many rows",
        )
