"""Hidden states to log-probabilities in chunks of positions: the logits [B, T, V] of a batch are never built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrainer.base.errors import UserError
from llmtrainer.core import balance, listed
from llmtrainer.core.batch import Batch, Outputs
from llmtrainer.core.drawn import Drawn
from llmtrainer.core.few_shapes import padding
from llmtrainer.core.products import turned_copy, widened

WANTS = ("logp", "entropy", "log_partition", "mean_logp", *listed.WANTS, balance.WANT)
"""What a policy can be asked for: fields of Outputs without their shape, and balanced gradients."""

_CHUNK_BYTES = 512 * 2**20
"""Size of one chunk of logits where nobody names a chunk. A batch that fits keeps its logits for backward: to compute
them again is a third more products with the head, whose rows are a fifth of a small model's weights."""
_SLICE_BYTES = 64 * 2**20
"""A chunk is worked through in slices of this size: C libraries return larger blocks to the system each time,
and pages that come back cost more than the arithmetic on them."""
_SLICE_ROWS = 1024
"""But no fewer positions than this: each slice passes once over the gradient [V, D] of the weight."""
_TILE_ELEMENTS = 2**19
"""Element-wise work goes over tiles of about this many logits, which stay in a core's cache."""

Reduced = tuple[Tensor, Tensor, Tensor | None]
"""logp, log_partition and, if asked for, entropy of some rows of logits."""


class Arithmetic(NamedTuple):
    """What is done to logits between the matrix products. Two ways, equal but for last digits."""

    reduce: Callable[[Tensor, Tensor, bool], Reduced]
    """(logits, targets, whether the entropy is wanted) -> Reduced."""
    differentiate: Callable[..., None]
    """(logits, targets, log_partition, logp_grad, partition_grad, entropy, entropy_grad): overwrite the logits
    by their gradient."""
    turn: Callable[[Tensor], Tensor] | None = None
    """A matrix transposed and contiguous, where the weight's gradient is better summed that way round
    (see core/products.py); None: it is summed as it is."""


def score(
    hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch, wants: tuple[str, ...], chunk: int | None = None
) -> Outputs:
    """What the objective wants to know of every target whose weight is not 0; exactly 0 elsewhere.

    hidden_BTD: what the head reads, in the compute type. weight_VD: the head's float32 (or float64) rows.
    chunk: positions whose logits exist at one time; None chooses by memory.
    """
    chosen_N = weighted_positions(batch)
    hidden_ND = gather(hidden_BTD, chosen_N)
    return score_gathered(hidden_ND, weight_VD, batch, chosen_N, wants, chunk)


def weighted_positions(batch: Batch) -> Tensor | None:
    """Flat places [N] of the targets that count, or None where all of them do."""
    weights = batch.weights_BT.flatten()
    chosen_N = weights.nonzero().squeeze(1)
    return None if chosen_N.numel() == weights.numel() else chosen_N


def gather(x_BTD: Tensor, chosen_N: Tensor | None) -> Tensor:
    """The chosen positions of all rows: [N, D]."""
    flat = x_BTD.flatten(0, 1)
    return flat if chosen_N is None else flat.index_select(0, chosen_N)


def score_gathered(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: Batch,
    chosen_N: Tensor | None,
    wants: tuple[str, ...],
    chunk: int | None = None,
    arithmetic: Arithmetic | None = None,
    ids: int | None = None,
) -> Outputs:
    """As `score`, for hidden states already gathered at `chosen_N`."""
    assert set(wants) <= set(WANTS), f"a policy cannot compute {sorted(set(wants) - set(WANTS))}"
    targets = batch.targets_BT.flatten()
    targets_N = targets if chosen_N is None else targets.index_select(0, chosen_N)
    if balance.WANT in wants:
        hidden_ND = balance.balanced(hidden_ND, batch, chosen_N)
    wants = tuple(name for name in wants if name != balance.WANT)
    found, plain = dict[str, Tensor](), tuple(name for name in wants if name not in listed.WANTS)
    if plain:
        drawn = Drawn.of(batch, chosen_N)
        found |= log_probabilities(hidden_ND, weight_VD, targets_N, plain, chunk, arithmetic, ids, drawn)
    if plain != wants:
        rows = max(_SLICE_ROWS, _SLICE_BYTES // max(1, weight_VD.shape[0] * hidden_ND.element_size()))
        found |= listed.log_probabilities(hidden_ND, weight_VD, *listed.asked(batch, chosen_N), chunk or rows)
    return _outputs(found, batch, chosen_N)


def _outputs(found: dict[str, Tensor], batch: Batch, chosen_N: Tensor | None) -> Outputs:
    """Values of the chosen positions in their places, 0 elsewhere."""

    def spread(value_N: Tensor | None) -> Tensor | None:
        if value_N is None or chosen_N is None:
            return None if value_N is None else value_N.unflatten(0, batch.targets_BT.shape)
        whole = value_N.new_zeros(batch.targets_BT.numel(), *value_N.shape[1:]).index_copy(0, chosen_N, value_N)
        return whole.unflatten(0, batch.targets_BT.shape)

    return Outputs(
        logp_BT=spread(found.get("logp")),
        entropy_BT=spread(found.get("entropy")),
        log_partition_BT=spread(found.get("log_partition")),
        mean_logp_BT=spread(found.get("mean_logp")),
        listed_logp_BTK=spread(found.get("listed_logp")),
        rest_logp_BT=spread(found.get("rest_logp")),
    )


def score_logits(
    logits_NV: Tensor, batch: Batch, chosen_N: Tensor | None, wants: tuple[str, ...], ids: int | None = None
) -> Outputs:
    """As `score_gathered`, from logits of a model that makes them in a way of its own."""
    assert set(wants) <= set(WANTS), f"a policy cannot compute {sorted(set(wants) - set(WANTS))}"
    targets = batch.targets_BT.flatten()
    targets_N = targets if chosen_N is None else targets.index_select(0, chosen_N)
    if balance.WANT in wants:
        raise UserError(
            "the gradients of this model's hidden states cannot be balanced",
            why="its class makes logits in a way of its own and shows no hidden states",
            fix="objective.balance=false",
        )
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    taught = not set(wants).isdisjoint(listed.WANTS)
    found = listed.of_logits(logits_NV, *listed.asked(batch, chosen_N)) if taught else {}
    if (drawn := Drawn.of(batch, chosen_N)) is not None:
        assert "mean_logp" not in wants, _NO_MEAN
        logits_NV = drawn.narrowed(logits_NV, slice(None))
    partition_N = logits_NV.logsumexp(-1)
    every_logp_NV = logits_NV - partition_N[:, None]
    found |= {
        "logp": every_logp_NV.gather(-1, targets_N[:, None])[:, 0],
        "entropy": -(every_logp_NV.exp() * every_logp_NV).sum(-1),
        "log_partition": partition_N,
        "mean_logp": every_logp_NV[:, :ids].mean(-1),
    }
    return _outputs({name: found[name] for name in wants}, batch, chosen_N)


def log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    wants: tuple[str, ...] = ("logp",),
    chunk: int | None = None,
    arithmetic: Arithmetic | None = None,
    ids: int | None = None,
    drawn: Drawn | None = None,
) -> dict[str, Tensor]:
    """Per position [N], float32 or wider, whatever of WANTS is asked for.

    ids: how many rows of the weight stand for an id, for `mean_logp`; None: all. Rows after them only pad the
    matrix and count in no mean. drawn: how the targets were drawn; what is computed is then of that distribution.

    The product runs in hidden's type, every reduction over the vocabulary in float32 (float64 for float64).
    With more than one chunk, backward computes the logits again instead of keeping them.
    """
    narrow, hidden_ND = hidden_ND.dtype, widened(hidden_ND)
    row_bytes = max(1, weight_VD.shape[0] * hidden_ND.element_size())
    if chunk is None:
        chunk = max(_SLICE_ROWS, _CHUNK_BYTES // row_bytes)
    assert chunk > 0
    rows = min(chunk, max(_SLICE_ROWS, _SLICE_BYTES // row_bytes))
    N, keep = hidden_ND.shape[0], hidden_ND.shape[0] <= chunk
    assert drawn is None or "mean_logp" not in wants, _NO_MEAN
    read_ND = hidden_ND
    if more := padding(N, hidden_ND.device, hidden_ND.dtype):
        # Positions that count nothing and get no gradient, so that few shapes occur.
        read_ND, targets_N = F.pad(hidden_ND, (0, 0, 0, more)), F.pad(targets_N, (0, more))
        drawn = None if drawn is None else drawn.padded(more)
    found = _Head.apply(
        read_ND, weight_VD, targets_N, rows, keep, "entropy" in wants, arithmetic or PLAIN, drawn, narrow
    )
    logp_N, log_partition_N, entropy_N = (value if value is None or len(value) == N else value[:N] for value in found)
    values = {"logp": logp_N, "entropy": entropy_N, "log_partition": log_partition_N}
    if "mean_logp" in wants:
        values["mean_logp"] = _mean_logit(hidden_ND, weight_VD[:ids]) - log_partition_N
    return {name: values[name] for name in WANTS if name in wants}


_NO_MEAN = "a mean over all ids means nothing of targets that were drawn from some"


def _mean_logit(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The mean over the vocabulary of each position's logits, in the log-partition's type: [N].

    The mean of products with rows is the product with the mean row, so no logit is touched again.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    return hidden_ND.to(wide) @ weight_VD.to(wide).mean(0)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int, keep: bool, entropy: bool,
        arithmetic: Arithmetic, drawn: Drawn | None, narrow: torch.dtype,
    ) -> Reduced:  # fmt: skip
        N = hidden_ND.shape[0]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        # Rounded to the type that is computed in, also where products are in a wider one: a reference or a sampler may
        # hold nothing but that.
        weight = weight_VD.to(narrow).to(hidden_ND.dtype)
        logp_N, log_partition_N = hidden_ND.new_empty(N, dtype=wide), hidden_ND.new_empty(N, dtype=wide)
        entropy_N = hidden_ND.new_empty(N, dtype=wide) if entropy else None
        grads = any(ctx.needs_input_grad)
        keep = keep and grads
        ctx.kept = []
        room_RV = None if keep else _room_of_slice(hidden_ND, weight, rows)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden_ND[part], weight, room_RV)
            if drawn is not None:
                logits = drawn.narrowed(logits, part)
            logp_N[part], log_partition_N[part], entropy_n = arithmetic.reduce(logits, targets_N[part], entropy)
            if entropy_N is not None and entropy_n is not None:
                entropy_N[part] = entropy_n
            ctx.kept.append(logits if keep else None)
        # The copy in hidden's type too: to make it again would need the same memory when backward begins.
        ctx.save_for_backward(hidden_ND, weight_VD, weight, targets_N, log_partition_N, entropy_N)
        ctx.rows, ctx.arithmetic, ctx.drawn, ctx.room_RV = rows, arithmetic, drawn, room_RV if grads else None
        return logp_N, log_partition_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logp_grad_N: Tensor, partition_grad_N: Tensor, entropy_grad_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, weight, targets_N, log_partition_N, entropy_N = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        drawn, turn, weight_grad = ctx.drawn, ctx.arithmetic.turn, None
        if ctx.needs_input_grad[1]:
            # Slices add up in the master's type: bfloat16 sums would depend on how many there are.
            weight_grad = _room_like(weight_VD.t(), _APART) if turn else torch.empty_like(weight_VD)
        room_RV, ctx.room_RV = ctx.room_RV, None
        for index, logits in enumerate(ctx.kept):
            part = slice(index * ctx.rows, (index + 1) * ctx.rows)
            # Kept logits are overwritten by their own gradient, so a second backward computes them again.
            ctx.kept[index] = None
            if logits is None:
                room_RV = _room_of_slice(hidden_ND, weight, ctx.rows) if room_RV is None else room_RV
                logits = _logits(hidden_ND[part], weight, room_RV)
                if drawn is not None:
                    logits = drawn.narrowed(logits, part)
            ctx.arithmetic.differentiate(
                logits, targets_N[part], log_partition_N[part], logp_grad_N[part], partition_grad_N[part],
                None if entropy_N is None else entropy_N[part],
                None if entropy_grad_N is None else entropy_grad_N[part],
            )
            if drawn is not None:
                logits = drawn.unnarrowed(logits, part, weight.dtype)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[part])
            if weight_grad is not None:
                factors = (turn(hidden_ND[part]), logits) if turn else (logits.t(), hidden_ND[part])
                _add_product(weight_grad, *factors, first=index == 0)
        if weight_grad is not None and not ctx.kept:
            weight_grad.zero_()
        if weight_grad is not None and turn:
            weight_grad = turn(weight_grad)
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _room_of_slice(hidden_ND: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Where the logits of every slice are written, in forward and in the backward that follows it. Each in a room of
    its own would stand beside the one before it while it is made, and glibc, which takes blocks of 64 bytes'
    alignment, would find neither's place again."""
    return hidden_ND.new_empty(min(rows, len(hidden_ND)), weight.shape[0])


def _logits(hidden_nD: Tensor, weight: Tensor, room_RV: Tensor | None) -> Tensor:
    """Of one slice, in the room for slices where there is one."""
    if room_RV is None:
        return hidden_nD @ weight.t()
    return torch.mm(hidden_nD, weight.t(), out=room_RV[: len(hidden_nD)])


_APART = 16
"""Elements between the rows of a sum that is read across them at the end. Rows of a whole number of pages would
all stand in the same few lines of the cache: measured, that reading takes four times as long."""


def _room_like(matrix: Tensor, apart: int) -> Tensor:
    """Unset memory of the same shape and type, each row so many elements behind the end of the one before."""
    rows, columns = matrix.shape
    return matrix.new_empty(rows, columns + apart)[:, :columns]


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """left right onto the total, in the total's type; the first one is what the total becomes."""
    if total.dtype == left.dtype:
        # The library adds while the product is in registers: no second matrix of this size, no second pass.
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _reduce(logits: Tensor, targets_n: Tensor, entropy: bool) -> Reduced:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_partition_n = torch.logsumexp(wide, dim=-1)
    logp_n = wide.gather(1, targets_n[:, None]).squeeze(1) - log_partition_n
    if not entropy:
        return logp_n, log_partition_n, None
    # From log-probabilities, not from logits: their common offset would cost digits.
    every_logp = wide - log_partition_n[:, None]
    return logp_n, log_partition_n, -(every_logp.exp() * every_logp).sum(-1)


def _reduce_by_tiles(logits: Tensor, targets_n: Tensor, entropy: bool) -> Reduced:
    # Room for all results first: made tile by tile they would lie between what the tiles free, and keep it apart.
    empty_n = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    rooms = (empty_n, torch.empty_like(empty_n), torch.empty_like(empty_n) if entropy else None)
    for tile in _tiles(logits):
        _reduce_into(rooms, tile, logits, targets_n)
    return rooms


def _reduce_into(rooms: Reduced, tile: slice, logits: Tensor, targets_n: Tensor) -> None:
    """One tile's results, of which nothing is left when the next tile begins."""
    for room_n, value in zip(rooms, _reduce(logits[tile], targets_n[tile], rooms[2] is not None), strict=True):
        if room_n is not None and value is not None:
            room_n[tile] = value


def _scale(
    every_logp: Tensor, logp_grad_n: Tensor, partition_grad_n: Tensor, entropy_n: Tensor | None,
    entropy_grad_n: Tensor | None,
) -> Tensor:
    """What p = softmax(z) is multiplied by in the gradient of logits z; the target's place adds logp_grad.

    d logp / dz = onehot - p, d log_partition / dz = p, and with entropy H: d H / dz = -p (log p + H).
    """
    scale = (partition_grad_n - logp_grad_n)[:, None]
    if entropy_grad_n is None:
        return scale
    assert entropy_n is not None
    return scale - entropy_grad_n[:, None] * (every_logp + entropy_n[:, None])


def _differentiate_by_tiles(
    logits: Tensor, targets_n: Tensor, log_partition_n: Tensor, logp_grad_n: Tensor, *others: Tensor | None
) -> None:
    for tile in _tiles(logits):
        every_logp = logits[tile].to(log_partition_n.dtype) - log_partition_n[tile, None]
        scale = _scale(every_logp, logp_grad_n[tile], *(None if x is None else x[tile] for x in others))  # type: ignore[arg-type]
        gradient = every_logp.exp_().mul_(scale)
        gradient.scatter_add_(1, targets_n[tile, None], logp_grad_n[tile, None])
        logits[tile] = gradient


def _differentiate_at_once(
    logits: Tensor, targets_n: Tensor, log_partition_n: Tensor, logp_grad_n: Tensor, *others: Tensor | None
) -> None:
    # The target's place by comparison: a compiler fuses that, and could not fuse a scatter.
    every_logp = logits.to(log_partition_n.dtype) - log_partition_n[:, None]
    at_target = torch.arange(logits.shape[1], device=logits.device) == targets_n[:, None]
    gradient = every_logp.exp() * _scale(every_logp, logp_grad_n, *others)  # type: ignore[arg-type]
    logits.copy_(gradient + at_target * logp_grad_n[:, None])


PLAIN = Arithmetic(_reduce_by_tiles, _differentiate_by_tiles)


def compiled(turned: bool = False) -> Arithmetic:
    """The same arithmetic by torch.compile: one pass over the logits in each direction. Vectors go in as their own:
    a view of a longer one, or one number shown N times, as the gradient of a sum is, would be compiled for again."""
    reduce: Any = torch.compile(_reduce, dynamic=True)
    differentiate: Any = torch.compile(_differentiate_at_once, dynamic=True)

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone(memory_format=torch.contiguous_format)

    return Arithmetic(
        lambda logits, targets_n, entropy: reduce(logits, targets_n.clone(), entropy),
        lambda logits, *vectors: differentiate(logits, *map(own, vectors)), turned_copy if turned else None,
    )


def _tiles(logits: Tensor) -> list[slice]:
    count, width = logits.shape
    step = max(1, _TILE_ELEMENTS // width) if logits.device.type == "cpu" else count
    return [slice(first, first + step) for first in range(0, count, max(1, step))]
