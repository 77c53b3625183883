"""SentencePiece models: plain byte-pair ones as a tokenizer.json, all others read by SentencePiece itself."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.byte_pairs import added_tokens, merges_of_ranks, template, with_class
from llmtrainer.tokenizer.files import CONFIG_FILE, FILE, not_unicode, parsed
from llmtrainer.tokenizer.tokenizer import FileTokenizer

MODEL_FILE = "tokenizer.model"
BLANK = "\u2581"
"""What stands for a blank in a piece."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_NUMBER, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types of protocol buffers."""


@dataclass(frozen=True)
class Piece:
    """One word of a model; its id is its place."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class Model:
    """What a SentencePiece file says, as far as it decides about ids."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = UNIGRAM
    blank_behind: bool = False
    """Whether a blank belongs to the word before it."""
    charsmap: bytes = b""
    """Rules by which characters are replaced before anything else, compiled."""
    dummy_prefix: bool = True
    """Whether a blank is put before a text."""
    squeeze: bool = True
    """Whether blanks at the ends are removed, and runs of them become one."""
    escape: bool = True

    @property
    def lossless(self) -> bool:
        """Whether text reaches the pieces as it is."""
        return not self.charsmap and not self.squeeze and self.escape and not self.blank_behind

    def mergeable(self) -> dict[str, int] | None:
        """Place in the order of merging of each word, if the model is one that a list of merges describes exactly."""
        words = {piece.text: piece.score for piece in self.pieces if piece.kind == NORMAL}
        distinct = len({score for text, score in words.items() if len(text) > 1})
        blanks = any(piece.kind == USER_DEFINED and not _is_name(piece.text) for piece in self.pieces)
        if (
            self.algorithm != BPE or not self.lossless or blanks
            or any(piece.kind == UNUSED for piece in self.pieces)
            or distinct != sum(len(text) > 1 for text in words)
            or any(letter not in words for text in words for letter in text)
        ):  # fmt: skip
            return None
        return {text: place for place, text in enumerate(sorted(words, key=lambda text: -words[text]))}


def read_model(data: bytes, where: str) -> Model:
    """Parse a file. UserError if it is none of SentencePiece's."""
    told: dict[str, Any] = {}
    pieces: list[Piece] = []
    try:
        for number, _, value in _fields(data):
            if number == 1:
                entry = {key: part for key, _, part in _fields(value)}
                (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
                pieces.append(Piece(entry[1].decode("utf-8"), score, entry.get(3, NORMAL)))
            elif number == 2:
                spec = {key: part for key, _, part in _fields(value)}
                told |= {"algorithm": spec.get(3, UNIGRAM), "blank_behind": bool(spec.get(24, 0))}
            elif number == 3:
                spec = {key: part for key, _, part in _fields(value)}
                told |= {
                    "charsmap": spec.get(2, b""), "dummy_prefix": bool(spec.get(3, 1)),
                    "squeeze": bool(spec.get(4, 1)), "escape": bool(spec.get(5, 1)),
                }  # fmt: skip
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces:
        raise UserError(
            "this is no SentencePiece model", where=where, why="its bytes do not have the form of one",
            fix="copy or download the file again",
        )
    return Model(pieces, **told)


def files_of_model(model: Model, files: Mapping[str, str], where: str) -> dict[str, str]:
    """tokenizer.json and its companions. Exact where `model.mergeable()` is not None; else its words, control tokens
    and decoder are right, and the ids of a text are SentencePiece's business."""
    order = model.mergeable()
    places = {piece.text: place for place, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    named = {
        piece.text: piece.kind == CONTROL
        for piece in model.pieces
        if piece.kind == CONTROL or (piece.kind == USER_DEFINED and _is_name(piece.text))
    }
    more = {name: told for name, told in added_tokens(files, where, places).items() if name != unknown}
    added: dict[str, dict[str, Any]] = {
        name: {"id": places[name], "special": special} for name, special in named.items()
    }
    for name, told in more.items():
        added[name] = {**told, "id": places.get(name, told["id"])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entries = [
        {"id": told["id"], "content": name, **flags, "special": told["special"]}
        for name, told in sorted(added.items(), key=lambda item: item[1]["id"])
    ]
    beside = _with_roles(model, with_class(files, where), where)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = [{"type": "Prepend", "prepend": BLANK}] if model.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []
    back = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    bytes_too = any(piece.kind == BYTE for piece in model.pieces)
    description = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": entries,
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]}, "pre_tokenizer": None,
        "post_processor": template(parsed(beside, CONFIG_FILE, where), entries),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": bytes_too, "ignore_merges": False,
            "vocab": places | {name: told["id"] for name, told in added.items()},
            "merges": [list(merge) for merge in merges_of_ranks(order)] if order else [],
        },
    }  # fmt: skip
    return {FILE: json.dumps(description, ensure_ascii=False), **beside}


class SentencePieceTokenizer(FileTokenizer):
    """A model whose normalisation or probabilities no tokenizer.json describes exactly: the `sentencepiece` library
    itself gives the ids. Control names and user-defined names are text to it."""

    def __init__(self, data: bytes, model: Model, files: Mapping[str, str], where: str) -> None:
        self._data = data
        self._beside = dict(files)
        super().__init__(files_of_model(model, files, where), where)
        self._first = _processor(_without_names(data, {}), where)
        # Text that goes on has no blank put before it, and keeps the blanks at its ends.
        self._later = _processor(_without_names(data, {3: 0, 4: 0}), where)

    @cached_property
    def fingerprint(self) -> str:
        decides = {"model": hashlib.sha256(self._data).hexdigest(), "control": self._control, "end": self._end}
        if self.begin is not None:
            decides["begin"] = self.begin
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._by(self._first, texts)

    def encode_continuation(self, text: str) -> list[int]:
        (ids,) = self._by(self._later, [text])
        return ids

    def files(self) -> dict[str, str]:
        return dict(self._beside)

    def with_file(self, name: str, text: str) -> Self:
        other = super().with_file(name, text)
        other._beside = {**self._beside, name: text}
        return other

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._data)
        for name, text in self._beside.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")

    def _by(self, processor: Any, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [list(processor.encode(text, out_type=int)) for text in texts]
        except (UnicodeError, RuntimeError) as error:  # the library cannot cast such a text
            raise not_unicode(texts, error) from error


def _processor(data: bytes, where: str) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(
            "this tokenizer needs the sentencepiece library", where=where,
            why="it normalises text or weighs words, which no tokenizer.json describes exactly",
            fix="pip install 'llmtrainer[hf]'",
        ) from error
    return SentencePieceProcessor(model_proto=data)


def _without_names(data: bytes, normalizer: Mapping[int, int]) -> bytes:
    """The same file with every user-defined name unused, so that no text is read as one, and with other settings of
    its normalizer."""
    changed = bytearray()
    for number, wire, value in _fields(data):
        if number == 1:
            entry = {key: part for key, _, part in _fields(value)}
            if entry.get(3) == USER_DEFINED and _is_name(entry[1].decode("utf-8")):
                value = _replaced(value, {3: UNUSED})
        elif number == 3:
            value = _replaced(value, normalizer)
        changed += _written(number, wire, value)
    return bytes(changed)


def _replaced(message: bytes, numbers: Mapping[int, int]) -> bytes:
    kept = b"".join(_written(key, wire, part) for key, wire, part in _fields(message) if key not in numbers)
    return kept + b"".join(_written(key, _NUMBER, value) for key, value in numbers.items())


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field of a protocol buffer: int for numbers, else its bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == _NUMBER:
            value, place = _varint(data, place)
            yield key >> 3, wire, value
            continue
        if wire == _BYTES:
            length, place = _varint(data, place)
        else:
            length = {_FOUR_BYTES: 4, _EIGHT_BYTES: 8}[wire]
        if place + length > len(data):
            raise ValueError("the field ends behind the file")
        yield key >> 3, wire, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _written(number: int, wire: int, value: Any) -> bytes:
    head = _as_varint(number << 3 | wire)
    if wire == _NUMBER:
        return head + _as_varint(value)
    return head + (_as_varint(len(value)) if wire == _BYTES else b"") + value


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _is_name(text: str) -> bool:
    """Whether a piece is a name that a text could forge, and not a run of blanks or marks."""
    return bool(re.search(r"\w", text.replace(BLANK, " ").replace("_", " ")))


def _with_roles(model: Model, files: dict[str, str], where: str) -> dict[str, str]:
    """The companions with the roles that SentencePiece's usual names have, where nothing names others."""
    config = parsed(files, CONFIG_FILE, where)
    names = {piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    roles = {role: name for role, name in usual.items() if name in names and role not in config}
    return {**files, CONFIG_FILE: json.dumps({**config, **roles}, indent=2) + "\n"}
