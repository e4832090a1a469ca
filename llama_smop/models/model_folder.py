"""Model folders: written aside, sealed with hashes, read back only when whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from llama_smop.models import card
from llama_smop.models.card_records import write_training
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.processing_llama_smop import LlamaSmopProcessor
from llama_smop.models.seal import SEAL, is_whole, write_sealed


def save(
    model: LlamaSmopForConditionalGeneration,
    processor: LlamaSmopProcessor,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
    training: dict | None = None,
    metadata: card.Metadata | None = None,
) -> Path:
    """Write a model folder with its model card; `weights` in place of the model's own, which may be sharded.

    training, metadata: for the card (`card_records.write_training`, `card.Metadata`).

    Raises:
        OSError: see `seal.check_target`; a disk that is full, and the model that was there before still is.
    """

    def write(aside: Path) -> None:
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        describe(type(model), aside, Path(folder).name, training, metadata)

    with quietly():
        return write_sealed(folder, write)


def describe(
    kind: Any, folder: Path, name: str, training: dict | None = None, metadata: card.Metadata | None = None
) -> None:
    """Write the records and the card of a model folder that is being written and will be called `name`."""
    metadata = metadata or card.Metadata()
    if training:
        write_training(folder, training)
        name = training.get("name", name)
    card.write_card(kind, folder, replace(metadata, name=metadata.name or name))


def load(
    folder: str | Path, device: str | torch.device | None = None
) -> tuple[LlamaSmopForConditionalGeneration, LlamaSmopProcessor]:
    """Model (in eval mode) and processor of a folder that `save` or a training run wrote.

    device: by default a GPU where there is one.

    Raises:
        ValueError: no such folder, no model in it, or weights that disagree with the configuration; one line.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model here (config.json is missing); give the folder a training run wrote")
    if (folder / SEAL).is_file() and not is_whole(folder, ".safetensors"):
        raise ValueError(f"{folder}: the weights are not those that were saved ({SEAL} says so); copy it again")
    try:
        with quietly():
            model = LlamaSmopForConditionalGeneration.from_pretrained(folder, local_files_only=True)
            processor = LlamaSmopProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types for a malformed file
        if str(error).startswith(f"{folder}: "):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}: cannot be read: {reason[:300]}") from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


@contextmanager
def quietly() -> Iterator[None]:
    """Hide transformers' progress bars over weights and its notes on sharding."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
