"""A class of transformers writes from kept keys what it writes when it reads whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrainer.core.protocols import TextStream
from llmtrainer.generation.loop import complete
from llmtrainer.generation.sampling import Sampling
from llmtrainer.models.foreign_cache import KeyRows, Rows
from llmtrainer.models.foreign_loading import load_foreign
from tests.models.test_foreign import APART, WORLDS, folder_of, theirs
from tests.tolerances import FOREIGN_FLOAT64

transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 6, 7, 9, 8, 4, 3], [8], [11, 12, 13], [8]]


class Numbers:
    """A vocabulary without words."""

    vocabulary, end = 320, 1
    control: Mapping[str, int] = {}

    def stream(self) -> TextStream:
        raise NotImplementedError


def written(policy: Any, count: int = 10) -> list[tuple[int, ...]]:
    settings = Sampling(temperature=0.0, max_new_tokens=count)
    return [completion.tokens for completion in complete(policy, PROMPTS, settings, Numbers())]


@pytest.mark.parametrize("name", WORLDS)
def test_greedy_ids_are_those_of_whole_rows(name: str, tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS[name](), tmp_path), torch.float64).eval()
    assert policy.keeps_keys and isinstance(policy.cache(1, 1), KeyRows)
    kept = written(policy)
    policy.keeps_keys = False
    assert isinstance(policy.cache(1, 1), Rows)
    assert written(policy) == kept


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss"])
def test_logits_after_rows_moved_and_went_are_transformers_own(name: str, tmp_path: Path) -> None:
    folder = folder_of(WORLDS[name](), tmp_path)
    policy = load_foreign(folder, torch.float64).eval()
    cache = policy.cache(3, 16)
    policy.read(torch.tensor([[5, 6, 7, 9], [8, 0, 0, 0], [4, 3, 0, 0]]), torch.tensor([4, 1, 2]), cache)
    cache.take([1, 2, 1])    # the longest row goes, one is repeated
    assert cache.position_BS.shape[1] == 2    # and its columns with it
    policy.read(torch.tensor([[9, 10], [11, 0], [0, 0]]), torch.tensor([2, 1, 0]), cache)
    logits_BV = policy.read(torch.tensor([[12], [13], [14]]), torch.tensor([1, 1, 1]), cache)
    assert cache.lengths_B.tolist() == [4, 4, 2]
    for found, ids in zip(logits_BV, ([8, 9, 10, 12], [4, 3, 11, 13], [8, 14]), strict=True):
        assert (found - theirs(folder, ids)[-1]).abs().max() < FOREIGN_FLOAT64[name]


def test_each_token_is_read_once(tmp_path: Path) -> None:
    policy = load_foreign(folder_of(WORLDS["gpt_neox"](), tmp_path), torch.float64).eval()
    read: list[int] = []
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: read.append(out.shape[1]))
    tokens = written(policy)
    hook.remove()
    rounds = max(map(len, tokens)) - 1    # the last token is read by nobody
    assert read == [max(map(len, PROMPTS)), *[1] * rounds]


def test_a_class_that_reads_documents_apart_keeps_no_keys_and_says_so(tmp_path: Path) -> None:
    from llmtrainer.core.arrangement import Arrangement

    policy = load_foreign(folder_of(APART["bloom"](), tmp_path), torch.float64, apart=True).eval()
    assert not policy.keeps_keys and isinstance(policy.cache(1, 4), Rows)
    assert any("keeps no keys" in line for line in policy.arrange(Arrangement()).fallbacks)
