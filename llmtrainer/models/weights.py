"""Weights in and out of safetensors folders that Hugging Face libraries read too, and freezing by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import Stored, fill
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.hugging_face import from_config, to_config, zero_biases

MODEL = "model"
"""The folder, in a checkpoint's, of weights that several processes wrote in pieces."""
ONE_FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of stored weights that are plain numbers."""
SHARD_BYTES = 5 * 10**9
"""Size at which Hugging Face's own libraries begin another file."""


def tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Every weight by name, detached, not copied. A tied head is the embedding and has no name of its own; adapters
    and a critic are no part of the model."""
    return {name: parameter.detach() for name, parameter in _own(decoder).items()}


def _own(decoder: Decoder) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in decoder.named_parameters()
        if ".adapter." not in name and not name.startswith("critic.")
    }  # fmt: skip


def save_weights(
    decoder: Decoder, folder: Path, *, shard_bytes: int = SHARD_BYTES, end: int | None = None, pad: int | None = None,
    dtype: torch.dtype | None = None, tokenizer_class: str | None = None,
) -> list[Path]:  # fmt: skip
    """Write config.json and the weights, one file or shards with an index. Returns the files written.

    `end` and `pad` are the tokenizer's ids, for whoever generates with another library, and `tokenizer_class` is
    what its tokenizer_config.json says (see `to_config`). `dtype` rounds the weights, for an export; None keeps
    the masters. The bytes are a function of the weights alone.
    """
    dtype = dtype or decoder.head_weight.dtype
    config = to_config(
        decoder.family, decoder.vocabulary, end=end, pad=pad, dtype=str(dtype).removeprefix("torch."),
        tokenizer_class=tokenizer_class,
    )  # fmt: skip
    rounded = {name: value.to(dtype) for name, value in tensors(decoder).items()}
    return save_tensors(rounded, config, folder, shard_bytes)


def save_tensors(
    named: Mapping[str, Tensor], config: Mapping[str, object], folder: Path, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """As `save_weights`, from tensors that may be a copy taken earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {**named, **zero_biases(named, config)}
    shards = _shards(named, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = dict(zip([ONE_FILE] if len(shards) == 1 else names, shards, strict=True))
    for file, part in files.items():
        # More than one metadata key would be written in an order that differs from save to save.
        save_file({name: value.contiguous() for name, value in part.items()}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(value.nbytes for value in named.values())},
            "weight_map": {name: file for file, part in files.items() for name in part},
        }
        _write_json(folder / INDEX, index)
        files[INDEX] = {}
    write_config(config, folder)
    return [folder / name for name in [*files, CONFIG]]


def write_config(config: Mapping[str, object], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, config)


def load_policy(folder: Path, compute: torch.dtype = torch.float32, *, frozen: bool = False) -> Decoder:
    """The decoder of a folder that `save_weights` or a Hugging Face library wrote, ready to compute.

    frozen: nothing of it will ever be trained, so matrices are kept in the type that they are multiplied in.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError("no model here", where=str(folder), why=f"{CONFIG} is missing", fix="name a model folder")
    family, vocabulary = from_config(_read_json(path), str(path))
    decoder = family.build(vocabulary, compute)
    if frozen:
        narrow(decoder)
    load_weights(decoder, folder)
    return decoder


def load_weights(decoder: Decoder, folder: Path) -> None:
    """Fill every weight from a folder. Missing, unexpected and wrongly shaped names are listed and refused
    before anything is changed."""
    wanted = _own(decoder)
    if in_pieces(folder):
        stored = Stored(folder, MODEL)
        shapes_of = {name: tuple(value.shape) for name, value in wanted.items()}
        _require_equal(shapes_of, {name: stored.shape(name) for name in stored}, folder)
        for name, parameter in wanted.items():
            fill(parameter, stored[name])
        return
    files = _weight_files(folder)
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    ours = _our_names(shapes, folder)
    found = {ours[name]: shape for name, shape in shapes.items() if not _redundant(ours[name], decoder)}
    _require_equal({name: tuple(value.shape) for name, value in wanted.items()}, found, folder)
    # Copies and zeros are read first: a folder that is refused has changed nothing.
    for changes in (False, True):
        for file in files:
            with safe_open(file, framework="pt") as opened, torch.no_grad():
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    redundant = _redundant(ours[name], decoder)
                    if changes and not redundant:
                        fill(wanted[ours[name]], opened.get_tensor(name))
                    elif not changes and redundant:
                        _require_redundant(ours[name], opened.get_tensor(name), files, ours, folder)


def in_pieces(folder: Path) -> bool:
    """Whether a folder's weights are what several processes wrote, each its pieces."""
    return (folder / MODEL).is_dir()


def narrow(decoder: Decoder) -> None:
    """Freeze a decoder without values and give its matrices the type that they are used in: the same results, and
    in 16 bits half the memory. Vectors stay as they are, norms are computed in float32."""
    for name, module in decoder.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)) if name != "score" else ():
            dtype = decoder.residual_type if name.endswith("embed_tokens") else decoder.compute
            kept = parameter if parameter.ndim == 1 else torch.empty_like(parameter, dtype=dtype)
            setattr(module, own, nn.Parameter(kept, requires_grad=False))


def freeze(decoder: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose names match; `!pattern` trains them again. Later patterns win.

    Returns the frozen names. `["*", "!model.embed_tokens.*"]` trains the embedding alone.
    """
    parameters = dict(decoder.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern.removeprefix("!"))]
        if not matching:
            near = difflib.get_close_matches(pattern.strip("!*"), parameters, n=1, cutoff=0.3)
            raise UserError(
                f"`{pattern}` matches no parameter",
                where="model.freeze", why="a pattern that does nothing is a spelling mistake",
                fix=f"did you mean `{(near or list(parameters))[0]}`?",
            )
        for name in matching:
            parameters[name].requires_grad_(pattern.startswith("!"))
    return [name for name, parameter in parameters.items() if not parameter.requires_grad]


def _shards(named: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, value in named.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= value.nbytes
    return shards


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path.name} is no JSON", where=str(path), why=str(error), fix="copy it again"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no keys", where=str(path), fix="copy it again")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if in_pieces(folder):
        raise UserError(
            "these weights are in pieces, as several processes wrote them", where=str(folder / MODEL),
            why="this needs a folder of whole tensors", fix=f"llmtrainer merge {folder} out=FOLDER, and name that",
        )
    # Where both are, somebody saved again without clearing the folder; transformers reads the one file too.
    if (folder / INDEX).is_file() and not (folder / ONE_FILE).is_file():
        named = _read_json(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(
                f"{INDEX} names no files of this folder", where=str(folder / INDEX), fix="copy it again"
            )
        files = [folder / name for name in names]
    else:
        files = [folder / ONE_FILE]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            f"weights are missing: {', '.join(absent)}",
            where=str(folder),
            why="weights in *.bin files are pickles, which can run code" if pickled else None,
            fix="save the model as safetensors" if pickled else "copy the whole model folder",
        )
    return files


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                if part.get_dtype() not in _NUMBERS:
                    raise UserError(
                        f"{name} is stored as {part.get_dtype()}", where=str(file),
                        why="quantised weights mean something only with their scales", fix="use the original model",
                    )
                yield name, tuple(part.get_shape())
    except SafetensorError as error:
        raise UserError(
            "a weight file is damaged", where=str(file), why=str(error), fix="copy or download it again"
        ) from None


def _our_names(stored: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Our name for each stored one. What stands before `embed_tokens` is the prefix of the whole stack: `model.`,
    nothing in a base model that was saved without its head, `language_model.model.` in a model of several parts."""
    ending = "embed_tokens.weight"
    prefixes = [name.removesuffix(ending) for name in stored if name == ending or name.endswith("." + ending)]
    heads = [name for name in stored if name == "lm_head.weight" or name.endswith(".lm_head.weight")]
    for found in (prefixes, heads):
        if len(found) > 1:
            raise UserError(
                f"the folder holds {len(found)} models", where=str(folder),
                why=f"it has weights under {' and '.join(f'`{name}`' for name in found)}",
                fix="save the language model alone",
            )
    prefix = prefixes[0] if prefixes else "model."
    names = {}
    for name in stored:
        if name in heads:
            names[name] = "lm_head.weight"
        else:
            names[name] = "model." + name.removeprefix(prefix) if name.startswith(prefix) else name
    return names


def _redundant(name: str, decoder: Decoder) -> bool:
    """Whether a stored tensor follows from others: a tied head's copy, an old library's rotary table, a bias of
    zeros that another library's class has and the model has not."""
    return (
        name.endswith("rotary_emb.inv_freq")
        or (name == "lm_head.weight" and decoder.lm_head is None)
        or (name.endswith("self_attn.o_proj.bias") and not decoder.family.output_bias)
    )


def _require_redundant(
    name: str, stored: Tensor, files: Sequence[Path], ours: Mapping[str, str], folder: Path
) -> None:
    if name.endswith("o_proj.bias") and bool(stored.any()):
        raise UserError(
            f"{name} is not zero, and the model has no such bias", where=str(folder), why="it would be lost",
            fix="remove `llmtrainer` from config.json, if another program trained these weights further",
        )
    if name == "lm_head.weight":
        embedding = _stored("model.embed_tokens.weight", files, ours)
        if stored.shape != embedding.shape or not torch.equal(stored.to(embedding.dtype), embedding):
            raise UserError(
                "lm_head.weight differs from the embedding, but the model says they are tied", where=str(folder),
                why="one of the two would be lost", fix='"tie_word_embeddings": false in config.json',
            )


def _stored(name: str, files: Sequence[Path], ours: Mapping[str, str]) -> Tensor:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118 (not a dict)
                if ours[stored] == name:
                    return opened.get_tensor(stored)
    raise AssertionError(f"{name} was found before")


def _require_equal(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    problems = [
        *(f"missing: {name} {list(wanted[name])}" for name in wanted if name not in found),
        *(f"unexpected: {name} {list(found[name])}" for name in found if name not in wanted),
        *(
            f"{name} is {list(found[name])}, the model has {list(wanted[name])}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ),
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            "the stored weights are not this model's", where=str(folder), why=shown,
            fix="name the folder of a model of the same shape and vocabulary, or leave the shape to its config.json",
        )


def stored_names(folder: Path) -> dict[Path, dict[str, str]]:
    """The files of weights of a folder; of each tensor in them its stored name and ours."""
    names = {file: [name for name, _ in _shapes(file)] for file in _weight_files(folder)}
    ours = _our_names(dict.fromkeys(name for found in names.values() for name in found), folder)
    return {file: {name: ours[name] for name in found} for file, found in names.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. UserError where there is none."""
    if not (folder / CONFIG).is_file():
        raise UserError("no model here", where=str(folder), why=f"{CONFIG} is missing", fix="name a model folder")
    return _read_json(folder / CONFIG)
