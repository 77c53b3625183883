"""Which parameters decay, and which pattern takes which."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrainer.base.errors import UserError
from llmtrainer.models.families.llama import Llama
from llmtrainer.optim.groups import Group, group


def small() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "layers": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)),
        }
    )


def names(groups: list[dict]) -> list[tuple[float, float, list[str]]]:
    return [(entry["rate_multiplier"], entry["decay_multiplier"], entry["param_names"]) for entry in groups]


def test_matrices_decay_and_vectors_do_not() -> None:
    assert names(group(small().named_parameters())) == [
        (1.0, 1.0, ["embed.weight", "layers.0.weight", "layers.2.weight"]),
        (1.0, 0.0, ["layers.0.bias", "layers.1.weight", "layers.1.bias"]),
    ]


def test_the_anchor_model_has_the_published_numbers_with_and_without_decay() -> None:
    family = Llama(
        hidden_size=2048,
        intermediate_size=5632,
        layers=32,
        heads=16,
        kv_heads=8,
        attention_bias=True,
        context_length=2048,
    )
    with torch.device("meta"):
        decoder = family.build(64_320)
    with_decay, without = group(decoder.named_parameters())
    assert (with_decay["decay_multiplier"], without["decay_multiplier"]) == (1.0, 0.0)
    assert [len(entry["params"]) for entry in (with_decay, without)] == [226, 161]
    numbers = [sum(parameter.numel() for parameter in entry["params"]) for entry in (with_decay, without)]
    assert numbers == [1_773_404_160, 264_192]


def test_the_first_pattern_that_matches_takes_a_parameter() -> None:
    groups = group(
        small().named_parameters(),
        [
            Group(match="layers.0.*", rate=0.5),
            Group(match="layers.*", decay=0.25),
            Group(match="embed.*", decay=0.0),
        ],
    )
    assert names(groups) == [
        (1.0, 0.0, ["embed.weight"]),
        (0.5, 1.0, ["layers.0.weight"]),
        (0.5, 0.0, ["layers.0.bias"]),
        (1.0, 0.25, ["layers.1.weight", "layers.1.bias", "layers.2.weight"]),
    ]


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = small()
    entries = group(model.named_parameters(), [Group(match="*.weight", rate=2.0)])
    together = [id(parameter) for entry in entries for parameter in entry["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())


def test_a_pattern_without_a_parameter_is_refused_with_names_to_choose_from() -> None:
    with pytest.raises(UserError, match=r"`head\.\*` takes no") as caught:
        group(small().named_parameters(), [Group(match="embed.*"), Group(match="head.*")])
    assert caught.value.where == "optim.groups[1].match"
    assert "embed.weight" in str(caught.value.why)


def test_a_pattern_that_an_earlier_one_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        group(small().named_parameters(), [Group(match="*"), Group(match="embed.*")])
    assert "earlier group" in str(caught.value.why)


def test_frozen_parameters_are_in_no_group() -> None:
    model = small()
    model.get_submodule("embed").requires_grad_(False)
    assert "embed.weight" not in [name for entry in group(model.named_parameters()) for name in entry["param_names"]]
    with pytest.raises(UserError) as caught:
        group(model.named_parameters(), [Group(match="embed.*")])
    assert "frozen" in str(caught.value.why)


def test_a_model_without_a_trainable_parameter_is_refused() -> None:
    with pytest.raises(UserError, match="no parameter is trainable"):
        group(small().requires_grad_(False).named_parameters())
