"""merge: an adapter and its model, or the pieces that several processes wrote, become one Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.core.batch import Batch
from llmtrainer.core.precision import DTYPES
from llmtrainer.core.protocols import opening
from llmtrainer.models.adapters.lora import adapters
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.peft_format import is_adapter, read_config
from llmtrainer.models.stored import Policy
from llmtrainer.models.weights import in_pieces, load_policy
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.models import base_of, insert_adapter, load_base, model_folder, no_model, tokenizer_folder
from llmtrainer.training.publishing import (
    GENERATION,
    PROBES,
    publish,
    publish_foreign,
    read_json,
    require_free,
    stored_type,
)

ALLOWED = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of any logit, as a share of the largest logit, between the merged weights as they are stored
and the adapter beside its model, both computed in float32 or wider. Three to ten times what right merges show."""


class Merge(Config):
    """An adapter merged into its model, or pieces put together: one folder for transformers and every program that
    reads its files."""

    words: ClassVar[tuple[str, ...]] = ("model", "out")
    known_elsewhere: ClassVar[Mapping[str, str]] = {"dtype": "precision=bfloat16", "torch_dtype": "precision=bfloat16"}

    model: str
    """A run directory (its newest checkpoint), a checkpoint, or a PEFT folder: one that holds an adapter, or a model in
    pieces, as `engine.kind=fsdp2` saves it."""

    out: str
    """The folder to write. It appears whole, once all of it was read back and proved, or not at all."""

    base: str | None = None
    """The model that the adapter stands beside, if it is not where the adapter says."""

    precision: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Type of the stored weights. auto: the type of the model that the adapter stands beside."""

    tokenizer: str | None = None
    """A folder or file with the tokenizer. By default the adapter's own, if it was saved with one, else its
    model's."""

    shard_bytes: int = Field(default=5 * 10**9, ge=1)
    """Bytes of a file of weights at which another one is begun."""

    overwrite: bool = False
    """Replace a model that is already there. Anything else that is there is never touched."""

    check: bool = False
    """Also load the folder with transformers: the ids of texts, the logits and the likeliest text must be ours."""


@dataclass(frozen=True)
class Merged(Result):
    """Where the model is, and what was proved about it."""

    path: str
    base: str
    """The folder of the model that the adapter was merged into."""
    precision: str
    tensors: int
    bytes: int
    """Of the weights."""
    changed: int
    """Tensors that are not the base's."""
    max_logit_difference: float
    """Of the merged folder against the adapter beside its model, on texts of several kinds."""
    allowed_logit_difference: float
    """What rounding to the stored type may do; beyond it nothing is written."""
    base_logit_difference: float
    """Of the adapter beside its model against the model alone: what the adapter does."""
    files: list[str]
    checks: dict[str, str] = field(default_factory=dict)
    """What was proved, by name."""
    differences: list[str] = field(default_factory=list)
    """What is not as the base had it: fields of config.json, the tokenizer, its template, generation defaults."""

    def text(self) -> str:
        lines = [f"{self.path}: {self.tensors:,} tensors, {self.bytes / 1e6:,.1f} MB in {self.precision}"]
        lines += [f"  {name:<18} {told}" for name, told in self.checks.items()]
        lines += [f"  differs            {told}" for told in self.differences]
        return "\n".join(lines)


def merge(settings: Merge) -> Merged:
    """Write the folder. UserError where the model is in one piece and holds no adapter, OUT holds something else, the
    adapter vanishes in the stored type, or the folder does not give the logits of the adapter beside its model."""
    source, out = model_folder(settings.model), Path(settings.out)
    if in_pieces(source):
        return _put_together(settings, source, out)
    if not is_adapter(source):
        raise _nothing_to_merge(settings, source)
    base = base_of(source) if settings.base is None else model_folder(settings.base)
    require_free(out, base, settings.overwrite)
    words = Path(settings.tokenizer) if settings.tokenizer else tokenizer_folder(source)
    tokenizer = load_tokenizer(words)
    stored = stored_type(base)
    precision = stored if settings.precision == "auto" else settings.precision
    compute = torch.float64 if "float64" in (stored, precision) else torch.float32
    decoder = _opened(source, base, compute)
    rows = probes(tokenizer, decoder)
    wanted = [logits(decoder, row) for row in rows]
    learned = any(bool(linear.adapter.lora_B.any()) for linear in adapters(decoder).values() if linear.adapter)
    before = {name: linear.weight.detach().clone() for name, linear in adapters(decoder).items()}
    merge_in_place(decoder)
    changed = _changed(decoder, before, DTYPES[precision])
    del before
    if learned and not changed:
        raise UserError(
            f"in {precision} the merged model is its base: rounding takes away all that the adapter learned",
            where=str(source), why="every merged number is nearer to the old one than to its neighbour",
            fix="precision=float32, or serve the adapter beside its model",
        )
    found = 0.0
    bound = ALLOWED[precision] * max(float(row.abs().max()) for row in wanted)

    def prove(folder: Path) -> dict[str, str]:
        nonlocal found
        found = furthest(load_base(folder, compute).eval(), rows, wanted)
        if not found <= bound:
            raise UserError(
                f"the merged model is not the adapter beside its model: logits differ by {found:.2e}",
                where=str(source), why=f"in {precision} at most {bound:.2e} is allowed; nothing was kept",
                fix="precision=float32" if precision in ("bfloat16", "float16") else "tell the maintainers",
            )
        return {"logits": f"those of the adapter beside its model, to {found:.2e} ({bound:.2e} is allowed)"}

    if isinstance(decoder, Decoder):
        made = publish(
            decoder, tokenizer, base, out, precision, shard_bytes=settings.shard_bytes, check=settings.check,
            prove=prove, words=words,
        )  # fmt: skip
    else:
        made = publish_foreign(
            decoder, tokenizer, base, out, precision, shard_bytes=settings.shard_bytes, check=settings.check,
            prove=prove, words=words,
        )  # fmt: skip
    effect = furthest(_like(decoder, load_base(base, compute, frozen=True).eval()), rows, wanted)
    del decoder
    checks = {**made.checks, "base": f"{changed} tensors changed; the adapter moves logits by {effect:.2e}"}
    return Merged(
        str(out), str(base), precision, made.tensors, made.bytes, changed, found, bound, effect, made.files, checks,
        [*made.differences, *_told(base, out)],
    )  # fmt: skip


def _nothing_to_merge(settings: Merge, source: Path) -> UserError:
    if not (source / "config.json").is_file():
        return no_model(settings.model)
    return UserError(
        "this is a whole model, with no adapter to merge", where=str(source),
        fix=f"llmtrainer export {settings.model} out={settings.out}",
    )


def _put_together(settings: Merge, source: Path, out: Path) -> Merged:
    """The whole tensors of pieces, as a folder."""
    if settings.base is not None:
        raise UserError("these are pieces of a whole model, which has no base", where="base", fix="leave base out")
    require_free(out, source, settings.overwrite)
    stored = stored_type(source)
    precision = stored if settings.precision == "auto" else settings.precision
    decoder = load_policy(source, torch.float64 if stored == "float64" else torch.float32).eval()
    made = publish(
        decoder, load_tokenizer(settings.tokenizer or source), source, out, precision,
        shard_bytes=settings.shard_bytes, check=settings.check,
    )  # fmt: skip
    return Merged(
        str(out), str(source), precision, made.tensors, made.bytes, made.tensors, 0.0, 0.0, 0.0, made.files,
        made.checks, made.differences,
    )  # fmt: skip


def _opened(source: Path, base: Path, compute: torch.dtype) -> Policy:
    """The base with the adapter beside it."""
    policy = load_base(base, compute, frozen=True)
    read_config(source)[0].require_one()
    insert_adapter(policy, source)
    policy.eval()
    return policy


def _like(decoder: Policy, alone: Policy) -> Policy:
    """The model alone, compared by the same matrix: beside a score, a head for the vocabulary is gone."""
    if isinstance(alone, Decoder) and not decoder.worded:
        alone.lm_head = None
    return alone


def merge_in_place(decoder: Policy) -> None:
    """Every adapted matrix becomes the one that does what it and its adapter do; the adapters are gone."""
    with torch.no_grad():
        for linear in adapters(decoder).values():
            linear.weight.copy_(linear.merged())
            linear.adapter = None
    decoder.adapter = None


def probes(tokenizer: FileTokenizer, decoder: Policy) -> list[Batch]:
    """One row for each of the texts that are compared, no longer than the model's context."""
    rows = []
    for text in PROBES:
        ids = (opening(tokenizer) + tokenizer.encode(text))[: decoder.context_length]
        tokens_BT = torch.tensor([ids])
        zeros = torch.zeros(tokens_BT.shape, dtype=torch.int32)
        position_BT = torch.arange(len(ids), dtype=torch.int32)[None]
        rows.append(Batch(
            tokens_BT, tokens_BT, torch.ones(tokens_BT.shape), zeros, position_BT, zeros, torch.zeros(1).long()
        ))  # fmt: skip
    return rows


@torch.no_grad()
def logits(decoder: Policy, row: Batch) -> Tensor:
    """[B, T, V]; of a model that gives a score, its hidden states as seen by the embedding."""
    if isinstance(decoder, Decoder):
        return decoder.hidden(row) @ decoder.head_weight.to(decoder.compute).t()
    return decoder.logits(row)


def furthest(decoder: Policy, rows: Sequence[Batch], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any logit; NaN where a logit is."""
    return max(
        (float((logits(decoder, row) - right).abs().max()) for row, right in zip(rows, wanted, strict=True)),
        key=lambda value: math.inf if math.isnan(value) else value,
    )


def _changed(decoder: Policy, before: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    modules = dict(decoder.named_modules())
    now = ((getattr(modules[name], "weight"), old) for name, old in before.items())   # noqa: B009
    return sum(not torch.equal(weight.to(dtype), old.to(dtype)) for weight, old in now)


def _told(base: Path, out: Path) -> Iterator[str]:
    """What lies beside the weights and is not the base's: the tokenizer, its template, generation defaults."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", GENERATION):
        old, new = read_json(base / name), read_json(out / name)
        if not old and new:
            yield f"{name}: the base has none"
            continue
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                short = name == "tokenizer.json" or any(len(str(side.get(key))) > 60 for side in (old, new))
                yield f"{name}: {key}" + ("" if short else f": {old.get(key)!r}, now {new.get(key)!r}")
    old_template, new_template = (folder / "chat_template.jinja" for folder in (base, out))
    texts = [file.read_bytes() if file.is_file() else None for file in (old_template, new_template)]
    if texts[0] != texts[1]:
        yield "chat_template.jinja: " + ("the base has none" if texts[0] is None else "another one")
