"""The table of `python -m benchmarks host-time`."""

from pathlib import Path

from benchmarks.report import performance
from benchmarks.report.tables import Table

MARKERS = "<!-- host-time:begin -->", "<!-- host-time:end -->"


def table(results: dict) -> Table:
    """Of a file of benchmarks/results/host_time/: a row for each revision, this one last."""
    where, last = results["environment"], results["cases"][-1]
    rows = [
        [f"at {c['revision']}" if c["revision"] else "this version", f"{c['forward_us']:.0f}", f"{c['both_us']:.0f}",
         f"{c['both_us'] / last['both_us']:.2f}×"]
        for c in results["cases"]
    ]  # fmt: skip
    note = (
        f"{where['device']}, {where['cores']} cores, torch {where['versions']['torch']}, triton "
        f"{where['versions']['triton']}, T {results['tokens']}, measured {where['date']}: the least of many steps, "
        "revisions by turns."
    )
    return Table("", ["host time (µs)", "forward", "forward + backward", "of this version's"], rows, note)


def update(document: Path, every: list[dict]) -> None:
    """Put the table of each device's results between the markers."""
    performance.update(document, "\n".join(table(results).markdown() for results in every), *MARKERS)
