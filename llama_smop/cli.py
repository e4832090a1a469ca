"""The command line: `llama-smop demo | corpus | configs | train | average | ablate | evaluate | transcribe | crop |
convert | info | report | env | doctor`.

Commands import what they need when they run, so that `--help` is quick. An error is one line on stderr with exit status
1, or 2 for a wrong option; LLAMA_SMOP_DEBUG=1 shows the traceback. Ctrl-C exits with 130. A training that receives
SIGTERM or SIGHUP saves a checkpoint and exits with 143 or 129.
"""

import io
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from llama_smop.extras import remedy

try:
    import typer
except ModuleNotFoundError:
    sys.exit(f"llama-smop: the command line needs more than the base install: {remedy('typer')}")

INTERRUPTED = 130  # a shell's status of SIGINT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speech recognition that listens and reads lips, with a fast sparse mixture of projectors.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Corpora in the LRS3 layout: label, generate, show, shard.")
app.add_typer(corpus_app, name="corpus")


def _utf8(given):
    """Raises ValueError: a name or setting that is not UTF-8, which records and some libraries cannot store."""
    for value in given if isinstance(given, list | tuple) else [given]:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(value)!r}: the name is not UTF-8; choose another one") from None
    return given


Out = Annotated[Path, typer.Option(help="Folder for the results.", callback=_utf8)]
Model = Annotated[Path, typer.Option(help="Model folder that training or convert wrote.")]
Configs = Annotated[
    list[str],
    typer.Option(
        help="YAML file, or a shipped one's name; may be repeated, later ones override. See `configs`.", callback=_utf8
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value, after all files; may be repeated.", callback=_utf8)
]
Beams = Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    clips: Annotated[int | None, typer.Option(min=8, help="Clips in the corpus.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    seed: int = 0,
    full: Annotated[bool, typer.Option("--full", help="The long training, whose figures the documents show.")] = False,
) -> None:
    """Make a corpus, train and score a small Llama-SMoP, transcribe clips, write a report. Resumes when run again."""
    from llama_smop import demo as module

    module.demo(out, clips=clips, steps=steps, seed=seed, full=full)


@corpus_app.command("make")
def corpus_make(
    out: Annotated[Path, typer.Argument(callback=_utf8)],
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
    png: Annotated[Path | None, typer.Option(help="Default: contact_sheet.png in the corpus.", callback=_utf8)] = None,
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


@corpus_app.command("shard")
def corpus_shard(
    root: Path,
    out: Annotated[Path, typer.Option(help="Folder for the shards.", callback=_utf8)],
    labels: Annotated[str, typer.Option(help="Label file, under root/labels.")] = "train.csv",
    clips_per_shard: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the clips' order.")] = 0,
) -> None:
    """Write a corpus as webdataset tar shards, for a training's `data.shards`. Resumes when run again."""
    from llama_smop.data.shards.write import write_shards

    shards = write_shards(root, labels, out, clips_per_shard=clips_per_shard, seed=seed)
    print(f"{out}\t{len(shards)} shards")


@app.command()
def configs() -> None:
    """List the training and grid files that come with the package."""
    from llama_smop.training.compose import shipped, summary

    for name, path in shipped().items():
        print(f"{name:20s} {summary(path)}")


@app.command()
def train(
    config: Configs,
    out: Out,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option(help="Resume at the newest whole checkpoint in OUT.")] = True,
) -> None:
    """Train a model with the CONFIGs. The same command resumes an interrupted training."""
    from llama_smop.training.config import read_config
    from llama_smop.training.run import train as run

    print(run(read_config(config, settings=settings or ()), out, resume=resume))


@app.command()
def ablate(
    config: Annotated[Path, typer.Option(help="Grid file (YAML) or a shipped one's name, such as ablation/sharing.")],
    out: Out,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of concurrent cells; default: the grid's.")] = None,
) -> None:
    """Train and score every cell of a grid, then write a table and pictures. Resumes when run again."""
    from llama_smop.ablation import ablate as run

    print(run(config, out, jobs=jobs))


@app.command()
def average(
    run: Annotated[Path, typer.Argument(help="Folder of a training.")],
    to: Annotated[Path, typer.Option(help="Model folder to make.", callback=_utf8)],
    last: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints.")] = 5,
) -> None:
    """Write the mean of a training's last whole checkpoints as a model."""
    from llama_smop.models import seal
    from llama_smop.training import averaging

    seal.check_target(to)  # before the checkpoints are hashed
    checkpoints = averaging.newest(run, last)
    if len(checkpoints) < last:
        raise ValueError(f"{run}: has {len(checkpoints)} whole checkpoints, --last asks for {last}; see run.keep")
    averaging.average(checkpoints, to)
    print(f"{to}\tmean of {', '.join(folder.name for folder in checkpoints)}")


@app.command()
def evaluate(
    model: Model,
    root: Annotated[Path, typer.Option(help="Corpus in the LRS3 layout.")],
    labels: Annotated[str, typer.Option(help="Label file, under root/labels.")] = "test.csv",
    modality: Annotated[list[str] | None, typer.Option(help="audio, video, audiovisual; may be repeated.")] = None,
    snr: Annotated[list[str] | None, typer.Option(help='Decibels or "clean"; may be repeated.')] = None,
    noise: Annotated[str, typer.Option(help='"babble" or a sound file.')] = "babble",
    babble_labels: Annotated[str, typer.Option(help="Label file of the clips for the babble.")] = "train.csv",
    beams: Beams = 1,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode clips; default: 4 on a GPU.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file for rows and transcripts.", callback=_utf8)] = None,
) -> None:
    """Print a table of word error rates by modality and SNR. Under torchrun the processes share the clips."""
    from dataclasses import asdict

    import torch
    from accelerate import PartialState

    from llama_smop import files
    from llama_smop.evaluation import run as module
    from llama_smop.models import model_folder

    unknown = set(modality or ()) - set(module.MODALITIES)
    if unknown:
        raise ValueError(f"--modality takes {', '.join(module.MODALITIES)}, got {', '.join(sorted(unknown))}")
    snrs = [_snr(text) for text in snr or ["clean"]]
    here = PartialState(cpu=not torch.cuda.is_available())  # one process, or a rank of torchrun with its own GPU
    if json is not None and here.is_main_process:
        files.check_file(json)
    loaded, processor = model_folder.load(model, here.device)
    rows, transcripts = module.evaluate(
        loaded,
        processor,
        root,
        labels,
        modalities=modality,
        snrs=snrs,
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
        records = [asdict(row) | {"transcripts": texts} for row, texts in zip(rows, transcripts, strict=True)]
        files.write_json(json, records)
    print(module.table(rows))


def _snr(text: str) -> float | None:
    try:
        snr = None if text == "clean" else float(text)
    except ValueError:
        snr = math.nan
    if snr is not None and not abs(snr) <= 100:
        raise ValueError(f'--snr takes decibels (from -100 to 100) or "clean", got {text!r}')
    return snr


Face = Annotated[str, typer.Option(help="auto (who speaks), largest, or a number: --sheet of `crop` shows them.")]


def _face(text: str) -> str | int:
    if text in ("auto", "largest"):
        return text
    if not text.isdecimal():
        raise ValueError(f"--face takes auto, largest or a number, got {text!r}")
    return int(text)


@app.command()
def transcribe(
    clips: Annotated[list[Path], typer.Argument(help="Videos or sound files of any length.")],
    model: Model,
    modality: Annotated[str | None, typer.Option(help="audio, video or audiovisual; default: all available.")] = None,
    beams: Beams = 1,
    face: Face = "auto",
    prepared: Annotated[
        bool | None, typer.Option(help="The picture is a mouth crop; default: where it is 96 pixels wide and high.")
    ] = None,
    srt: Annotated[Path | None, typer.Option(help="Write SubRip subtitles here.", callback=_utf8)] = None,
    vtt: Annotated[Path | None, typer.Option(help="Write WebVTT subtitles here.", callback=_utf8)] = None,
    json: Annotated[Path | None, typer.Option(help="Write pieces, times and warnings here.", callback=_utf8)] = None,
) -> None:
    """Print what is said in each file. With several, --srt, --vtt and --json name folders."""
    from llama_smop.transcription import run
    from llama_smop.transcription.recording import Options

    options = Options(modality=modality, face=_face(face), prepared=prepared, num_beams=beams)
    outputs = run.Outputs(clips, srt=srt, vtt=vtt, json=json)
    for transcript in run.transcripts(clips, model, options, progress=True):
        outputs.write(transcript)
        print(f"{transcript.path}\t{transcript.text}" if len(clips) > 1 else transcript.text, flush=True)


@app.command()
def crop(
    video: Path,
    out: Annotated[Path, typer.Option(help="mp4 to write.", callback=_utf8)],
    sheet: Annotated[Path | None, typer.Option(help="Picture (PNG) of the faces and crops.", callback=_utf8)] = None,
    face: Face = "auto",
) -> None:
    """Cut the mouth out of a video, 96×96 and with its sound, as the models are trained on."""
    from llama_smop import files
    from llama_smop.data.faces.export import crop_video

    which = _face(face)
    for target in (out, sheet):
        if target is not None:
            files.check_file(target)
    print(crop_video(video, out, sheet=sheet, face=which))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Llama-SMoP or Llama-AVSR state dict, or fairseq AV-HuBERT .pt.")],
    to: Annotated[Path, typer.Option(help="Folder to make.", callback=_utf8)],
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
def info(config: Configs, settings: Settings = None) -> None:
    """Estimate memory and arithmetic of a training file, beside those of the published sizes."""
    from llama_smop.estimate import info as describe
    from llama_smop.training.config import read_config

    print(describe(read_config(config, settings=settings or ())))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a training, a demo or an ablation.")]) -> None:
    """Write the report of a training, running or finished, of an ablation or of a finished demo again."""
    if (run / "results.json").exists():
        from llama_smop.reports.ablation.page import write_page

        print(write_page(run))
        return
    from llama_smop.reports.demo import write_report

    print(write_report(run))


@app.command()
def env() -> None:
    """Versions, devices, and which backends can serve, or why not: for bug reports."""
    from llama_smop.doctor.environment import environment, text

    print(text(environment()))


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option(help="Write everything here too.", callback=_utf8)] = None,
) -> None:
    """Check the backends against the float64 definition and time them, in under a minute; status 1 if one is wrong."""
    from llama_smop import files
    from llama_smop.doctor import run
    from llama_smop.doctor.environment import text

    if json is not None:
        files.check_file(json)
    found = run.examine()
    if json is not None:
        files.write_json(json, found)
    print(f"{text(found['environment'])}\n{run.table(found)}\n{found['verdict']}")
    if not found["right"]:
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; `arguments` default to those of the command line. Exits unless the status is 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its messages are for developers
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # file names are bytes, not always UTF-8
    try:
        status = app(arguments, standalone_mode=False)
        _flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except typer.Abort:
        status = 1
    except Exception as error:
        from llama_smop.ops.checks import debug

        usage = getattr(error, "exit_code", None)
        if usage is not None:  # typer's own error: a wrong option or argument
            error.show()
            sys.exit(usage)
        if debug():
            raise
        sys.exit(f"llama-smop: {_line(error, sys.argv[1:] if arguments is None else arguments)}")
    if status == INTERRUPTED:
        print("llama-smop: interrupted; the same command starts again", file=sys.stderr)
    if isinstance(status, int) and status:
        sys.exit(status)


def _line(error: Exception, arguments: list[str]) -> str:
    """The error in one line; an unexpected error with its type and the command's arguments."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llama_smop"):
        return remedy(error.name)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and error.filename is None:  # `files` names its files
        return f"writing failed, probably to standard output: {error.strerror} (in: {shlex.join(arguments)})"
    if text and isinstance(error, ValueError | OSError | RuntimeError):
        return text
    kind = type(error).__name__
    return f"{kind}{': ' * bool(text)}{text} (in: {shlex.join(arguments)}; LLAMA_SMOP_DEBUG=1 shows where)"


def _flush() -> None:
    """Flush standard output. Raises OSError: it failed; stdout is then /dev/null, for the interpreter's own flush."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output: {error.strerror}") from None


if __name__ == "__main__":
    main()
