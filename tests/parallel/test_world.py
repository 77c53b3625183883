"""How processes meet: sums that belong together, and one that goes first."""

from __future__ import annotations

import datetime

import torch

from llmtrainer.parallel.world import World
from tests.processes import Processes, processes  # noqa: F401  a fixture


def opened() -> World:
    return World(torch.device("cpu"), datetime.timedelta(seconds=60))


def added() -> dict[str, float]:
    world = opened()
    return world.sum({"rank": world.rank, "one": 1.0})


def out_of_order() -> str:
    world = opened()
    try:
        world.sum({"loss": 1.0} if world.rank else {"stop": 0.0})
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_numbers_are_added_up_by_name(processes: Processes) -> None:  # noqa: F811
    assert processes.run(2, added) == [{"rank": 1.0, "one": 2.0}] * 2


def test_a_rank_that_left_the_order_of_sums_is_told_and_gets_no_other_sums_numbers(
    processes: Processes,  # noqa: F811
) -> None:
    first, second = processes.run(2, out_of_order)
    assert "adds up stop" in first and "adds up loss" in second
