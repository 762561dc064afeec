"""How a run starts in its folder: anew, from a checkpoint, or not at all because it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpicomp.checkpoint.folder import MANIFEST, Checkpoint
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree, together
from mpicomp.run.folder import RunFolder
from mpicomp.run.result import summary


@dataclass(frozen=True)
class Opened:
    """What was found in a run folder.

    Attributes:
        has_ended: whether nothing is left to do.
        lines: what to tell the user; on rank 0 only.

    """

    has_ended: bool = False
    lines: Sequence[str] = ()


def make_folder(world: World, make: Callable[[], RunFolder]) -> RunFolder:
    """Return the folder of the run, which `make` makes on rank 0; collective on all ranks.

    Raises:
        MpicompError: that of `make`, on all ranks.

    """
    path = None
    with together(world):
        if world.rank == 0:
            path = make().path
    path = world.broadcast(path)
    assert path is not None
    return RunFolder(path)


def open_folder(
    world: World, config: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None, is_chosen: bool
) -> Opened:
    """Prepare the folder on rank 0, and return whether its run has ended already; collective on all ranks.

    A run that continues changes its folder only after it has read its checkpoint.

    Args:
        world: the ranks of the run.
        config: their configuration.
        folder: that of the run.
        checkpoint: what the run goes on from; None for a run that starts.
        is_chosen: whether the user has chosen this checkpoint, from which the run then goes on even if it has ended.

    Raises:
        ConfigError: the folder holds another run, the run cannot go on under this configuration, it has ended and has
            no checkpoint, or a rank does not see the folder.

    """
    opened = Opened()
    with together(world):
        if world.rank == 0:
            opened = _open(config, folder, checkpoint, is_chosen)
    has_ended = world.broadcast(opened.has_ended)
    hidden = (
        None
        if has_ended or folder.config_path.is_file()
        else ConfigError(
            f"{world.host} does not see {folder.path}: the run folder must be on a file system that all nodes share"
        )
    )
    agree(world, hidden)
    return Opened(has_ended, opened.lines)


def _open(config: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None, is_chosen: bool) -> Opened:
    has_config = folder.config_path.exists()
    if not has_config and checkpoint is None:
        folder.check_is_new()
        folder.save_config(config)
        return Opened()
    trained = _trained(checkpoint)
    stored = RunConfig.load(folder.config_path) if has_config else trained
    # The file may have been edited since; what the checkpoint was trained with counts.
    if reference := trained or stored:
        config.check_continues(reference)
    result = folder.load_result()
    if result is not None and stored and config.training == stored.training and not is_chosen:
        said = ["This run has ended already; nothing is left to do.", *summary(result, folder.path)]
        return Opened(has_ended=True, lines=said)
    warnings = _begin_anew(folder) if checkpoint is None else []
    if checkpoint is None or not has_config:
        folder.save_config(config)
    return Opened(lines=warnings)


def _trained(checkpoint: Checkpoint | None) -> RunConfig | None:
    """Return the configuration that a checkpoint was trained with; None if it does not say, as that of a script."""
    if checkpoint is None or not checkpoint.manifest.config:
        return None
    return RunConfig.from_toml(checkpoint.manifest.config, str(checkpoint.path / MANIFEST))


def _begin_anew(folder: RunFolder) -> list[str]:
    """Empty the folder of a run without a checkpoint, which starts at step 0, and return a warning if that loses work.

    Raises:
        ConfigError: the run has ended.

    """
    if folder.result_path.exists():
        raise ConfigError(
            f"{folder.path}: this run has ended, and has no checkpoint to go on from; to start anew would remove its "
            "result and its model. Put its checkpoints back, or give another --run-dir"
        )
    records, damaged = folder.sound_records()
    folder.rewind(0)
    if not records and not damaged:
        return []
    return [
        f"mpicomp: warning: {folder.path} has no checkpoint: the run starts anew at step 0, and its {len(records)} "
        "records are dropped"
    ]
