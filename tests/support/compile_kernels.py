"""Compile every kernel for a GPU that need not be there, and print their names; a program of its own.

The kernels and the types of their arguments are those that the operations start; what starts them only takes notes.
"""

import contextlib
import re

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import mangle_type

from mpicomp.kernels import gpu
from mpicomp.kernels.gpu import compiled, indices, quantizer, select, select_parts

TARGET = GPUTarget("cuda", 90, 32)
FUSING = {"mix", "adaptive_mix", "add_quantized", "add_gridded"}
started = {}


def note(kernel, programs, *args, **constants):
    """Take note of a kernel and the types of its arguments, in the place of `compiled.launch`."""
    types = [p.annotation_type or mangle_type(arg) for p, arg in zip(kernel.params, args, strict=False)]
    absent = {p.name: None for p, arg in zip(kernel.params, args, strict=False) if arg is None}
    started[(kernel.__name__, *types, *constants.items())] = kernel, types, {**absent, **constants}


def start(x):
    """Start every kernel; as none of them runs, nothing found is right."""
    indices = torch.arange(8, dtype=torch.int32)
    gpu.top_k(x, 3)
    gpu.top_k_of_difference(x, x, 3)
    gpu.top_k_of_parts(x, x, (1000, 2000), (3, 2000))
    for kind in (torch.int16, torch.int32):
        gpu.scatter_add_(x, indices.to(kind), x[:8])
    gpu.encode_indices(indices, 500)
    with contextlib.suppress(IndexError):
        gpu.decode_indices(torch.zeros(9, dtype=torch.uint8), 8, 500)
    gpu.mix_(x, x, x, 1.0)
    gpu.absolute_sum(x)
    gpu.noise(x, 1)
    gpu.add_gridded_(x, gpu.round_to_grid(x, 0.1, [0.5, 1.0], 3), [0.0, 1.0, 2.0], 3, 1.0)
    gpu.add_signs_(x, gpu.pack_signs(x), 1.0)


def start_again(x):
    """Start those with a branch that depends on the type of `x`."""
    gpu.above(x, 1.0)
    gpu.adaptive_mix_(x, x, x, x, 0.1, 0.9, 0.1, 1e-8, 1.0)
    gpu.norm(x)
    gpu.add_quantized_(x, gpu.quantize(x, 0.1, 4, 1), 4, 1.0)


for module in (gpu, indices, quantizer, select, select_parts):
    assert module.launch is compiled.launch
    module.launch = note
start(torch.ones(3000))
for dtype in (torch.float32, torch.float64):
    start_again(torch.ones(3000, dtype=dtype))
for (name, *_), (kernel, types, constants) in started.items():
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind for name, kind in zip(names, types, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, places), target=TARGET, options=compiled.OPTIONS)
    code = built.asm["ptx"]
    assert not re.search(r"div\.(full|approx)|sqrt\.approx|\.ftz", code), f"{name} rounds as it likes"
    assert name in FUSING or not re.search(r"\bfma\.", code), f"{name} fuses products and sums"
    print(name)
