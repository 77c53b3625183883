"""Sums that do not depend on how many processes share the work: one tree over the virtual shards of every step.

Addition of rounded numbers is not associative, so what several processes add up depends on who adds what to what. Here
a step is cut into V virtual shards whatever the number of processes; each shard is a forward and backward pass of its
own, and the gradients of the shards are added up in one fixed binary tree. Who computes a node changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.randomness import derive
from llmtrainer.core.share import Share

Summand = TypeVar("Summand")
Leaf = list[Tensor | None]
"""The gradient of every parameter; None where it took no part."""


class Node(NamedTuple):
    """Shards index * 2^level to (index + 1) * 2^level - 1, as far as there are so many."""

    level: int
    index: int

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.index // 2)

    def is_left_of(self, other: Node) -> bool:
        """Whether both have one parent, and this one is its left half."""
        return self.level == other.level and self.index % 2 == 0 and self.index + 1 == other.index


def block(shards: int, rank: int, ranks: int) -> range:
    """The shards of a rank: neighbours, so that most of its sums are nodes of the tree."""
    return range(shards * rank // ranks, shards * (rank + 1) // ranks)


def nodes_of(shards: Sequence[int]) -> list[Node]:
    """What is left when neighbours that have one parent are added up, in order."""
    stack: list[Node] = []
    for shard in shards:
        stack.append(Node(0, shard))
        while len(stack) > 1 and stack[-2].is_left_of(stack[-1]):
            stack[-2:] = [stack[-1].parent]
    return stack


def total(shards: int, nodes: Mapping[Node, Summand], add: Callable[[Summand, Summand], Summand]) -> Summand:
    """The sum over all shards, of nodes that cover each of them once: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""

    def sum_of(node: Node) -> Summand:
        if node in nodes:
            return nodes[node]
        left, right = Node(node.level - 1, 2 * node.index), Node(node.level - 1, 2 * node.index + 1)
        # The last shards may be too few for a right half.
        return add(sum_of(left), sum_of(right)) if right.index << right.level < shards else sum_of(left)

    return sum_of(Node((shards - 1).bit_length(), 0))


def added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """left + right in the memory of left; None counts as zeros, and two of them stay None."""
    if left is None or right is None:
        # x + 0 is x, but for -0.0: what is added as zeros elsewhere must round so here.
        only = right if left is None else left
        return None if only is None else only.add_(0.0)
    return left.add_(right)


def require_exact(device: torch.device, threads: int | None) -> None:
    """Refuse exact sums where they would not be."""
    if threads not in (None, 1):
        raise UserError(
            f"{threads:,} threads add up in an order of their own", where="engine.threads, engine.exact",
            why="engine.exact promises the same bits, and a sum over threads has others than a sum over one",
            fix="engine.threads=1, or more processes: they may be as many as engine.virtual_shards",
        )
    if device.type != "cpu":
        raise UserError(
            f"exact sums are proved on processors, and the device is {device}", where="engine.exact, engine.device",
            why="kernels of graphics cards add up in an order that nobody promises",
            fix="engine.device=cpu, or engine.exact=false: results are then equal to rounding",
        )


class ExactSums:
    """What an engine does otherwise where its sums must not depend on the processes."""

    def __init__(self, shards: int, rank: int = 0, ranks: int = 1) -> None:
        """Raises UserError where there are more processes than shards."""
        if ranks > shards:
            raise UserError(
                f"{ranks:,} processes share {shards:,} virtual shards", where="engine.virtual_shards",
                why="some process would have nothing to compute in any step",
                fix=f"engine.virtual_shards={ranks}, in a run that begins: results depend on it",
            )
        self.shards, self._rank = shards, rank
        self._layout = [nodes_of(block(shards, number, ranks)) for number in range(ranks)]
        """The nodes that each rank can add up by itself."""
        self.share = Share(tuple(block(shards, rank, ranks)), shards)
        self._shard: int | None = None
        self._batches = 0
        self._held: list[tuple[Node, Leaf]] = []

    def enter(self, batch: Batch, parameters: Sequence[nn.Parameter]) -> Batch:
        """Before the forward pass of a micro-batch: gradients of the shard before are put aside, and modules that draw
        from torch's own generator draw what this micro-batch draws wherever it is computed."""
        if self._shard is not None and batch.shard != self._shard:
            self._put(self._shard, [parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
            self._batches = 0
        self._shard = batch.shard
        torch.manual_seed(derive(batch.dropout_key, "shard", batch.shard, self._batches))
        self._batches += 1
        return replace(batch, shard=-1)    # a compiler would compile anew for every other number

    def forget(self) -> None:
        """The step is over."""
        self._held, self._shard, self._batches = [], None, 0

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Where one process has all shards: the step's gradients in place of those of the last shard."""
        if self._shard is not None:
            self._put(self._shard, [parameter.grad for parameter in parameters])
            found = total(self.shards, dict(self._held), lambda left, right: list(map(added, left, right)))
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
        self.forget()

    def reduce(self, flat: Tensor, views: Sequence[Tensor], places: Sequence[int]) -> None:
        """The gradients of some parameters over all shards, in place of those of the last shard of this rank.

        flat: one vector; views: the gradient of each parameter in it; places: which parameters these are. Every rank
        calls it with the same parameters in the same order of calls. Sends what a ring would send, where the shards of
        a rank make one node: 2 (W - 1) / W of the vector.
        """
        assert self._shard is not None, "a shard comes first"
        node, pieces = Node(0, self._shard), list(self._held)
        while pieces and pieces[-1][0].is_left_of(node):
            _, leaf = pieces.pop()
            for view, place in zip(views, places, strict=True):
                added(view, leaf[place])
            node = node.parent
        flats = [_flat(leaf, views, places, flat) for _, leaf in pieces] + [flat]
        mine, found = self._layout[self._rank], [*(kept for kept, _ in pieces), node]
        if self._shard < 0:     # a trial of no step: what it sends has the right size, and is thrown away
            flats = [flat] * len(mine)
        else:
            assert found == mine, f"{found} are not the nodes of rank {self._rank}"
        flat.copy_(exact_all_reduce(flats, self._layout, self.shards))

    def _put(self, shard: int, leaf: Leaf) -> None:
        node = Node(0, shard)
        while self._held and self._held[-1][0].is_left_of(node):
            _, left = self._held.pop()
            leaf, node = list(map(added, left, leaf)), node.parent
        self._held.append((node, leaf))


def _flat(leaf: Leaf, views: Sequence[Tensor], places: Sequence[int], like: Tensor) -> Tensor:
    """A node's gradients as `like` has them."""
    found = torch.zeros_like(like)
    for view, place in zip(views, places, strict=True):
        gradient = leaf[place]
        if gradient is not None:
            begin = view.storage_offset() - like.storage_offset()
            found[begin : begin + view.numel()] = gradient.reshape(-1)
    return found


def exact_all_reduce(nodes: Sequence[Tensor], layout: Sequence[Sequence[Node]], shards: int) -> Tensor:
    """The sum over all shards as a vector, of this rank's nodes and those of the others."""
    size = nodes[0].numel()
    part = exact_reduce_scatter(nodes, layout, shards)
    if len(layout) == 1:
        return part
    whole = part.new_empty(part.numel() * len(layout))
    dist.all_gather(list(whole.view(len(layout), -1)), part)
    return whole[:size]


def exact_reduce_scatter(nodes: Sequence[Tensor], layout: Sequence[Sequence[Node]], shards: int) -> Tensor:
    """This rank's slice, one W-th rounded up, of the sum: every rank gets that slice of every node, and adds them up
    itself. A ring would add them in an order that depends on the number of ranks."""
    ranks, size = len(layout), nodes[0].numel()
    if ranks == 1:
        received = [nodes]
    else:
        each = -(-size // ranks)
        sent = nodes[0].new_zeros(ranks, len(nodes), each)
        for number, node in enumerate(nodes):
            padded = torch.nn.functional.pad(node, (0, ranks * each - size))
            sent[:, number] = padded.view(ranks, each)
        counts = [len(of_rank) for of_rank in layout]
        got = sent.new_empty(sum(counts) * each)
        dist.all_to_all_single(
            got, sent.view(-1), [count * each for count in counts], [len(nodes) * each] * ranks
        )
        slices = got.view(sum(counts), each)
        begins = [sum(counts[:rank]) for rank in range(ranks)]
        received = [list(slices[begin : begin + count]) for begin, count in zip(begins, counts, strict=True)]
    named = {
        node: piece for of_rank, pieces in zip(layout, received, strict=True)
        for node, piece in zip(of_rank, pieces, strict=True)
    }
    return total(shards, named, lambda left, right: left.add_(right))


def exact_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm over all gradients, a float64 scalar: of rows along the last axis, which no engine cuts, then of all
    rows' norms in float64 in the order of the parameters."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    for dtype in (None, torch.float64):
        norm = torch.linalg.vector_norm(torch.cat(list(row_norms(gradients, dtype))))
        if _NARROW_NORMS[0] < float(norm) < _NARROW_NORMS[1]:
            break
    return norm


def row_norms(gradients: Sequence[Tensor], dtype: torch.dtype | None) -> Iterator[Tensor]:
    """The norms of each gradient's rows along its last axis, as float64 vectors; a vector's rows are its elements.
    dtype: of the arithmetic; None: the gradients' own, which is nine times as fast."""
    for gradient in gradients:
        if gradient.ndim < 2:
            yield gradient.reshape(-1).double().abs()
        else:
            yield torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype).reshape(-1).double()


_NARROW_NORMS = (1e-12, 1e18)
"""Norms whose squares, and those of what makes them up, are ordinary float32 numbers."""
