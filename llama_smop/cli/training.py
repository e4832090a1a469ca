"""`demo`, `configs`, `train`, `ablate`, `average`, `info`, `report`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import Configs, Out, Settings, place


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
    to: Annotated[Path, typer.Option(help="Model folder to make.", callback=place)],
    last: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints.")] = 5,
) -> None:
    """Write the mean of a training's last whole checkpoints as a model."""
    from llama_smop.models import seal
    from llama_smop.training import averaging

    seal.check_target(to)  # before the checkpoints are hashed
    checkpoints = averaging.newest(run, last)
    if len(checkpoints) < last:
        raise ValueError(f"{run}: has {len(checkpoints)} whole checkpoints, --last asks for {last}; see run.keep")
    averaging.average(checkpoints, to, run)
    print(f"{to}\tmean of {', '.join(folder.name for folder in checkpoints)}")


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
