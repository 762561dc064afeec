"""The dress rehearsal of `scripts/gpu_campaign`: packed, unpacked without an index, run on the CPU, killed, resumed.

The tests go through one campaign in order. Its environment finds torch in the one that runs the tests; what the
campaign brings along is installed from the parts.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from support.runs import MPIEXEC

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_campaign"
STAGES = ["correctness", "kernels", "ranks", "step", "headline"]

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing")

# What is found anew in the unpacked tree and its environment; nothing of the tests' own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MPICOMP_DATA")}
ENVIRONMENT |= {"MPICOMP_KERNELS": "reference", "OMP_NUM_THREADS": "1"}  # numba would compile all of a fresh tree


def call(*words, **options):
    """Run a command to its end; both outputs come together."""
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        **{"env": ENVIRONMENT, **options},
    )
    return done.returncode, done.stdout


def test_parts_are_read_one_behind_the_other_and_nothing_behind_the_last(tmp_path):
    loader = SourceFileLoader("gpu_campaign", str(SCRIPT))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(script)
    files = [tmp_path / name for name in "abc"]
    for file, content in zip(files, (b"one", b"", b"two"), strict=True):
        file.write_bytes(content)
    joined = script.Joined(files)
    assert [joined.read(2) for _ in range(6)] == [b"on", b"e", b"tw", b"o", b"", b""]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The folder of the parts; one data set is there, of bytes that no compressor makes smaller."""
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "given").mkdir()
    (folder / "given" / "cifar10.h5").write_bytes(os.urandom(1_000_000))
    here = "{}.{}".format(*sys.version_info)
    code, output = call(sys.executable, SCRIPT, "pack", folder / "parts", "--python", here, "--data", folder / "given")
    assert code == 0, output
    assert "fashion_mnist.h5 is not packed" in output and "cifar10.h5 is not packed" not in output
    yield folder / "parts"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unpacked(packed):
    """The folder of source, data and environment; pip has no index, and would not reach one."""
    folder = packed.parent / "there"
    nowhere = ENVIRONMENT | {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_FIND_LINKS": ""}
    code, output = call(sys.executable, packed / "gpu_campaign", "unpack", packed, folder, env=nowhere, cwd=packed)
    assert code == 0, output
    return folder


def campaign(unpacked, *words):
    python, script = unpacked / "venv" / "bin" / "python", unpacked / "source" / "scripts" / "gpu_campaign"
    return [str(word) for word in (python, script, *words)]


def items(unpacked, stage):
    return json.loads((unpacked / "campaign" / f"{stage}.json").read_text())["items"]


def test_parts_are_small_and_listed_with_their_hashes(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert len(manifest["parts"]) >= 2
    assert {part["name"] for part in manifest["parts"]} == {path.name for path in packed.glob("part-*")}
    for part in manifest["parts"]:
        assert 0 < part["bytes"] == (packed / part["name"]).stat().st_size <= 60_000_000


@pytest.mark.parametrize("how", ["changed", "missing", "python"])
def test_what_does_not_fit_is_refused_by_name(packed, tmp_path, how):
    parts = tmp_path / "parts"
    parts.mkdir()
    for path in packed.iterdir():
        (parts / path.name).symlink_to(path)
    last = max(parts.glob("part-*"))
    manifest = json.loads((packed / "manifest.json").read_text())
    content = bytearray(last.read_bytes())
    (last if how != "python" else parts / "manifest.json").unlink()
    if how == "changed":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    if how == "python":
        (parts / "manifest.json").write_text(json.dumps(manifest | {"python": "3.99"}))
    code, output = call(sys.executable, parts / "gpu_campaign", "unpack", parts, tmp_path / "there")
    message = {"changed": f"{last.name} is damaged", "missing": f"{last.name} is missing", "python": "python3.99"}[how]
    assert code == 2 and message in output and not (tmp_path / "there").exists(), output


def test_the_environment_has_what_was_packed_and_the_rest_from_the_machine(packed, unpacked):
    given = packed.parent / "given" / "cifar10.h5"
    assert (unpacked / "data" / "cifar10.h5").read_bytes() == given.read_bytes()
    program = (
        "import mpicomp, mpi4py, pydantic, sklearn, torch; print(*(m.__file__ for m in (mpicomp, mpi4py, pydantic, "
    )
    code, output = call(unpacked / "venv" / "bin" / "python", "-c", program + "sklearn, torch)))", cwd=unpacked)
    assert code == 0, output
    *inside, torch_path = output.split()
    assert all(Path(path).is_relative_to(unpacked) for path in inside), output
    assert Path(torch_path) == Path(importlib.util.find_spec("torch").origin)
    assert (unpacked / "venv" / "bin" / "mpiexec").exists()


RUN = ("run", "--device", "cpu", "--tiny", "--minutes", "4.5")


def test_one_stage_is_run_into_a_folder_of_its_own(unpacked, tmp_path):
    code, output = call(*campaign(unpacked, *RUN, "--out", tmp_path / "out", "kernels"))
    assert code == 0 and "kernels: complete" in output, output
    found = json.loads((tmp_path / "out" / "kernels.json").read_text())["items"]
    assert {entry["state"] for entry in found.values()} == {"done"}


@pytest.mark.long
def test_a_stage_that_is_killed_costs_one_item(unpacked):
    """Its process is killed in the middle of an item: the stage goes on with the next one."""
    run = subprocess.Popen(
        campaign(unpacked, *RUN, "correctness", "kernels"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    killed = None
    deadline = time.monotonic() + 120
    while killed is None and time.monotonic() < deadline and run.poll() is None:
        if (unpacked / "campaign" / "correctness.json").exists():
            found = items(unpacked, "correctness")
            if found.get("algorithm dc_gossip", {}).get("state") == "running":
                killed = stage_of(unpacked)
        time.sleep(0.05)
    output, _ = run.communicate(timeout=200)
    assert killed is not None and run.returncode == 1, output
    assert "correctness: ended with -9" in output and "correctness: failed" in output
    assert "kernels: complete" in output
    states = {name: entry["state"] for name, entry in items(unpacked, "correctness").items()}
    assert states.pop("algorithm dc_gossip") == "running"
    assert set(states.values()) == {"done"} and len(states) == 7, states


def stage_of(unpacked):
    """Kill the process of the stage `correctness`, and return its number."""
    program = os.fsencode(unpacked / "source" / "scripts" / "gpu_stages" / "correctness.py")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if program in words:
            os.kill(int(process.name), signal.SIGKILL)
            return int(process.name)
    return None


@pytest.mark.long
def test_results_are_not_overwritten(unpacked):
    code, output = call(*campaign(unpacked, *RUN))
    assert code == 2 and "--resume goes on with them" in output
    code, output = call(*campaign(unpacked, "run", "--device", "cpu", "--resume"))
    assert code == 2 and "take another --out" in output
    code, output = call(*campaign(unpacked, *RUN, "--resume", "kernel"))
    assert code == 2 and "there is no stage 'kernel'" in output


def test_no_time_is_no_failure(unpacked):
    code, output = call(*campaign(unpacked, "run", "--device", "cpu", "--tiny", "--minutes", "0", "--resume", "step"))
    assert code == 75 and "step: unfinished" in output
    assert not (unpacked / "campaign" / "step.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("stages", [STAGES[:2], *([stage] for stage in STAGES[2:])], ids=" ".join)
def test_the_rest_is_done_on_resuming(unpacked, stages):
    """In several starts, for the time limit of a test on a busy machine."""
    before = (unpacked / "campaign" / "kernels.json").read_bytes()
    code, output = call(*campaign(unpacked, *RUN, "--resume", *stages))
    assert code == 0, output
    assert re.findall(r"^(\w+): complete", output, re.MULTILINE) == stages
    assert (unpacked / "campaign" / "kernels.json").read_bytes() == before
    for stage in stages:
        assert {entry["state"] for entry in items(unpacked, stage).values()} == {"done"}


@pytest.mark.long
def test_what_the_stages_have_found(unpacked):
    results = {stage: {name: entry["result"] for name, entry in items(unpacked, stage).items()} for stage in STAGES}
    compared = [result for result in results["correctness"].values() if "same_bits" in result]
    assert len(compared) == 5 and all(result["same_bits"] and result["difference"] == 0 for result in compared)
    assert results["correctness"]["tests/gpu"]["failed"] == 0
    for row in results["kernels"]["1,000 entries"]["results"]:
        floor = {"CHOCO mix": 4, "top-k, 1.0%": 1}.get(row["name"])
        if floor:
            assert row["bytes_per_s"] == pytest.approx(floor * 4000 / row["ms"] * 1e3)
    assert results["ranks"]["restart of choco, 2 ranks"]["same_bits"] is True
    assert results["ranks"]["restart of choco, 2 ranks"]["killed"] == 2
    assert results["ranks"]["timeline"]["steps"] == 30
    assert results["ranks"]["timeline"]["exchange_ms"] > 0
    assert all(result["ratio"] > 0 and result["nbytes"] > 0 for result in results["step"].values())
    (headline,) = [result for name, result in results["headline"].items() if name.startswith("choco_90")]
    speeds = {how: results["headline"][f"speed of {how}"]["samples_per_s"] for how in ("threads", "processes")}
    assert headline["ranks_are"] == max(speeds, key=speeds.get) and headline["epoch"] == 1


@pytest.mark.long
def test_the_report_has_a_table_of_each_stage(unpacked):
    code, output = call(*campaign(unpacked, "report"))
    assert code == 0, output
    assert re.findall(r"^## (\w+)$", output, re.MULTILINE) == STAGES
    assert "Not run." not in output and "has failed" not in output and "Not complete" not in output
    for row in (
        "| algorithm gmc | yes | yes | yes |",
        "| restart of choco, 2 ranks | 2 |",
        "| CHOCO mix |",
        "| speed of",
    ):
        assert row in output, output


@pytest.fixture
def ranks_stage(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu_stages"))
    spec = importlib.util.spec_from_file_location("ranks_stage", ROOT / "scripts" / "gpu_stages" / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("stage", None)


def test_copies_beside_kernels_are_added_up(ranks_stage):
    """On a recording made by hand: what one finds on a GPU only."""

    def event(category, name, stream, begin, duration):
        return {"cat": category, "name": name, "ts": begin, "dur": duration, "args": {"stream": stream}}

    events = [
        event("kernel", "gemm", 7, 0, 1000),
        event("kernel", "gemm", 7, 2000, 1000),
        event("kernel", "gemm", 9, 500, 1000),  # on the stream of the copies: not beside them
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 9, 900, 1200),  # 900..2100: 100 + 100 beside
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 9, 2000, 200),  # 2000..2100 counts once
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 9, 0, 1000),
        {"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 5, "args": {}},
        {"name": "process_name", "ph": "M", "args": {}},
    ]
    assert ranks_stage.device_overlap(events) == {
        "kernel_streams": ["7", "9"],
        "copy_streams": ["9"],
        "copies_ms": 1.3,
        "copies_beside_kernels_ms": pytest.approx(0.3),
    }
