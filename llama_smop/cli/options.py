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


def place(given):
    """Raises ValueError: a name that nothing can be written to, or "-", by which other programs mean something else."""
    if str(given) == "-":
        raise ValueError("-: names no file or folder here; standard output is /dev/stdout")
    return utf8(given)


Out = Annotated[Path, typer.Option(help="Folder for the results.", callback=place)]
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
Face = Annotated[str, typer.Option(help="auto (who speaks), largest, or a number: --sheet of `crop` shows them.")]


def face_choice(text: str) -> str | int:
    """Raises ValueError: not a value of --face."""
    if text in ("auto", "largest"):
        return text
    if not text.isdecimal():
        raise ValueError(f"--face takes auto, largest or a number, got {text!r}")
    return int(text)
