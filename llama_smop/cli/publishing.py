"""`card`, `adapter export`, `adapter import`, `merge`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_smop.cli.app import app
from llama_smop.cli.options import Model, place, utf8

adapter_app = typer.Typer(no_args_is_help=True, help="LoRA as peft's adapter folders: export, import.")
app.add_typer(adapter_app, name="adapter")

ModelTo = Annotated[Path, typer.Option(help="Model folder to make.", callback=place)]
Part = Annotated[str, typer.Option(help="language_model or video_tower.")]


@app.command()
def card(
    model: Model,
    results: Annotated[list[Path] | None, typer.Option(help="File of `evaluate --json`; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, by the hub's name.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Trained on, by the hub's name; may be repeated.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Spoken, such as en; may be repeated.")] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(help="Started from, by the hub's name; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name.", callback=utf8)] = None,
) -> None:
    """Write a model's card (README.md) again, with results and what you say here. An edited card is not replaced."""
    from llama_smop.models.card import rewrite_card
    from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
    from llama_smop.system import files

    given = {"name": name, "license": license, "datasets": dataset, "languages": language, "base_models": base_model}
    found = [(path, files.read_json(path)) for path in results or ()]
    print(rewrite_card(LlamaSmopForConditionalGeneration, model, {k: v for k, v in given.items() if v}, found))


@adapter_app.command("export")
def export_(
    model: Model,
    to: Annotated[Path, typer.Option(help="Adapter folder to make.", callback=place)],
    part: Part = "language_model",
) -> None:
    """Write a model's LoRA as an adapter folder, which peft loads onto the base model."""
    from llama_smop.models import adapters, model_folder, seal

    seal.check_target(to)
    print(adapters.export_adapter(model_folder.load(model, "cpu")[0], to, part))


@adapter_app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that peft or `adapter export` wrote.")],
    model: Model,
    to: ModelTo,
    part: Part = "language_model",
) -> None:
    """Make a model of MODEL with the LoRA of an adapter folder, in place of the LoRA that it has."""
    from llama_smop.models import adapters, model_folder, seal
    from llama_smop.models.card import Metadata, inherited

    seal.check_target(to)
    loaded, processor = model_folder.load(model, "cpu")
    known = Metadata(base_models=inherited(model).base_models)  # the adapter's data and licence may be others
    print(model_folder.save(adapters.import_adapter(loaded, adapter, part), processor, to, metadata=known))


@app.command()
def merge(model: Model, to: ModelTo) -> None:
    """Make a model of MODEL whose LoRA is folded into the weights, for engines without LoRA."""
    from llama_smop.models import adapters, model_folder, seal
    from llama_smop.models.card import inherited

    seal.check_target(to)
    loaded, processor = model_folder.load(model, "cpu")
    known = inherited(model)
    print(model_folder.save(adapters.merge_lora(loaded), processor, to, metadata=known))
