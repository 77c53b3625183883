"""What is saved is what was there, byte for byte, and a loaded run takes the same next step: for every rule."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrainer.base.errors import UserError
from llmtrainer.core.protocols import Rule
from llmtrainer.optim import rules
from llmtrainer.optim.groups import Group, group
from llmtrainer.parallel.optimizer_state import read_state, write_state

SETTINGS: list[dict[str, Any]] = [
    *({"kind": module.name} for module in pkgutil.iter_modules(rules.__path__)),  # a new file is tested unasked
    {"kind": "adamw", "implementation": "plain"},
    {"kind": "adamw_8bit", "smallest": 1, "keep_float": []},
    {"kind": "adafactor", "implementation": "foreach"},
]
GROUPS = [Group(match="*layers.1.*", rate=0.5, decay=0.25)]


class Model(nn.Module):
    """Matrices above and below the size for codes, of both orientations, vectors, a scalar, and a part that no loss
    ever reaches."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(70, 64)
        layers = nn.ModuleList([nn.Linear(64, 72), nn.Linear(72, 64, bias=False), nn.LayerNorm(64)])
        self.model = nn.ModuleDict({"layers": layers})
        self.gain = nn.Parameter(torch.ones(()))
        self.untouched = nn.Linear(64, 65)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.to(dtype)

    def forward(self, step: int) -> Tensor:
        x = self.embed_tokens(torch.randint(70, (20,), generator=torch.Generator().manual_seed(step)))
        for layer in self.model.get_submodule("layers").children():
            x = torch.tanh(layer(x))
        return (self.gain * x).square().sum()


def begun(rule: Rule, dtype: torch.dtype) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(dtype)
    return model, rule.build(group(model.named_parameters(), GROUPS))


def train(model: Model, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        model(step).backward()
        for entry in optimizer.param_groups:
            entry["lr"] = 1e-2 / (1 + step) * entry["rate_multiplier"]
        optimizer.step()
        optimizer.zero_grad()


def raw(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: (v.dtype, tuple(v.shape), v.contiguous().numpy().tobytes()) for name, v in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(map(str, settings.values())))
def test_a_saved_optimizer_is_loaded_by_bytes_and_goes_on_with_the_same_bits(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    rule = Rule.model_validate(settings)
    whole, optimizer = begun(rule, dtype)
    train(whole, optimizer, 0, 3)
    save_file(read_state(optimizer), tmp_path / "optimizer.safetensors")
    saved = raw(read_state(optimizer))
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    train(whole, optimizer, 3, 5)

    model, continued = begun(rule, dtype)
    train(model, continued, 7, 9)  # leave something to overwrite
    model.load_state_dict(weights)
    write_state(continued, rule, load_file(tmp_path / "optimizer.safetensors"))
    assert raw(read_state(continued)) == saved
    train(model, continued, 3, 5)
    assert raw(dict(model.state_dict())) == raw(dict(whole.state_dict()))
    assert raw(read_state(continued)) == raw(read_state(optimizer))
    assert "optimizer.untouched.weight.untouched" in saved


def cut(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**state, name: state[name].flatten()[:-1].contiguous()}


@pytest.mark.parametrize(
    ("kind", "what", "form"),
    [("adamw_8bit", "exp_avg", "uint8[72, 64]"), ("adamw_8bit", "exp_avg_sq_scale", "float32[18]"),
     ("adafactor", "row_var", "float32[72, 1]"), ("adafactor", "col_var", "float32[1, 64]"),
     ("lion", "exp_avg", "float32[72, 64]")],
)  # fmt: skip
def test_state_of_another_shape_is_refused_and_nothing_is_changed(kind: str, what: str, form: str) -> None:
    rule = Rule.model_validate({"kind": kind})
    model, optimizer = begun(rule, torch.float32)
    train(model, optimizer, 0, 2)
    before = raw(read_state(optimizer))
    name = f"optimizer.model.layers.0.weight.{what}"
    with pytest.raises(UserError, match="in another form") as caught:
        write_state(optimizer, rule, cut(read_state(optimizer), name))
    assert caught.value.where is not None and caught.value.where.endswith(f"not {form}")
    assert raw(read_state(optimizer)) == before


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon"])
def test_codes_are_refused_by_every_other_rule(kind: str) -> None:
    coded, other = (Rule.model_validate({"kind": name}) for name in ("adamw_8bit", kind))
    model, optimizer = begun(coded, torch.float32)
    train(model, optimizer, 0, 1)
    _, mine = begun(other, torch.float32)
    with pytest.raises(UserError):
        write_state(mine, other, read_state(optimizer))
