"""What the kernels take of a GPU, by the compiler's report for A100, H100 and B200; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the compiler is tried where there is no GPU", allow_module_level=True)

from mpicomp.kernels.gpu.compiled import OPTIONS

pytestmark = pytest.mark.long
CAPABILITIES = [80, 90, 100]

# At most so many bytes of shared memory a program, and registers a thread, in float32 and float64.
BOUNDS = {
    "_count": (64, 88),
    "_count_bits": (2048, 32),
    "_emit": (16384, 160),
    "_find_bits": (512, 56),
    "_fold": (4096, 80),
    "_histogram": (8192, 192),
    "_indices": (0, 32),
    "_join": (8192, 120),
    "_pack": (512, 40),
    "_pick": (256, 104),
    "_select": (512, 128),
    "_select_part": (1024, 255),
    "_set_bits": (8192, 64),
    "_split": (8192, 96),
    "adaptive_mix": (0, 184),
    "add_block": (4096, 104),
    "add_gridded": (512, 80),
    "add_quantized": (512, 104),
    "add_signs": (512, 88),
    "mix": (0, 80),
    "noise": (0, 32),
    "pack_signs": (512, 32),
    "quantize": (512, 136),
    "random_indices": (16384, 80),
    "round_to_grid": (512, 64),
    "scatter_add": (32768, 80),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return what the compiler, which is stricter than the interpreter, says of every kernel."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    del environment["TRITON_INTERPRET"]
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(report):
    assert {(row["kernel"], row["capability"]) for row in report} == {(k, c) for k in BOUNDS for c in CAPABILITIES}


@pytest.mark.parametrize("kernel", BOUNDS)
def test_a_kernel_keeps_to_its_registers_and_shared_memory(report, kernel):
    """And spills none: what does not fit into registers would go to memory, entry by entry."""
    shared, registers = BOUNDS[kernel]
    for row in report:
        if row["kernel"] == kernel:
            assert row["shared"] <= shared, row
            assert row["registers"] <= registers, row
            assert row["stack"] == 0, row


def test_a_program_fits_on_a_multiprocessor():
    """Of 64 Ki registers and, unless a kernel asks for more, 48 KiB of shared memory."""
    for shared, registers in BOUNDS.values():
        assert shared <= 48 * 1024
        assert registers * 32 * OPTIONS["num_warps"] <= 64 * 1024
