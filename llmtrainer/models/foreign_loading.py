"""Folders of transformers' own classes: opened without their code, proved before anything is trained, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.at_rest import at_rest
from llmtrainer.core.memory import aligned
from llmtrainer.models.foreign import AdaptedLinear, Foreign
from llmtrainer.models.foreign_attention import ATTENTION, attend_packed, made_mask
from llmtrainer.models.foreign_proof import (
    is_product,
    keeps_keys,
    require_causal,
    require_own_attention,
    require_packing,
)
from llmtrainer.models.foreign_score import with_own_head
from llmtrainer.models.weights import SHARD_BYTES

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that our attention computes."""


def load_foreign(
    folder: Path, compute: torch.dtype = torch.float32, *, frozen: bool = False, apart: bool = False
) -> Foreign:
    """The model of a folder, in any class of transformers that predicts the next token. No code of the folder runs.

    UserError where packed rows could not be exact (and they are not read apart), or where a proof fails.
    """
    transformers = _transformers()
    where, silent = str(folder), _Silence(transformers)
    with silent:
        config, model_class = _described(transformers, folder)
        lack = unpackable(model_class, config)
        if lack is not None and not apart:
            raise UserError(
                f"packed rows are not exact in {model_class.__name__}", where=where, why=lack,
                fix="model.apart=true, which reads every document by itself",
            )
        master = torch.float64 if compute == torch.float64 else torch.float32
        # Where documents are read one by one, the class' own attention sees all there is to see.
        named = {} if apart else {"attn_implementation": ATTENTION}
        if master == torch.float64:
            named["experts_implementation"] = "eager"     # their grouped products know no float64
        try:
            model = model_class.from_pretrained(
                str(folder), config=config, dtype=compute if frozen else master, local_files_only=True,
                use_safetensors=True, trust_remote_code=False, **named,
            )  # fmt: skip
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(
                f"transformers does not open this folder as {model_class.__name__}", where=where,
                why=str(error).strip().partition("\n")[0], fix="copy the model again, with its safetensors files",
            ) from None
    if not frozen:      # a weight inside a mapped file rounds otherwise than the same one that was trained
        for parameter in model.parameters():
            parameter.data = aligned(parameter.data)
    if labelled(config):
        with_own_head(model, model.score.weight, torch.promote_types(model.score.weight.dtype, torch.float32))
    if frozen:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = AdaptedLinear
                module.adapter = None   # type: ignore[assignment]
    policy = Foreign(model, compute, apart=apart, frozen=frozen)
    policy.angles_change_at = change_of_angles(config, where)
    with at_rest(policy):
        if apart:
            require_causal(policy, where)
        else:
            require_packing(policy, where)
            with silent:
                require_own_attention(policy, where)
        policy.own_logits = policy.worded and not is_product(policy)
        policy.keeps_keys = (
            policy.worded and not apart and policy.angles_change_at is None and keeps_keys(policy)
        )
    policy.requires_grad_(not frozen)
    policy.train()
    return policy


def change_of_angles(config: Any, where: str) -> int | None:
    """From which position on a text that is longer is turned by other angles (`longrope`, arXiv:2402.13753); None
    where all texts are turned alike. UserError where angles depend on what was read before."""
    text = config.get_text_config()
    for told in _rotary(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)):
        kind = told.get("rope_type", told.get("type"))
        if kind == "dynamic":
            raise UserError(
                "angles of the kind `dynamic` are kept from one batch to the next by this class", where=where,
                why="what a text is read as would depend on the longest text before it",
                fix="a model of our own families (model.kind=llama), or rope_type `yarn` or `linear` in config.json",
            )
        if kind == "longrope":
            first = told.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(first or text.max_position_embeddings)
    return None


def _rotary(told: Any) -> list[Mapping[str, Any]]:
    """What a config says of rotary angles: once, or for each kind of layer."""
    if not isinstance(told, Mapping):
        return []
    inner = [value for value in told.values() if isinstance(value, Mapping)]
    return inner or [told]


def unpackable(model_class: Any, config: Any) -> str | None:
    """Why packed rows cannot be exact in a class, for people; None if they may be."""
    text = config.get_text_config()
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if strange:
        return f"it has layers of {', '.join(strange)}, and only softmax attention can be told where documents end"
    if getattr(text, "attention_chunk_size", None):
        return f"its attention sees chunks of {text.attention_chunk_size} places, wherever documents begin"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "its class computes what mixes places by itself, so that nothing can tell it where documents end"
    return None


@dataclass(frozen=True)
class ForeignModel:
    """A folder as transformers saves it."""

    policy: Foreign

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and every buffer that is kept, by name; what is tied, once."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in self.policy.model.state_dict().items():
            if ".adapter." not in name and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                found[name] = value.detach()
        return found

    def write(self, named: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        model = self.policy.model
        tied = {name: value for name, value in model.state_dict().items() if name not in named}
        owners = {value.data_ptr(): name for name, value in model.state_dict().items() if name in named}
        whole = {**named, **{name: named[owners[value.data_ptr()]] for name, value in tied.items()}}
        with _Silence(_transformers()):
            model.save_pretrained(str(folder), state_dict=whole, max_shard_size=shard_bytes)


def read_foreign(policy: Foreign, folder: Path) -> None:
    """Fill a policy from a folder that it wrote."""
    transformers = _transformers()
    with _Silence(transformers):
        _, model_class = _described(transformers, folder)
        stored = model_class.from_pretrained(
            str(folder), dtype=policy.head_weight.dtype, local_files_only=True, use_safetensors=True
        )
    wanted, found = dict(policy.model.named_parameters()), dict(stored.named_parameters())
    wrong = sorted(
        name for name in {*wanted, *found}
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    )  # fmt: skip
    if wrong:
        raise UserError(
            "the stored weights are not this model's", where=str(folder), why=f"so {', '.join(wrong[:4])}",
            fix="name the folder of a model of the same shape and vocabulary",
        )
    policy.model.load_state_dict(stored.state_dict())


def _described(transformers: Any, folder: Path) -> tuple[Any, Any]:
    """The configuration of a folder and the class that reads it."""
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        known = transformers.models.auto.modeling_auto
        if not labelled(config):
            return config, known.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model_class = known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "transformers has no class for this folder that predicts the next token or scores a text",
            where=str(folder),
            why=str(error).strip().partition("\n")[0],
            fix="name a model that transformers knows by itself: code that lies in a folder is never run",
        ) from None
    if config.num_labels != 1:
        raise UserError(
            f"this model tells {config.num_labels} labels apart", where=str(folder),
            why="one number is what a reward model gives", fix="choose another model",
        )
    return config, model_class


def labelled(config: Any) -> bool:
    """Whether a folder's model gives one number instead of the next token."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def _transformers() -> Any:
    try:
        import transformers
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise UserError(
            "this model needs transformers", where="model.kind hf", why=str(error),
            fix="pip install 'llmtrainer[hf]'",
        ) from None
    AttentionInterface.register(ATTENTION, attend_packed)
    AttentionMaskInterface.register(ATTENTION, made_mask)
    return transformers


class _Silence:
    """Without transformers' progress bars and advice, which are for people who use it by hand."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
