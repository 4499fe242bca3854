"""What healing runs on: accelerate as it was launched, its precision and its tracker."""
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_tensorboard_available, is_trackio_available

from ..device import pick_device
from ..errors import LrkvError
from ..writer import PARTIAL
from .options import Options


def new_accelerator(device: str, options: Options, out: Path) -> Accelerator:
    """accelerate as it was launched, or a single process. Raises LrkvError for devices and trackers that are not there."""
    cpu = pick_device(device).type == "cpu"
    precision = {"bf16": "bf16", "fp32": "no", "auto": "bf16" if fast_bf16(cpu) else "no"}[options.precision]
    AcceleratorState._reset_state()         # an earlier run in this process may have had another precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, log_with=choose_tracker(options.tracker), project_dir=str(out.with_name(out.name + PARTIAL)))
    if accelerator.distributed_type == DistributedType.DEEPSPEED and options.optimizer != "adamw":
        raise LrkvError("DeepSpeed shards one optimiser, and Muon comes with a second", "give --optimizer adamw, or use FSDP")
    return accelerator


def fast_bf16(cpu: bool) -> bool:
    """Whether bfloat16 products have instructions of their own."""
    if not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))


def choose_tracker(wanted: str) -> str | None:
    """The tracker of accelerate to log to besides the file. Raises LrkvError for one that is not installed."""
    there = {"trackio": is_trackio_available(), "tensorboard": is_tensorboard_available()}
    if wanted == "auto":
        return next((name for name, installed in there.items() if installed), None)
    if wanted != "none" and not there[wanted]:
        raise LrkvError(f"the tracker {wanted} is not installed", f"pip install {wanted}, or --tracker none")
    return None if wanted == "none" else wanted
