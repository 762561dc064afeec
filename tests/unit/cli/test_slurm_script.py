"""The batch scripts of ``mpicomp slurm``, and the examples in ``slurm/``, which are made by it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from mpicomp.cli import main
from mpicomp.errors import ConfigError
from mpicomp.slurm.script import BatchScript

ROOT = Path(__file__).parents[3]
CHOCO = "configs/methods/choco.toml"
EXAMPLES = {
    "single_node.sbatch": f"{CHOCO} --ranks-per-node 4 --cpus-per-rank 4 --time 2:00:00 --no-requeue --mpi pmi2",
    "many_nodes.sbatch": f"{CHOCO} --nodes 8 --gpus-per-node 4 --time 24:00:00 --no-requeue --mpi pmix",
    "requeue.sbatch": f"{CHOCO} --nodes 2 --gpus-per-node 4 --cpus-per-rank 8 --time 8:00:00 --mpi pmix",
    "array.sbatch": f"{CHOCO} --gpus-per-node 4 --cpus-per-rank 8 --time 8:00:00 --mpi pmix --seeds 0-2 "
    "--vary compression.ratio=0.01,0.1 --at-once 3",
}
SMALL = "configs/quickstart.toml"


def slurm(*words):
    return CliRunner().invoke(main, ["slurm", *words])


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_command_prints(name):
    result = slurm("script", *shlex.split(EXAMPLES[name]))
    assert result.exit_code == 0, result.output
    assert (ROOT / "slurm" / name).read_text() == result.output


def test_every_example_is_made_here():
    assert {path.name for path in (ROOT / "slurm").iterdir()} == set(EXAMPLES)


def batch(**options):
    return BatchScript(**{"config": "c.toml", "name": "c", "run_dir": "runs/c"} | options)


def play(script, tmp_path, code, *, restarts=0, advances=True, requeue_works=True, task=None):
    """Run a script with a training and a Slurm that only say what they were told; return exit code and output."""
    folder = tmp_path / "bin"
    folder.mkdir()
    advance = 'dir=$(sed -E "s/.*--run-dir ([^ ]*).*/\\1/" <<<"$*"); mkdir -p "$dir/checkpoints"; '
    advance += 'echo step_$RANDOM$RANDOM >"$dir/checkpoints/latest"; ' if advances else ""
    programs = {
        "srun": f'#!/bin/bash\n{advance}echo "train: $*"\nexit {code}\n',
        "scontrol": f'#!/bin/bash\necho "scontrol $*"\nexit {0 if requeue_works else 1}\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1"}
    environ |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    environ |= {"SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {}
    done = subprocess.run(
        ["bash", "-c", script.text()], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (75, 0), (1, 1), (137, 137)], ids=["done", "unfinished", "error", "killed"]
)
def test_only_an_unfinished_run_is_requeued(tmp_path, code, expected):
    returned, output = play(batch(), tmp_path, code)
    assert returned == expected
    assert ("scontrol requeue 17" in output) == (code == 75)


def test_no_progress_is_not_requeued(tmp_path):
    returned, output = play(batch(), tmp_path, 75, advances=False)
    assert returned == 1
    assert "no new checkpoint" in output
    assert "scontrol" not in output


def test_restarts_are_limited(tmp_path):
    returned, output = play(batch(max_restarts=3), tmp_path, 75, restarts=3)
    assert returned == 75
    assert "scontrol" not in output


def test_a_refused_requeue_leaves_the_exit_code_to_the_site(tmp_path):
    returned, output = play(batch(), tmp_path, 75, requeue_works=False)
    assert returned == 75
    assert "send this script again and it goes on from step_" in output


def test_without_requeue_the_exit_code_tells(tmp_path):
    returned, output = play(batch(requeue=False), tmp_path, 75)
    assert returned == 75
    assert "scontrol" not in output


def test_a_signal_makes_the_stop_file_and_waits_for_the_training(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text("#!/bin/bash\nkill -USR1 $PPID\nsleep 0.5\nkill -USR1 $PPID\nsleep 0.5\nexit 7\n")
    (folder / "srun").chmod(0o755)
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1"}
    script = tmp_path / "job"
    script.write_text(batch().text())
    assert subprocess.run(["bash", script], cwd=tmp_path, env=environ, timeout=30).returncode == 7
    assert (tmp_path / "runs/c/stop").exists()


def test_the_stop_file_of_an_earlier_job_does_not_stop_this_one(tmp_path):
    (tmp_path / "runs/c").mkdir(parents=True)
    (tmp_path / "runs/c/stop").touch()
    assert play(batch(), tmp_path, 0)[0] == 0
    assert not (tmp_path / "runs/c/stop").exists()


def test_a_task_of_an_array_has_a_folder_and_settings_of_its_own(tmp_path):
    script = batch(vary={"run.seed": ["1", "2"], "compression.ratio": ["0.1"]}, overrides=["run.device=cpu"])
    assert "#SBATCH --array=0-1" in script.text()
    _, output = play(script, tmp_path, 0, task=1)
    assert "--set=run.device=cpu --set=run.seed=2 --set=compression.ratio=0.1 " in output
    assert "--run-dir runs/c/run.seed=2,compression.ratio=0.1 --resume auto" in output


@pytest.mark.parametrize(
    ("time", "lead"),
    [
        *(("", 180), ("4", 60), ("2:00", 30), ("1:00:00", 180), ("1-0", 180), ("UNLIMITED", 180)),
        *(("0", 180), ("0:03", 15), ("1:30", 30)),  # no limit; sbatch takes full minutes and rounds up
    ],
)
def test_the_signal_comes_a_quarter_of_a_short_limit_before_it(time, lead):
    assert f"--signal=B:USR1@{lead} " in batch(time=time).text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "soon"}, "--time 'soon' is not a time limit"),
        ({"time": "1", "signal_lead_s": 60}, "--signal 60 must be less than"),
        ({"gpus_per_node": 4, "ranks_per_node": 2}, "each rank takes one GPU"),
        ({"at_once": 2}, "--seeds or --vary"),
        ({"name": "a/b"}, "--name 'a/b' must not contain a slash"),
        ({"partition": "a b"}, "--partition 'a b'"),
        ({"sbatch": ["--nodes=3"]}, "use --nodes"),
        ({"vary": {"run.seed": ["1", "2"]}, "overrides": ["run.seed = 7"]}, "leave one out"),
        ({"vary": {"run.seed": ["1", "1"]}}, "two runs in one folder"),
        ({"vary": {"run.seed": ["$(rm x)"]}}, "must be a word or a number"),
        ({"vary": {"run.seed": []}}, "must be SECTION.KEY=VALUE,VALUE"),
        ({"run_dir": 'a"b'}, "without quotes"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("$", r"\$")):
        batch(**options)


def test_the_configuration_is_checked_before_a_job_waits_for_it():
    result = slurm("script", SMALL, "--ranks-per-node", "4", "--mpi", "pmi2", "--vary", "compression.kind=topq")
    assert result.exit_code == 2
    assert "compression.kind" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ["--vary", "optimizer.lr=1,2", "--vary", "optimizer.lr=3,4"],
        ["--vary", "run.seed=1,2", "--seeds", "3,4"],
        ["--set", "run.seed=7", "--seeds", "0-2"],
    ],
)
def test_a_key_has_its_values_from_one_place(options):
    result = slurm("script", SMALL, "--ranks-per-node", "4", "--mpi", "pmi2", *options)
    assert result.exit_code == 2
    assert re.search("given twice|leave one out", result.output)


def test_the_number_of_ranks_must_be_given():
    result = slurm("script", SMALL)
    assert result.exit_code == 2
    assert "--ranks-per-node" in result.output


@pytest.mark.parametrize("seeds", ["x", "3-1", "1-x", "1,,2"])
def test_seeds_must_be_numbers(seeds):
    assert "--seeds" in slurm("script", SMALL, "--ranks-per-node", "1", "--mpi", "pmi2", "--seeds", seeds).output


def test_submit_prints_the_number_of_the_job(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho '42;lab'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["submit", SMALL, "--ranks-per-node", "2", "--mpi", "pmi2", "--out", str(tmp_path / "job")]
    result = slurm(*words)
    assert result.output.startswith("job 42: ")
    (tmp_path / "job").write_text("edited")
    result = slurm(*words)
    assert result.exit_code == 2
    assert "is another script" in result.output
    assert (tmp_path / "job").read_text() == "edited"


def test_submit_tells_why_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = slurm("submit", SMALL, "--ranks-per-node", "2", "--mpi", "pmi2", "--out", str(tmp_path / "job"))
    assert result.exit_code == 1
    assert "sbatch refuses it: invalid partition" in result.output


def test_submit_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = slurm("submit", SMALL, "--ranks-per-node", "2", "--mpi", "pmi2", "--out", str(tmp_path / "job"))
    assert result.exit_code == 1
    assert "there is no sbatch here" in result.output
