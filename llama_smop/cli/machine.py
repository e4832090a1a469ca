"""`env`, `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import place


@app.command()
def env() -> None:
    """Versions, devices, and which backends can serve, or why not: for bug reports."""
    from llama_smop.doctor.environment import environment, text

    print(text(environment()))


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option(help="Write everything here too.", callback=place)] = None,
) -> None:
    """Check the backends against the float64 definition and time them, in under a minute; status 1 if one is wrong."""
    from llama_smop.doctor import run
    from llama_smop.doctor.environment import text
    from llama_smop.system import files

    if json is not None:
        files.check_file(json)
    found = run.examine()
    if json is not None:
        files.write_json(json, found)
    print(f"{text(found['environment'])}\n{run.table(found)}\n{found['verdict']}")
    if not found["right"]:
        raise typer.Exit(1)
