"""Blocks of a cache: nobody's block is given away, and none is lost."""

from __future__ import annotations

import random

import pytest

from llmtrainer.generation.blocks import Blocks


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back() -> None:
    blocks = Blocks(3, 4)
    mine = blocks.take(2)
    theirs = blocks.share(mine)
    blocks.give_back(mine)
    assert blocks.free == 1
    blocks.give_back(theirs)
    assert blocks.free == 3


def test_block_0_is_never_given_out_and_partly_filled_blocks_count_whole() -> None:
    blocks = Blocks(5, 4)
    assert sorted(blocks.take(5)) == [1, 2, 3, 4, 5]
    assert [blocks.needed(tokens) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_free_block_can_be_neither_shared_nor_given_back() -> None:
    blocks = Blocks(2, 4)
    (block,) = blocks.take(1)
    blocks.give_back([block])
    with pytest.raises(AssertionError):
        blocks.give_back([block])
    with pytest.raises(AssertionError):
        blocks.share([block])
    with pytest.raises(AssertionError):
        blocks.take(3)


def test_after_any_order_of_taking_sharing_and_giving_back_no_block_has_two_owners_that_did_not_share() -> None:
    chance, blocks = random.Random(0), Blocks(20, 4)
    held: list[list[int]] = []
    alone: set[int] = set()
    for _ in range(500):
        if held and chance.random() < 0.5:
            blocks.give_back(held.pop(chance.randrange(len(held))))
        elif held and chance.random() < 0.3:
            held.append(blocks.share(chance.choice(held)))
        elif blocks.free >= 3:
            taken = blocks.take(3)
            assert not {block for table in held for block in table} & set(taken)
            held.append(taken)
        alone = {block for table in held for block in table}
        assert blocks.free == 20 - len(alone)
