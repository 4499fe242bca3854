"""What healing runs on: accelerate as it was launched, its precision and its tracker."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    is_tensorboard_available,
    is_trackio_available,
)

from ..device import fast_bf16, pick_device
from ..errors import LrkvError
from ..folder.writer import PARTIAL
from .options import Options

RUNS = "runs"  # where trackers that write files write them
# how long processes wait for one another: one packs the data, and writes the result, for all
PATIENCE = timedelta(days=1)


def new_accelerator(device: str, options: Options, out: Path) -> Accelerator:
    """accelerate as it was launched, or a single process. Raises LrkvError for devices, trackers
    and ways of sharding that cannot be used.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise LrkvError(
            f"the device {device!r} cannot be chosen here",
            "choose auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU",
        )
    cpu = pick_device(device).type == "cpu"
    precision = {
        "bf16": "bf16",
        "fp32": "no",
        "auto": "bf16" if fast_bf16(torch.device("cpu" if cpu else "cuda")) else "no",
    }[options.precision]
    # an earlier run in this process may have had another device or precision
    AcceleratorState._reset_state(int(os.environ.get("WORLD_SIZE", "1")) == 1)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=choose_tracker(options.tracker),
        project_dir=str(out.with_name(out.name + PARTIAL) / RUNS),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    accelerator.gradient_accumulation_steps = options.accumulation(accelerator.num_processes)
    check_sharding(accelerator, options)
    return accelerator


def check_sharding(accelerator: Accelerator, options: Options) -> None:
    """Tell DeepSpeed what it must know. Raises LrkvError for sharding that cannot be used."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if options.optimizer != "adamw":
            raise LrkvError(
                "DeepSpeed flattens what it shards, and Muon needs matrices",
                "give --optimizer adamw, or use FSDP",
            )
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None, "that is what DeepSpeed is launched with"
        if plugin.zero_stage == 3:
            raise LrkvError(
                "ZeRO stage 3 gathers weights module by module, and the factors of a head are read"
                " outside of theirs",
                "use stage 2, or FSDP",
            )
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": options.micro_batch_size,
            "gradient_clipping": options.clip,
        }
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise LrkvError(
            "FSDP 1 flattens what it shards, and Muon needs matrices",
            "set fsdp_version: 2, as in lrkv recipes fsdp",
        )


def choose_tracker(wanted: str) -> str | None:
    """The tracker of accelerate to log to besides the file. Raises LrkvError for one that is not
    installed.
    """
    there = {"trackio": is_trackio_available(), "tensorboard": is_tensorboard_available()}
    if wanted == "auto":
        return next((name for name, installed in there.items() if installed), None)
    if wanted != "none" and not there[wanted]:
        raise LrkvError(
            f"the tracker {wanted} is not installed", f"pip install {wanted}, or --set tracker=none"
        )
    return None if wanted == "none" else wanted
