"""What DeepSpeed is told: the settings of an engine, and the files of known set-ups, as plain data. Loads no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Zero:
    """ZeRO (Rajbhandari 2020, arXiv:1910.02054): what is divided among the processes, and what waits elsewhere."""

    stage: int
    """0: nothing; 1: the optimizer's state; 2: gradients too; 3: weights too."""
    optimizer: Place = "none"
    """Where the optimizer's state waits between steps; none: on the device."""
    parameters: Place = "none"
    nvme_path: str | None = None
    pin: bool = False
    """Page-locked memory: faster copies to a device, and none of it for others."""
    bucket: int = 25 * 2**20 // 4
    """Numbers in a message."""
    whole_below: int = 100_000
    """Stage 3: weights with fewer numbers stay whole everywhere."""
    overlap: bool = False
    """Add gradients up on a stream of their own while backward goes on."""
    secondary: int = 1
    """ZeRO++: processes that keep a second copy of their share, so that backward gathers within a machine."""
    quantized_weights: bool = False
    quantized_gradients: bool = False

    def settings(self) -> dict[str, Any]:
        """As DeepSpeed's `zero_optimization`, https://www.deepspeed.ai/docs/config-json."""
        found: dict[str, Any] = {
            "stage": self.stage, "overlap_comm": self.overlap, "contiguous_gradients": True,
            "reduce_bucket_size": self.bucket,
        }
        if self.stage < 3:
            found["allgather_bucket_size"] = self.bucket
        else:
            found["stage3_prefetch_bucket_size"] = self.bucket
            found["stage3_param_persistence_threshold"] = self.whole_below
        for key, place in (("offload_optimizer", self.optimizer), ("offload_param", self.parameters)):
            if place != "none":
                found[key] = {"device": place, "pin_memory": self.pin}
                if place == "nvme":
                    found[key]["nvme_path"] = self.nvme_path
        plus = {
            "zero_hpz_partition_size": self.secondary, "zero_quantized_weights": self.quantized_weights,
            "zero_quantized_gradients": self.quantized_gradients,
        }
        return found | {key: value for key, value in plus.items() if value not in (1, False)}


def is_installed() -> bool:
    """Whether DeepSpeed is there. Asked of what was installed: a folder of that name would look like a package."""
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def engine_settings(zero: Zero) -> dict[str, Any]:
    """For an engine that counts its own micro-batches, keeps float32 masters and scales and clips by itself."""
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31 - 1,
        "zero_optimization": zero.settings(),
    }


@dataclass(frozen=True)
class Preset:
    """A set-up under the name that it had in other trainers."""

    zero: Zero
    precision: str
    clip: float | None
    processes: int
    purpose: str

    @property
    def words(self) -> str:
        """The same in a recipe of ours."""
        found = [f"engine.kind=deepspeed engine.stage={self.zero.stage}"]
        found += [f"engine.offload_optimizer={self.zero.optimizer}"] if self.zero.optimizer != "none" else []
        found += [f"engine.offload_parameters={self.zero.parameters}"] if self.zero.parameters != "none" else []
        found += ["engine.pin_memory=true"] if self.zero.pin else []
        return " ".join([*found, f"precision={self.precision}", *([f"optim.clip={self.clip}"] if self.clip else [])])

    def deepspeed(self) -> dict[str, Any]:
        """A config file of DeepSpeed's; `auto` is filled in by the trainer that reads it."""
        scaled = {
            "enabled": True, "loss_scale": 0, "initial_scale_power": 13, "loss_scale_window": 100_000_000,
            "min_loss_scale": 1,
        }
        kind = {"fp16": scaled} if self.precision == "float16" else {"bf16": {"enabled": True}}
        return {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto" if self.clip is None else self.clip, **kind,
            "zero_optimization": self.zero.settings(),
        }

    def accelerate(self, file: str, processes: int) -> dict[str, Any]:
        """A config file of accelerate's beside `file`."""
        return {
            "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": file, "zero3_init_flag": self.zero.stage == 3},
            "machine_rank": 0, "main_training_function": "main", "num_machines": 1, "num_processes": processes,
            "rdzv_backend": "static", "same_network": True, "use_cpu": False,
        }


_HALF, _BRAIN = "float16", "bfloat16"
PRESETS: Mapping[str, Preset] = {
    "stage0": Preset(Zero(0, overlap=True), _HALF, None, 8, "nothing is divided"),
    "stage1": Preset(Zero(1, overlap=True), _HALF, None, 8, "the optimizer's state is divided"),
    "stage2": Preset(Zero(2, overlap=True), _HALF, None, 8, "gradients too"),
    "stage2_off_o": Preset(Zero(2, "cpu", pin=True, overlap=True), _HALF, None, 8, "and the state waits on the host"),
    "ds_stage1": Preset(Zero(1, overlap=True), _BRAIN, 1.0, 4, "the optimizer's state is divided"),
    "ds_stage2": Preset(Zero(2, overlap=True), _BRAIN, 1.0, 5, "gradients too"),
    "ds_stage3": Preset(Zero(3, overlap=True), _BRAIN, 1.0, 8, "weights too"),
    "ds_stage3_offload": Preset(
        Zero(3, "cpu", "cpu", overlap=True), _BRAIN, 1.0, 8, "weights too, and they and the state wait on the host"
    ),
}

_KNOWN: Mapping[str, tuple[type, ...]] = {
    "train_micro_batch_size_per_gpu": (int, str), "gradient_accumulation_steps": (int, str),
    "gradient_clipping": (float, int, str), "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,), "steps_per_print": (int,), "fp16.enabled": (bool,),
    "fp16.loss_scale": (int, float), "fp16.initial_scale_power": (int,), "fp16.loss_scale_window": (int,),
    "fp16.min_loss_scale": (int, float), "bf16.enabled": (bool,), "zero_optimization.stage": (int,),
    "zero_optimization.overlap_comm": (bool,), "zero_optimization.contiguous_gradients": (bool,),
    "zero_optimization.reduce_bucket_size": (int,), "zero_optimization.allgather_bucket_size": (int,),
    "zero_optimization.stage3_prefetch_bucket_size": (int,),
    "zero_optimization.stage3_param_persistence_threshold": (int,),
    "zero_optimization.offload_optimizer.device": (str,), "zero_optimization.offload_optimizer.pin_memory": (bool,),
    "zero_optimization.offload_optimizer.nvme_path": (str,), "zero_optimization.offload_param.device": (str,),
    "zero_optimization.offload_param.pin_memory": (bool,), "zero_optimization.offload_param.nvme_path": (str,),
    "zero_optimization.zero_hpz_partition_size": (int,), "zero_optimization.zero_quantized_weights": (bool,),
    "zero_optimization.zero_quantized_gradients": (bool,),
}
"""Keys of DeepSpeed's config that we write, and what they may be."""


def problems(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with a config of DeepSpeed's as far as we write them; DeepSpeed need not be there."""
    found: list[str] = []
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, Mapping):
            found += problems(value, f"{name}.")
        elif name not in _KNOWN:
            found.append(f"{name}: unknown")
        elif type(value) not in _KNOWN[name]:
            found.append(f"{name}: {value!r} is no {' or '.join(kind.__name__ for kind in _KNOWN[name])}")
    if not prefix:
        zero = settings.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if stage not in (0, 1, 2, 3):
            found.append(f"zero_optimization.stage: {stage!r} is none of 0, 1, 2, 3")
        if "offload_param" in zero and stage != 3:
            found.append("zero_optimization.offload_param: only stage 3 divides weights")
        if "offload_optimizer" in zero and stage == 0:
            found.append("zero_optimization.offload_optimizer: stage 0 divides nothing")
    return found
