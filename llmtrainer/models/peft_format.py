"""Adapters in and out of the folders that PEFT reads and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import fill
from llmtrainer.core.protocols import Head
from llmtrainer.models.adapters.dora import Dora
from llmtrainer.models.adapters.gated_lora import GatedLora, chosen
from llmtrainer.models.adapters.lora import Lora, adaptable, adapters, matches, measure
from llmtrainer.models.heads.ordinal import Ordinal
from llmtrainer.models.heads.score import Score
from llmtrainer.models.heads.value import Value

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_GATED = "GATED_LORA"
"""Our own type: several adapters in one, see adapters/gated_lora.py."""
_PREFIX = "base_model.model."
"""What PEFT puts before the name that a module has in the model."""

_HEAD = f"{_PREFIX}score."
"""What stands before the parameters of a scalar head, which is saved whole beside the adapters."""
_HEADS = {"classifier", "score"}
"""What PEFT calls such heads among its modules_to_save."""

_PLAIN: dict[str, Any] = {
    "alpha_pattern": {}, "bias": "none", "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "lora_bias": False, "modules_to_save": None, "rank_pattern": {}, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
}  # fmt: skip
"""What PEFT's LoraConfig also says of every adapter of ours."""

_OTHER_FUNCTIONS = (
    "alpha_pattern", "rank_pattern", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config", "fan_in_fan_out",
)  # fmt: skip
"""Settings under which an adapter computes, or holds, something else than a LowRank does."""

_SAME_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""First values of an adapter that leave the base as it is. All others, such as pissa, olora and corda, take from the
base's own matrices what they put into A and B, each time that PEFT loads the adapter."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / CONFIG).is_file()


def adapter_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Every weight of every adapter under PEFT's name, detached, not copied."""
    return {stored: parameter.detach() for stored, parameter in _parameters(policy).items()}


def _parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    for name, linear in adapters(policy).items():
        assert linear.adapter is not None
        for own, parameter in linear.adapter.named_parameters():
            # A and B are layers there, the magnitude is not.
            named[f"{_PREFIX}{name}.{own}" + (".weight" if own in ("lora_A", "lora_B") else "")] = parameter
    if policy.score is not None:
        # What is trained whole beside the adapters: PEFT's modules_to_save.
        assert isinstance(policy.score, nn.Module)
        named |= {f"{_HEAD}{own}": parameter for own, parameter in policy.score.named_parameters()}
    return named


def adapter_config(policy: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json. `base` is the folder or hub id of the model that the adapter stands beside; what follows
    the @ of an id is its revision."""
    adapter = policy.adapter
    assert isinstance(adapter, Lora)
    # PEFT has no such mixture, and must not take it for one adapter of a large rank.
    gates: dict[str, Any] = {"peft_type": _GATED, "groups": adapter.groups} if isinstance(adapter, GatedLora) else {}
    return _described(adapter, _target_modules(policy), base) | gates | _head_config(policy)


def _head_config(policy: nn.Module) -> dict[str, Any]:
    if policy.score is None:
        return {}
    return {"modules_to_save": ["score"]} | ({} if policy.worded else {"task_type": "SEQ_CLS"})


def head_of(folder: Path) -> Head | None:
    """The scalar head that an adapter's folder holds besides: what kind it is follows from its weights."""
    shapes, config = _stored_shapes(folder), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if f"{_HEAD}weight" not in shapes:
        return None
    if shapes[f"{_HEAD}weight"][0] != 1:
        raise UserError(
            f"the head beside the adapter has {shapes[f'{_HEAD}weight'][0]} labels", where=str(folder / WEIGHTS),
            why="one number is what a reward model gives", fix="choose another model",
        )
    if cuts := shapes.get(f"{_HEAD}cuts"):
        return Ordinal(classes=cuts[0] + 1)
    return Score() if config.get("task_type") == "SEQ_CLS" else Value(trunk="shared")


def _described(adapter: Lora, target_modules: list[str], base: str) -> dict[str, Any]:
    name, _, revision = (base, "", "") if Path(base).is_absolute() else base.partition("@")
    return {
        "peft_type": "LORA", "base_model_name_or_path": name, "revision": revision or None, "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout, "use_rslora": adapter.rslora, "use_dora": adapter.directed,
        "target_modules": target_modules, **_PLAIN,
    }  # fmt: skip


def _target_modules(policy: nn.Module) -> list[str]:
    """Last parts of names where they name the adapted matrices and no others, else whole names."""
    adapted = set(adapters(policy))
    last = sorted({name.rpartition(".")[2] for name in adapted})
    meant = {name for name in adaptable(policy) if any(matches(name, part) for part in last)}
    return last if meant == adapted else sorted(adapted)


def write_combinations(policy: nn.Module, base: str, out: Path) -> list[str]:
    """An ordinary adapter of every combination of a mixture's gates, each in a folder of its name below `out`."""
    gated = policy.adapter
    assert isinstance(gated, GatedLora)
    names = []
    for gate, numbers in gated.combinations():
        named: dict[str, Tensor] = {}
        for name, (down_RI, up_OR) in chosen(policy, numbers).items():
            named |= {f"{_PREFIX}{name}.lora_A.weight": down_RI, f"{_PREFIX}{name}.lora_B.weight": up_OR}
        write_adapter(named, _described(gated.alone(), _target_modules(policy), base), out / gate)
        names.append(gate)
    return names


def write_adapter(named: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Both files of an adapter's folder, from tensors that may be a copy taken earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in named.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> tuple[Lora, str | None]:
    """The adapter that a folder describes, and the name of its base. What we would compute differently is refused."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{CONFIG} cannot be read", where=str(path), why=str(error), fix="copy it again") from None
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", _GATED):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(
            f"this adapter is of the type {kind!r}", where=str(path), why="LORA is the one that is computed here",
            fix="merge it into its model with the program that made it",
        )
    for key in _OTHER_FUNCTIONS:
        if config.get(key) and not (key == "modules_to_save" and _saves_a_head_alone(config[key], folder)):
            raise UserError(
                f"{key} is {config[key]!r}, which is not computed here", where=str(path),
                why="another function under the same weights would be another model",
                fix="merge the adapter into its model with PEFT, and start from that",
            )
    if (first := config.get("init_lora_weights")) not in _SAME_BASE:
        raise UserError(
            f"init_lora_weights is {first!r}: the adapter stands beside another base than its base's folder holds",
            where=str(path), why="PEFT takes the first values of A and B away from the base's matrices, here and there",
            fix="in PEFT, save it with path_initial_model_for_weight_conversion, or merge it into its model",
        )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"bias is {config['bias']!r}: biases of the model were trained too", where=str(path),
            why="only low-rank weights are read here", fix="merge the adapter into its model with PEFT",
        )
    fields = {
        "rank": config.get("r", 8), "alpha": config.get("lora_alpha", 8),
        "rslora": bool(config.get("use_rslora", False)), "dropout": float(config.get("lora_dropout") or 0.0),
        "targets": tuple(sorted(_adapted_names(folder))),
    }  # fmt: skip
    try:
        if config["peft_type"] == _GATED:
            adapter: Lora = GatedLora.model_validate({**fields, "groups": config.get("groups", ())})
        else:
            adapter = (Dora if config.get("use_dora") else Lora).model_validate(fields)
    except ValueError as error:
        raise UserError("no adapter has this shape", where=str(path), why=str(error), fix="save it again") from None
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        return adapter, None
    return adapter, f"{base}@{revision}" if revision and not Path(base).is_dir() else base


def _saves_a_head_alone(modules: Any, folder: Path) -> bool:
    return isinstance(modules, list) and set(modules) <= _HEADS and f"{_HEAD}weight" in _stored_shapes(folder)


def load_adapter(policy: nn.Module, folder: Path) -> None:
    """Fill every adapter of the policy. Missing, unexpected and wrongly shaped names are listed and refused before
    anything is changed."""
    wanted, problems = _parameters(policy), []
    stored = _stored_shapes(folder)
    problems += [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in stored]
    problems += [f"unexpected: {name} {list(stored[name])}" for name in stored if name not in wanted]
    problems += [
        f"{name} is {list(stored[name])}, the adapter has {list(parameter.shape)}"
        for name, parameter in wanted.items() if name in stored and tuple(parameter.shape) != stored[name]
    ]  # fmt: skip
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            "the stored adapter is not one of this model", where=str(folder), why=shown,
            fix="name the model that the adapter was trained on, and its own rank and targets",
        )
    with safe_open(folder / WEIGHTS, framework="pt") as opened, torch.no_grad():
        for name, parameter in wanted.items():
            fill(parameter, opened.get_tensor(name))
    measure(policy)


def _adapted_names(folder: Path) -> set[str]:
    names = set()
    for stored in _stored_shapes(folder):
        if stored.startswith(_HEAD):
            continue
        name, _, part = stored.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B", "lora_magnitude_vector") or not stored.startswith(_PREFIX):
            raise UserError(
                f"{stored} is no weight of a low-rank adapter of a linear layer", where=str(folder / WEIGHTS),
                why="it would be lost", fix="merge the adapter into its model with the program that made it",
            )
        names.add(name)
    return names


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{WEIGHTS} is missing", where=str(folder),
            why="adapter_model.bin is a pickle, which can run code" if pickled else None,
            fix="save the adapter as safetensors" if pickled else "copy the whole folder",
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            "the file of the adapter is damaged", where=str(folder / WEIGHTS), why=str(error),
            fix="copy or download it again",
        ) from None
