"""Tensors that say they lie on a GPU and complain as those would where devices are mixed; they are
computed on the CPU.

Shows that every step moves what it needs to the device it was given. Says nothing of kernels,
memory or speed. Registers a device for the whole process, so it runs in one of its own:

    python pretended_gpu.py FOLDER      reads jobs.json there, a list of [source, out, options];
                                        converts each on the device
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
# a GPU takes indices that lie on the CPU
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __reduce_ex__(self, protocol):  # what is saved is read back onto the CPU
        return self.held.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnGPU)]
    # a GPU takes numbers from the CPU
    here = [t for t in tensors if not isinstance(t, OnGPU) and t.dim()]
    if (
        there
        and here
        and func.overloadpacket not in COPIES
        and not (func.overloadpacket in INDEXED and isinstance(args[0], OnGPU))
    ):
        raise RuntimeError(f"{func} mixes devices")
    asked = kwargs.get("device")
    on_gpu = (
        isinstance(args[0], OnGPU)
        if func is aten.copy_.default
        else bool(there)
        if asked is None
        else torch.device(asked).type == GPU.type
    )
    if asked is not None and on_gpu:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    # what works in place gives back what it was given
    wrappers = {id(t.held): t for t in there}
    held = lambda t: t.held if isinstance(t, OnGPU) else t
    args, kwargs = tree_map(held, args), tree_map(held, kwargs)
    if func is aten.histc.default:  # of whole numbers: on GPUs only
        args = (args[0].float(), *args[1:])
    if func is aten._conj.default:  # a conjugate put off would be forgotten, this far down
        func = aten.conj_physical.default
    result = func(*args, **kwargs)
    return tree_map(
        lambda t: (
            wrappers.get(id(t), OnGPU(t) if on_gpu else t) if isinstance(t, torch.Tensor) else t
        ),
        result,
    )


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def pretend() -> None:
    """Make the device."""
    global GPU  # noqa: PLW0603  (there can be one only)
    _setup_privateuseone_for_python_backend("pretended")
    GPU = torch.device("pretended", 0)
    library, tolist = torch.library.Library("aten", "IMPL"), torch.Tensor.tolist
    # past the mode, in C++
    library.impl(
        "empty_strided",
        lambda size, stride, dtype=None, **_: OnGPU(torch.empty_strided(size, stride, dtype=dtype)),
        "PrivateUse1",
    )
    library.impl(
        "_copy_from",
        lambda source, target, non_blocking=False: compute(
            aten.copy_.default, (target, source), {}
        ),
        "PrivateUse1",
    )
    pretend.library = library  # lives as long as this
    torch.Tensor.tolist = lambda self: tolist(self.held if isinstance(self, OnGPU) else self)


def main(folder: Path) -> None:
    pretend()
    from lrkv_convert import convert

    with Pretended():
        for source, out, options in json.loads((folder / "jobs.json").read_text()):
            convert(source, out, device=GPU.type, **options)
            print(Path(out).name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
