"""Learning a vocabulary: the right merges, from a fair sample, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrainer.base.errors import UserError
from llmtrainer.base.units import Bytes
from llmtrainer.tokenizer import train as module
from llmtrainer.tokenizer.tokenizer import FileTokenizer
from llmtrainer.tokenizer.train import RESIDENT, learn, take_sample, train_vocabulary
from tests.tokenizer.conftest import chinese
from tests.tokenizer.test_split import RULE

ROOM = RESIDENT + 2**26
"""The smallest memory there is: 64 MiB to learn in."""


def merges_of(tokenizer: FileTokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer._files["tokenizer.json"])["model"]["merges"]
    return merges


def words_of(texts: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(word) for text in texts for word, _ in RULE.pre_tokenize_str(text))


def test_every_merge_is_of_a_pair_that_is_most_frequent_at_that_moment(texts: list[str]) -> None:
    some = [text[:4_000] for text in texts[::12]]
    words = words_of(some)
    merges = merges_of(train_vocabulary(some, 256 + 13 + 120))
    assert len(merges) == 120
    for left, right in merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        assert pairs[left, right] == max(pairs.values()) >= 2
        words = Counter({_merged(word, left, right): count for word, count in words.items()})


def _merged(word: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    done: list[str] = []
    for token in word:
        # "aaa" merges once: what was just made is no longer its left half.
        if done and done[-1] == left and token == right:
            done[-1] = left + right
        else:
            done.append(token)
    return tuple(done)


LEARN = """
import sys
from pathlib import Path
from llmtrainer.tokenizer.train import train_vocabulary
train_vocabulary([Path(sys.argv[1]).read_text(encoding="utf-8")], 1_000).save(Path(sys.argv[2]))
"""


def test_the_same_text_gives_the_same_files_in_every_process_with_one_or_two_threads(
    texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("\n".join(texts)[-1_000_000:], encoding="utf-8", newline="")
    for threads in (1, 2):
        run = [sys.executable, "-c", LEARN, str(tmp_path / "text"), str(tmp_path / str(threads))]
        subprocess.run(
            run, env={"RAYON_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(sys.path)}, check=True
        )
    one, two = ((tmp_path / str(threads) / "tokenizer.json").read_bytes() for threads in (1, 2))
    assert one == two


def test_a_vocabulary_has_exactly_the_ids_asked_for_and_compresses(
    trained: FileTokenizer, texts: list[str]
) -> None:
    assert trained.vocabulary == 1_000
    assert len(merges_of(trained)) == 1_000 - 256 - 13
    tokens = sum(map(len, trained.encode_batch(texts)))
    assert sum(len(text.encode()) for text in texts) / tokens > 2.0


def test_too_little_text_gives_fewer_ids_and_says_so() -> None:
    told: list[str] = []
    tokenizer = train_vocabulary(["ab ab"], 1_000, warn=told.append)
    # `ab` and ` ab`: the pair a+b occurs twice, everything else once.
    assert merges_of(tokenizer) == [["a", "b"]]
    assert tokenizer.vocabulary == 256 + 1 + 13
    assert list(tokenizer.control.values()) == list(range(257, 270))
    assert told == ["5 bytes of text gave 270 ids, not 1,000: no pair is left that occurs twice"]


@pytest.mark.parametrize("texts_", [[], [""]])
def test_no_text_is_refused(texts_: list[str]) -> None:
    with pytest.raises(UserError, match="no text to learn a vocabulary from"):
        train_vocabulary(texts_, 1_000)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    assert train_vocabulary(["abc"], 269).vocabulary == 269
    with pytest.raises(UserError, match="a vocabulary of 268 is too small"):
        train_vocabulary(["abc"], 268)


def test_too_little_memory_is_refused_with_an_amount_that_works() -> None:
    with pytest.raises(UserError, match="maximum_memory=100 MiB is too little") as caught:
        take_sample(["abc"], maximum_memory=Bytes.parse("100 MiB"))
    assert caught.value.fix is not None
    assert (
        take_sample(["abc"], maximum_memory=Bytes.parse(caught.value.fix.partition("=")[2])).kept_bytes == 3
    )


def test_text_that_fits_is_kept_whole_and_in_order(texts: list[str]) -> None:
    told: list[str] = []
    reported: list[int] = []
    sample = take_sample(texts, report=reported.append)
    train_vocabulary(texts[:1], 300, warn=told.append)
    assert "".join(sample.pieces) == "".join(texts)
    size = sum(len(text.encode()) for text in texts)
    assert sample.kept_bytes == sample.read_bytes == sum(reported) == size
    assert max(map(len, sample.pieces)) <= module.PIECE
    assert told == []


def test_a_long_text_is_cut_at_line_ends_where_there_are_any() -> None:
    text = ("x" * 99 + "\n") * 1_000 + "y" * 70_000
    sample = take_sample([text])
    assert "".join(sample.pieces) == text
    assert all(piece.endswith("\n") for piece in sample.pieces[:-3])


def test_a_sample_comes_from_all_of_the_text_and_fills_its_bounds() -> None:
    # Two halves of two alphabets: a head of the text would hold one of them.
    texts = ["latin words " * 100 + "\n"] * 500 + ["кириллица слова " * 50 + "\n"] * 500
    sample = take_sample(texts, maximum_text=200_000)
    assert 195_000 < sample.kept_bytes <= 200_000
    latin = sum("latin" in piece for piece in sample.pieces)
    # 150 or so of 1,000 pieces without replacement: a standard deviation is under 6.
    assert abs(latin - len(sample.pieces) / 2) < 25
    assert take_sample(texts, maximum_text=200_000) == sample


def test_a_sample_that_leaves_text_out_is_announced() -> None:
    told: list[str] = []
    train_vocabulary(["some words\n" * 10] * 100, 280, maximum_text=5_000, warn=told.append)
    assert told[0].startswith("the vocabulary is learned from a uniform sample: 0.0 of 0.0 MB of text, ")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab 中文\n"), max_size=30), max_size=40), st.integers(1, 300))
def test_the_counts_of_a_sample_are_those_of_its_pieces(texts_: list[str], bound: int) -> None:
    sample = take_sample(texts_, maximum_text=bound)
    words = {word for piece in sample.pieces for word in module._WORD.findall(piece)}
    assert sample.distinct_words == len(words)
    assert sample.kept_bytes == sum(len(piece.encode()) for piece in sample.pieces)
    assert sample.memory == sample.kept_bytes + module.COST_PER_SYMBOL * sum(
        len(word.encode()) for word in words
    )
    assert sample.kept_bytes <= bound or len(sample.pieces) == 1


def test_memory_does_not_grow_with_text_once_the_bound_is_reached() -> None:
    # Chinese of which nearly every run is distinct: what memory grows with.
    amounts = [
        take_sample(
            (chinese(50_000, seed=place, even=True) for place in range(pieces)), maximum_memory=ROOM
        ).memory
        for pieces in (6, 24)
    ]
    # A piece is a tenth of this bound.
    assert all(0.8 * 2**26 < amount <= 2**26 for amount in amounts)


PEAK = """
import sys
import torch
from llmtrainer.tokenizer.train import train_vocabulary
from tests.tokenizer.conftest import chinese
texts = (chinese(50_000, seed=place, even=True) for place in range(int(sys.argv[1])))
train_vocabulary(texts, 2_000, maximum_memory=int(sys.argv[2]))
# Not getrusage: its peak is inherited from the process that started this one.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_of_the_process_stays_below_maximum_memory_and_does_not_grow_with_text() -> None:
    peaks = []
    for pieces in (6, 24):
        run = [sys.executable, "-c", PEAK, str(pieces), str(ROOM)]
        done = subprocess.run(
            run, env={"PYTHONPATH": ":".join(sys.path)}, check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout))
    assert max(peaks) < ROOM
    assert max(peaks) < 1.3 * min(peaks)


def test_equal_samples_give_equal_merges(texts: list[str]) -> None:
    sample = take_sample(texts[:3])
    assert merges_of(learn(sample, 400)) == merges_of(learn(sample, 400))
