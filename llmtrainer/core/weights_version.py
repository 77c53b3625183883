"""Which weights a policy has: a hash of every byte of them, at the speed of memory."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_COLUMNS = 128
"""Numbers of eight bytes that become one sum before they are hashed."""


def weights_version(module: nn.Module) -> str:
    """SHA-256 in hex over names, types, shapes and all bytes of a module's parameters, those that stay as they are
    included.

    SHA-256 itself would read a large model for seconds. So each KiB first becomes one sum modulo 2^64 of its bits as
    whole numbers. A change of one number is never lost, and changes of several only if they cancel within a KiB
    exactly: a step of training changes millions.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        weight = parameter.detach()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(_sums(weight))
    return digest.hexdigest()


def _sums(weight: Tensor) -> bytes:
    flat = weight.contiguous().flatten().view(torch.uint8)
    whole, rest = flat.tensor_split([len(flat) // (8 * _COLUMNS) * 8 * _COLUMNS])
    sum_N = whole.view(torch.int64).view(-1, _COLUMNS).sum(1)
    # A list and not an array: FSDP2 must be able to let go of memory that numpy would hold on to.
    return sum_N.cpu().numpy().tobytes() + bytes(rest.tolist())
