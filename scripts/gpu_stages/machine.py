"""Print what is known of the machine as JSON, and end with an error if the stages could not run on it."""

import json
import platform
import shutil
import subprocess
import sys


def main() -> None:
    """Look at the packages, the device, the launcher and the compiler that Triton needs."""
    try:
        import torch

        import mpicomp
    except ImportError as error:
        sys.exit(f"{sys.executable}: {error}")
    device = sys.argv[1]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or rehearse with --device cpu --tiny")
    facts = {"python": platform.python_version(), "mpicomp": mpicomp.__version__, "torch": torch.__version__}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "missing: the definitions in torch are measured"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = _driver()
    facts["mpiexec"] = shutil.which("mpiexec") or "missing"
    facts["c_compiler"] = shutil.which("cc") or shutil.which("gcc") or "missing: Triton cannot start kernels"
    print(json.dumps(facts))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


if __name__ == "__main__":
    main()
