"""Devices, their memory, and dtypes as users name them and read them."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .errors import LrkvError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SAFETENSORS_DTYPES = {  # names in the headers of safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises LrkvError for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise LrkvError(
            f"the device {name!r} cannot be used", "choose auto, cpu or cuda"
        ) from error


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has, and that this process may have of it; None where the
    system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def pick_dtype(name: str) -> torch.dtype | str:
    """A torch dtype, or "auto" as it is. Raises LrkvError for an unknown name."""
    if name != "auto" and name not in DTYPES:
        raise LrkvError(f"unknown dtype {name!r}", f"choose from auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def in_units(count: float) -> str:
    """Bytes as people read them: "22.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps freed blocks of up to 32 MB for itself, which
    adds up over the layers of a large model.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products have instructions of their own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()
        for name in ("avx512_bf16", "amx_tile")
    )


def peak_memory() -> int | None:
    """Most bytes of memory this process held; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
