"""Which files make a tokenizer, told by their names and their bytes."""

from __future__ import annotations

import re
from pathlib import Path

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.byte_pairs import MERGES_FILE, VOCAB_FILE, files_of_gpt2, files_of_ranks
from llmtrainer.tokenizer.files import FILE
from llmtrainer.tokenizer.sentence_piece import MODEL_FILE, SentencePieceTokenizer, files_of_model, read_model
from llmtrainer.tokenizer.tokenizer import COMPANIONS, FileTokenizer

KNOWN = f"{FILE}; {VOCAB_FILE} with {MERGES_FILE}; *.tiktoken; {MODEL_FILE} or another *.model of SentencePiece"


def open_tokenizer(path: Path) -> FileTokenizer:
    """The tokenizer of a folder, or of one of its files. In a folder tokenizer.json goes before the files that it
    was made from."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else _of_folder(path)
    where = str(path)
    if file.name == FILE:
        return FileTokenizer({FILE: _text(file), **_companions(folder)}, where)
    if file.name in (VOCAB_FILE, MERGES_FILE):
        names = [VOCAB_FILE, MERGES_FILE]
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"no {name} in {folder}", why=f"{' and '.join(names)} make one tokenizer together")
        return FileTokenizer(
            files_of_gpt2({name: _text(folder / name) for name in names} | _companions(folder), where), where
        )
    data = file.read_bytes()
    if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+", data[:400].split(b"\n", 1)[0].rstrip(b"\r")):
        return FileTokenizer(files_of_ranks(data, file.stem, _companions(folder), where), where)
    if file.suffix != ".model":
        raise UserError(f"{file.name} is no tokenizer", where=where, why=f"these are read: {KNOWN}")
    model = read_model(data, where)
    if model.mergeable() is not None:
        return FileTokenizer(files_of_model(model, _companions(folder), where), where)
    return SentencePieceTokenizer(data, model, _companions(folder), where)


def _of_folder(folder: Path) -> Path:
    for name in (FILE, VOCAB_FILE):
        if (folder / name).is_file():
            return folder / name
    found = sorted([*folder.glob("*.tiktoken"), *folder.glob("*.model")]) if folder.is_dir() else []
    if len(found) > 1:
        raise UserError(
            f"{len(found)} files in {folder} could be the tokenizer", why=", ".join(file.name for file in found),
            fix=f"name one: tokenizer={found[0]}",
        )
    if not found:
        raise UserError(
            f"no {FILE} in {folder}",
            why="there is no such folder" if not folder.exists() else f"nothing that is read here: {KNOWN}",
            fix=f"llmtrainer train-tokenizer DATA {folder}",
        )
    return found[0]


def _companions(folder: Path) -> dict[str, str]:
    return {name: _text(folder / name) for name in COMPANIONS if (folder / name).is_file()}


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is not UTF-8", where=f"{file}, byte {error.start:,}") from error
