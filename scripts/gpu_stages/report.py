"""Print the results of a campaign as tables in Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Entries = Mapping[str, Mapping[str, Any]]
"""What the file of a stage says of its items."""


def main() -> None:
    """Print the tables of the folder that the command line names."""
    folder = Path(sys.argv[1])
    state = json.loads((folder / "campaign.json").read_text())
    print(f"# A campaign on {state['device']}{', the dress rehearsal' if state['tiny'] else ''}\n")
    for number, start in enumerate(state["starts"], 1):
        facts = ", ".join(f"{key} {value}" for key, value in start["machine"].items())
        outcomes = ", ".join(f"{name} {outcome['state']}" for name, outcome in start["stages"].items())
        print(f"- Start {number}, {start['minutes']:g} minutes: {facts}. Stages: {outcomes or 'none'}.")
    for name, tables in TABLES.items():
        path = folder / f"{name}.json"
        print(f"\n## {name}\n")
        if not path.is_file():
            print("Not run.")
            continue
        report = json.loads(path.read_text())
        if not report["is_complete"]:
            print("Not complete: what is missing was not run, or has failed.\n")
        items: Entries = report["items"]
        print(
            "\n\n".join(tables({item: entry for item, entry in items.items() if entry["state"] in ("done", "waits")}))
        )
        for item, entry in items.items():
            if entry["state"] in ("failed", "running"):
                print(
                    f"\n**{item}** has failed: `{' '.join(entry.get('error', 'it took the stage down').split())[:400]}`"
                )


def correctness(items: Entries) -> Iterator[str]:
    """Yield the counts of the tests and two tables."""
    results = {item: entry["result"] for item, entry in items.items()}
    if (tests := results.get("tests/gpu")) is not None:
        yield f"`tests/gpu`: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."
        yield from (f"- {failure}" for failure in tests["failures"])
    compared = {item: result for item, result in results.items() if "difference" in result}
    rows = [
        [
            item,
            yes(result["same_bits"]) + (" (promised)" if result["promised"] else ""),
            yes(result.get("same_bits_again")),
            yes(result.get("same_bytes_sent")),
            f"{result['difference']:.1e}",
        ]
        for item, result in compared.items()
    ]
    yield table(["", "bits of the CPU", "same bits again", "same bytes sent", "largest difference"], rows)
    for tool in ("memcheck", "racecheck"):
        if (found := results.get(tool)) is not None:
            yield f"compute-sanitizer, {tool}: " + (found["summary"] if found["found"] else "not found on this machine")


def kernels(items: Entries) -> Iterator[str]:
    """Yield a table for each length, and the counts."""
    for item, result in ((item, entry["result"]) for item, entry in items.items()):
        if "results" in result:
            copied = f"{item}: copied in {result['copy_ms']:.3f} ms, {rate(result['copy_bytes_per_s'])}."
            rows = [
                [
                    row["name"],
                    f"{row['ms']:.3f}",
                    f"{row['copies']:.2f}",
                    f"{row['torch_copies']:.2f}" if row["torch_copies"] else "",
                    rate(row["bytes_per_s"]),
                    against(row["target_copies"], row["is_met"]) if "is_met" in row else "",
                ]
                for row in result["results"]
            ]
            yield copied
            yield table(["operation", "ms", "copies", "torch, copies", "achieved", "target"], rows)
        else:
            yield f"{item}: {result[item]}; target {against(result['target'], result['is_met'])}."


def ranks(items: Entries) -> Iterator[str]:
    """Yield the runs, the restarts and the timelines."""
    results = {item: entry["result"] for item, entry in items.items()}
    runs = {item: result for item, result in results.items() if "train_loss" in result}
    rows = [
        [item, result["steps"], f"{1e3 * result['seconds'] / result['steps']:.2f}", percent(result["test_accuracy"])]
        for item, result in runs.items()
    ]
    yield table(["", "steps", "ms a step", "test accuracy"], rows)
    rows = [
        [item, result["killed"], result["went_on_after"], yes(result.get("same_bits"))]
        for item, result in results.items()
        if "killed" in result
    ]
    yield table(["", "ranks killed", "went on after step", "same bits as undisturbed"], rows)
    if (found := results.get("timeline")) is not None:
        hidden, whole = found["exchange_within_gradients_ms"], found["exchange_ms"]
        yield f"Timeline of {found['steps']} steps: {hidden:.2f} of {whole:.2f} ms of the exchange within gradients."
    if (found := results.get("streams")) is not None:
        beside, whole = found["copies_beside_kernels_ms"], found["copies_ms"]
        where = f"copies on streams {found['copy_streams']}, kernels on {found['kernel_streams']}"
        yield f"Streams: {beside:.2f} of {whole:.2f} ms of copies between host and device beside kernels ({where})."


def step(items: Entries) -> Iterator[str]:
    """Yield the times of steps."""
    rows = []
    for item, result in ((item, entry["result"]) for item, entry in items.items()):
        parts = [f"{1e3 * result['parts'][part]:.2f}" for part in ("gradient", "compress", "exchange", "mix")]
        met = against(result["target_ratio"], result["is_met"]) if "is_met" in result else ""
        times = [f"{1e3 * result['seconds']:.2f}", *parts, f"{1e3 * result['alone_seconds']:.2f}"]
        rows.append([item, result["ranks"], *times, f"{result['ratio']:.3f}", met])
    columns = ["", "ranks", "ms a step", "gradient", "compress", "exchange", "mix", "alone", "ratio", "target"]
    yield table(columns, rows)


def headline(items: Entries) -> Iterator[str]:
    """Yield the speeds, and how far each run has come."""
    results = {item: (entry["state"], entry["result"]) for item, entry in items.items()}
    rows = [
        [item, result["ranks"], f"{result['samples_per_s']:.0f}"]
        for item, (_, result) in results.items()
        if "samples_per_s" in result
    ]
    yield table(["", "ranks", "samples a second"], rows)
    rows = [
        [
            item,
            "done" if state == "done" else "goes on",
            f"{result['epoch']:.1f}" if "epoch" in result else "0",
            percent(result.get("test_accuracy")),
            result.get("ranks_are", ""),
        ]
        for item, (state, result) in results.items()
        if "samples_per_s" not in result
    ]
    yield table(["run", "state", "epoch", "test accuracy (%)", "ranks are"], rows)


TABLES: dict[str, Callable[[Entries], Iterator[str]]] = {
    "correctness": correctness,
    "kernels": kernels,
    "ranks": ranks,
    "step": step,
    "headline": headline,
}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table, or a word in its place."""
    if not rows:
        return "None yet."
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def yes(value: bool | None) -> str:
    """Return a word for a verdict; nothing where there is none."""
    return "" if value is None else "yes" if value else "**no**"


def against(target: float, is_met: bool) -> str:
    """Return a target and whether it is reached."""
    return f"{target:g}, {'reached' if is_met else '**missed**'}"


def rate(value: float | None) -> str:
    """Return bytes a second."""
    return "" if value is None else f"{value / 1e9:.1f} GB/s"


def percent(value: float | None) -> str:
    """Return a fraction in percent."""
    return "" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    main()
