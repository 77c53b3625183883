"""The last collectives of this process, as torch's own flight recorder has them."""

from __future__ import annotations

import json

import torch.distributed

from llmtrainer.base.heartbeat import Collective


def last_collectives(most: int = 64) -> list[Collective]:
    """The last `most` collectives, oldest first; empty where no process group or no recorder is there."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    native = torch._C._distributed_c10d
    backend = torch.distributed.get_backend()
    dump = getattr(native, "_dump_nccl_trace_json" if backend == "nccl" else "_dump_fr_trace_json", None)
    if dump is None:
        return []
    found = []
    for entry in json.loads(dump(True, False)).get("entries", [])[-most:]:
        name = str(entry["profiling_name"]).rpartition(":")[2]
        shapes = tuple(tuple(shape) for shape in entry["input_sizes"])
        pending = not entry["retired"] and entry.get("state") != "completed"
        group, number = str(entry["process_group"][0]), int(entry["collective_seq_id"])
        found.append(Collective(group, number, name, shapes, tuple(entry["input_dtypes"]), pending))
    return found
