"""Adapters in PEFT's folders: written as PEFT writes them, read as PEFT reads them, and the same function."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrainer.base.errors import UserError
from llmtrainer.models.adapters.lora import Lora, adapters, initialise
from llmtrainer.models.decoder import Decoder
from llmtrainer.models.families.llama import Llama
from llmtrainer.models.peft_format import adapter_config, adapter_tensors, load_adapter, read_config, write_adapter
from llmtrainer.models.weights import load_policy, save_weights
from tests.models.test_lora import KINDS, adapted, gradients, lows, rows
from tests.tolerances import PEFT_FLOAT64, PEFT_GRADIENT_RELATIVE
from tests.worlds import tiny_model

NO_PEFT = "peft is the oracle here, and no dependency"


def write(policy: Decoder, folder: Path, base: str = "base") -> None:
    write_adapter(adapter_tensors(policy), adapter_config(policy, base), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_read_back_gives_the_same_adapter_and_the_same_bytes(kind: str, tmp_path: Path) -> None:
    policy = adapted(kind, rslora=True, dropout=0.1, targets=("q_proj", "down_proj"))
    write(policy, tmp_path / "one", "somebody/base@1")
    adapter, base = read_config(tmp_path / "one")
    assert base == "somebody/base@1"
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/base", "1")
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.rslora, adapter.dropout) == (kind, 3, 6.0, True, 0.1)
    again = tiny_model(torch.float64, attention_bias=True)
    for name, value in again.named_parameters():
        value.data.copy_(dict(policy.named_parameters())[name])
    adapter.insert(again)
    load_adapter(again, tmp_path / "one")
    assert (again.hidden(rows()) - policy.eval().hidden(rows())).abs().max() > 0     # dropout is there, and on
    assert torch.equal(again.eval().hidden(rows()), policy.hidden(rows()))
    write(again, tmp_path / "two", "somebody/base@1")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_names_and_keys_are_those_of_peft(tmp_path: Path) -> None:
    write(adapted("dora", targets=("q_proj",)), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name for name in stored if ".0." in name} == {
        f"{first}.lora_A.weight", f"{first}.lora_B.weight", f"{first}.lora_magnitude_vector"
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["use_dora"] is True and config["use_rslora"] is False and config["r"] == 3
    assert config["lora_alpha"] == 6 and config["target_modules"] == ["q_proj"]


def test_matrices_that_no_last_part_of_a_name_tells_apart_are_listed_by_whole_names(tmp_path: Path) -> None:
    policy = adapted("lora", targets=("model.layers.1.*.q_proj", "up_proj"))
    config = adapter_config(policy, "base")
    assert config["target_modules"] == sorted(adapters(policy))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}), ("bias", "all"), ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused_by_the_name_of_the_setting(
    key: str, value: Any, tmp_path: Path
) -> None:
    write(adapted("lora"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert key in str(caught.value) or "IA3" in str(caught.value)


def test_an_adapter_of_another_model_is_refused_with_the_names_and_changes_nothing(tmp_path: Path) -> None:
    write(adapted("lora"), tmp_path)
    policy = tiny_model(torch.float64, layers=1)
    Lora(rank=3, targets=("q_proj",)).insert(policy)
    initialise(policy, 0)
    before = [low.lora_A.clone() for low in lows(policy)]
    with pytest.raises(UserError, match=r"unexpected: base_model\.model\.model\.layers\.0\.mlp"):
        load_adapter(policy, tmp_path)
    assert all(torch.equal(low.lora_A, kept) for low, kept in zip(lows(policy), before, strict=True))


def test_a_pickle_is_never_opened_and_a_stranger_among_the_weights_is_named(tmp_path: Path) -> None:
    write(adapted("lora"), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**stored, "base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is no weight of a low-rank adapter"):
        read_config(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        read_config(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rs"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft_in_float64(kind: str, rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    transformers = pytest.importorskip("transformers")
    family = Llama(
        hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context_length=64, attention_bias=True,
        output_bias=True,
    )
    plain = family.build(320, torch.float64)
    plain.initialise(3)
    save_weights(plain, tmp_path / "base")
    policy = load_policy(tmp_path / "base", torch.float64)
    KINDS[kind](rank=3, alpha=5.0, rslora=rslora).insert(policy)
    initialise(policy, 1)
    random = torch.Generator().manual_seed(8)
    for low in lows(policy):
        low.lora_B.data.normal_(0.0, 0.3, generator=random)
        if low.lora_magnitude_vector is not None:
            low.lora_magnitude_vector.data *= 1.3
    write(policy, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float64, attn_implementation="sdpa"
    )
    share_angles(base, policy)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    ids_BT = torch.randint(0, 320, (2, 9), generator=random)
    targets_BT = torch.randint(0, 320, (2, 9), generator=random)
    logits = theirs(ids_BT).logits
    batch = rows()
    batch = type(batch)(
        ids_BT, targets_BT, torch.ones(2, 9), torch.zeros(2, 9, dtype=torch.int32),
        torch.arange(9, dtype=torch.int32).repeat(2, 1), torch.arange(2, dtype=torch.int32)[:, None].expand(2, 9),
        torch.arange(2),
    )  # fmt: skip
    ours = policy.hidden(batch) @ policy.head_weight.T
    assert (ours - logits).abs().max() < PEFT_FLOAT64
    found = gradients(policy, batch)
    logp_BT = logits.log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    (logp_BT * torch.arange(1.0, logp_BT.numel() + 1).view_as(logp_BT)).sum().backward()
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".default", ""): value.grad
        for name, value in theirs.named_parameters() if value.grad is not None
    }  # fmt: skip
    assert set(named) == {name.replace(".adapter.", ".") for name in found}
    for name, value in found.items():
        right = named[name.replace(".adapter.", ".")]
        assert (value - right).abs().max() < PEFT_GRADIENT_RELATIVE * right.abs().max(), name


def share_angles(model: Any, policy: Decoder) -> None:
    """Have a class of transformers rotate by our float64 angles: its own are float32 whatever the weights are."""

    def angles(x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        cos, sin = policy.rotary(position_ids, int(position_ids.max()) + 1)
        return torch.cat([cos, cos], -1)[:, :, 0], torch.cat([sin, sin], -1)[:, :, 0]

    model.model.rotary_emb.forward = angles
    for norm in [module for name, module in model.named_modules() if name.endswith("norm")]:
        norm.forward = lambda x, norm=norm: (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
        )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_wrote_is_the_same_function_here(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    transformers = pytest.importorskip("transformers")
    plain = Llama(hidden_size=32, layers=1, heads=4, intermediate_size=48, context_length=64).build(320, torch.float64)
    plain.initialise(3)
    save_weights(plain, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules="all-linear", use_dora=kind == "dora", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    share_angles(base, plain)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter, _ = read_config(tmp_path / "adapter")
    assert adapter.kind == kind and len(adapter.targets) == 7 and math.isclose(adapter.scale, 7 / 4)
    policy = load_policy(tmp_path / "base", torch.float64)
    adapter.insert(policy)
    load_adapter(policy, tmp_path / "adapter")
    ids_BT = torch.randint(0, 320, (1, 9), generator=torch.Generator().manual_seed(0))
    logits_V = policy.read(ids_BT, torch.tensor([9]), policy.cache(1, 9))[0]
    with torch.no_grad():
        assert (theirs(ids_BT).logits[0, -1] - logits_V).abs().max() < PEFT_FLOAT64
