"""Learning a byte-level vocabulary from any amount of text in bounded memory."""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Bytes
from llmtrainer.tokenizer.files import byte_level_files, pre_tokenizer
from llmtrainer.tokenizer.split import CONTROL_NAMES
from llmtrainer.tokenizer.tokenizer import FileTokenizer

BYTES = 256
SMALLEST = BYTES + len(CONTROL_NAMES)

MAXIMUM_MEMORY = 2 * 2**30
MAXIMUM_TEXT = 48 * 10**6
"""More text hardly changes a vocabulary, and it takes a minute already."""

RESIDENT = 400 * 2**20
"""What a process with torch imported takes before it learns anything."""
COST_PER_SYMBOL = 120
"""Memory for each byte of a distinct word. Measured at 4 thousand and 32 thousand entries, on 5 to 32 MB of
Chinese, English and Python: 75 to 105."""

PIECE = 32_768
"""Characters. The library aligns every character of a text while it splits it, for 100 bytes each; a whole
file at a time cost five times the memory of the words in it."""

# Roughly the split rule, in the dialect of the standard library: only the amount of distinct words is wanted.
_WORD = re.compile(
    r"[\u2e80-\u9fff\uf900-\ufaff]{1,4}|[ \t!-/:-@\[-`{-~]?[^\W\d_\u2e80-\u9fff\uf900-\ufaff]{1,64}|\d{1,3}"
    r"|\s{1,64}|[^\w\s]{1,32}|_{1,32}"
)
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive multiples fill 0..2^64 evenly (Knuth, 6.4)


@dataclass(frozen=True)
class Sample:
    """Text to learn from: everything, or a uniform sample of the pieces of everything."""

    pieces: tuple[str, ...]
    read_bytes: int
    """UTF-8 bytes of all text."""
    kept_bytes: int
    distinct_words: int
    """About, among the kept pieces."""
    memory: int
    """Bytes that learning from it will take at most, beyond the process itself."""

    def __str__(self) -> str:
        return (
            f"{self.kept_bytes / 1e6:,.1f} of {self.read_bytes / 1e6:,.1f} MB of text, "
            f"{self.distinct_words:,} distinct words, about {self.memory / 2**20:,.0f} MiB"
        )


def train_vocabulary(
    texts: Iterable[str],
    vocabulary: int,
    *,
    maximum_memory: int | Bytes = MAXIMUM_MEMORY,
    maximum_text: int | Bytes = MAXIMUM_TEXT,
    report: Callable[[int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> FileTokenizer:
    """Learn a byte-level BPE vocabulary of `vocabulary` ids: 256 bytes, merges, and 13 control ids after
    them.

    Peak memory of the process stays below `maximum_memory`, and at most `maximum_text` bytes of text are
    learned from: where there is more, a uniform sample over all of it, the same on every machine; `warn` is
    told. `report` gets the UTF-8 bytes read since its last call. Too little text gives a smaller vocabulary,
    and `warn` is told.
    """
    sample = take_sample(texts, maximum_memory=maximum_memory, maximum_text=maximum_text, report=report)
    if warn and sample.kept_bytes < sample.read_bytes:
        warn(f"the vocabulary is learned from a uniform sample: {sample}")
    learned = learn(sample, vocabulary)
    if warn and learned.vocabulary < vocabulary:
        warn(
            f"{sample.kept_bytes:,} bytes of text gave {learned.vocabulary:,} ids, not {vocabulary:,}: "
            "no pair is left that occurs twice"
        )
    return learned


def take_sample(
    texts: Iterable[str],
    *,
    maximum_memory: int | Bytes = MAXIMUM_MEMORY,
    maximum_text: int | Bytes = MAXIMUM_TEXT,
    report: Callable[[int], None] | None = None,
) -> Sample:
    """Read all text and keep the pieces of lowest priority that fit: a uniform sample, whatever the order.

    A piece's priority is a function of its place in the text alone, so the sample is the same on every
    machine.
    """
    maximum_memory = _count(maximum_memory)
    if maximum_memory < RESIDENT + 2**26:
        raise UserError(
            f"maximum_memory={Bytes(maximum_memory)} is too little to learn a vocabulary in",
            why=f"the process alone takes about {Bytes(RESIDENT)}",
            fix=f"maximum_memory={Bytes(RESIDENT + 2**28)}",
        )
    reservoir = _Reservoir(maximum_memory - RESIDENT, _count(maximum_text))
    unreported = read = 0
    for place, piece in enumerate(piece for text in texts for piece in _pieces(text)):
        size = len(piece.encode("utf-8", "surrogatepass"))
        read += size
        unreported += size
        if report and unreported >= 2**20:
            report(unreported)
            unreported = 0
        reservoir.offer(place, piece, size)
    if report and unreported:
        report(unreported)
    kept = reservoir.pieces()
    return Sample(kept, read, reservoir.text, len(reservoir.words), reservoir.memory)


def learn(sample: Sample, vocabulary: int) -> FileTokenizer:
    """Learn the merges. Equal samples give equal merges, whatever the number of threads."""
    if vocabulary < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocabulary:,} is too small",
            why=f"{BYTES} bytes and {len(CONTROL_NAMES)} control ids are always in it",
            fix=f"vocabulary={SMALLEST} or more",
        )
    if not sample.read_bytes:
        raise UserError("there is no text to learn a vocabulary from", fix="look at what `data` names")
    blank = {"type": "BPE", "vocab": {}, "merges": []}
    frame = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(), "model": blank}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(frame))
    assert isinstance(tokenizer.model, models.BPE)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL_NAMES),
        min_frequency=2,  # a merge seen once is an accident of the sample
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample.pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    return FileTokenizer(byte_level_files(model["vocab"], merges))


class _Reservoir:
    """The pieces of lowest priority whose words and text fit the bounds (a bottom-k sample, Cohen 1997)."""

    def __init__(self, memory: int, text: int) -> None:
        self._memory, self._text = memory, text
        self._heap: list[tuple[int, int, str, int]] = []
        """(-priority, place, piece, UTF-8 bytes): the piece to drop first is on top."""
        self._limit = 2**64
        self.words: Counter[str] = Counter()
        """In how many kept pieces a word is."""
        self._symbols = 0
        self.text = 0

    @property
    def memory(self) -> int:
        return self.text + COST_PER_SYMBOL * self._symbols

    def offer(self, place: int, piece: str, size: int) -> None:
        priority = _mixed(place)
        if priority >= self._limit:
            return
        heapq.heappush(self._heap, (-priority, place, piece, size))
        self._count(piece, size, 1)
        while len(self._heap) > 1 and (self.memory > self._memory or self.text > self._text):
            dropped, _, other, other_size = heapq.heappop(self._heap)
            self._limit = -dropped
            self._count(other, other_size, -1)

    def pieces(self) -> tuple[str, ...]:
        """In the order of the text."""
        return tuple(piece for _, _, piece, _ in sorted(self._heap, key=lambda item: item[1]))

    def _count(self, piece: str, size: int, sign: int) -> None:
        self.text += sign * size
        for word in set(_WORD.findall(piece)):
            before = self.words[word]
            self.words[word] = before + sign
            if before == 0 or before + sign == 0:
                self._symbols += sign * len(word.encode("utf-8", "surrogatepass"))
                if sign < 0:
                    del self.words[word]


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, cut at line ends where there are any."""
    start = 0
    while len(text) - start > PIECE:
        line = text.rfind("\n", start, start + PIECE)
        stop = line + 1 if line > start else start + PIECE
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _mixed(place: int) -> int:
    """A fixed pseudo-random 64-bit number for each place (the finaliser of SplitMix64, Steele 2014)."""
    low = 2**64 - 1
    x = (place + 1) * _MIX & low
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & low
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & low
    return x ^ (x >> 31)


def _count(amount: int | Bytes) -> int:
    return amount.count if isinstance(amount, Bytes) else amount
