"""``mpicomp checkpoint``: list, verify, show, compare, remove and export what a run has stored."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mpicomp.checkpoint import export as model_export
from mpicomp.checkpoint.folder import MANIFEST, Checkpoint, Checkpoints, is_step_folder, open_checkpoint, place
from mpicomp.errors import CheckpointError
from mpicomp.run.folder import RunFolder
from mpicomp.run.result import readable_bytes
from mpicomp.state import Leaf

VOLATILE = ("random/", "meter/seconds", "meter/total_seconds")
"""Leaves that may differ between two identical runs."""

_CONTEXT = 20
"""Characters before the first difference of two texts that `diff` shows."""

_path = click.argument("path", type=click.Path(path_type=Path), metavar="RUN_DIR|CHECKPOINT")


@click.group(short_help="List, verify, show, compare, remove and export checkpoints.")
def checkpoint() -> None:
    """List, verify, show, compare, remove and export checkpoints.

    CHECKPOINT is RUN_DIR/checkpoints/step_..., or RUN_DIR for the newest one in it.
    """


@checkpoint.command("ls")
@click.argument("run_dir", type=click.Path(path_type=Path))
def ls(run_dir: Path) -> None:
    """List the checkpoints in RUN_DIR."""
    _check_exists(run_dir)
    found = _folder(run_dir).paths()
    table = Table("step", "created (UTC)", "ranks", "size", "algorithm", "Slurm job", box=None)
    damages = []
    for path in found:
        try:
            one = open_checkpoint(path)
        except CheckpointError as error:
            damages.append(str(error))
            continue
        manifest = one.manifest
        size = sum(digest.nbytes for digest in manifest.files.values())
        created = manifest.created.replace("T", " ").removesuffix("+00:00")
        cells = (
            manifest.step,
            created,
            manifest.size,
            readable_bytes(size),
            ", ".join(re.findall(r"([A-Z]\w+)\(", manifest.algorithm)) or manifest.algorithm,
            manifest.slurm_job or "-",
        )
        table.add_row(*map(str, cells))
    _console().print(table if found else f"{run_dir} has no checkpoint", markup=False)
    for damage in damages:
        click.echo(damage)


@checkpoint.command("verify")
@_path
def verify(path: Path) -> None:
    """Read every file and compare it with its SHA-256: all checkpoints of RUN_DIR, or one.

    Says which file and which dataset is damaged, and ends with exit code 6 if any is.
    """
    is_sound = True
    for folder in [path] if _is_one(path) else _some(path):
        files = 0
        try:
            one = open_checkpoint(folder)
            files, problems = len(one.manifest.files), one.verify()
        except CheckpointError as error:
            if folder == path:
                raise
            problems = [str(error)]
        is_sound = is_sound and not problems
        click.echo(f"{folder}: {'damaged' if problems else f'{files} files are sound'}")
        for problem in problems:
            click.echo(f"  {problem}")
    if not is_sound:
        sys.exit(CheckpointError.exit_code)


@checkpoint.command("show")
@_path
@click.option("--rank", default=0, show_default=True, help="Whose entries.")
def show(path: Path, rank: int) -> None:
    """Show the description of a checkpoint, and name, shape, type and norm of every entry of one rank."""
    one = _one(path)
    _check_rank(one, rank)
    manifest, console = one.manifest, _console()
    for key in ("step", "size", "algorithm", "topology", "model", "created", "slurm_job"):
        console.print(f"{key:10} {getattr(manifest, key)}", markup=False)
    console.print(f"{'versions':10} {', '.join(f'{name} {text}' for name, text in manifest.versions.items())}")
    title = " ".join(place(rank, manifest.nodes)).removesuffix(" /")
    table = Table("name", "shape", "type", "size", "norm or value", box=None, title=title)
    for entry in one.entries(rank):
        shape = "x".join(map(str, entry.shape)) or "-"
        table.add_row(entry.name, shape, entry.dtype, readable_bytes(entry.nbytes), _shown(entry.value))
    console.print(table)


@checkpoint.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--all", "with_volatile", is_flag=True, help="Compare random generators and times, too.")
def diff(first: Path, second: Path, with_volatile: bool) -> None:
    """Compare two checkpoints, rank by rank, bit for bit; exit code 1 if they differ."""
    one, other = _one(first), _one(second)
    differences = list(_differences(one, other, with_volatile))
    for line in differences:
        click.echo(line)
    if differences:
        sys.exit(1)
    click.echo(f"the same: step {one.manifest.step}, {one.manifest.size} ranks")


@checkpoint.command("prune")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--keep-last", default=1, show_default=True, type=click.IntRange(min=1), help="How many of the newest.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep those at a multiple of it, too.")
def prune(run_dir: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove old checkpoints from RUN_DIR, and those from which it went back; the newest is verified first."""
    folder = _folder(run_dir)
    newest = _one(run_dir)
    if problems := newest.verify():
        raise CheckpointError("nothing is removed, because the newest checkpoint is damaged:\n" + "\n".join(problems))
    removed = folder.prune(keep_last, keep_every)
    click.echo(
        f"removed {len(removed)}: {', '.join(path.name for path in removed)}" if removed else "nothing to remove"
    )


@checkpoint.command("export")
@_path
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def export(path: Path, out: Path) -> None:
    """Write the averaged model as OUT.safetensors, or as OUT.pt for torch.load.

    Tied weights are stored once: under all their names in OUT.pt, under the first one in OUT.safetensors, as
    safetensors.torch.load_model and transformers expect.
    """
    one = _one(path)
    model = model_export.mean_model(one)
    model_export.save(model, out)
    tensors = set(model.values())
    entries = sum(tensor.numel() for tensor in tensors)
    step, size = one.manifest.step, one.manifest.size
    click.echo(f"{out}: {len(tensors)} tensors, {entries:,} entries; the mean of {size} ranks at step {step}")


def _console() -> Console:
    # A table in a log file must not be cut at 80 columns.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def _folder(run_dir: Path) -> Checkpoints:
    return Checkpoints(RunFolder(run_dir).checkpoints_path if (run_dir / "checkpoints").is_dir() else run_dir)


def _one(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, or the newest one if `path` is a run folder."""
    if _is_one(path):
        return open_checkpoint(path)
    newest = _folder(path).latest()
    if newest is None:
        raise CheckpointError(f"{path}: has no checkpoint")
    return newest


def _is_one(path: Path) -> bool:
    return (path / MANIFEST).exists() or is_step_folder(path)


def _some(path: Path) -> list[Path]:
    """Return the folders of all checkpoints of a run folder; raise CheckpointError if there is none."""
    _check_exists(path)
    if not (found := _folder(path).paths()):
        raise CheckpointError(f"{path}: has no checkpoint")
    return found


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: has no checkpoint: there is no such folder")


def _check_rank(one: Checkpoint, rank: int) -> None:
    if not 0 <= rank < one.manifest.size:
        raise CheckpointError(f"--rank {rank}: {one.path} has the ranks 0 to {one.manifest.size - 1}")


def _differences(one: Checkpoint, other: Checkpoint, with_volatile: bool) -> Iterator[str]:
    for key in ("step", "size", "algorithm", "topology", "model"):
        values = getattr(one.manifest, key), getattr(other.manifest, key)
        if values[0] != values[1]:
            yield f"{key}: {values[0]} and {values[1]}"
    for rank in range(min(one.manifest.size, other.manifest.size)):
        ours, theirs = one.read(rank), other.read(rank)
        for name in sorted(ours.keys() | theirs.keys()):
            if with_volatile or not name.startswith(VOLATILE):
                difference = _difference(ours.get(name), theirs.get(name))
                if difference:
                    yield f"rank {rank}: {name}: {difference}"


def _difference(ours: Leaf | None, theirs: Leaf | None) -> str:
    """Return how two leaves differ; ``""`` if they are equal."""
    if ours is None or theirs is None:
        return "only in the " + ("second" if ours is None else "first")
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        same = type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))
        return "" if same else " and ".join(_shown(value) for value in _from_difference(ours, theirs))
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}"
    if ours.numel() == 0 or torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (ours, theirs))):
        return ""
    wrong = int((ours != theirs).sum())
    wide = torch.complex128 if ours.is_complex() else torch.float64
    largest = float((ours.to(wide) - theirs.to(wide)).abs().max())
    return f"{wrong:,} of {ours.numel():,} entries differ, by at most {largest:.3g}"


def _from_difference(ours: Leaf, theirs: Leaf) -> tuple[Leaf, Leaf]:
    """Return two long texts from shortly before their first difference on; other values unchanged."""
    if not isinstance(ours, str) or not isinstance(theirs, str):
        return ours, theirs
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (our, their) in pairs if our != their), min(len(ours), len(theirs)))
    start = max(0, first - _CONTEXT)
    return (f"...{ours[start:]}", f"...{theirs[start:]}") if start else (ours, theirs)


def _shown(value: Leaf | None) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
