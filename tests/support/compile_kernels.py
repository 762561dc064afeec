"""Compile every kernel for GPUs that need not be there, and print what each takes as JSON; a program of its own.

The kernels and the types of their arguments are those that the operations start; what starts them only takes notes.
Pointers are multiples of 16, as torch allocates, and lengths are not. Registers, and the bytes of the stack, where
registers are spilled to, are read from the machine code by NVIDIA's cuobjdump, which comes with Triton.
"""

import contextlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import mangle_type

from mpicomp.errors import DivergenceError
from mpicomp.kernels import gpu
from mpicomp.kernels.gpu import blocks, compiled, indices, quantizer, select, select_parts

CAPABILITIES = [80, 90, 100]
COMPLETE = 90
"""For this one all constants of a kernel are tried, for the others those that it meets first with its types."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FUSING = {"add_block", "mix", "adaptive_mix", "add_quantized", "add_gridded"}
started = {}


def note(kernel, programs, *args, **constants):
    """Take note of a kernel and the types of its arguments, in the place of `compiled.launch`."""
    types = [p.annotation_type or mangle_type(arg) for p, arg in zip(kernel.params, args, strict=False)]
    absent = {p.name: None for p, arg in zip(kernel.params, args, strict=False) if arg is None}
    started[(kernel.__name__, *types, *constants.items())] = kernel, types, {**absent, **constants}


def start(x):
    """Start every kernel; as none of them runs, nothing found is right."""
    indices = torch.arange(8, dtype=torch.int32)
    with contextlib.suppress(DivergenceError):
        select.top_k(x, None, 3)
    with contextlib.suppress(DivergenceError):
        select.top_k(x, x, 3)
    gpu.top_k(x, 3)
    gpu.top_k_of_parts(x, x, (1000, 2000), (3, 2000))
    select_parts._SHORT = 0
    gpu.top_k(x, 3)
    gpu.top_k_of_parts(x, x, (1000, 2000), (3, 2000))
    table = torch.tensor([[0, 64, 64, 640, 9, 0]])
    gpu.top_k_of_blocks(x, x, table, 9)
    packed = gpu.pack_codes(torch.zeros(9, dtype=torch.int16), 12)
    gpu.block_indices(packed, table, 12, 9)
    for kind in (torch.int16, torch.int32):
        gpu.scatter_add_(x, indices.to(kind), x[:8])
    gpu.add_block_(x, indices[:1], x[:8])
    gpu.encode_indices(indices, 500)
    gpu.decode_indices(torch.zeros(9, dtype=torch.uint8), 8, 500)
    gpu.mix_(x, x, x, 1.0)
    gpu.mean_magnitude(x)
    gpu.noise(x, 1)
    gpu.random_indices(torch.ones(1, dtype=torch.int64), 3000, 300)
    gpu.add_gridded_(x, gpu.round_to_grid(x, x[:1], [0.5, 1.0], 3), [0.0, 1.0, 2.0], 3, x[:1])
    gpu.add_signs_(x, gpu.pack_signs(x), x[:1])


def start_again(x):
    """Start those with a branch that depends on the type of `x`."""
    gpu.above(x, 1.0)
    gpu.adaptive_mix_(x, x, x, x, 0.1, 0.9, 0.1, 1e-8, 1.0)
    gpu.norm(x)
    gpu.add_quantized_(x, gpu.quantize(x, x[:1].double(), 4, 1), 4, torch.ones(1))


for module in (gpu, blocks, indices, quantizer, select, select_parts):
    assert module.launch is compiled.launch
    module.launch = note
start(torch.ones(3000))
for dtype in (torch.float32, torch.float64):
    start_again(torch.ones(3000, dtype=dtype))


def resources(cubin):
    """Return the registers of a thread and the bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    return map(int, found)


seen = set()
for (name, *_), (kernel, types, constants) in started.items():
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind for name, kind in zip(names, types, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    for capability in CAPABILITIES:
        variant = kernel, tuple(signature.items()), capability
        if variant in seen and capability != COMPLETE:
            continue
        seen.add(variant)
        target = GPUTarget("cuda", capability, 32)
        built = compile(ASTSource(kernel, signature, places, aligned), target=target, options=compiled.OPTIONS)
        code = built.asm["ptx"]
        assert not re.search(r"div\.(full|approx)|sqrt\.approx|\.ftz", code), f"{name} rounds as it likes"
        assert name in FUSING or not re.search(r"\bfma\.", code), f"{name} fuses products and sums"
        registers, stack = resources(built.asm["cubin"])
        used = {"shared": built.metadata.shared, "registers": registers, "stack": stack}
        print(json.dumps({"kernel": name, "capability": capability, "types": types, **used}), flush=True)
