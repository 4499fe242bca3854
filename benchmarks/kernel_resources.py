"""python benchmarks/kernel_resources.py [--arch 80 90]

Compiles every launch of the decode kernel ahead of time, with the arguments decoding gives it, and
prints what the compiler reports: registers per thread, shared memory per program and bytes spilled.
Needs Triton, no GPU. Exits with 1 if anything spills or does not fit.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# before Triton is imported: what is compiled here must not be interpreted
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrkv_convert.modeling import kernel_lrkv
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.modeling.forms_lrkv import FORMS

# bytes of shared memory a program may take, CUDA programming guide, table of compute capabilities
SHARED = {80: 163 << 10, 90: 227 << 10}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
KERNELS = ("direct_scores", "rotated_scores", "value_sums", "combine")

# name -> H, G, d, keys (m, r, form), values (m, r), RoPE
CASES = {
    "position-free, 32 heads, r 60": (32, 1, 128, (128, 60, "joint"), (128, 60), False),
    "position-free, 6 heads, r 46": (6, 1, 128, (128, 46, "joint"), (128, 46), False),
    "RoPE joint, 32 heads, r 60": (32, 1, 128, (128, 60, "joint"), (128, 60), True),
    "RoPE joint, 8 x 4 heads, r 48": (8, 4, 128, (128, 48, "joint"), (128, 48), True),
    "RoPE per-head, r 64": (32, 1, 128, (0, 64, "joint"), (128, 60), True),
    "RoPE rotary, r 60": (32, 1, 128, (128, 60, "rotary"), (128, 60), True),
    "full keys, values m 512": (32, 1, 128, (0, 128, "full"), (512, 16), True),
    "RoPE joint latent m 1024": (32, 1, 128, (1024, 0, "joint"), (1024, 0), True),
    "RoPE joint, d 64, 3 x 3 heads": (3, 3, 64, (64, 16, "joint"), (144, 20), True),
}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches(case: tuple, dtype: torch.dtype, tokens: int = 8192) -> list:
    """What one decode step launches: [(kernel, arguments, options)]. Nothing is computed."""
    H, G, d, (m, r, form), (v_m, v_r), rope = case
    found, device = [], torch.device("meta")
    kept = {name: getattr(kernel_lrkv, name) for name in KERNELS}
    try:
        for name, kernel in kept.items():
            setattr(kernel_lrkv, name, Recorder(kernel, found))
        with device:
            sides = [
                FORMS[form](H * d, H, d, m, r, FORMS[form].has_maps, False),
                LowRankHeads(H * d, H, d, v_m, v_r, True, False),
            ]
            sides = [side.to(dtype) for side in sides]
            cached = [
                (
                    torch.empty(1, 1, tokens, a, dtype=dtype),
                    torch.empty(1, H, tokens, b, dtype=dtype),
                )
                for a, b in ((m, r), (v_m, v_r))
            ]
            rotation = (torch.empty(1, tokens, d, dtype=dtype),) * 2 if rope else None
            kernel_lrkv.decode(
                *sides,
                torch.empty(1, H, G, d, dtype=dtype),
                *cached,
                rotation,
                torch.empty(1, 1, 1, tokens),
                d**-0.5,
            )
    finally:
        for name, kernel in kept.items():
            setattr(kernel_lrkv, name, kernel)
    return found


def compiled(kernel, args: tuple, options: dict, arch: int, **build):
    """The kernel for these arguments, specialised as the launcher does: pointers and sizes
    divisible by 16 are known to be.
    """
    options = dict(options)
    build["num_warps"] = options.pop("num_warps")
    signature, constants, attributes = {}, dict(options), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
        signature[name] = (
            TYPES[value.dtype]
            if isinstance(value, torch.Tensor)
            else "fp32"
            if isinstance(value, float)
            else "i32"
        )
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build)


def resources(binary) -> tuple[int, int, int]:
    """(registers per thread, shared memory in bytes, bytes of stack, where spills go) of a compiled
    kernel.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, binary.metadata.shared, stack + local


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    arguments = parser.parse_args()
    failed = False
    print(
        f"{'case':32s} {'kernel':15s} {'sm':>3s} {'registers':>9s} {'shared':>8s} {'spilled':>7s}"
    )
    for name, case in CASES.items():
        for kernel, args, options in launches(case, torch.bfloat16):
            for arch in arguments.arch:
                registers, shared, spilled = resources(compiled(kernel, args, options, arch))
                bad = spilled > 0 or shared > SHARED.get(arch, 99 << 10)
                failed |= bad
                print(
                    f"{name:32s} {kernel.__name__:15s} {arch:3d} {registers:9d}"
                    f" {shared / 1024:6.1f}Ki"
                    f" {spilled:7d}{'  <- spills or does not fit' if bad else ''}",
                    flush=True,
                )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
