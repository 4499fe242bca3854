"""python benchmarks/kernel_resources.py [--arch 80 90]

Compiles every launch of the decode kernel ahead of time, with the arguments decoding gives it, and
prints what the compiler reports: registers per thread, shared memory per program and bytes spilled;
for each shape also flops and bytes of a cached token, beside the 295 flops that an H100 has for
each byte. Needs Triton, no GPU. Exits with 1 if anything spills or does not fit.
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
from decode import SHAPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrkv_convert.evaluate.step import Shape
from lrkv_convert.modeling import kernel_lrkv

# bytes of shared memory a program may take, CUDA programming guide, table of compute capabilities
SHARED = {80: 163 << 10, 90: 227 << 10}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
}
KERNELS = ("direct_scores", "rotated_scores", "value_sums", "combine")

BOTH = ((8, 128),), ((8, 56),)
CASES = {
    "position-free, 32 heads, r 60": Shape(32, 1, 128, (128, 60), (128, 60)),
    "position-free, 6 heads, r 46": Shape(6, 1, 128, (128, 46), (128, 46)),
    "RoPE joint, 32 heads, r 60": Shape(32, 1, 128, (128, 60), (128, 60), rotary=True),
    "RoPE joint, 8 x 4 heads, r 48": Shape(8, 4, 128, (128, 48), (128, 48), rotary=True),
    "RoPE per-head, r 64": Shape(32, 1, 128, (0, 64), (128, 60), rotary=True),
    "RoPE rotary, r 60": Shape(32, 1, 128, (128, 60), (128, 60), "rotary", True),
    "full keys, values m 512": Shape(32, 1, 128, (0, 128), (512, 16), "full", True),
    "RoPE joint latent m 1024": Shape(32, 1, 128, (1024, 0), (1024, 0), rotary=True),
    "RoPE joint, d 64, 3 x 3 heads": Shape(3, 3, 64, (64, 16), (144, 20), rotary=True),
    # a base and residuals, as --rank 56 --bits 8 has them
    "codes RoPE joint, r 56": Shape(
        32, 1, 128, (128, 56), (128, 56), rotary=True, codes=(BOTH,) * 2
    ),
    **{name: s for name, s in SHAPES.items() if name.startswith("codes") and s.in_kernel},
}
# of an H100 with dense bfloat16: flops per second over bytes per second of its memory
RIDGE = 989e12 / 3.35e12


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches(shape: Shape, dtype: torch.dtype, tokens: int = 8192) -> list:
    """What one decode step launches: [(kernel, arguments, options)]. Nothing is computed."""
    H, G, d = shape.heads, shape.groups, shape.head_dim
    found, device = [], torch.device("meta")
    kept = {name: getattr(kernel_lrkv, name) for name in KERNELS}
    try:
        for name, kernel in kept.items():
            setattr(kernel_lrkv, name, Recorder(kernel, found))
        with device:
            sides = [side.to(dtype) for side in shape.modules()]
            cached = [
                tuple(
                    torch.empty(
                        1, heads, tokens, width, dtype=dtype if coder is None else torch.uint8
                    )
                    for (heads, width), coder in zip(side.slots(), side.coders)
                )
                for side in sides
            ]
            rotation = (torch.empty(1, tokens, d, dtype=dtype),) * 2 if shape.rotary else None
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


def work(shape: Shape) -> int:
    """Flops to read one cached token: a multiply-add is two. Keys that are rebuilt cost d per
    latent and head that reads it, what is read as it lies one per query head.
    """
    H, G, d = shape.heads, shape.groups, shape.head_dim
    (m, r), (v_m, v_r) = shape.keys, shape.values
    if shape.rotary and shape.form in ("joint", "rotary"):
        rebuilt = H * d * (r + (m if shape.form == "joint" and shape.alignment else 0))
        keys = rebuilt + H * G * d
    else:
        keys = H * G * (m + r)
    return 2 * (keys + H * G * (v_m + v_r))


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
    for name, shape in CASES.items():
        flops, size = work(shape), shape.bytes(2)
        print(
            f"{name}: {size:,} bytes a token, {size / (2 * shape.full):.0%} of bfloat16,"
            f" {flops / 1e6:.3g} Mflop, {flops / size:,.0f} a byte,"
            f" {flops / size / RIDGE:.2g} of what an H100 computes while it reads one",
            flush=True,
        )
        for kernel, args, options in launches(shape, torch.bfloat16):
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
