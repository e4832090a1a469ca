"""`convert`, `kernels`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import place


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Llama-SMoP or Llama-AVSR state dict, or fairseq AV-HuBERT .pt.")],
    to: Annotated[Path, typer.Option(help="Folder to make.", callback=place)],
    language_model: Annotated[str | None, typer.Option(help="The base model: name or folder.")] = None,
    audio_tower: Annotated[str | None, typer.Option(help="The Whisper model: name or folder.")] = None,
    video_tower: Annotated[Path | None, typer.Option(help="The AV-HuBERT .pt it started from; default: Large.")] = None,
    rate_audio: Annotated[int, typer.Option(min=1)] = 4,
    rate_video: Annotated[int, typer.Option(min=1)] = 2,
    compression: str = "pool",
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    lora_scale: Annotated[float, typer.Option(help="The authors' alpha / rank.")] = 0.125,
    key_map: Annotated[Path | None, typer.Option(help="YAML rules that precede the built-in ones.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept missing and unexpected keys.")] = False,
) -> None:
    """Convert a published checkpoint to a model folder; every key is accounted for."""
    from llama_smop.convert import convert as run

    report = run(
        source,
        to,
        language_model=language_model,
        audio_tower=audio_tower,
        video_tower=video_tower,
        rate_audio=rate_audio,
        rate_video=rate_video,
        compression=compression,
        top_k=top_k,
        lora_scale=lora_scale,
        key_map=key_map,
        partial=partial,
    )
    print(f"{report.summary()}\n{to}")


@app.command()
def kernels(
    out: Annotated[Path, typer.Argument(help="Folder to make, or one that this command made.", callback=place)],
) -> None:
    """Write the Triton kernels as a folder that Hugging Face's `kernels` package loads without an install of ours."""
    from llama_smop.integrations import kernels_hub

    print(kernels_hub.write(out))
