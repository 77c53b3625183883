"""doctor: what the machine says about itself."""

from __future__ import annotations

import json
import platform

import pytest
import torch

import llmtrainer as lt
from llmtrainer.apps import doctor as module


def test_the_diagnosis_names_versions_devices_and_rates() -> None:
    found = lt.doctor(lt.Examination(matrix_size=64, repeats=1))
    told = json.loads(json.dumps(found.json(), allow_nan=False))
    assert told["packages"]["torch"] == torch.__version__
    assert told["python"] == platform.python_version() and told["llmtrainer"] == lt.__version__
    assert told["devices"][-1].startswith("cpu (") and told["cores"] >= 1 and told["memory"] > 2**20
    assert set(told["matrix_rate"]) == {"float32", "bfloat16"} and min(told["matrix_rate"].values()) > 0
    assert told["precision"] == ("bfloat16" if told["bfloat16"] else "float32")
    assert "active fallbacks" in found.text() and torch.__version__ in found.text()


def test_what_is_missing_is_named_as_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(module, "PACKAGES", ("torch", "transformers", "a-package-nobody-has"))
    found = lt.doctor(lt.Examination(matrix_size=64, repeats=1))
    assert found.packages["a-package-nobody-has"] is None and found.compiler is None
    told = "\n".join(found.fallbacks)
    for part in ("bfloat16", "C++ compiler", "install a-package-nobody-has"):
        assert part in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_what_attention_and_kernels_can_run_is_listed_with_what_the_others_lack() -> None:
    found = lt.doctor(lt.Examination(matrix_size=64, repeats=1))
    assert [name for name, lack in found.attention.items() if lack is None] == ["blocks", "sdpa", "reference"]
    assert found.kernels["torch"] is None and found.kernels["liger"] is not None
    told = "\n".join(found.fallbacks)
    for name in ("attention=flex", "attention=varlen", "kernels=liger"):
        assert f"engine.{name} is refused: " in told
    assert "blocks, sdpa, reference" in found.text()
