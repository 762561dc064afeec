"""The step of CHOCO-SGD at 1 % beside the same step without communication, ranks as processes and as threads."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from typing import Any

from stage import Stage

RANKS = 2

TARGET = 1.1
"""Of a ResNet-20, as a multiple of the step without communication."""

MODELS = {
    "ResNet-20": ["data.kind=cifar10", "model.kind=resnet20", "training.batch_size=128"],
    "GPT, 10 M": ["model.kind=gpt", "model.width=384", "model.layers=6", "model.heads=6", "data.context=256"],
    "GPT, 124 M": ["model.kind=gpt", "model.width=928", "model.layers=12", "model.heads=16", "data.context=256"],
}
TINY = {
    "ResNet-20": ["data.kind=digits", "model.kind=resnet20", "training.batch_size=2"],
    "GPT, 10 M": ["model.kind=gpt", "model.width=16", "model.layers=1", "model.heads=2", "data.context=8"],
}

HOWS = ("processes", "threads")


def main() -> None:
    """Run the stage."""
    stage = Stage("step")
    measured: Iterable[tuple[str, str]] = zip(TINY, HOWS, strict=True) if stage.tiny else product(MODELS, HOWS)
    models = TINY if stage.tiny else MODELS
    stage.run({f"{name}, {how}": partial(measure, stage, name, models[name], how) for name, how in measured})


def measure(stage: Stage, name: str, sets: list[str], ranks_are: str) -> Mapping[str, Any]:
    """Run `mpicomp bench step`."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    if "GPT" in name:
        text = stage.folder / "text.txt"  # of how it reads, a step knows nothing
        if not text.exists():
            draw = random.Random(0)
            text.write_text("".join(draw.choices(string.ascii_letters + " \n", k=200_000)))
        sets = [*sets, "data.kind=text", f"data.path={text}", "training.batch_size=" + ("2" if stage.tiny else "16")]
    sets = [*sets, "compression.ratio=0.01", f"run.device={stage.device}", "run.allow_shared_gpu=true"]
    path = stage.folder / f"{name}-{ranks_are}.json"
    words = ["-m", "mpicomp", "bench", "step", "configs/methods/choco.toml", "--json", path]
    words += ["--blocks", 1, "--block", 2] if stage.tiny else ["--blocks", 10, "--block", 5]
    words += [word for value in sets for word in ("--set", value)]
    if ranks_are == "threads":
        stage.program([*words, "--loopback", RANKS], limit=90)
    else:
        stage.program(words, ranks=RANKS, limit=90)
    report: dict[str, Any] = json.loads(path.read_text())
    (result,) = report["results"]
    if name == "ResNet-20":
        result |= {"target_ratio": TARGET, "is_met": result["ratio"] <= TARGET}
    return result | {"machine": report["machine"]}


if __name__ == "__main__":
    main()
