"""Records, results and what a user sees of a run."""

import io
import itertools
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from mpicomp.replica.record import Record, report
from mpicomp.run import progress
from mpicomp.run.evaluation import evaluates_own
from mpicomp.run.progress import Progress
from mpicomp.run.result import Result, readable_bytes, readable_time, summary, to_json


def record(step, accuracy=None, sent=1_000_000, loss=0.5):
    seconds = {"gradient": 0.1, "compress": 0.0, "exchange": 0.2, "mix": 0.1}
    return Record(step, step / 10, loss, 0.1, sent * step, seconds, 0.0123, accuracy)


def result(**changes):
    values = {
        "algorithm": "choco",
        "topology": "ring",
        "compressor": "topk",
        "ranks": 4,
        "steps": 100,
        "seconds": 2.0,
        "train_loss": 0.1,
        "test_accuracy": 0.95,
        "test_accuracy_local": [0.94, 0.95, 0.96, 0.95],
        "bytes_sent": [60_000] * 4,
        "consensus_distance": 0.1,
        "parameters": 1000,
        "spectral_gap": 0.5,
    }
    return Result(**{**values, **changes})


class Clock:
    """A time that only the test moves."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def console(is_terminal=False):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=200, highlight=False)


def lines(console):
    return console.file.getvalue().splitlines()


def test_reports_are_json():
    stored = json.loads(to_json(record(3, 0.5)))
    assert list(stored) == [
        "step",
        "epoch",
        "loss",
        "lr",
        "bytes_sent",
        "seconds",
        "consensus_distance",
        "test_accuracy",
        "diagnostics",
        "gradients",
        "delays",
        "test_loss",
        "test_perplexity",
    ]
    assert list(stored["seconds"]) == ["gradient", "compress", "exchange", "mix"]


def test_scalars_are_the_numbers_that_are_known():
    told = Record(7, None, 0.5, 0.1, 80, {"mix": 2.0}, None, None, {"ratio": 0.01}, [3, 4], {"0<1": [5, 6]})
    assert told.scalars() == {
        "loss": 0.5,
        "lr": 0.1,
        "bytes_sent": 80,
        "seconds/mix": 2.0,
        "diagnostics/ratio": 0.01,
        "gradients/0": 3,
        "gradients/1": 4,
    }


def test_rank_0_tells_all_callbacks_in_their_order():
    told = []

    class Listener:
        def __init__(self, name):
            self.name = name

        def on_record(self, record):
            told.append((self.name, record.step))

    for rank in (1, 0):
        report(record(3), rank, [Listener("a"), None, Listener("b")])
    assert told == [("a", 3), ("b", 3)]


def test_what_json_lacks_becomes_null():
    stored = json.loads(to_json(record(3, loss=math.nan)))
    assert stored["loss"] is None
    assert json.loads(to_json(result(test_accuracy_local=[math.inf, 1.0])))["test_accuracy_local"] == [None, 1.0]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (999_900, "1 MB"),
        (12.34e6, "12.3 MB"),
        (5e9, "5 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_times_are_readable(seconds, text):
    assert readable_time(seconds) == text


def test_the_summary_compares_with_an_all_reduce(tmp_path):
    # 2 * 3/4 * 4 bytes * 1000 parameters * 100 steps = 600 kB
    assert result().all_reduce_nbytes == 600_000
    text = "\n".join(summary(result(), tmp_path))
    assert "Trained 100 steps on 4 ranks in 2.0 s." in text
    assert "Test accuracy: 95.00% of the averaged model (94.00% to 96.00% of the ranks' own)." in text
    assert "Each rank sent 60 kB; an uncompressed all-reduce would have sent 600 kB, 10 times as much." in text
    assert f"Results: {tmp_path}" in text


def test_the_summary_of_nodes_compares_what_is_sent_between_them(tmp_path):
    # 2 * 1/2 * 4 bytes * 500 parameters of a rank's shard * 100 steps = 200 kB
    text = "\n".join(summary(result(nodes=2), tmp_path))
    assert (
        "Each rank sent 60 kB between nodes; an uncompressed all-reduce between nodes would have sent 200 kB, 3.33 "
        "times as much." in text
    )


def test_the_summary_tells_of_unequal_ranks(tmp_path):
    text = "\n".join(summary(result(bytes_sent=[30_000, 60_000, 90_000, 60_000]), tmp_path))
    assert "Each rank sent 60 kB on average (at most 90 kB);" in text


def test_the_summary_of_one_rank(tmp_path):
    text = "\n".join(summary(result(ranks=1, bytes_sent=[0], test_accuracy_local=[0.95]), tmp_path))
    assert "on 1 rank in" in text
    assert "Test accuracy: 95.00%.\n" in text
    assert "Nothing was sent." in text


def test_a_line_holds_what_a_user_asks_for(clock):
    out = console()
    with Progress(steps=100, epochs=None, console=out) as progress:
        progress.start(["header"])
        clock.now += 10
        progress.on_record(record(20, accuracy=0.91234))
    header, line = lines(out)
    assert header == "header"
    for text in (
        "epoch   2.00",
        "step     20",
        "loss  0.5000",
        "accuracy  91.23%",
        "sent    20 MB (50 MB/s)",
        "consensus 1.23e-02",
        "0:40 left",
    ):
        assert text in line


def test_the_rate_is_by_the_seconds_of_training_since_the_last_record(clock):
    # They are 0.4 a record, real or simulated, whatever evaluations take and however fast a simulation is.
    out = console()
    progress = Progress(steps=100, epochs=None, console=out)
    progress.start(["header"], begun=0.1)
    for step in (20, 30):
        clock.now += 100
        progress.on_record(record(step))
    first, second = lines(out)[1:]
    assert "MB/s" not in first  # how much earlier starts have sent is not known
    assert "sent    30 MB (25 MB/s)" in second


def test_a_line_leaves_out_what_is_not_known():
    out = console()
    progress = Progress(steps=10, epochs=None, console=out)
    progress.start([])
    progress.on_record(Record(10, None, None, 0.1, 0, {}, None))
    assert lines(out)[0].startswith("step     10  loss       -  not yet tested  sent")


def test_a_run_in_epochs_knows_what_is_left(clock):
    out = console()
    progress = Progress(steps=None, epochs=4, console=out)
    progress.start([])
    clock.now += 10
    progress.on_record(record(20))
    assert "0:10 left" in lines(out)[0]


def test_a_log_file_gets_few_lines(clock):
    out = console()
    progress = Progress(steps=1000, epochs=None, console=out)
    progress.start([])
    for step in range(1, 101):
        clock.now += 0.5
        progress.on_record(record(step))
    assert len(lines(out)) == 10
    assert not any("\x1b" in line or "\r" in line for line in lines(out))


def test_a_new_accuracy_is_shown_soon(clock):
    out = console()
    progress = Progress(steps=1000, epochs=None, console=out)
    progress.start([])
    clock.now += 1.5
    progress.on_record(record(1))
    progress.on_record(record(2, accuracy=0.5))
    clock.now += 0.1
    progress.on_record(record(3, accuracy=0.6))
    assert ["50.00%" in line for line in lines(out)] == [True]


def test_the_last_record_is_always_shown(clock):
    out = console()
    progress = Progress(steps=10, epochs=None, console=out)
    progress.start([])
    progress.on_record(record(10, accuracy=0.5))
    progress.finish(["summary"])
    assert lines(out)[-1] == "summary"
    assert "0:00 left" in lines(out)[-2]


def test_a_terminal_shows_every_record_in_place(clock):
    out = console(is_terminal=True)
    with Progress(steps=10, epochs=None, console=out) as progress:
        progress.start(["header"])
        clock.now += 0.01
        progress.on_record(record(1))
        assert "step      1" in out.file.getvalue()
        assert "\x1b[?25l" in out.file.getvalue()
    assert "\x1b[?25h" in out.file.getvalue()


def test_the_terminal_is_restored_after_an_error(clock):
    out = console(is_terminal=True)
    with pytest.raises(RuntimeError), Progress(steps=10, epochs=None, console=out) as progress:
        progress.start([])
        raise RuntimeError
    assert "\x1b[?25h" in out.file.getvalue()


def test_a_language_model_has_a_perplexity_and_no_accuracy(clock):
    out = console()
    progress = Progress(100, None, out)
    progress.start([])
    seconds = {"gradient": 0.1, "compress": 0.0, "exchange": 0.2, "mix": 0.1}
    clock.now += 10
    progress.on_record(Record(10, 1.0, 2.5, 0.1, 0, seconds, 0.1, test_loss=2.25, test_perplexity=math.exp(2.25)))
    assert "loss  2.5000  test loss  2.2500  perplexity  9.4877  sent" in out.file.getvalue()
    shown = summary(result(test_accuracy=None, test_loss=2.25, test_perplexity=math.exp(2.25)), Path("runs/1"))
    assert "Test loss: 2.25 (perplexity 9.488) of the averaged model." in shown


def test_numbers_of_many_ranks_are_written_as_a_distribution():
    many = result(
        ranks=101,
        bytes_sent=list(range(1000, 1101)),
        test_accuracy_local=[None] * 37 + [rank / 63 for rank in range(64)],
        gradients=[0, *[7] * 100],
        delays={f"{rank}<{(rank + 1) % 101}": [1] * (1 + rank % 2) for rank in range(101)},
        lost=["rank 101 on a"],
    )
    stored = json.loads(to_json(many))
    assert stored["bytes_sent"] == {
        "count": 101,
        "mean": 1050,
        "min": 1000,
        "5%": 1005,
        "25%": 1025,
        "median": 1050,
        "75%": 1075,
        "95%": 1095,
        "max": 1100,
    }
    assert (stored["test_accuracy_local"]["count"], stored["test_accuracy_local"]["max"]) == (64, 1)
    assert stored["delays"] == {"all": [101, 50]}
    assert stored["lost"] == ["rank 101 on a"]
    assert "Gradients of a rank: 0 to 7, 6.9 on average." in summary(many, Path("runs/a"))
    # A run that has ended shows what its file has kept.
    assert summary(Result(**stored), Path("runs/a")) == summary(many, Path("runs/a"))
    no_accuracy = result(ranks=65, test_accuracy_local=[None] * 65)
    assert json.loads(to_json(no_accuracy))["test_accuracy_local"] == {"count": 0}


@pytest.mark.parametrize("size", [1, 64, 65, 100, 1024])
def test_of_many_ranks_some_evaluate_their_own_models(size):
    chosen = [rank for rank in range(size) if evaluates_own(rank, size)]
    assert len(chosen) == min(size, 64) and chosen[0] == 0
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {max(1, size // 64), -(-size // 64)}


@pytest.mark.parametrize("width", [80, 100, 130])
def test_lines_fit_the_terminal(clock, width):
    out = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    with Progress(100, None, out) as shown:
        line = shown._line(record(7, accuracy=0.5), clock.now)
    assert len(line) <= width and "loss" in line and line.endswith("left")
    assert ("consensus" in line) == (width >= 120) and ("step" in line) == (width >= 90)


def test_a_loss_without_bounds_stays_short(clock):
    with Progress(100, None, console()) as shown:
        assert "loss 3.095e+31" in shown._line(record(7, loss=30953258574871640343945104326656.0), clock.now)
