"""The command line: `llama-smop demo | corpus | configs | train | average | ablate | evaluate | transcribe | convert |
info | report`.

Commands import what they need when they run, so that `--help` is quick. Whatever goes wrong ends in one line on
stderr and exit status 1 (2: a wrong option); LLAMA_SMOP_DEBUG=1 shows where it came from. Ctrl-C ends with 130; a
training that SIGTERM or SIGHUP tells to end saves first, and ends with 143 or 129.
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

INTERRUPTED = 130  # by Ctrl-C: a shell's status of SIGINT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speech recognition that listens and reads lips, with a fast sparse mixture of projectors.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Corpora in the LRS3 layout: label, generate, show, shard.")
app.add_typer(corpus_app, name="corpus")


def _utf8(given):
    """Raises ValueError: a name or a setting that is not text. It is written down, and not every library takes it."""
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
    """Make a corpus, train a small Llama-SMoP on it, score it, transcribe, write a report. Resumes when run again."""
    from llama_smop import demo as module

    module.demo(out, clips=clips, steps=steps, seed=seed, full=full)


@corpus_app.command("make")
def corpus_make(
    out: Annotated[Path, typer.Argument(callback=_utf8)],
    clips: Annotated[int, typer.Option(min=8)] = 600,
    seed: int = 0,
    grammar: Annotated[Path | None, typer.Option(help="YAML word lists; default: GRID's, with twelve letters.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Write a corpus of synthetic talking faces into OUT; one seed, one set of bytes. Resumes when run again."""
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
    root: Annotated[Path, typer.Argument(help="What auto_avsr's preparation wrote: labels/, lrs3/.")],
    prepared: Annotated[list[str], typer.Option("--from", help="Its label file, under root/labels; may be repeated.")],
    to: Annotated[str, typer.Option(help="Label file to write, under root/labels.")],
    min_seconds: Annotated[float, typer.Option(min=0, help="Leave out shorter clips.")] = 0.2,
    max_seconds: Annotated[float, typer.Option(help="Leave out longer clips; Whisper takes 30.")] = 30.0,
    keep_case: Annotated[bool, typer.Option("--keep-case", help="Do not lower-case the texts.")] = False,
) -> None:
    """Write a label file with texts for clips that auto_avsr's preparation cropped of LRS2, LRS3 or VoxCeleb2."""
    from llama_smop.data.auto_avsr import write_labels

    print(write_labels(root, prepared, to, min_seconds=min_seconds, max_seconds=max_seconds, lower=not keep_case))


@corpus_app.command("shard")
def corpus_shard(
    root: Path,
    out: Annotated[Path, typer.Option(help="Folder for the shards.", callback=_utf8)],
    labels: Annotated[str, typer.Option(help="Label file, under root/labels.")] = "train.csv",
    clips_per_shard: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Draws the order of the clips.")] = 0,
) -> None:
    """Write a corpus as webdataset tar shards, which a training reads as `data.shards`. Resumes when run again."""
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
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint in OUT.")] = True,
) -> None:
    """Train a model as the CONFIGs say. Run again after an interruption, it goes on where it was."""
    from llama_smop.training.config import read_config
    from llama_smop.training.run import train as run

    print(run(read_config(config, settings=settings or ()), out, resume=resume))


@app.command()
def ablate(
    config: Annotated[Path, typer.Option(help="Grid file (YAML) or a shipped one's name, such as ablation/sharing.")],
    out: Out,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at a time; default: the grid's.")] = None,
) -> None:
    """Train and score every cell of a grid, then write one table and pictures. Goes on when run again."""
    from llama_smop.ablation import ablate as run

    print(run(config, out, jobs=jobs))


@app.command()
def average(
    run: Annotated[Path, typer.Argument(help="Folder of a training.")],
    to: Annotated[Path, typer.Option(help="Model folder to make.", callback=_utf8)],
    last: Annotated[int, typer.Option(min=1, help="How many of its newest checkpoints.")] = 5,
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
    babble_labels: Annotated[str, typer.Option(help="Label file of the clips that babble is mixed of.")] = "train.csv",
    beams: Beams = 1,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode clips; default: 4 on a GPU.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write rows and transcripts here too.", callback=_utf8)] = None,
) -> None:
    """Word error rate by modality and SNR, as a table. Under torchrun the clips are shared out over the processes."""
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
    here = PartialState(cpu=not torch.cuda.is_available())  # one process, or one of torchrun's with its own GPU
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


@app.command()
def transcribe(
    clips: Annotated[list[Path], typer.Argument(help="mp4 or sound files.")],
    model: Model,
    modality: Annotated[str | None, typer.Option(help="audio, video or audiovisual; default: all there is.")] = None,
    beams: Beams = 1,
) -> None:
    """Print what is said in each clip."""
    from llama_smop.transcription.run import transcribe as run

    for path, text in run(clips, model, modality=modality, num_beams=beams):
        print(f"{path}\t{text}" if len(clips) > 1 else text, flush=True)


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
    key_map: Annotated[Path | None, typer.Option(help="YAML rules that go before the built-in ones.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept missing and unexpected keys.")] = False,
) -> None:
    """Make a model folder of other people's checkpoints; every key is accounted for."""
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
    """Memory and arithmetic that a training file asks for, beside the published sizes."""
    from llama_smop.estimate import info as describe
    from llama_smop.training.config import read_config

    print(describe(read_config(config, settings=settings or ())))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a training, a demo or an ablation.")]) -> None:
    """Write the page about a training, running or ended, an ablation or a finished demo again."""
    if (run / "results.json").exists():
        from llama_smop.reports.ablation.page import write_page

        print(write_page(run))
        return
    from llama_smop.reports.demo import write_report

    print(write_report(run))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; `arguments` default to the command line's. Returns, or exits with a status other than 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes are for developers
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files are bytes, not always UTF-8
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
        if usage is not None:  # typer's own: a wrong option or argument
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
    """What is wrong; of an error that nobody foresaw also its kind, and of which files the command was."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llama_smop"):
        return remedy(error.name)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and error.filename is None:  # what is written to files names them
        return f"writing failed, to standard output most likely: {error.strerror} (in: {shlex.join(arguments)})"
    if text and isinstance(error, ValueError | OSError | RuntimeError):
        return text
    kind = type(error).__name__
    return f"{kind}{': ' * bool(text)}{text} (in: {shlex.join(arguments)}; LLAMA_SMOP_DEBUG=1 shows where)"


def _flush() -> None:
    """Raises OSError: what was printed did not get out. The interpreter, which would try again, is spared it."""
    if sys.stdout is None:  # closed before it began
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output: {error.strerror}") from None


if __name__ == "__main__":
    main()
