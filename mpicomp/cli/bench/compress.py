"""``mpicomp bench compress``: kernels and compressors, compared with a copy of the vector and with torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.table import Table
from torch import Tensor

from mpicomp import kernels
from mpicomp.cli import debug_option
from mpicomp.cli.bench.machine import console, json_option, machine, print_machine, seconds, write_json
from mpicomp.compression import QSGD, Compressor, RandomK, SignNorm, Spec, TopK
from mpicomp.compression.ratio import kept
from mpicomp.kernels.reference import trim_code

RATIOS = (0.1, 0.01, 0.001)
"""The fractions of the entries that top-k is measured with."""

RATIO = 0.01
"""The fraction kept in all other measurements."""

_LEAST_S = 1e-3
"""The shortest time that is measured."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """An operation to be timed.

    Attributes:
        name: for the table.
        run: does the operation once.
        torch: does the same, or the closest operation, with torch; None if there is none.
        indices: how many indices it encodes or decodes, if any.
        bits: bits per index of that code.
        entropy: the entropy of a random choice, in bits per index.

    """

    name: str
    run: Run
    torch: Run | None = None
    indices: int | None = None
    bits: float | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Result:
    """The medians of one operation.

    Attributes:
        name: of the operation.
        ms: milliseconds.
        copies: the ratio to the time of a copy of the vector, timed in turns with it.
        torch_ms: milliseconds with torch.
        torch_copies: the ratio of `torch_ms` to the time of a copy.
        indices_per_s: for index codes.
        bits_per_index: for index codes.
        entropies: the ratio of `bits_per_index` to the entropy of a random choice.

    """

    name: str
    ms: float
    copies: float
    torch_ms: float | None = None
    torch_copies: float | None = None
    indices_per_s: float | None = None
    bits_per_index: float | None = None
    entropies: float | None = None


@click.command()
@click.option("--entries", default=11_000_000, show_default=True, type=click.IntRange(1), help="Length of the vector.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Medians are over so many.")
@click.option("--device", default="cpu", show_default=True, help="Where the vector lies: cpu, cuda, cuda:1 ...")
@json_option
@debug_option
def compress(entries: int, rounds: int, device: str, json_path: Path | None) -> None:
    """Time selection, packing, mixing and index codes on one thread, against a copy of the vector and against torch.

    The vector is float32 with normally distributed entries; 1 % of them are kept unless the table says otherwise. On a
    GPU the time includes the wait until it has finished.
    """
    place = _device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = torch.randn(entries, generator=torch.Generator().manual_seed(0)).to(place)
        target = torch.zeros_like(source)
        copy_ms, results = _measure(list(_operations(source)), lambda: target.copy_(source), rounds, place)
    finally:
        torch.set_num_threads(threads)
    facts = machine(place)
    if json_path:
        figures = [asdict(result) for result in results]
        report = {"machine": facts, "entries": entries, "rounds": rounds, "copy_ms": copy_ms, "results": figures}
        write_json(json_path, report)
    out = console()
    print_machine(out, facts)
    out.print(f"{entries:,} float32 on {place}, copied in {copy_ms:.3f} ms; one thread, medians of {rounds}")
    out.print(_table(results))


def _device(name: str) -> torch.device:
    """Return the device of that name; UsageError if there is none that can be measured."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.UsageError(f"--device {name} is not the name of a device") from error
    if device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device {name}: it must be cpu or a CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.UsageError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return device


def _measure(operations: list[Operation], copy: Run, rounds: int, device: torch.device) -> tuple[float, list[Result]]:
    """Time every operation in turns with torch's and a copy, so that all run under the same conditions.

    An operation that takes less than a millisecond is repeated for a millisecond, so that clock and caches matter less.
    """
    copies_ms, results = [], []
    for operation in operations:
        runs = [copy, operation.run, *([operation.torch] if operation.torch else [])]
        for run in runs:
            run()  # compiles, and touches memory for the first time
        calls = [max(1, int(_LEAST_S / seconds(run, 1, device))) for run in runs]
        taken = [[seconds(*pair, device) for pair in zip(runs, calls, strict=True)] for _ in range(rounds)]
        copy_ms, ms, *torch_ms = (1e3 * statistics.median(column) for column in zip(*taken, strict=True))
        copies_ms.append(copy_ms)
        results.append(
            Result(
                operation.name,
                ms,
                ms / copy_ms,
                torch_ms[0] if torch_ms else None,
                torch_ms[0] / copy_ms if torch_ms else None,
                operation.indices / ms * 1e3 if operation.indices else None,
                operation.bits,
                operation.bits / operation.entropy if operation.bits and operation.entropy else None,
            )
        )
    return statistics.median(copies_ms), results


def _operations(x: Tensor) -> Iterator[Operation]:
    """Yield the operations to time on the vector `x` (n,)."""
    n = len(x)
    for ratio in RATIOS:
        k = kept(n, ratio)
        yield Operation(f"top-k, {ratio:.1%}", _top_k(x, k), _torch_top_k(x, k))
    yield from _updates(x)
    yield from _dense(x)
    for ratio in RATIOS:
        yield from _codes(x, ratio)


def _top_k(x: Tensor, k: int) -> Run:
    return lambda: kernels.top_k(x, k)


def _torch_top_k(x: Tensor, k: int) -> Run:
    return lambda: x.abs().topk(k, sorted=False)


def _updates(x: Tensor) -> Iterator[Operation]:
    """Yield the steps of CHOCO-SGD and AdaGossip."""
    n = len(x)
    k, spec, top = kept(n, RATIO), Spec.flat(n), TopK(RATIO)
    x_hat, scratch, s, v, y = (torch.zeros_like(x) for _ in range(5))
    generator = torch.Generator(x.device).manual_seed(1)
    s.normal_(generator=generator)
    v.uniform_(generator=generator)

    def torch_step() -> None:
        torch.sub(x, x_hat, out=scratch)
        indices = scratch.abs().topk(k, sorted=False).indices
        x_hat.index_add_(0, indices, scratch[indices])

    def torch_mix() -> None:
        r = s - x_hat
        v.mul_(0.9).addcmul_(r, r, value=0.1)
        y.addcmul_(r, (0.01 / (v / 0.19).sqrt_().add_(1e-8)).clamp_max_(1.0))

    def select(threshold: float) -> Run:
        return lambda: (x.abs() >= threshold).nonzero()

    threshold = 2.5758  # of a normal distribution, 1 % lie beyond
    yield Operation("threshold, 1.0%", lambda: kernels.above(x, threshold), select(threshold))
    message = top.compress(x, spec, None)
    plain = kernels.top_k(x, k)
    yield Operation(
        "CHOCO: difference, top-k, public copy",
        lambda: top.compress_difference_(x, x_hat, spec, None, scratch),
        torch_step,
    )
    yield Operation(
        "add a top-k message",
        lambda: top.accumulate(message, spec, y, 0.5),
        lambda: y.index_add_(0, plain[1], plain[0], alpha=0.5),
    )
    yield Operation("CHOCO mix", lambda: kernels.mix_(y, s, x_hat, 0.1), lambda: y.add_(s - x_hat, alpha=0.1))
    yield Operation(
        "AdaGossip mix", lambda: kernels.adaptive_mix_(y, s, x_hat, v, 0.01, 0.9, 0.19, 1e-8, 1.0), torch_mix
    )


def _dense(x: Tensor) -> Iterator[Operation]:
    """Yield packing and unpacking of signs and levels, by themselves and with their scales, and random entries."""
    spec, y = Spec.flat(len(x)), torch.zeros_like(x)
    unit = kernels.norm(x, 15)
    step = float(unit)
    sign, qsgd = SignNorm(), QSGD(bits=4)

    def torch_levels() -> Tensor:
        return (x.abs() / step + torch.rand_like(x)).floor_().to(torch.uint8)

    yield Operation("pack signs", lambda: kernels.pack_signs(x), lambda: x.sign())
    yield from _both_ways(sign, "sign", x, y, spec)
    yield Operation("pack 4-bit levels", lambda: kernels.quantize(x, unit, 4, 1), torch_levels)
    yield from _both_ways(qsgd, "QSGD, 4 bits", x, y, spec)
    yield from _both_ways(RandomK(RATIO), f"random-k, {RATIO:.1%}", x, y, spec)


def _both_ways(compressor: Compressor, name: str, x: Tensor, y: Tensor, spec: Spec) -> Iterator[Operation]:
    state = compressor.init(spec, x.device)
    message = compressor.compress(x, spec, state)
    yield Operation(f"{name}: compress", lambda: compressor.compress(x, spec, state))
    yield Operation(f"{name}: add a message", lambda: compressor.accumulate(message, spec, y, 0.5))


def _codes(x: Tensor, ratio: float) -> Iterator[Operation]:
    """Yield encoding and decoding of the indices of the largest entries."""
    n, k = len(x), kept(len(x), ratio)
    _, indices = kernels.top_k(x, k)
    code = trim_code(kernels.encode_indices(indices, n))
    bits, share = 8 * len(code) / k, k / n
    entropy = -(math.log2(share) + (1 / share - 1) * math.log2(1 - share)) if k < n else None
    for name, run in (
        ("encode", lambda: kernels.encode_indices(indices, n)),
        ("decode", lambda: kernels.decode_indices(code, k, n)),
    ):
        yield Operation(f"{name} indices, {ratio:.1%}", run, indices=k, bits=bits, entropy=entropy)


def _table(results: list[Result]) -> Table:
    table = Table(box=None)
    table.add_column("operation", no_wrap=True)
    for column in ("ms", "copies", "torch ms", "torch copies", "million indices/s", "bits/index", "entropies"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{result.ms:.3f}",
            f"{result.copies:.2f}",
            _number(result.torch_ms, 3),
            _number(result.torch_copies, 2),
            _number(result.indices_per_s and result.indices_per_s / 1e6, 0),
            _number(result.bits_per_index, 2),
            _number(result.entropies, 3),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
