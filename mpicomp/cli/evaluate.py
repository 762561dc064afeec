"""``mpicomp evaluate``: the averaged model of a finished run on the test samples."""

from __future__ import annotations

from pathlib import Path

import click

from mpicomp.cli import debug_option
from mpicomp.config.config import RunConfig
from mpicomp.errors import DataError
from mpicomp.exchange.placement import device_of, only_gpu
from mpicomp.run.evaluation import evaluate as evaluate_model
from mpicomp.run.evaluation import tested
from mpicomp.run.folder import RunFolder


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "--data-path", type=click.Path(path_type=Path, exists=True), metavar="PATH", help="Takes the place of data.path."
)
@debug_option
def evaluate(run_dir: Path, data_path: Path | None) -> None:
    """Print test loss and accuracy, or perplexity, of the averaged model in RUN_DIR, as `mpicomp train` has left it.

    The tokens of a text are those of the run, also with other texts.
    """
    folder = RunFolder.open(run_dir)
    # As TOML, so that a path with quotes or digits stays a text.
    overrides = [f"data.path={_quoted(data_path)}"] if data_path else []
    if folder.tokenizer_path.exists() and "tokenizer" in RunConfig.load(folder.config_path).data.arguments():
        overrides.append(f"data.tokenizer={_quoted(folder.tokenizer_path)}")
    config = RunConfig.load(folder.config_path, overrides)
    # A run on GPUs may be evaluated on a machine without one.
    device = device_of(only_gpu("cpu" if config.run.device == "cpu" else "auto"))
    try:
        dataset = config.data.load()
    except DataError as error:
        raise DataError(f"{error} Here, --data-path takes the place of data.path.") from error
    model = config.model.build(dataset, config.run.seed)
    folder.load_model(model)
    score = evaluate_model(model.to(device), dataset, device)
    what = dataset.evaluated_on
    click.echo(f"{config.model.kind} on {config.data.kind}: {score.total:,} predictions on the {what} samples")
    accuracy = f", {what} accuracy {score.accuracy:.2%}" if score.accuracy is not None else ""
    perplexity = tested(score, dataset)["test_perplexity"]
    of_text = f", {what} perplexity {perplexity:.4g}" if perplexity is not None else ""
    click.echo(f"{what} loss {score.loss_sum / max(score.total, 1):.4f}{accuracy}{of_text}")


def _quoted(path: Path) -> str:
    return "'''" + str(path) + "'''"
