"""The table of `python -m benchmarks memory`."""

from benchmarks.report.readings import number
from benchmarks.report.tables import Table


def table(results: dict) -> Table:
    """Of a file of benchmarks/results/training_memory/: a row for each measure, the peak beside its estimate."""
    sizes, where = results["sizes"], results["environment"]
    most = results["cases"][0]["peak_bytes"]
    rows = [
        [c["case"], number(c["peak_bytes"] / 1e6), f"{100 * c['peak_bytes'] / most:.0f} %",
         number(c["estimated_bytes"] / 1e6)]
        for c in results["cases"]
    ]  # fmt: skip
    note = (
        f"{where['device']}, torch {where['versions']['torch']}, float32, measured {where['date']}. A Llama of "
        f"{sizes['vocabulary']} tokens and width {sizes['width']} with LoRA; {sizes['clips']} clips, "
        f"{sizes['positions']} positions, {sizes['labelled']} of them with a label; {sizes['chunk']} in a chunk. "
        "Resident above the model itself, each case in a fresh process; the estimate is that of `llama-smop info`. "
        "What libraries and the allocator take in the first steps is in the first column alone."
    )
    return Table("a training step's peak memory (MB)", ["", "resident", "of the first", "estimate"], rows, note)
