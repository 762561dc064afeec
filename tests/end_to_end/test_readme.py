"""The README's example script runs as it stands, on MPI ranks, and learns."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


CLOSURE = re.compile(r"^    loss = gossip.step\(.*?^    \)\n", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("entry", ["closure", "loop"])
def test_the_script_runs_on_two_ranks(tmp_path, entry):
    source, loop = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if entry == "loop":
        loop = loop.replace(
            "loss_fn(model, batch)", "torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])"
        )
        source, changed = CLOSURE.subn(textwrap.indent(loop, "    "), source)
        assert changed == 1
    script = tmp_path / "train.py"
    script.write_text(source)
    mpiexec = Path(sys.executable).parent / "mpiexec"
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"rank (\d): loss [\d.]+, accuracy ([\d.]+)", done.stdout))
    assert set(found) == {"0", "1"}
    assert all(float(accuracy) > 0.9 for accuracy in found.values())
