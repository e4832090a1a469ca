"""The table of `python -m benchmarks host-time`."""

from pathlib import Path

from benchmarks.report import performance
from benchmarks.report.tables import Table

NAMES = {"triton": "Triton", "cuda": "CUDA C++"}
MARKERS = "<!-- host-time:begin -->", "<!-- host-time:end -->"


def table(results: dict) -> Table:
    """Of a file of benchmarks/results/host_time/: a row for each revision of Triton, this one last, then CUDA C++."""
    where = results["environment"]
    by_case = {(c.get("backend", "triton"), c["revision"]): c for c in results["cases"]}
    this = by_case["triton", ""]["both_us"]
    rows = [
        [f"{NAMES[backend]}, {f'at {revision}' if revision else 'this version'}", f"{c['forward_us']:.0f}",
         f"{c['both_us']:.0f}", f"{c['both_us'] / this:.2f}×"]
        for (backend, revision), c in by_case.items()
    ]  # fmt: skip
    note = (
        f"{where['device']}, {where['cores']} cores, torch {where['versions']['torch']}, triton "
        f"{where['versions']['triton']}, T {results['tokens']}, measured {where['date']}: the least of many steps, "
        "revisions by turns."
    )
    return Table("", ["host time (µs)", "forward", "forward + backward", "of Triton's"], rows, note)


def update(document: Path, every: list[dict]) -> None:
    """Put the table of each device's results between the markers."""
    performance.update(document, "\n".join(table(results).markdown() for results in every), *MARKERS)
