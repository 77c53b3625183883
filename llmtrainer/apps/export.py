"""export: a model as a Hugging Face folder, read back and proved before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from llmtrainer.base.config import Config
from llmtrainer.base.errors import UserError
from llmtrainer.base.result import Result
from llmtrainer.models.adapters.gated_lora import GatedLora
from llmtrainer.models.peft_format import is_adapter, read_config, write_combinations
from llmtrainer.models.weights import load_policy
from llmtrainer.tokenizer.tokenizer import load_tokenizer
from llmtrainer.training.models import is_ours, load_whole, model_folder
from llmtrainer.training.publishing import appearing, publish, require_free, stored_type


class Export(Config):
    """A model as a Hugging Face folder, for transformers and every program that reads its files."""

    words: ClassVar[tuple[str, ...]] = ("model", "out")

    model: str
    """A run directory (its newest checkpoint), a checkpoint, or a Hugging Face folder."""

    out: str
    """The folder to write. It appears whole, once all of it was read back and proved, or not at all."""

    precision: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Type of the stored weights. auto: the type they have now."""

    tokenizer: str | None = None
    """A folder or file with the tokenizer, if the model's own has none."""

    shard_bytes: int = Field(default=5 * 10**9, ge=1)
    """Bytes of a file of weights at which another one is begun."""

    overwrite: bool = False
    """Replace a model that is already there. Anything else that is there is never touched."""

    check: bool = False
    """Also load the folder with transformers: the ids of texts, the logits and the likeliest text must be ours."""


@dataclass(frozen=True)
class Exported(Result):
    """Where the model is, and what was proved about it."""

    path: str
    precision: str
    tensors: int
    bytes: int
    """Of the weights."""
    files: list[str]
    checks: dict[str, str] = field(default_factory=dict)
    """What was proved, by name."""
    differences: list[str] = field(default_factory=list)
    """Fields of config.json that are not as the source had them."""
    loader: str = "AutoModelForCausalLM"
    """The class of transformers that reads the folder."""
    combinations: tuple[str, ...] = ()
    """Of a gated mixture: the folders of its adapters below `path`."""

    def text(self) -> str:
        held = f"{len(self.combinations):,} adapters" if self.combinations else f"{self.tensors:,} tensors"
        lines = [f"{self.path}: {held}, {self.bytes / 1e6:,.1f} MB in {self.precision}"]
        lines += [f"  {name:<18} {told}" for name, told in self.checks.items()]
        lines += [f"  differs            {told}" for told in self.differences]
        if self.combinations:
            lines += [
                "", "Load one of them with transformers and PEFT:",
                f'  model = AutoModelForCausalLM.from_pretrained("{Path(self.path) / self.combinations[0]}")',
            ]
            return "\n".join(lines)
        lines += [
            "", "Load it with transformers:",
            f'  tokenizer = AutoTokenizer.from_pretrained("{self.path}")',
            f'  model = {self.loader}.from_pretrained("{self.path}", dtype="auto")',
        ]
        return "\n".join(lines)


def export(settings: Export) -> Exported:
    """Write the folder. UserError where no class of transformers computes the model, OUT holds something else, or
    what was written does not read back as it was."""
    source, out = model_folder(settings.model), Path(settings.out)
    if is_adapter(source):
        if isinstance(read_config(source)[0], GatedLora):
            return _combinations(source, out)
        raise UserError(
            "this is an adapter, not a model", where=str(source), why="other programs want one matrix for each layer",
            fix=f"llmtrainer merge {settings.model} out={settings.out}",
        )
    if not is_ours(source):
        raise UserError(
            "this model is of a class of transformers, and lies in such a folder already", where=str(source),
            fix=f"cp -r {source} {out}",
        )
    require_free(out, source, settings.overwrite)
    tokenizer = load_tokenizer(settings.tokenizer or source)
    stored = stored_type(source)
    precision = stored if settings.precision == "auto" else settings.precision
    decoder = load_policy(source, torch.float64 if stored == "float64" else torch.float32).eval()
    made = publish(
        decoder, tokenizer, source, out, precision, shard_bytes=settings.shard_bytes, check=settings.check
    )
    loader = "AutoModelForCausalLM" if decoder.worded else "AutoModelForSequenceClassification"
    return Exported(str(out), precision, made.tensors, made.bytes, made.files, made.checks, made.differences, loader)


def _combinations(source: Path, out: Path) -> Exported:
    """A gated mixture as ordinary adapters in PEFT's form, one folder for each combination of gates."""
    require_free(out, source, overwrite=False)
    base = read_config(source)[1]
    policy = load_whole(source, torch.float32)
    with appearing(out) as partial:
        names = write_combinations(policy, base or "", partial)
        for name in names:
            read_config(partial / name)
    files = [path for path in out.rglob("*.safetensors")]
    return Exported(
        str(out), "float32", len(files), sum(path.stat().st_size for path in files), sorted(names),
        {"adapters": f"{len(names)} combinations of gates, each an ordinary adapter"},
        combinations=tuple(sorted(names)),
    )
