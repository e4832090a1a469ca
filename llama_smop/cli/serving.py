"""`serve`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import Model


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine need another one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is a free one.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(envvar="LLAMA_SMOP_AUTH", help="USER:PASSWORD, or a token, to be let in.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address through gradio's relay.")] = False,
    max_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a file, at most.")] = 200,
    max_disk_mb: Annotated[int, typer.Option(min=2, help="Megabytes of all visitors' files, at most.")] = 5000,
    max_minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of a recording, at most.")] = 30,
    babble: Annotated[
        Path | None, typer.Option(help="Clips (a folder) or noise (a file) for the babble; default: its own sound.")
    ] = None,
    word_times: Annotated[bool, typer.Option("--word-times", help="Find when each word is said.")] = False,
    aligner: Annotated[
        str | None, typer.Option(help="Whisper that finds it, a name or folder; default: the audio tower's.")
    ] = None,
) -> None:
    """A page in the browser that transcribes, and an HTTP endpoint as OpenAI's /v1/audio/transcriptions."""
    from llama_smop.serve import run

    run.serve(
        model,
        host=host,
        port=port,
        auth=auth,
        share=share,
        most_mb=max_mb,
        disk_mb=max_disk_mb,
        longest_s=60 * max_minutes,
        babble=babble,
        word_times=word_times or aligner is not None,
        aligner=aligner,
    )
