"""`transcribe`, `crop`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import Beams, Face, Model, face_choice, place


@app.command()
def transcribe(
    clips: Annotated[list[Path], typer.Argument(help="Videos or sound files of any length.")],
    model: Model,
    modality: Annotated[str | None, typer.Option(help="audio, video or audiovisual; default: all available.")] = None,
    beams: Beams = 1,
    rate: Annotated[
        str | None, typer.Option(help="Compression rate, such as 16,5; default: the first of the model's.")
    ] = None,
    face: Face = "auto",
    prepared: Annotated[
        bool | None, typer.Option(help="The picture is a mouth crop; default: where it is 96 pixels wide and high.")
    ] = None,
    srt: Annotated[Path | None, typer.Option(help="Write SubRip subtitles here.", callback=place)] = None,
    vtt: Annotated[Path | None, typer.Option(help="Write WebVTT subtitles here.", callback=place)] = None,
    json: Annotated[Path | None, typer.Option(help="Write pieces, times and warnings here.", callback=place)] = None,
    word_times: Annotated[
        bool, typer.Option("--word-times", help="Find when each word is said: in the JSON, and for the cues.")
    ] = False,
    aligner: Annotated[
        str | None, typer.Option(help="Whisper that finds it, a name or folder; default: the audio tower's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pieces in a batch; default: 4, on a GPU 16.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Files that are read ahead at a time; default: 1, on a GPU 4.")
    ] = None,
) -> None:
    """Print what is said in each file. With several, --srt, --vtt and --json name folders.

    Under torchrun the processes share the files.
    """
    from llama_smop.transcription import run
    from llama_smop.transcription.ranks import ranks
    from llama_smop.transcription.recording import Options

    options = Options(
        modality=modality,
        face=face_choice(face),
        prepared=prepared,
        num_beams=beams,
        rate=rate,
        pieces_at_once=batch_size,
        workers=workers,
        word_times=word_times or aligner is not None,
        aligner=aligner,
    )
    outputs = run.Outputs(clips, srt=srt, vtt=vtt, json=json)
    with ranks() as here:
        if here.world == 1:
            found = outputs.written(run.transcripts(clips, model, options, progress=True))
        else:
            found = run.share_out(clips, model, options, outputs, here)
        for transcript in found:
            print(f"{transcript.path}\t{transcript.text}" if len(clips) > 1 else transcript.text, flush=True)


@app.command()
def crop(
    video: Path,
    out: Annotated[Path, typer.Option(help="mp4 to write.", callback=place)],
    sheet: Annotated[Path | None, typer.Option(help="Picture (PNG) of the faces and crops.", callback=place)] = None,
    face: Face = "auto",
) -> None:
    """Cut the mouth out of a video, 96×96 and with its sound, as the models are trained on."""
    from llama_smop.data.faces.export import crop_video
    from llama_smop.data.media import files_of
    from llama_smop.system import files

    which = face_choice(face)
    places = [files.check_file(target, files_of(video)) for target in (out, sheet) if target is not None]
    if len(set(places)) < len(places):
        raise ValueError(f"{sheet}: --out and --sheet name the same file")
    print(crop_video(video, out, sheet=sheet, face=which, progress=True))
