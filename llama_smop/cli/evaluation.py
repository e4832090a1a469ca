"""`evaluate`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import Beams, Model, place


@app.command()
def evaluate(
    model: Model,
    root: Annotated[Path, typer.Option(help="Corpus in the LRS3 layout.")],
    labels: Annotated[str, typer.Option(help="Label file, under root/labels.")] = "test.csv",
    modality: Annotated[list[str] | None, typer.Option(help="audio, video, audiovisual; may be repeated.")] = None,
    snr: Annotated[list[str] | None, typer.Option(help='Decibels or "clean"; may be repeated.')] = None,
    degrade: Annotated[
        list[str] | None,
        typer.Option(
            help='Make the picture worse: blur:3, occlude:0.3, drop:0.2, jitter:2, fps:10 or "none"; may be repeated.'
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="Compression rate, such as 16,5; may be repeated. Default: all of the model's."),
    ] = None,
    noise: Annotated[str, typer.Option(help='"babble" or a sound file.')] = "babble",
    babble_labels: Annotated[str, typer.Option(help="Label file of the clips for the babble.")] = "train.csv",
    beams: Beams = 1,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode clips; default: 4 on a GPU.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file for rows and transcripts.", callback=place)] = None,
) -> None:
    """Print a table of word error rates by modality, rate, SNR and picture.

    Under torchrun the processes share the clips.
    """
    import torch
    from accelerate import PartialState

    from llama_smop.data.degrade import Degradation
    from llama_smop.evaluation import run as module
    from llama_smop.models import model_folder
    from llama_smop.system import files

    unknown = set(modality or ()) - set(module.MODALITIES)
    if unknown:
        raise ValueError(f"--modality takes {', '.join(module.MODALITIES)}, got {', '.join(sorted(unknown))}")
    snrs = [_snr(text) for text in snr or ["clean"]]
    worse = [None if text == "none" else Degradation.parse(text) for text in degrade or ["none"]]
    here = PartialState(cpu=not torch.cuda.is_available())  # one process, or a rank of torchrun with its own GPU
    if json is not None and here.is_main_process:
        files.check_file(json, (root / "labels" / labels, root / "labels" / babble_labels, labels, noise))
    loaded, processor = model_folder.load(model, here.device)
    rows, transcripts = module.evaluate(
        loaded,
        processor,
        root,
        labels,
        modalities=modality,
        snrs=snrs,
        degradations=list(dict.fromkeys(worse)),
        rates=rate,
        noise=noise,
        babble_labels=babble_labels,
        num_beams=beams,
        workers=(4 if here.device.type == "cuda" else 0) if workers is None else workers,
        distributed=here.use_distributed,
    )
    here.destroy_process_group()
    if not here.is_main_process:
        return
    if json is not None:
        kept = module.records(rows, model, root, noise, beams)
        files.write_json(json, [r | {"transcripts": texts} for r, texts in zip(kept, transcripts, strict=True)])
    print(module.table(rows))


def _snr(text: str) -> float | None:
    try:
        snr = None if text == "clean" else float(text)
    except ValueError:
        snr = math.nan
    if snr is not None and not abs(snr) <= 100:
        raise ValueError(f'--snr takes decibels (from -100 to 100) or "clean", got {text!r}')
    return snr
