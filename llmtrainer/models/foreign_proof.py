"""What a class of transformers must show before it is trained or asked: that it looks at nothing behind a token, that
packed rows are exact in it, and that our attention inside it is its own."""

from __future__ import annotations

import torch

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.core.randomness import derive
from llmtrainer.models import proof
from llmtrainer.models.foreign import Foreign, rows_of
from llmtrainer.models.foreign_attention import ATTENTION
from llmtrainer.models.foreign_cache import KeyRows

_LENGTHS = (11, 7)
"""Documents of the row that packing is proved with."""
_APART = "model.apart=true, which reads every document by itself"
_TWO_WAYS = 3
"""So many times as far as one way of computing from itself may be two ways from each other."""


@torch.no_grad()
def require_causal(policy: Foreign, where: str) -> None:
    """Read a document and its beginning: what both have must be the same, or a UserError names the class."""
    whole = _documents(policy)[0]
    device, begun = policy.head_weight.device, len(whole) // 2
    alone = policy.hidden(rows_of([whole[:begun]], device))[0]
    beside = policy.hidden(rows_of([whole], device))[0][:begun]
    if (off := proof.difference(beside, alone)) > _allowed(policy):
        raise UserError(
            f"{type(policy.model).__name__} does not predict the next token from those before it", where=where,
            why=f"what it makes of a text depends on what stands behind it, off by {off:.1e}",
            fix="name a model that generates; of an encoder, one whose config.json has `is_decoder: true`",
        )


@torch.no_grad()
def require_own_attention(policy: Foreign, where: str) -> None:
    """Read a document with our attention and with the class' own: every state must be the same, and every window that
    the class asks a mask for must be told to our attention; or a UserError names the class."""
    row = rows_of(_documents(policy)[:1], policy.head_weight.device)
    ours = policy.hidden(row)[0]
    asked, why = policy.asked, None
    if asked.masked:
        why = "it makes a mask of its own, which knows no documents"
    elif lost := sorted(asked.windows - asked.told):
        why = f"it has a window of {lost[0]:,} tokens and does not tell its attention"
    else:
        policy.model.set_attn_implementation("eager")
        try:
            require_causal(policy, where)    # ours sees to it whatever the class does
            theirs = policy.hidden(row)[0]
        finally:
            policy.model.set_attn_implementation(ATTENTION)
        off, most = proof.difference(ours, theirs), _TWO_WAYS * _allowed(policy)
        why = f"our attention is not its own, off by {off:.1e}" if off > most else None
    if why is not None:
        raise UserError(f"packed rows are not exact in {type(policy.model).__name__}", where=where, why=why, fix=_APART)


def _allowed(policy: Foreign) -> float:
    """How far states may be apart where attention is the class' own: it takes softmax in float32 at best."""
    return max(proof.ALLOWED[policy.compute], proof.ALLOWED[torch.float32])


def _documents(policy: Foreign) -> list[list[int]]:
    draw = torch.Generator().manual_seed(derive(0, "packing"))
    return [torch.randint(0, policy.vocabulary, (length,), generator=draw).tolist() for length in _LENGTHS]


@torch.no_grad()
def require_packing(policy: Foreign, where: str) -> None:
    """Read two documents in one row and apart: every state must be the same, or a UserError names the class."""
    documents, device = _documents(policy), policy.head_weight.device
    packed = policy.hidden(packed_row(documents, device))[0]
    alone = torch.cat([policy.hidden(rows_of([ids], device))[0] for ids in documents])
    off = proof.difference(packed, alone)
    if policy.asked.calls and off <= proof.ALLOWED[policy.compute]:
        return
    raise UserError(
        f"packed rows are not exact in {type(policy.model).__name__}", where=where,
        why=f"a document beside another is read as something else, off by {off:.1e}" if policy.asked.calls
        else "its class never asked for our attention",
        fix=_APART,
    )  # fmt: skip


def packed_row(documents: list[list[int]], device: torch.device) -> Batch:
    tokens_BT = torch.tensor([[token for ids in documents for token in ids]], device=device)
    owners = [number for number, ids in enumerate(documents) for _ in ids]
    owner_BT = torch.tensor([owners], dtype=torch.int32, device=device)
    position_BT = torch.tensor([[place for ids in documents for place in range(len(ids))]], dtype=torch.int32)
    return Batch(
        tokens_BT, tokens_BT, torch.zeros(tokens_BT.shape, device=device), owner_BT, position_BT.to(device), owner_BT,
        torch.zeros(1, dtype=torch.int64, device=device),
    )  # fmt: skip


@torch.no_grad()
def is_product(policy: Foreign) -> bool:
    """Whether logits are hidden states times the head's rows, and nothing else."""
    row = rows_of([[index % policy.vocabulary for index in range(3, 12)]], policy.head_weight.device)
    if policy.hidden(row).shape[-1] != policy.head_weight.shape[1]:
        return False    # something stands between them
    policy.own_logits = True
    right = policy.logits(row)
    policy.own_logits = False
    return proof.difference(policy.logits(row), right) <= proof.ALLOWED[policy.compute]


@torch.no_grad()
def keeps_keys(policy: Foreign) -> bool:
    """Whether two rows that are read in parts, from kept keys, are read as in one."""
    parts = (((3, 7, 5, 9), (8, 4)), ((6,), (11, 2, 10)))
    device = policy.head_weight.device
    whole = [[token % policy.vocabulary for part in row for token in part] for row in zip(*parts, strict=True)]
    right = policy._after(whole)
    cache = KeyRows(2, 8, device)
    try:
        for part in parts:
            width = max(map(len, part))
            tokens_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in part], device=device)
            read = policy.read(tokens_BT % policy.vocabulary, torch.tensor([len(ids) for ids in part]), cache)
    except Exception:  # a class may do anything with keys that it keeps otherwise; then whole rows are read
        return False
    return len(cache.held.layers) > 0 and proof.difference(read, right) <= proof.ALLOWED[policy.compute]
