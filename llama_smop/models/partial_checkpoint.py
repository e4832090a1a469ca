"""What our checkpoints hold, and how they are written and read without half-done results."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_smop import files
from llama_smop.models import seal
from llama_smop.models.fit import absent, refuse_disagreement, refuse_non_finite
from llama_smop.models.hub import Source
from llama_smop.models.part_weights import load_part, part_weights

SPECIAL_TOKENS_FILE = "special_tokens.safetensors"


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; its files move over when all of them are there."""
    folder = Path(folder)
    try:
        with files.folder_aside(folder) as aside:
            yield aside
            seal.renew(folder, files.move_into(aside, folder))
    except (OSError, SafetensorError) as error:  # the second is safetensors' full disk
        errno, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise OSError(errno, f"could not save {folder} ({reason}); its earlier files are as they were") from error


def remove_stale_weights(folder: Path, written: set[str], variant: str | None) -> None:
    """Remove what an earlier save left in `folder` and a later load would take in place of what is `written` now."""
    name = "model" if variant is None else f"model.{variant}"
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    weights = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    if not any(weights.fullmatch(file) for file in written):
        return  # another process writes them
    for file in folder.iterdir():
        if file.name not in written and (weights.fullmatch(file.name) or file.name == SPECIAL_TOKENS_FILE):
            file.unlink()


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Without transformers' table of missing keys: `complete` judges them."""
    logger = logging.getLogger("transformers.modeling_utils")
    # A filter, not a level: with a level of its own the logger has the tensor-parallel plan checked and warned about.
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def without_fetched_parts(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the frozen weights of the parts that `config.sources` names."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = tuple(f"{part}." for part in model.config.sources)
    return {k: v for k, v in state.items() if not k.startswith(parts) or k in trained}


def special_token_rows(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The markers', the pad token's and added tokens' embeddings: with LoRA they are frozen, and nowhere else."""
    first, vocabulary = model.config.first_added_token, model.config.text_config.vocab_size
    added = () if first is None else range(first, vocabulary)
    ids = torch.tensor(sorted({*model.config.special_token_ids, *added}))
    rows = {"ids": ids}
    names = {id(module): name for name, module in model.named_modules()}
    for which, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if layer is not None:  # from `state`: the model's own may be sharded
            rows[which] = state[f"{names[id(layer)]}.weight"].detach()[ids].cpu().clone()
    return rows


def complete(model, info: dict, folder: Source) -> None:
    """Fetch the parts that a checkpoint left out, and strike them off `info`'s missing keys.

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
def put_special_token_rows(model, folder: str | Path | Source) -> None:
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
