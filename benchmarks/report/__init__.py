"""`python -m benchmarks report`: tables, pictures, one page and sections of two documents, from the JSON files."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import results, say
from benchmarks.environment import ROOT
from llama_smop.system import files


def run(
    folder: Path = results.FOLDER,
    document: Path | None = ROOT / "docs" / "performance.md",
    say: Callable[[str], None] = say,
) -> None:
    """Write README.md, index.html and the pictures into `folder`, and what stands between the markers of `document`
    and of integrations.md beside it.

    Raises:
        FileNotFoundError: no results in `folder`. ValueError: a file of another schema.
    """
    from benchmarks import layer_memory, predictions
    from benchmarks.report import decoding, host_time, page, performance, plots, predicted, tables, training_memory

    folder = Path(folder)
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benchmarks cpu` or `gpu` first")
    order = {"gpu": 0, "cpu": 1, "peers": 2, "data": 3}
    devices = sorted(((path.stem, results.load(path)) for path in paths), key=lambda d: order[d[1]["kind"]])
    drawn = [(found, plots.draw(found, folder, stem)) for stem, found in devices]
    memories = [training_memory.table(results.load(path)) for path in sorted(folder.glob("training_memory/*.json"))]
    files.write_text(folder / "README.md", tables.document([found for found, _ in drawn], memories))
    page.write(folder / "index.html", drawn, memories)
    say(f"wrote {folder / 'README.md'} and {folder / 'index.html'}")
    if document is not None:
        if document.exists() and predicted.BEGIN in document.read_text():
            of_h100 = predictions.load()
            picture = predicted.draw(of_h100, predictions.PREDICTED.parent)
            predicted.update(document, of_h100, results.load(layer_memory.PATH), picture)
        host_time.update(document, [results.load(path) for path in sorted(folder.glob("host_time/*.json"))])
        decoding.update(document.with_name("integrations.md"), sorted(folder.glob("decoding/*.json")))
        changed = performance.update(document, performance.section(drawn, document.parent))
        missing = f"{document.name} has no {performance.BEGIN} … {performance.END}: left alone"
        say(f"updated {document.name}" if changed else missing)
