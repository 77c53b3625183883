"""Sums that do not depend on how many processes share the work: one tree over the virtual shards of every step.

Addition of rounded numbers is not associative, so what several processes add up depends on who adds what to what. Here
a step is cut into V virtual shards whatever the number of processes; each shard is a forward and backward pass of its
own, and the gradients of the shards are added up in one fixed binary tree. Who computes a node changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.protocols import Rule
from llmtrainer.core.randomness import derive
from llmtrainer.core.share import Share

Summand = TypeVar("Summand")
Leaf = list[Tensor | None]
"""The gradient of every parameter; None where it took no part."""


class Node(NamedTuple):
    """Shards place * 2^level to (place + 1) * 2^level - 1, as far as there are so many."""

    level: int
    place: int

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.place // 2)

    def is_left_of(self, other: Node) -> bool:
        """Whether both have one parent, and this one is its left half."""
        return self.level == other.level and self.place % 2 == 0 and self.place + 1 == other.place


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
        left, right = Node(node.level - 1, 2 * node.place), Node(node.level - 1, 2 * node.place + 1)
        # The last shards may be too few for a right half.
        return add(sum_of(left), sum_of(right)) if right.place << right.level < shards else sum_of(left)

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


def require_plain(rule: Rule) -> None:
    """Refuse a rule that rounds an element by where it stands, where processes have pieces of other sizes."""
    if getattr(rule, "implementation", None) == "fused":
        raise UserError(
            "the fused AdamW rounds the last elements of a piece otherwise than the others",
            where="optim.rule.implementation, engine.exact",
            why="which elements are the last of a piece depends on the number of processes",
            fix="optim.rule.implementation=foreach",
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
            self._leave(self._shard, parameters)
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
        self.require_shards()
        if self._shard is not None:
            self._put(self._shard, [parameter.grad for parameter in parameters])
            found = total(self.shards, dict(self._held), lambda left, right: list(map(added, left, right)))
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
        self.forget()

    def require_shards(self) -> None:
        """Refuse a step of micro-batches that do not say which shard they are of."""
        if self._shard is not None and self.on_trial:
            raise UserError(
                "the rows of this step are not cut into virtual shards", where="engine.exact, data.kind",
                why="a dataset of another's making has to cut its steps as `engine.share` says",
                fix="engine.exact=false, or a data.kind of ours: documents, examples, preferences",
            )

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
        if self.on_trial:     # what it sends has the right size, and is thrown away
            flats = [flat] * len(mine)
        else:
            assert found == mine, f"{found} are not the nodes of rank {self._rank}"
        flat.copy_(exact_all_reduce(flats, self._layout, self.shards))

    @property
    def on_trial(self) -> bool:
        """Whether the micro-batch is of no step."""
        return self._shard is None or self._shard < 0

    def _leave(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        self._put(shard, [parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None

    def _put(self, shard: int, leaf: Leaf) -> None:
        node = Node(0, shard)
        while self._held and self._held[-1][0].is_left_of(node):
            _, left = self._held.pop()
            leaf, node = list(map(added, left, leaf)), node.parent
        self._held.append((node, leaf))


class ExactPieces(ExactSums):
    """The same where each process has a piece of every gradient (FSDP2): in every backward pass each process gets its
    piece of what every other computed, and adds pieces up as the tree says.

    Neighbouring shards are computed at the same time, by different processes: what waits is at most log2(V) pieces.
    """

    def __init__(self, shards: int, rank: int, ranks: int) -> None:
        super().__init__(shards, rank, ranks)
        rounds = -(-shards // ranks)
        self.share = Share(tuple(round * ranks + rank for round in range(rounds)), shards)
        self.ends = False
        """Whether the micro-batch is the last of its step."""
        self._reducers: list[_Reducer] = []

    def reducer(self) -> _Reducer:
        """What adds up the gradients of one unit of the model."""
        self._reducers.append(_Reducer(self))
        return self._reducers[-1]

    def forget(self) -> None:
        super().forget()
        for reducer in self._reducers:
            reducer.forget()

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        self.require_shards()
        self.forget()

    def _leave(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        for reducer in self._reducers:
            reducer.put()


class _Reducer:
    """In place of FSDP2's own reduction: nothing until the step's last backward pass, then the sum over all shards."""

    def __init__(self, sums: ExactPieces) -> None:
        self._sums = sums
        self.forget()

    def forget(self) -> None:
        self._held: list[tuple[Node, Tensor]] = []
        self._leaves: Tensor | None = None
        """The pieces of the shards that are computed now, one of each rank."""
        self._next = 0
        """The first of these shards."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        pieces = received.view(-1, output_tensor.numel())
        if self._sums.on_trial:
            output_tensor.copy_(pieces.sum(0))
            return
        self._leaves = pieces if self._leaves is None else self._leaves.add_(pieces)
        output_tensor.zero_()
        if self._sums.ends:
            self.put()
            # torch adds this to the zeros of the backward passes before.
            output_tensor.copy_(total(self._sums.shards, dict(self._held), lambda left, right: left.add_(right)))

    def put(self) -> None:
        """The shards that were computed are complete."""
        if self._leaves is None:
            return
        for leaf in self._leaves[: self._sums.shards - self._next]:
            node = Node(0, self._next)
            self._next += 1
            while self._held and self._held[-1][0].is_left_of(node):
                _, left = self._held.pop()
                leaf, node = left.add_(leaf), node.parent
            self._held.append((node, leaf))
        # What waits must not keep the pieces of all ranks in memory with it.
        of_all = self._leaves.untyped_storage().data_ptr()
        self._held = [
            (node, held.clone() if held.untyped_storage().data_ptr() == of_all else held) for node, held in self._held
        ]
        self._leaves = None


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
