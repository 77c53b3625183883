"""A hard-gated mixture of adapters: which tokens go through which, and what every combination becomes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.core.batch import Batch
from llmtrainer.models.adapters.gated_lora import GatedLora, chosen
from llmtrainer.models.adapters.lora import adapters, initialise
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.foreign_proof import packed_row
from llmtrainer.models.peft_format import (
    adapter_config,
    adapter_tensors,
    load_adapter,
    read_config,
    write_adapter,
    write_combinations,
)  # fmt: skip
from llmtrainer.models.weights import tensors
from tests.tolerances import FLOAT64_GRADIENT_RELATIVE, FLOAT64_LOGITS
from tests.worlds import ragged_documents, tiny_model


def gated(**fields: object) -> Decoder:
    """A tiny model with eight adapters beside every matrix, all of which do something."""
    policy = tiny_model(torch.float64)
    GatedLora.model_validate({"rank": 2, "alpha": 3.0, **fields}).insert(policy)
    initialise(policy, 5)
    for linear in adapters(policy).values():
        assert linear.adapter is not None
        linear.adapter.lora_B.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return policy


def rows(gates: list[str], adapter: GatedLora) -> Batch:
    """All samples packed in one row, each with its own gate."""
    batch = packed_row([ids[:-1] for ids in ragged_documents([9, 6, 8])], torch.device("cpu"))
    named = torch.tensor([adapter.numbers(gate) for gate in gates])[batch.document_BT.long()]
    return replace(batch, signals={"gates_BTG": named})


def single(gates: str, policy: Decoder, document: int) -> Tensor:
    """Hidden states of one sample in a model whose matrices have the two deltas added."""
    adapter = policy.adapter
    assert isinstance(adapter, GatedLora)
    plain = tiny_model(torch.float64)
    for name, value in tensors(policy).items():
        dict(plain.named_parameters())[name].data.copy_(value)
    matrices = dict(plain.named_modules())
    for name, linear in adapters(policy).items():
        low = linear.adapter
        assert low is not None
        for group, number in enumerate(adapter.numbers(gates)):
            if number >= 0:
                first = (4 * group + number) * 2
                delta = low.lora_B[:, first : first + 2] @ low.lora_A[first : first + 2]
                matrices[name].weight.data += 3.0 / 2 * delta
    documents = [ids[:-1] for ids in ragged_documents([9, 6, 8])]
    return plain.hidden(packed_row([documents[document]], torch.device("cpu")))[0]


def test_a_sample_goes_through_its_two_adapters_and_no_other() -> None:
    policy = gated()
    assert isinstance(policy.adapter, GatedLora)
    names = ["t1a3", "t0a0", "t3"]
    found = policy.hidden(rows(names, policy.adapter))[0]
    right = torch.cat([single(gate, policy, number) for number, gate in enumerate(names)])
    assert (found - right).abs().max() < FLOAT64_LOGITS
    other = policy.hidden(rows(["t1a3", "t2a0", "t3"], policy.adapter))[0]
    assert torch.equal(other[:9], found[:9]) and torch.equal(other[15:], found[15:])
    assert not torch.equal(other[9:15], found[9:15])


def test_only_adapters_behind_open_gates_learn() -> None:
    policy = gated()
    assert isinstance(policy.adapter, GatedLora)
    policy.hidden(rows(["t1a3", "t1a0", "t1"], policy.adapter)).square().sum().backward()
    for linear in adapters(policy).values():
        low = linear.adapter
        assert low is not None and low.lora_A.grad is not None and low.lora_B.grad is not None
        learned = low.lora_A.grad.view(8, 2, -1).flatten(1).any(1).tolist()
        assert learned == [False, True, False, False, True, False, False, True]
        assert low.lora_B.grad.view(-1, 8, 2).any(2).any(0).tolist() == learned


def test_the_gradient_of_a_gated_layer_is_that_of_its_formula() -> None:
    policy = gated(targets=("q_proj",), dropout=0.0)
    linear = next(iter(adapters(policy).values()))
    low = linear.adapter
    assert low is not None and isinstance(policy.adapter, GatedLora)
    beside = policy._beside(rows(["t1a3", "t0a0", "t3"], policy.adapter))
    assert beside is not None and beside.gates_BTE is not None
    x = torch.randn(1, 23, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    mask = beside.gates_BTE.repeat_interleave(2, -1)
    right = x @ linear.weight.T + 1.5 * ((x @ low.lora_A.T) * mask) @ low.lora_B.T
    found = low(x, linear.weight, None, beside)
    along = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    leaves = [x, low.lora_A, low.lora_B]
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, along), torch.autograd.grad(right, leaves, along), strict=True
    ):
        assert (ours - theirs).abs().max() <= FLOAT64_GRADIENT_RELATIVE * theirs.abs().max()


@pytest.mark.parametrize("rslora", [False, True])
def test_every_combination_becomes_an_ordinary_adapter_of_twice_the_rank(rslora: bool, tmp_path: Path) -> None:
    policy = gated(rslora=rslora)
    assert isinstance(policy.adapter, GatedLora)
    names = write_combinations(policy, "base", tmp_path)
    assert len(names) == 16 and sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for gate in ("t1a3", "t0a0", "t3a2"):
        adapter, base = read_config(tmp_path / gate)
        assert base == "base" and adapter.kind == "lora" and adapter.rank == 4
        alone = tiny_model(torch.float64)
        for name, value in tensors(policy).items():
            dict(alone.named_parameters())[name].data.copy_(value)
        adapter.insert(alone)
        load_adapter(alone, tmp_path / gate)
        batch = rows([gate] * 3, policy.adapter)
        far = alone.hidden(batch) - policy.hidden(batch)
        assert far.abs().max() < FLOAT64_LOGITS
    assert not torch.equal(chosen(policy, (0, 0))["model.layers.0.mlp.up_proj"][0],
                           chosen(policy, (0, 1))["model.layers.0.mlp.up_proj"][0])  # fmt: skip


def test_the_mixture_itself_is_kept_whole_and_is_no_folder_of_peft(tmp_path: Path) -> None:
    policy = gated()
    write_adapter(adapter_tensors(policy), adapter_config(policy, "base"), tmp_path)
    adapter, _ = read_config(tmp_path)
    assert isinstance(adapter, GatedLora) and isinstance(policy.adapter, GatedLora)
    assert adapter.groups == policy.adapter.groups and adapter.rank == 2 and adapter.scale == 1.5
    assert '"peft_type": "GATED_LORA"' in (tmp_path / "adapter_config.json").read_text()


def test_gates_are_read_from_a_string_and_nothing_else_is_a_gate() -> None:
    adapter = GatedLora()
    assert adapter.numbers("t1a3") == (1, 3) and adapter.numbers("a2") == (-1, 2) and adapter.numbers("") == (-1, -1)
    assert len(dict(adapter.combinations())) == 16
    with pytest.raises(UserError, match="names no gates"):
        adapter.numbers("t1b2")
    with pytest.raises(ValueError, match="a name of its own"):
        GatedLora(groups=(("x", "x"),))


def test_rows_without_gates_and_reading_without_gates_are_refused() -> None:
    policy = gated()
    with pytest.raises(UserError, match="which adapters it goes through"):
        policy.hidden(packed_row([[1, 2, 3]], torch.device("cpu")))
    with pytest.raises(UserError, match="which adapters"):
        policy.cache(1, 4)
