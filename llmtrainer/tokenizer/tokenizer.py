"""Text to ids and back, from the files of any common format, with control tokens that no text can forge."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Self

import tokenizers

from llmtrainer.base.errors import UserError
from llmtrainer.tokenizer.bare import first_only, is_word, without_control, without_prefix
from llmtrainer.tokenizer.byte_pairs import QWEN_RULE
from llmtrainer.tokenizer.files import CONFIG_FILE, FILE, MAP_FILE, not_unicode, parsed, pre_tokenizer
from llmtrainer.tokenizer.split import END, PAD, cut
from llmtrainer.tokenizer.stream import ByteStream, TextStream, WindowStream, byte_alphabet

Allowed = Literal["none", "none_raise", "all"] | Set[str]

TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (CONFIG_FILE, MAP_FILE, "added_tokens.json", TEMPLATE_FILE)
"""What may stand beside tokenizer.json and is passed on, byte for byte, when a tokenizer is saved."""

LONG_TEXT = 1_000_000
"""Characters at a time: the library keeps more than a hundred bytes for each token until its text is done."""
FEW_CHARACTERS = 2_048
"""Texts that have fewer together are cut by the thread that asks: waking others takes longer than the work."""


class FileTokenizer:
    """A tokenizer.json with its companions. Holds any model the `tokenizers` library knows; ours is
    byte-level BPE.

    Text is encoded by a copy of the tokenizer that knows no added token at all: whatever a text says, it
    becomes ordinary ids. No id is put before or after a text. `allowed` is the one way in, and names what may
    pass.
    """

    def __init__(self, files: Mapping[str, str], where: str = "a tokenizer in memory") -> None:
        self._files = dict(files)
        self._where = where
        description = parsed(files, FILE, where)
        added = sorted(description.get("added_tokens") or (), key=lambda token: token["id"])
        self._control: dict[str, int] = {token["content"]: token["id"] for token in added if not is_word(token)}
        self._greedy = {
            token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip"))) for token in added
        }
        self._hidden = frozenset(token["id"] for token in added if token["special"])
        self._bare = bare = without_control(description, self._control)
        self._first_only = first_only(bare)
        goes_on = without_prefix(bare)
        self._by_bytes = (description.get("decoder") or {}).get("type") == "ByteLevel"
        self._ours = description.get("pre_tokenizer") == pre_tokenizer() and not description.get("normalizer")
        try:
            self._whole = tokenizers.Tokenizer.from_str(files[FILE])
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(bare))
            self._later = self._plain if goes_on == bare else tokenizers.Tokenizer.from_str(json.dumps(goes_on))
        except Exception as error:  # the library raises a plain Exception for every kind of damage
            raise UserError(
                f"{FILE} is not one the tokenizers library can read", where=where, why=str(error)
            ) from error
        for tokenizer in (self._whole, self._plain, self._later):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._vocabulary = 1 + max(self._whole.get_vocab(with_added_tokens=True).values())
        self.roles: Mapping[str, str] = _roles(files, where)
        """Token names by role, such as `eos_token`, as the files give them."""
        roles = self.roles
        self._end = self._control_id(roles, "eos_token", (END, "</s>", "<|end_of_text|>"))
        self._pad = self._control_id(roles, "pad_token", (PAD, "<pad>"), self._end)
        self._begin = self._template_begin()
        self._require_unforgeable(description)

    @property
    def vocabulary(self) -> int:
        """Number of ids, control ids included, before padding."""
        return self._vocabulary

    @property
    def end(self) -> int:
        return self._end

    @property
    def pad(self) -> int:
        """`end` where the files name none: a padding position is read by nobody, so it needs no id of its
        own."""
        return self._pad

    @property
    def begin(self) -> int | None:
        """The id that the tokenizer's own template puts before a text, as Llama's does; None where it has none."""
        return self._begin

    @property
    def cuts_as_qwen2(self) -> bool:
        """Whether text is prepared and cut by the rule of Qwen2's own tokenizer, which transformers takes for every
        model of that type."""
        split = (self._bare.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
        rule = (split[0].get("pattern") or {}).get("Regex")
        return rule == QWEN_RULE and (self._bare.get("normalizer") or {}).get("type") == "NFC"

    @property
    def control(self) -> Mapping[str, int]:
        return dict(self._control)

    @property
    def takes_blanks(self) -> Mapping[str, tuple[bool, bool]]:
        """Which control tokens take the blanks before and behind them into themselves, where a program wrote them."""
        return {name: self._greedy[name] for name in self._control if any(self._greedy[name])}

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates that lie with the tokenizer, by name; `default` is the one. Empty without any."""
        found: dict[str, str] = {}
        if CONFIG_FILE in self._files:
            told = parsed(self._files, CONFIG_FILE, self._where).get("chat_template")
            if isinstance(told, str):
                found["default"] = told
            elif isinstance(told, list):
                found |= {str(item["name"]): str(item["template"]) for item in told}
        if TEMPLATE_FILE in self._files:
            found["default"] = self._files[TEMPLATE_FILE]
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the model, what prepares text for it, the added tokens and the ids that begin and end a
        document. The layout of the files does not count, nor their names for the other control tokens."""
        decides = {key: self._bare.get(key) for key in ("normalizer", "pre_tokenizer")}
        model = {**self._bare["model"]}
        model["merges"] = [
            " ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", ())
        ]
        decides |= {"model": model, "control": self._control, "end": self._end}
        if self._begin is not None:
            decides["begin"] = self._begin
        if self._bare["added_tokens"]:
            decides["words"] = self._bare["added_tokens"]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, *, allowed: Allowed = "none") -> list[int]:
        """Ids of a text.

        `allowed` decides about control names in it: "none" reads them as text, "none_raise" refuses them,
        "all" turns each into its id, a set only those it names. Only for text that a program wrote, never for
        a user's.
        """
        if not self._names(allowed):
            return self.encode_batch([text])[0]
        found = self._split_at(self._names(allowed), text)
        if allowed == "none_raise":
            for part in found:
                if part in self._control:
                    raise UserError(
                        f"the text holds the control token {part}",
                        where=f"character {text.index(part):,}",
                        why="it was asked that no text with such a name gets through",
                        fix='allowed="none" reads it as ordinary text',
                    )
            return self.encode_batch([text])[0]
        names = self._names(allowed)
        parts = self.encode_parts([self._control[part] if part in names else part for part in found])
        return [token for ids in parts for token in ids]

    def encode_parts(self, parts: Sequence[str | int]) -> list[list[int]]:
        """Ids of each part of one text: a control token as its id, the rest as text. Text behind text goes on where
        the other ended, and behind a control token as this tokenizer does it."""
        goes_on = [
            place > 0 and (self._first_only or isinstance(parts[place - 1], str)) for place in range(len(parts))
        ]
        ids: list[list[int]] = [[part] if isinstance(part, int) else [] for part in parts]
        for later in (False, True):
            places = [place for place, part in enumerate(parts) if isinstance(part, str) and goes_on[place] == later]
            texts = [str(parts[place]) for place in places]
            if later:
                done = [self.encode_continuation(text) for text in texts]
            else:
                done = self.encode_batch(texts) if texts else []
            for place, found in zip(places, done, strict=True):
                ids[place] = found
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended. They do not depend on that other one, and decode to the
        exact text behind it: a tokenizer that puts a blank before a text's first word puts none here."""
        return self._encoded(self._later, [text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores. A control name in a text is text."""
        return self._encoded(self._plain, texts)

    def _encoded(self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(cut(text, LONG_TEXT)) if self._ours else [text] for text in texts]
        flat = [piece for part in parts for piece in part]
        try:
            if sum(map(len, flat)) < FEW_CHARACTERS:
                done = iter([tokenizer.encode(piece, add_special_tokens=False) for piece in flat])
            else:
                done = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError) as error:
            raise not_unicode(texts, error) from error
        batches: list[list[int]] = []
        for part in parts:
            ids: list[int] = []
            for _ in part:
                ids.extend(next(done).ids)
            batches.append(ids)
        return batches

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        """The text of some ids. `skip_control` leaves out the control tokens that the file calls special."""
        shown = self._known(ids, skip_control)
        if not self._by_bytes:
            return str(self._whole.decode(shown, skip_special_tokens=False))
        return b"".join(map(self._bytes_of, shown)).decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per id; joined they are the decoded text. A token that is part of a character shows ""
        until the character's last token; a control token shows its name."""
        pieces: list[str] = []
        stream = self.stream()
        control = set(self._control.values())
        for token in self._known(ids, skip_control=False):
            if token in control and pieces:
                pieces[-1] += stream.close()  # what an open character came to belongs to its own tokens
            pieces.append(stream.feed(token))
        if pieces:
            pieces[-1] += stream.close()
        return pieces

    def stream(self) -> TextStream:
        """Text while tokens arrive: `feed(id)` gives what this id completes, `close()` the rest."""
        return ByteStream(self._bytes_of) if self._by_bytes else WindowStream(self.decode)

    def numbered(self, name: str) -> int | None:
        """The id of an entry of the vocabulary, control token or word, by its exact spelling there."""
        number = self._whole.token_to_id(name)
        return None if number is None else int(number)

    def files(self) -> dict[str, str]:
        """The text files that describe it, by name."""
        return dict(self._files)

    def with_file(self, name: str, text: str) -> Self:
        """A copy with another companion file, which decides about no id."""
        assert name in COMPANIONS
        other = copy.copy(self)
        other._files = {**self._files, name: text}
        other.__dict__.pop("chat_templates", None)
        return other

    def save(self, folder: Path) -> None:
        """Write the files that transformers.AutoTokenizer and `load_tokenizer` read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")

    @cached_property
    def _table(self) -> list[bytes | None]:
        """Bytes of each id; None where the vocabulary has a gap."""
        alphabet = byte_alphabet()
        table: list[bytes | None] = [None] * self._vocabulary
        for token, number in self._whole.get_vocab(with_added_tokens=True).items():
            spelled = [alphabet.get(character) for character in token]
            if token in self._control or None in spelled:
                table[number] = token.encode()
            else:
                table[number] = bytes(byte for byte in spelled if byte is not None)
        return table

    def _bytes_of(self, token: int) -> bytes:
        spelled = self._table[token]
        if spelled is None:
            raise self._no_such(token)
        return spelled

    def _known(self, ids: Sequence[int], skip_control: bool) -> list[int]:
        hidden = self._hidden if skip_control else ()
        known: list[int] = []
        for token in map(int, ids):
            if not 0 <= token < self._vocabulary:
                raise self._no_such(token)
            if token not in hidden:
                known.append(token)
        return known

    def _no_such(self, token: int) -> UserError:
        return UserError(
            f"id {token:,} is not in the vocabulary of {self._vocabulary:,}",
            where=self._where,
            why="the ids were made with another tokenizer, or name a padding row of the model",
            fix="use the tokenizer that lies with the data or the model",
        )

    def _names(self, allowed: Allowed) -> frozenset[str]:
        """Which control names to look for."""
        if isinstance(allowed, str):
            if allowed not in ("none", "none_raise", "all"):
                raise UserError(
                    f"allowed={allowed!r}", fix='"none", "none_raise", "all", or a set of control names'
                )
            return frozenset() if allowed == "none" else frozenset(self._control)
        unknown = sorted(set(allowed) - set(self._control))
        if unknown:
            raise UserError(
                f"no control token is called {unknown[0]}", why=f"there are: {', '.join(self._control)}"
            )
        return frozenset(allowed)

    @staticmethod
    def _split_at(names: frozenset[str], text: str) -> list[str]:
        # The longest first: one name may be the beginning of another.
        ordered = sorted(names, key=lambda name: (-len(name), name))
        return [part for part in re.split(f"({'|'.join(map(re.escape, ordered))})", text) if part]

    def _control_id(
        self, roles: Mapping[str, str], role: str, usual: tuple[str, ...], otherwise: int | None = None
    ) -> int:
        for name in (roles.get(role), *usual):
            number = self._whole.token_to_id(name) if name else None
            if number is not None:
                return int(number)
        if otherwise is not None:
            return otherwise
        raise UserError(
            f"nothing says which token ends a document: no `{role}`",
            where=self._where,
            why="a model that never saw its end token never stops",
            fix=f'name one of its tokens in {CONFIG_FILE}: {{"{role}": "..."}}',
        )

    def _template_begin(self) -> int | None:
        # The file's own template counts. transformers too passes over `add_bos_token` in the config beside it.
        shown = self._whole.encode("a", add_special_tokens=True)
        before = list(takewhile(lambda pair: pair[1], zip(shown.ids, shown.special_tokens_mask, strict=True)))
        if len(before) > 1:
            raise UserError(
                f"this tokenizer begins a text with {len(before)} ids", where=self._where,
                why="one at most is known here", fix=f"change the post_processor in {FILE}",
            )
        return int(before[0][0]) if before else None

    def _require_unforgeable(self, description: Mapping[str, Any]) -> None:
        """Refuse a vocabulary whose model, added tokens or not, turns a control token's name into its id."""
        unknown = description["model"].get("unk_token") or ""
        for name, number in self._control.items():
            ids = self._plain.encode(name, add_special_tokens=False).ids
            if number in ids and name != unknown:
                raise UserError(
                    f"text could forge {name}",
                    where=self._where,
                    why=f"its {description['model'].get('type')} model itself reads this as id {number}",
                    fix="use a vocabulary whose control tokens are not words of its model",
                )


def load_tokenizer(path: str | Path) -> FileTokenizer:
    """The tokenizer of a folder or of a file: tokenizer.json (ours, a checkpoint's, or a Hugging Face model's),
    GPT-2's vocab.json with merges.txt, tiktoken's ranks, or a SentencePiece model."""
    from llmtrainer.tokenizer.formats import open_tokenizer  # which makes tokenizers of the class above

    return open_tokenizer(Path(path))


def padded_vocabulary(vocabulary: int, multiple: int = 64) -> int:
    """Rows of the embedding and the head: matrix products are fastest when their sizes are multiples of 64.
    The rows above the vocabulary have no token: they are never a target and never sampled."""
    return -(-vocabulary // multiple) * multiple


def _roles(files: Mapping[str, str], where: str) -> dict[str, str]:
    """Token names by role, such as `eos_token`. The config goes before the map: transformers reads it so."""
    roles: dict[str, str] = {}
    for name in (MAP_FILE, CONFIG_FILE):
        for role, token in parsed(files, name, where).items() if name in files else ():
            content = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(content, str):
                roles[role] = content
    return roles
