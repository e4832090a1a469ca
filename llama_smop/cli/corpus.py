"""`corpus make | show | labels | crop | shard`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import corpus_app
from llama_smop.cli.options import Face, face_choice, place, utf8


@corpus_app.command("make")
def corpus_make(
    out: Annotated[Path, typer.Argument(callback=place)],
    clips: Annotated[int, typer.Option(min=8)] = 600,
    seed: int = 0,
    grammar: Annotated[Path | None, typer.Option(help="YAML word lists; default: GRID's with twelve letters.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: one per core.")] = None,
) -> None:
    """Write a corpus of synthetic talking faces into OUT; a seed determines every byte. Resumes when run again."""
    from llama_smop.data.synthetic.corpus import make_corpus
    from llama_smop.data.synthetic.grammar import GRID, Grammar

    words = GRID if grammar is None else Grammar.from_file(grammar)
    print(make_corpus(out, clips=clips, seed=seed, grammar=words, workers=workers))


@corpus_app.command("show")
def corpus_show(
    root: Path,
    png: Annotated[Path | None, typer.Option(help="Default: contact_sheet.png in the corpus.", callback=place)] = None,
    clips: Annotated[int, typer.Option(min=1)] = 6,
) -> None:
    """Draw a contact sheet of a corpus."""
    from llama_smop.data.synthetic.contact_sheet import contact_sheet

    png = png or root / "contact_sheet.png"
    contact_sheet(root, png, n=clips)
    print(png)


@corpus_app.command("labels")
def corpus_labels(
    root: Annotated[Path, typer.Argument(help="Folder that auto_avsr's preparation wrote, with labels/ and lrs3/.")],
    prepared: Annotated[list[str], typer.Option("--from", help="Its label file, under root/labels; may be repeated.")],
    to: Annotated[str, typer.Option(help="Label file to write, under root/labels.")],
    min_seconds: Annotated[float, typer.Option(min=0, help="Leave out shorter clips.")] = 0.2,
    max_seconds: Annotated[float, typer.Option(help="Leave out longer clips; Whisper's limit is 30.")] = 30.0,
    keep_case: Annotated[bool, typer.Option("--keep-case", help="Do not lower-case the texts.")] = False,
) -> None:
    """Write a label file with texts for clips that auto_avsr's preparation cropped from LRS2, LRS3 or VoxCeleb2."""
    from llama_smop.data.auto_avsr import write_labels

    print(write_labels(root, prepared, to, min_seconds=min_seconds, max_seconds=max_seconds, lower=not keep_case))


@corpus_app.command("crop")
def corpus_crop(
    root: Annotated[Path, typer.Argument(help="Folder of videos, in any layout.")],
    out: Annotated[Path, typer.Option(help="Folder of the corpus.", callback=place)],
    name: Annotated[str | None, typer.Option(help="Of the data set; default: ROOT's.", callback=utf8)] = None,
    texts: Annotated[
        Path | None, typer.Option(help="CSV of path,text; default: NAME.txt beside NAME.mp4, as in LRS3.")
    ] = None,
    without_text: Annotated[bool, typer.Option("--without-text", help="Crop videos without a text too.")] = False,
    face: Face = "auto",
    min_seconds: Annotated[float, typer.Option(min=0, help="Leave out shorter videos.")] = 0.2,
    max_seconds: Annotated[float, typer.Option(help="Leave out longer videos; Whisper's limit is 30.")] = 30.0,
    keep_case: Annotated[bool, typer.Option("--keep-case", help="Do not lower-case the texts.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: one per core.")] = None,
) -> None:
    """Crop the mouths out of a folder of videos, into OUT/NAME with OUT/labels/NAME.csv. Resumes when run again."""
    from llama_smop.data.faces.corpus import Limits, crop_corpus

    limits = Limits(face_choice(face), min_seconds, max_seconds)
    print(
        crop_corpus(
            root,
            out,
            name=name,
            table=texts,
            without_text=without_text,
            limits=limits,
            lower=not keep_case,
            workers=workers,
        )
    )


@corpus_app.command("shard")
def corpus_shard(
    root: Path,
    out: Annotated[Path, typer.Option(help="Folder for the shards.", callback=place)],
    labels: Annotated[str, typer.Option(help="Label file, under root/labels.")] = "train.csv",
    clips_per_shard: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the clips' order.")] = 0,
) -> None:
    """Write a corpus as webdataset tar shards, for a training's `data.shards`. Resumes when run again."""
    from llama_smop.data.shards.write import write_shards

    shards = write_shards(root, labels, out, clips_per_shard=clips_per_shard, seed=seed)
    print(f"{out}\t{len(shards)} shards")
