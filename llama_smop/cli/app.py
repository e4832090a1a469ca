"""The application to which each module of this folder adds its commands."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speech recognition that listens and reads lips, with a fast sparse mixture of projectors.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Corpora in the LRS3 layout: crop, label, generate, show, shard.")
app.add_typer(corpus_app, name="corpus")
