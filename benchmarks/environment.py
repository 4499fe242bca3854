"""Where a benchmark ran: what every record starts with."""

import datetime
import platform

import torch
import transformers


def environment(device: torch.device) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "device": (
            torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
        ),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
