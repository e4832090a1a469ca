"""`save_pretrained` and `from_pretrained`: partial checkpoints, which leave out parts that `config.sources` names."""

import inspect
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llama_smop.models import card, hub, seal
from llama_smop.models.checkpoint_checks import absent, check_folder, refuse_disagreement, refuse_non_finite
from llama_smop.models.former_names import KEY_MAPPING
from llama_smop.models.hub import Source
from llama_smop.models.part_weights import load_part, part_weights
from llama_smop.system import files

SPECIAL_TOKENS_FILE = "special_tokens.safetensors"


class CheckpointMixin:
    """Before `PreTrainedModel` among a model's bases."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        complete: bool | None = None,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> CommitInfo | None:
        """Save whole, or with `config.sources` (and not `complete`) only what cannot be fetched again: what is
        trained, and the special tokens' embeddings. Written aside, then renamed: a full disk leaves the old files;
        weights of an earlier save that the new ones do not replace are removed, and a model card that nobody edited
        is written anew.

        A push goes to the repository `repo_id`, by default of the folder's name, with a model card; parts whose source
        is a folder or a file of this machine are saved whole."""
        if push_to_hub and (named := local_sources(self.config)):
            with without_sources(self.config, named):
                pushed = {"complete": complete, "state_dict": state_dict, "push_to_hub": True}
                return self.save_pretrained(save_directory, **pushed, **kwargs)
        state = self.state_dict() if state_dict is None else state_dict
        rows = None
        if self.config.sources and not complete:
            rows = special_token_rows(self, state)
            state = without_fetched_parts(self, state)
        own = inspect.signature(PreTrainedModel.save_pretrained).parameters
        saving = {k: v for k, v in kwargs.items() if k in own}
        pushing = {k: v for k, v in kwargs.items() if k not in own or k == "token"}
        with merging_into(save_directory) as folder:
            super().save_pretrained(folder, state_dict=state, **saving)
            if rows is not None:
                save_file(rows, folder / SPECIAL_TOKENS_FILE)
            written = {file.name for file in folder.iterdir()}
        folder = Path(save_directory)
        remove_stale_weights(folder, written, kwargs.get("variant"))
        if not kwargs.get("is_main_process", True):
            return None
        tags = [*(self.model_tags or ()), *(pushing.pop("tags", None) or ())]
        if push_to_hub:
            pushing.setdefault("repo_id", Path(os.path.abspath(folder)).name)
            told = card.read_metadata(folder)
            card.write_card(type(self), folder, replace(told, name=pushing["repo_id"], tags=[*told.tags, *tags]))
        elif (folder / seal.CARD).exists():
            card.write_card(type(self), folder)
        seal.renew(folder, () if seal.is_edited(folder / seal.CARD) else [seal.CARD])
        return hub.upload(folder, written, **pushing) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """Save and upload the model with a model card. `kwargs` are `save_pretrained`'s and `create_repo`'s, `tags`,
        `commit_message`, `commit_description`, `revision`, `create_pr` and `token`."""
        with TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args, output_loading_info: bool = False, **kwargs
    ) -> Any:
        """transformers' `from_pretrained`; parts that the checkpoint leaves out come from `config.sources`.

        Raises:
            ValueError: a checkpoint that is damaged, lacks weights, has others, holds numbers that are not finite, or
                disagrees with its config.
        """
        kwargs["ignore_mismatched_sizes"] = True
        kwargs["key_mapping"] = KEY_MAPPING | (kwargs.get("key_mapping") or {})
        source = hub.Source(pretrained_model_name_or_path, kwargs)
        if "config" not in kwargs:
            check_folder(cls, source)
        try:
            with quiet_load_report():
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: model.safetensors is truncated or damaged ({error}); copy it again"
            ) from None
        # A model is saved as it was loaded, but for names of ours that have changed.
        kept = [
            c for c in model._weight_conversions or () if KEY_MAPPING.keys().isdisjoint(c._original_source_patterns)
        ]
        model._weight_conversions = kept
        fetch_left_out_parts(model, info, source)
        model.freeze()
        return (model, info) if output_loading_info else model


def local_sources(config: Any) -> list[str]:
    """The parts whose source is on this machine, where others cannot fetch it."""
    return [part for part, source in config.sources.items() if not hub.is_hub_name(source)]


@contextmanager
def without_sources(config: Any, parts: Iterable[str]) -> Iterator[None]:
    """While open, `config` does not name the sources of `parts`, so that their weights are saved with the model."""
    sources, configs = config.sources, {"language_model": config.text_config, "audio_tower": config.audio_config}
    named = [(part, part.name_or_path) for part in (configs[p] for p in parts if p in configs)]
    config.sources = {part: source for part, source in sources.items() if part not in parts}
    for part, _ in named:
        part.name_or_path = ""
    try:
        yield
    finally:
        config.sources = sources
        for part, name in named:
            part.name_or_path = name


@contextmanager
def merging_into(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write into; its files are merged into `folder` when all of them are written."""
    folder = Path(folder)
    try:
        with files.folder_aside(folder) as aside:
            yield aside
            seal.renew(folder, files.move_into(aside, folder))
    except (OSError, SafetensorError) as error:  # safetensors raises the second on a full disk
        errno, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise OSError(errno, f"could not save {folder} ({reason}); its earlier files are as they were") from error


def remove_stale_weights(folder: Path, written: set[str], variant: str | None) -> None:
    """Remove weights of an earlier save from `folder` that a later load would prefer to those `written` now."""
    name = "model" if variant is None else f"model.{variant}"
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    weights = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    if not any(weights.fullmatch(file) for file in written):
        return  # another rank writes them
    for file in folder.iterdir():
        if file.name not in written and (weights.fullmatch(file.name) or file.name == SPECIAL_TOKENS_FILE):
            file.unlink()


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Hide transformers' table of missing keys, which `fetch_left_out_parts` checks."""
    logger = logging.getLogger("transformers.modeling_utils")
    # A filter, not a level: with its own level this logger warns about the tensor-parallel plan.
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def without_fetched_parts(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the frozen weights of the parts that `config.sources` names."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = tuple(f"{part}." for part in model.config.sources)
    return {k: v for k, v in state.items() if not k.startswith(parts) or k in trained}


def special_token_rows(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of the markers, the pad token and added tokens: frozen with LoRA, and in no source."""
    first, vocabulary = model.config.first_added_token, model.config.text_config.vocab_size
    added = () if first is None else range(first, vocabulary)
    ids = torch.tensor(sorted({*model.config.special_token_ids, *added}))
    rows = {"ids": ids}
    names = {id(module): name for name, module in model.named_modules()}
    for which, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if layer is not None:  # from `state`: the model's own may be sharded
            rows[which] = state[f"{names[id(layer)]}.weight"].detach()[ids].cpu().clone()
    return rows


def fetch_left_out_parts(model: PreTrainedModel, info: dict, folder: Source) -> None:
    """Fetch the parts that a checkpoint left out, and remove them from `info`'s missing keys.

    Raises:
        ValueError: the checkpoint disagrees with its config, or holds numbers that are not finite.
    """
    missing = set(info["missing_keys"])
    fetched, lost = absent(missing, model.config)
    wrong = [str(k[0] if isinstance(k, tuple | list) else k) for k in info["mismatched_keys"]]
    refuse_disagreement(folder, lost=lost, unexpected=info["unexpected_keys"], wrong=wrong)
    elsewhere = [p for p in fetched if any(w.is_meta for w in getattr(model, p).parameters())]
    if elsewhere or (fetched and getattr(model, "hf_quantizer", None) is not None):
        raise ValueError(
            f"{folder}: leaves out the weights of {' and '.join(fetched)}, and only a whole checkpoint can be loaded "
            "quantised or offloaded; load it as it is and save it with save_pretrained(…, complete=True)"
        )
    for part in fetched:
        source, module = model.config.sources[part], getattr(model, part)
        own = {k: v.clone() for k, v in module.state_dict().items() if f"{part}.{k}" not in missing}
        load_part(module, part_weights(part, source, model.dtype), source)
        module.load_state_dict(own, strict=False)
    info["missing_keys"] = set()
    if "language_model" in fetched:
        put_special_token_rows(model, folder)
    refuse_non_finite(model.state_dict(), folder)


@torch.no_grad()
def put_special_token_rows(model: PreTrainedModel, folder: str | Path | Source) -> None:
    """Give an unsharded model the markers' embeddings that its checkpoint holds.

    Raises:
        ValueError: the checkpoint lacks them.
    """
    folder = folder if isinstance(folder, Source) else Source(folder)
    file = folder.file(SPECIAL_TOKENS_FILE)
    if file is None:
        raise ValueError(f"{folder}: lacks {SPECIAL_TOKENS_FILE}, the embeddings of the speech markers; copy it too")
    rows = load_file(file)
    for which, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if which in rows:
            layer.weight[rows["ids"].to(layer.weight.device)] = rows[which].to(layer.weight)
