"""Byte-pair vocabularies of other formats as a tokenizer.json: GPT-2's vocab.json with merges.txt, and
tiktoken's ranks."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.files import CONFIG_FILE, FILE, MAP_FILE, parsed
from llmtrainer.tokenizer.stream import byte_alphabet

VOCAB_FILE, MERGES_FILE, ADDED_FILE = "vocab.json", "merges.txt", "added_tokens.json"

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_MARKS_AND_BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_RULE = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
QWEN_RULE = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_MARKS_AND_BLANKS}"
CL100K_RULE = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How the vocabularies of these names cut text, for Oniguruma. tiktoken's own possessive forms match the same."""

_GPT2_END = {"<|endoftext|>": 50_256}
KNOWN_RANKS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "r50k_base": (GPT2_RULE, _GPT2_END),
    "p50k_base": (GPT2_RULE, _GPT2_END),
    "cl100k_base": (
        CL100K_RULE,
        {
            "<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
}  # fmt: skip
"""Rank files that say by their name how text is cut, and which control ids stand beside the ranks."""


def files_of_gpt2(files: Mapping[str, str], where: str) -> dict[str, str]:
    """tokenizer.json and its companions from vocab.json and merges.txt. The class that tokenizer_config.json names
    decides how text is cut: GPT-2's way where it names none. UserError for a class of another way."""
    config = parsed(files, CONFIG_FILE, where) if CONFIG_FILE in files else {}
    owner = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    rules = {"GPT2Tokenizer": (GPT2_RULE, None), "Qwen2Tokenizer": (QWEN_RULE, {"type": "NFC"})}
    if owner not in rules:
        raise UserError(
            f"how {owner} cuts text is not known here", where=where,
            why=f"{VOCAB_FILE} and {MERGES_FILE} do not say; known are {', '.join(rules)}",
            fix=f"save the tokenizer with transformers once: AutoTokenizer.from_pretrained(...) writes {FILE}",
        )
    vocabulary = {str(token): int(number) for token, number in parsed(files, VOCAB_FILE, where).items()}
    merges = list(_merges(files[MERGES_FILE], vocabulary, where))
    added = added_tokens(files, where, vocabulary)
    if "<|endoftext|>" in vocabulary:
        added.setdefault("<|endoftext|>", {"id": vocabulary["<|endoftext|>"], "special": True})
    rule, normalizer = rules[owner]
    kept = {name: files[name] for name in files if name not in (VOCAB_FILE, MERGES_FILE, ADDED_FILE)}
    entries = _numbered(added, vocabulary, where)
    description = byte_level(
        vocabulary, merges, entries, rule, normalizer, prefix=bool(config.get("add_prefix_space", False))
    )
    description["post_processor"] = template(config, entries)
    return {FILE: json.dumps(description, ensure_ascii=False), **with_class(kept, where)}


def files_of_ranks(ranks_file: bytes, name: str, files: Mapping[str, str], where: str) -> dict[str, str]:
    """tokenizer.json and its companions from a tiktoken rank file.

    How text is cut and the control ids come from tokenizer_config.json (`pat_str`, `special_tokens`, as tiktoken
    calls them) or from the name, where it is a published one. UserError where neither says.
    """
    config = parsed(files, CONFIG_FILE, where) if CONFIG_FILE in files else {}
    ranks = _ranks(ranks_file, where)
    rule, special = KNOWN_RANKS.get(name, (None, {}))
    if config.get("pat_str"):
        rule = in_oniguruma(str(config["pat_str"]), where)
    if rule is None:
        raise UserError(
            "how this vocabulary cuts text is not known", where=where,
            why="a rank file holds words and no rule; another rule would give other ids without an error",
            fix=f'write {CONFIG_FILE} beside it: {{"pat_str": "...", "special_tokens": {{"<|endoftext|>": '
            f'{len(ranks)}}}, "eos_token": "<|endoftext|>"}}; known by name: {", ".join(KNOWN_RANKS)}',
        )
    special = {str(key): int(number) for key, number in (config.get("special_tokens") or special).items()}
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    added = {token: {"special": True, "id": number} for token, number in special.items()}
    added |= added_tokens(files, where, spelled)
    description = byte_level(
        spelled, list(merges_of_ranks(spelled)), _numbered(added, spelled, where), rule, None, whole_words=True
    )
    return {FILE: json.dumps(description, ensure_ascii=False), **with_class(files, where)}


def byte_level(
    vocabulary: Mapping[str, int], merges: Collection[tuple[str, str]], added: list[dict[str, Any]], rule: str,
    normalizer: dict[str, Any] | None, *, prefix: bool = False, whole_words: bool = False,
) -> dict[str, Any]:
    """A byte-level BPE as tokenizer.json holds it. `whole_words`: a piece of text that is a word needs no merge."""
    # The library numbers added tokens without a gap, unless the model lists them under their ids too.
    named = {token["content"]: token["id"] for token in added}
    split = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # GPT-2's blank in front of a text comes before the split, and joins its first word.
    first = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": first if prefix else {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_words,
            "vocab": {**vocabulary, **named}, "merges": [list(merge) for merge in merges],
        },
    }  # fmt: skip


def template(config: Mapping[str, Any], added: Collection[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The begin token before every text, as tokenizer.json says it, where a config without one asks for it."""
    told = config.get("bos_token")
    name = told.get("content") if isinstance(told, dict) else told
    number = next((token["id"] for token in added if token["content"] == name), None)
    if not config.get("add_bos_token") or number is None:
        return None
    begin, first = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing", "single": [begin, first],
        "pair": [begin, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }  # fmt: skip


def merges_of_ranks(ranks: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Every way to put a word together from two words, by the word's rank: where the format says only that the
    neighbours whose union ranks lowest are joined first, the leftmost of equals.

    Equals are two cuts of one word. Where they overlap in a text (`x y z` with xy = yz), xy is the left one, so it
    must stand first in a list of merges.
    """
    for word in sorted(ranks, key=ranks.__getitem__):
        cuts = [cut for cut in range(1, len(word)) if word[:cut] in ranks and word[cut:] in ranks]
        for cut in sorted(cuts, key=lambda cut: (not word.startswith(word[cut:]), cut)):
            yield word[:cut], word[cut:]


def added_tokens(files: Mapping[str, str], where: str, vocabulary: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What the companions call added tokens, by name, each with what is told of it: id, special."""
    found: dict[str, dict[str, Any]] = {}
    if ADDED_FILE in files:
        told = parsed(files, ADDED_FILE, where)
        found |= {str(name): {"id": int(number), "special": False} for name, number in told.items()}
    for file in (MAP_FILE, CONFIG_FILE):
        config = parsed(files, file, where) if file in files else {}
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            found[token["content"]] = {"special": bool(token.get("special")), "id": int(number)}
        named = [value for key, value in config.items() if key.endswith("_token")]
        for token in [*named, *(config.get("additional_special_tokens") or ())]:
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str) and (name in found or name in vocabulary):
                found[name] = {"id": vocabulary.get(name), **found.get(name, {}), "special": True}
    return found


def with_class(files: Mapping[str, str], where: str) -> dict[str, str]:
    """The companions, with a config that makes transformers take tokenizer.json as it stands."""
    config = parsed(files, CONFIG_FILE, where) if CONFIG_FILE in files else {}
    for key in ("pat_str", "special_tokens", "added_tokens_decoder", "auto_map"):
        config.pop(key, None)
    return {**files, CONFIG_FILE: json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"}


def in_oniguruma(pattern: str, where: str) -> str:
    """A pattern of tiktoken's for the library that splits here. UserError for what would mean something else."""
    # Behind a count, `+` is possessive there and a repetition here; where nothing follows, greedy is the same.
    changed = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=[|)]|\Z)", r"\1", pattern)
    changed = re.sub(r"(?<!\\)\$(?=[|)]|\Z)", r"\\z", changed)
    if re.search(r"\{\d+(?:,\d*)?\}\+|(?<![\\\[])\^|(?<!\\)\$", changed):
        raise UserError(
            "this pattern cannot be carried over", where=where, why=f"pat_str is {pattern}",
            fix="write it without `{n,m}+` inside an alternative, and without `^`",
        )
    return changed


def _merges(text: str, vocabulary: Mapping[str, int], where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not right or left + right not in vocabulary:
            raise UserError(
                f"line {number:,} of {MERGES_FILE} is no merge of {VOCAB_FILE}", where=where, why=repr(line),
                fix="copy both files of one tokenizer again",
            )
        yield left, right


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"line {number:,} is no rank", where=where, why="a line is a word in base64, a blank and its rank",
                fix="copy or download the file again",
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{len(missing)} of the 256 bytes have no rank", where=where, why="not all text could be read")
    return ranks


def _numbered(
    added: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], where: str
) -> list[dict[str, Any]]:
    """Added tokens as tokenizer.json lists them, by id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entries = []
    for name, told in added.items():
        number = told.get("id") if told.get("id") is not None else vocabulary.get(name)
        assert number is not None, where
        entries.append({"id": number, "content": name, **flags, "special": told["special"]})
    return sorted(entries, key=lambda entry: entry["id"])
