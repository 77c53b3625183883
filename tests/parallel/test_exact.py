"""Sums over virtual shards have the same bits whoever computes them, and differ where anybody's order is taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import EngineConfig
from llmtrainer.optim.rules.adamw import AdamW
from llmtrainer.parallel.engines.single import Single
from llmtrainer.parallel.exact import (
    ExactSums,
    Node,
    added,
    block,
    exact_reduce_scatter,
    nodes_of,
    require_plain,
    total,
)
from llmtrainer.parallel.norm import exact_norm, rows_of
from tests.worlds import row_batch, tiny_model


def pairs_summed(values: Sequence[np.float32]) -> np.float32:
    """Neighbours added two by two, again and again; one that is left over waits for the next round."""
    while len(values) > 1:
        values = [values[place] + values[place + 1] if place + 1 < len(values) else values[place]
                  for place in range(0, len(values), 2)]    # fmt: skip
    return values[0]


def hard_to_add(count: int) -> list[np.float32]:
    """Numbers whose float32 sum depends on the order."""
    draw = random.Random(count)
    return [np.float32(draw.uniform(-1, 1) * 10 ** draw.randint(-3, 4)) for _ in range(count)]


@pytest.mark.parametrize("shards", range(1, 14))
def test_the_tree_is_pairs_of_neighbours_however_its_shards_are_shared_out(shards: int) -> None:
    values = hard_to_add(shards)
    wanted = pairs_summed(values)
    for ranks in range(1, shards + 1):
        found: dict[Node, np.float32] = {}
        for rank in range(ranks):
            mine = block(shards, rank, ranks)
            for node in nodes_of(mine):
                of_node = range(node.place << node.level, (node.place + 1) << node.level)
                assert set(of_node) <= set(mine)
                found[node] = pairs_summed([values[shard] for shard in of_node])
        assert total(shards, found, lambda left, right: left + right) == wanted, ranks
    assert sorted(shard for rank in range(3) for shard in block(shards, rank, 3)) == list(range(shards))


def test_the_order_of_a_ring_gives_other_bits() -> None:
    """The control: these numbers do depend on the order, so that the tests here prove something."""
    values = hard_to_add(8)
    shares = [sum(values[rank * 2 : rank * 2 + 2], np.float32(0)) for rank in range(4)]
    orders = {
        float(pairs_summed(values)), float(sum(values, np.float32(0))), float(sum(reversed(values), np.float32(0))),
        float(sum(shares, np.float32(0))),
    }
    assert len(orders) > 1


def test_a_parameter_that_took_no_part_counts_as_zeros() -> None:
    minus = torch.tensor([-0.0, 2.0])
    assert added(None, None) is None
    for found in (added(minus.clone(), None), added(None, minus.clone())):
        assert found is not None and torch.equal(found, minus) and not torch.signbit(found[0])


def test_one_process_sends_nothing_and_its_vector_is_the_tree_s() -> None:
    leaves = [torch.tensor(hard_to_add(40)[place : place + 5]) for place in range(0, 40, 5)]
    wanted = [float(pairs_summed(list(column))) for column in torch.stack(leaves, 1).numpy()]
    found = exact_reduce_scatter(leaves, [[Node(0, shard) for shard in range(8)]], 8)
    assert found.tolist() == wanted


def step(shards: Sequence[int], uneven: bool = False) -> list[Batch]:
    """One batch a shard, of rows of other lengths each."""
    draw = random.Random(5)
    batches = []
    for shard in shards:
        rows = [[draw.randrange(256) for _ in range(3 + (7 * shard + 5 * row) % 11)] for row in range(2)]
        batches += [row_batch(rows[:1], first=2 * shard), row_batch(rows[1:], first=2 * shard + 1)] if uneven else [
            row_batch(rows, first=2 * shard)
        ]    # fmt: skip
    return batches


def gradients_of(engine_sums: ExactSums, batches: Sequence[Batch], shards: Sequence[int]) -> list[Tensor]:
    policy = tiny_model()
    parameters = list(policy.parameters())
    for batch, shard in zip(batches, shards, strict=True):
        entered = engine_sums.enter(replace(batch, shard=shard), parameters)
        assert entered.shard == -1
        logp_BT = policy(entered, ("logp",)).logp_BT
        (-logp_BT).sum().backward()
    engine_sums.finish(parameters)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def test_the_gradients_of_shards_are_added_as_the_tree_says() -> None:
    """Against eight backward passes of their own, added up by hand as ((0+1)+(2+3))+((4+5)+(6+7))."""
    apart = []
    for shard, batch in enumerate(step(range(8))):
        policy = tiny_model()
        (-policy(batch, ("logp",)).logp_BT).sum().backward()
        apart.append([parameter.grad for parameter in policy.parameters()])
        assert shard < 8
    found = gradients_of(ExactSums(8), step(range(8)), range(8))
    for place, gradient in enumerate(found):
        g = [one[place] for one in apart]
        assert torch.equal(gradient, ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7])))


def test_several_micro_batches_of_a_shard_are_one_leaf() -> None:
    batches = step(range(3), uneven=True)
    found = gradients_of(ExactSums(3), batches, [0, 0, 1, 1, 2, 2])
    policy = tiny_model()
    leaves = []
    for pair in (batches[0:2], batches[2:4], batches[4:6]):
        policy.zero_grad()
        for batch in pair:
            (-policy(batch, ("logp",)).logp_BT).sum().backward()
        leaves.append([parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None])
    for gradient, a, b, c in zip(found, *leaves, strict=True):
        assert torch.equal(gradient, (a + b) + c)


def test_the_norm_is_that_of_all_numbers_and_takes_rows_as_they_come() -> None:
    gradients = [torch.randn(7, 33), torch.randn(12), torch.randn(3, 4, 5), torch.tensor(2.0)]
    wanted = float(np.sqrt(sum((item.double().numpy() ** 2).sum() for item in gradients)))
    assert float(exact_norm(lambda dtype: rows_of(gradients, dtype))) == pytest.approx(wanted, rel=1e-6)
    assert exact_norm(lambda dtype: rows_of([], dtype)) == 0.0
    large = [torch.full((4, 4), 1e30), torch.zeros(3)]
    assert float(exact_norm(lambda dtype: rows_of(large, dtype))) == pytest.approx(4e30, rel=1e-6)
    for first in range(7):      # a row's norm does not depend on which rows are beside it
        assert torch.equal(rows_of([gradients[0][first:]], None), rows_of(gradients[:1], None)[first:])


def test_more_processes_than_shards_and_more_threads_than_one_are_refused() -> None:
    with pytest.raises(UserError, match="4 processes share 3 virtual shards"):
        ExactSums(3, 0, 4)
    for more, told in (({"threads": 2}, "2 threads add up"), ({"device": "meta"}, "nothing is computed")):
        with pytest.raises(UserError, match=told):
            EngineConfig.model_validate({"kind": "single", "exact": True, **more}).start("float32")


def test_rows_that_do_not_say_their_shard_are_refused() -> None:
    with pytest.raises(UserError, match="not cut into virtual shards"):
        gradients_of(ExactSums(8), step(range(2)), [-1, -1])


def test_the_fused_rule_is_refused_where_pieces_have_other_sizes() -> None:
    require_plain(AdamW(implementation="foreach"))
    with pytest.raises(UserError, match="rounds the last elements"):
        require_plain(AdamW())


def test_a_hook_is_refused_because_it_would_replace_the_exact_sum() -> None:
    with pytest.raises(UserError, match="the hook `bf16` adds gradients up in an order of its own"):
        EngineConfig.model_validate({"kind": "ddp", "exact": True, "hook": {"kind": "bf16"}}).start("float32")


def test_without_exact_an_engine_has_the_share_of_its_rank() -> None:
    assert Single(device="cpu").start("float32").share == ((0,), 1)
    assert Single(device="cpu").sums(1, 4) is None
