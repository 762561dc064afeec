"""``mpicomp data``: download data sets, check them, list them."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from mpicomp.data.download import check, fetch
from mpicomp.data.files import FOLDER_VARIABLE, data_folder
from mpicomp.data.origins import ORIGINS
from mpicomp.errors import DataError

KIND = click.Choice(sorted(ORIGINS))
FOLDER = click.Path(path_type=Path, file_okay=False)
DEFAULT = f"Default: {FOLDER_VARIABLE}, else ./data."


@click.group(short_help="Download data sets, check them, list them.")
def data() -> None:
    """Download data sets into the data folder, check them by hash, and list them.

    The data folder is data.path of the configuration, else the environment variable MPICOMP_DATA, else ./data.
    """


@data.command("fetch")
@click.argument("kind", type=KIND)
@click.option("--to", "folder", type=FOLDER, help=f"The data folder to write into. {DEFAULT}")
@click.option("--from", "source", metavar="URL|FOLDER", help="A mirror, or a folder that holds the original downloads.")
def fetch_command(kind: str, folder: Path | None, source: str | None) -> None:
    """Download the data set KIND, check its SHA-256 and write it into the data folder.

    A file that exists and is intact is not downloaded again.
    """
    folder = data_folder(folder)
    if _is_sound(kind, folder):
        click.echo(f"{folder / ORIGINS[kind].file} is there already and its hashes are right.")
        return
    with _bar() as bar:
        path = fetch(kind, folder, _address(source), _Shown(bar))
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, hashes are right.")


@data.command("check")
@click.argument("kind", type=KIND, required=False)
@click.option("--path", type=click.Path(path_type=Path), help=f"The data folder. {DEFAULT}")
def check_command(kind: str | None, path: Path | None) -> None:
    """Check the file of the data set KIND, or of all data sets in the folder, by SHA-256."""
    folder = data_folder(path)
    kinds = [kind] if kind else [k for k, origin in ORIGINS.items() if (folder / origin.file).is_file()]
    if not kinds:
        raise DataError(f"{folder.absolute()} holds none of {', '.join(o.file for o in ORIGINS.values())}.")
    for each in kinds:
        for part, known in check(each, path).items():
            click.echo(f"{each}: {part}: {'right' if known else 'readable; no hash is known to compare it with'}")


@data.command("ls")
@click.option("--path", type=FOLDER, help=f"The data folder. {DEFAULT}")
def ls_command(path: Path | None) -> None:
    """List the data sets that can be downloaded and those that are in the data folder."""
    folder = data_folder(path)
    click.echo(f"Data folder: {folder.absolute()}")
    for kind, origin in sorted(ORIGINS.items()):
        file = folder / origin.file
        state = f"{file.stat().st_size / 1e6:.1f} MB" if file.is_file() else f"missing; mpicomp data fetch {kind}"
        click.echo(f"{kind:16} {origin.file:20} {state}")


class _Shown:
    """Shows the progress of several downloads, one line for each."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.lines: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if name not in self.lines:
            self.lines[name] = self.bar.add_task(name, total=total)
        self.bar.update(self.lines[name], completed=done)


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=Console(stderr=True))


def _address(source: str | None) -> str | None:
    """Return a URL for `source`, which may be a folder."""
    return Path(source).absolute().as_uri() if source is not None and "://" not in source else source


def _is_sound(kind: str, folder: Path) -> bool:
    try:
        check(kind, folder)
    except DataError:
        return False
    return True
