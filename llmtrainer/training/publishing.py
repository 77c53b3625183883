"""A model as a Hugging Face folder that appears whole, once all of it was read back and proved, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.pieces import Stored
from llmtrainer.core.precision import DTYPES
from llmtrainer.core.protocols import opening
from llmtrainer.generation.loop import complete
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.foreign import Foreign
from llmtrainer.models.foreign_loading import ForeignModel, load_foreign
from llmtrainer.models.hugging_face import OWN, from_config, to_config, zero_biases
from llmtrainer.models.weights import CONFIG, INDEX, MODEL, in_pieces, load_policy, save_tensors, tensors
from llmtrainer.tokenizer.tokenizer import FileTokenizer, load_tokenizer
from llmtrainer.training.scoring import scores_of

GENERATION = "generation_config.json"
PROBES = (
    "The quick brown fox jumps over the lazy dog.", "  def main(argv):\n\treturn 0\n\n", "it's 12345.678 x==y",
    "\u6625\u7720\u4e0d\u89c9\u6653\uff0c\u5904\u5904\u95fb\u557c\u9e1f\u3002", "na\u00efve caf\u00e9 e\u0301",
    "\U0001f600\U0001f469\u200d\U0001f467 \u0440\u0443\u0441\u0441\u043a\u0438\u0439", "a" * 100, "\r\n \n", "\x00\x7f",
)  # fmt: skip
"""What both tokenizers must read alike: words, indentation, numbers, Chinese, marks that combine, emoji, control
characters."""
GREEDY_TOKENS = 32
LOGITS_RELATIVE = 1e-3
"""Two float32 implementations, relative to the largest logit."""


Check = Callable[[Path], Mapping[str, str]]
"""Proves something of a folder that was written, and says what; raises UserError where it cannot."""


@dataclass(frozen=True)
class Published:
    """A folder that got its name."""

    tensors: int
    bytes: int
    """Of the weights."""
    files: list[str]
    checks: dict[str, str]
    """What was proved, by name."""
    differences: list[str]
    """What is not as the source had it."""

    @classmethod
    def of(
        cls, out: Path, weights: Mapping[str, Tensor], checks: dict[str, str], source: Path, config: Mapping[str, Any]
    ) -> Published:
        size = sum(value.nbytes for value in weights.values())
        files = sorted(file.name for file in out.iterdir())
        return cls(len(weights), size, files, checks, list(differences(source, config)))


def publish(
    decoder: Decoder, tokenizer: FileTokenizer, source: Path, out: Path, precision: str, *, shard_bytes: int,
    check: bool, prove: Check | None = None, words: Path | None = None,
) -> Published:  # fmt: skip
    """Write the folder. `source` has what other programs know about the model besides its weights, and `words` the
    template of the tokenizer, if that is another folder.

    UserError where no class of transformers computes the model, or what was written does not read back as it was.
    """
    require_fit(tokenizer, decoder.vocabulary, source)
    if decoder.worded and decoder.score is not None:
        decoder.score = None    # other programs have no place for a critic's head beside the vocabulary's
        decoder.family = decoder.family.model_copy(update={"head": None})
    with appearing(out) as partial:
        config = described(decoder, tokenizer, source, precision)
        weights = {name: value.to(DTYPES[precision]) for name, value in tensors(decoder).items()}
        weights |= zero_biases(weights, config)
        save_tensors(weights, config, partial, shard_bytes)
        _write_tokenizer(tokenizer, partial)
        _write_generation(source, config, partial)
        checks = dict(_proved(partial, source, words or source, decoder.family, weights, tokenizer))
        if prove is not None:
            checks |= prove(partial)
        if check:
            checks |= _checked_by_transformers(partial, load_policy(partial).eval(), tokenizer)
    return Published.of(out, weights, checks, source, config)


def publish_foreign(
    policy: Foreign, tokenizer: FileTokenizer, source: Path, out: Path, precision: str, *, shard_bytes: int,
    check: bool, prove: Check, words: Path,
) -> Published:  # fmt: skip
    """As `publish`, of a model of transformers' own classes, in the form that they save themselves."""
    with appearing(out) as partial:
        form = ForeignModel(policy)
        weights = {
            name: value.to(DTYPES[precision]) if value.is_floating_point() else value
            for name, value in form.tensors().items()
        }
        form.write(weights, partial, shard_bytes)
        # transformers writes the type of the model it holds, which is not the one of these weights.
        config = {**read_json(partial / CONFIG), "dtype": precision}
        _write_json(partial / CONFIG, config)
        _write_tokenizer(tokenizer, partial)
        for name, origin in (("chat_template.jinja", words), (GENERATION, source)):
            if (origin / name).is_file():
                shutil.copyfile(origin / name, partial / name)
        again = load_tokenizer(partial)
        _require(again.fingerprint == tokenizer.fingerprint, partial, "tokenizer", "its fingerprint")
        checks = {"tokenizer": "the same fingerprint", **prove(partial)}
        if check:
            again_policy = load_foreign(partial, torch.float32, apart=policy.apart).eval()
            checks |= _checked_by_transformers(partial, again_policy, tokenizer)
    return Published.of(out, weights, checks, source, config)


def described(decoder: Decoder, tokenizer: FileTokenizer, source: Path, precision: str) -> dict[str, Any]:
    """config.json. Ids beyond the tokenizer's own (several ends, say) are the source's. UserError where no class
    of transformers computes the model."""
    old = read_json(source / CONFIG)
    ends = old.get("eos_token_id")
    known = tokenizer.end in (ends if isinstance(ends, list) else [ends])
    config = to_config(
        decoder.family, decoder.vocabulary, end=tokenizer.end, pad=tokenizer.pad, dtype=precision,
        tokenizer_class="Qwen2Tokenizer" if tokenizer.cuts_as_qwen2 else None,
    )  # fmt: skip
    if config["model_type"] == OWN:
        raise UserError(
            "no class of transformers computes this model", where="model",
            why="a partial rotary exists in ours alone; biases with a window exist as `qwen2` alone, and beside a "
            "qwen2 transformers takes Qwen2's tokenizer",
            fix="use it with llmtrainer, or train a model without what is special about it",
        )
    begin = old.get("bos_token_id", tokenizer.begin) if known else tokenizer.begin
    return {**config, "bos_token_id": begin, "eos_token_id": ends if known else tokenizer.end}


def _write_tokenizer(tokenizer: FileTokenizer, folder: Path) -> None:
    """The tokenizer's files byte for byte; where none says so, which tokens begin, end and pad a text."""
    tokenizer.save(folder)
    names = {number: name for name, number in tokenizer.control.items()}
    roles = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "pad_token": tokenizer.pad}
    config_file, map_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    told = {**read_json(map_file), **read_json(config_file)}
    missing = {role: names[number] for role, number in roles.items() if number in names and not told.get(role)}
    if missing or not config_file.exists():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **read_json(config_file), **missing}
        _write_json(config_file, config)
        told |= config
    if not map_file.exists():
        _write_json(map_file, {role: told[role] for role in (*roles, "unk_token") if told.get(role)})


def _write_generation(source: Path, config: Mapping[str, Any], folder: Path) -> None:
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    else:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / GENERATION, {key: number for key, number in ids.items() if number is not None})


def _proved(
    folder: Path, source: Path, words: Path, family: Llama, weights: Mapping[str, Tensor], tokenizer: FileTokenizer
) -> Iterator[tuple[str, str]]:
    """Read everything back as a stranger would. UserError, and no folder, if anything is not as it was."""
    wrong = not_read_back(folder, weights)
    _require(not wrong, folder, "weights", ", ".join(wrong))
    yield "weights", f"{len(weights):,} tensors read back equal"
    described = read_json(folder / CONFIG)
    described.pop(OWN, None)    # what others read is what must be right
    theirs, vocabulary = from_config(described, str(folder))
    if not family.output_bias and theirs.output_bias:
        # Proved above to be zeros: the class has one switch for the biases of all four matrices.
        family = family.model_copy(update={"output_bias": True})
    wrong = [key for key in type(family).model_fields if _meant(theirs, key) != _meant(family, key)]
    _require(not wrong, folder, CONFIG, ", ".join(wrong))
    _require(vocabulary == described["vocab_size"], folder, CONFIG, "vocab_size")
    yield "config", "read back without our own fields: the same shape and the same rotary positions"
    again = load_tokenizer(folder)
    same = again.fingerprint == tokenizer.fingerprint and again.begin == tokenizer.begin
    _require(same, folder, "tokenizer", "its fingerprint")
    _require(
        all(again.encode(text) == tokenizer.encode(text) for text in PROBES), folder, "tokenizer", "ids of a text"
    )
    yield "tokenizer", f"the same fingerprint, the same ids of {len(PROBES)} texts"
    for name, origin in (("chat_template.jinja", words), (GENERATION, source)):
        if (origin / name).is_file():
            kept = (folder / name).is_file() and (folder / name).read_bytes() == (origin / name).read_bytes()
            _require(kept, folder, name, "its bytes")
            yield name.partition(".")[0], "the source's, byte for byte"


def not_read_back(folder: Path, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that the folder has otherwise, or has not, or has alone."""
    unread, wrong = dict(weights), []
    for opened, name in _opened(folder):
        value = unread.pop(name, None)
        if value is None or not torch.equal(opened.get_tensor(name), value):
            wrong.append(name)
    return wrong + list(unread)


def _meant(family: Llama, key: str) -> object:
    """A field, or what it comes to where it is left out; nothing for a field that changes no function."""
    if key in ("start_from", "freeze", "adapter", "head", "neftune", "dropout", "init_std", "fp32_residual"):
        return None
    if key == "kv_heads":
        return family.kv_heads or family.heads
    return getattr(family, {"head_size": "channels", "intermediate_size": "mlp_size"}.get(key, key))


def _checked_by_transformers(
    folder: Path, decoder: Decoder | Foreign, tokenizer: FileTokenizer
) -> dict[str, str]:
    """The same ids, logits and greedy text, or the same score, in float32. UserError, naming what differs, if not."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            "check=true needs transformers", why="it is what the folder is loaded with",
            fix="pip install 'llmtrainer[hf]', or leave check out",
        ) from error
    theirs = AutoTokenizer.from_pretrained(str(folder))
    for text in PROBES:
        found = list(theirs(text, split_special_tokens=True)["input_ids"])
        _require(found == opening(tokenizer) + tokenizer.encode(text), folder, "AutoTokenizer", f"the ids of {text!r}")
    told = {"AutoTokenizer": f"the same ids of {len(PROBES)} texts"}
    prompt = (opening(tokenizer) + tokenizer.encode(PROBES[0]))[: decoder.context_length // 2]
    tokens_BT = torch.tensor([prompt])
    if not decoder.worded:
        return {**told, "score": _same_score(folder, decoder, prompt)}
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(tokens_BT).logits[0, -1]
        cache: Any = decoder.cache(1, len(prompt))    # each reads its own
        got = decoder.read(tokens_BT, torch.tensor([len(prompt)]), cache)[0, : wanted.shape[0]]
        far = float((wanted - got).abs().max() / wanted.abs().max())
        _require(far <= LOGITS_RELATIVE, folder, "logits", f"{far:.1e} of the largest")
        room = min(GREEDY_TOKENS, decoder.context_length - len(prompt))
        text = model.generate(tokens_BT, max_new_tokens=room, do_sample=False)[0, len(prompt) :].tolist()
    (ours,) = complete(decoder, [prompt], Sampling(temperature=0.0, max_new_tokens=room), tokenizer)
    _require(text[: len(ours.tokens)] == list(ours.tokens), folder, "generate", "the likeliest text")
    return {
        **told, "logits": f"equal to {far:.0e} of the largest", "greedy text": f"the same {len(ours.tokens)} tokens",
    }  # fmt: skip


def _same_score(folder: Path, decoder: Decoder | Foreign, prompt: list[int]) -> str:
    """Of one text, by transformers' class for a sequence with one label."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = float(model(torch.tensor([prompt])).logits[0, 0])
    far = abs(float(scores_of(decoder, [prompt])[0]) - wanted)
    _require(far <= LOGITS_RELATIVE * max(1.0, abs(wanted)), folder, "score", f"{far:.1e} of {wanted:.3g}")
    return f"AutoModelForSequenceClassification gives the same, to {far:.0e}"


def differences(source: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Fields of the source's config.json that have another value now, or none."""
    for key, value in read_json(source / CONFIG).items():
        if key == OWN:
            continue
        if key not in config:
            yield f"{key}: {json.dumps(value)}, left out"
        elif config[key] != value:
            yield f"{key}: {json.dumps(value)}, now {json.dumps(config[key])}"


def _require(right: bool, folder: Path, part: str, what: str) -> None:
    if not right:
        raise UserError(
            f"{part}: {what} did not come back as it was", where=str(folder),
            why="an export that is not the model is worse than none, so nothing was kept",
            fix="tell the maintainers, with the config.json and the tokenizer of the model",
        )


def require_fit(tokenizer: FileTokenizer, rows: int, source: Path) -> None:
    """Refuse a tokenizer with ids beyond the rows of the model's embedding."""
    if tokenizer.vocabulary > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocabulary:,} ids and the model rows for {rows:,}",
            where=str(source), why="text would become ids that the model does not know",
            fix="name the tokenizer that the model was trained with: tokenizer=FOLDER",
        )


def require_free(out: Path, source: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_model = out.is_dir() and (out / CONFIG).is_file() and not any(file.is_dir() for file in out.iterdir())
    if overwrite and is_model and out.resolve() != source.resolve():
        return
    raise UserError(
        "there is something already", where=str(out),
        why="it is the model itself" if out.resolve() == source.resolve()
        else "only a folder that holds a model and nothing else is replaced" if overwrite
        else "nothing is overwritten unasked",
        fix="name another folder" if overwrite or not is_model else "overwrite=true, or name another folder",
    )  # fmt: skip


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder to write into, which gets the name `out` where the block ends well, and goes where it does not.
    A folder that was there before goes only after that."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def stored_type(folder: Path) -> str:
    """The type of a folder's first weight; float32 where there is none, which loading then refuses."""
    told = {"F64": "float64", "F16": "float16", "BF16": "bfloat16"}
    if in_pieces(folder):
        stored = Stored(folder, MODEL)
        return told.get(stored.type(next(iter(stored))), "float32")
    for opened, name in _opened(folder):
        return told.get(opened.get_slice(name).get_dtype(), "float32")
    return "float32"


def _opened(folder: Path) -> Iterator[tuple[Any, str]]:
    index = read_json(folder / INDEX).get("weight_map", {})
    for file in sorted({folder / name for name in index.values()}) or sorted(folder.glob("*.safetensors")):
        if file.name.startswith("model"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield opened, name


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
