"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer


def utf8(given):
    """Raises ValueError: a name or setting that is not UTF-8, which records and some libraries cannot store."""
    for value in given if isinstance(given, list | tuple) else [given]:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(value)!r}: the name is not UTF-8; choose another one") from None
    return given


Out = Annotated[Path, typer.Option(help="Folder for the results.", callback=utf8)]
Model = Annotated[Path, typer.Option(help="Model folder that training or convert wrote.")]
Configs = Annotated[
    list[str],
    typer.Option(
        help="YAML file, or a shipped one's name; may be repeated, later ones override. See `configs`.", callback=utf8
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key.path=value, after all files; may be repeated.", callback=utf8)
]
Beams = Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")]
