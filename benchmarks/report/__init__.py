"""`python -m benchmarks report`: writes tables, pictures, a page and the README section from the JSON files."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import results, say
from benchmarks.environment import ROOT
from llama_smop import files


def run(
    folder: Path = results.FOLDER, readme: Path | None = ROOT / "README.md", say: Callable[[str], None] = say
) -> None:
    """Write README.md, index.html and the pictures into `folder`, and the section between the README's markers.

    Raises:
        FileNotFoundError: no results in `folder`. ValueError: a file of another schema.
    """
    from benchmarks.report import page, plots, tables, training_memory
    from benchmarks.report import readme as front

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
    if readme is not None:
        changed = front.update(readme, front.section(drawn, readme.parent))
        say(f"updated {readme.name}" if changed else f"{readme.name} has no {front.BEGIN} … {front.END}: not changed")
