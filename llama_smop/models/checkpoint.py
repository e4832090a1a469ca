"""What our checkpoints hold, and how they are written and read without half-done results."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_smop import files, seal
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


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Without transformers' table of missing keys: `complete` judges them."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def without_fetched_parts(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the frozen weights of the parts that `config.sources` names."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = tuple(f"{part}." for part in model.config.sources)
    return {k: v for k, v in state.items() if not k.startswith(parts) or k in trained}


def special_token_rows(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The markers' and the pad token's embeddings: with LoRA they are random and frozen, and nowhere else."""
    ids = torch.tensor(_special_ids(model.config))
    rows = {"ids": ids}
    names = {id(module): name for name, module in model.named_modules()}
    for which, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if layer is not None:  # from `state`: the model's own may be sharded
            rows[which] = state[f"{names[id(layer)]}.weight"].detach()[ids].cpu().clone()
    return rows


def complete(model, info: dict, folder: str | Path) -> None:
    """Fetch the parts that a checkpoint left out, and strike them off `info`'s missing keys.

    Raises:
        ValueError: the checkpoint disagrees with its config.
    """
    missing = set(info["missing_keys"])
    fetched = [p for p in model.config.sources if any(k.startswith(f"{p}.") for k in missing)]
    lost = sorted(k for k in missing if not k.startswith(tuple(f"{p}." for p in fetched)) or "lora_" in k)
    wrong = sorted(str(k[0] if isinstance(k, tuple | list) else k) for k in info["mismatched_keys"])
    for keys, what in (
        (lost, "lacks"),
        (sorted(info["unexpected_keys"]), "has, beyond what its config asks for,"),
        (wrong, "has in another shape than its config asks for"),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{folder}: the checkpoint {what} {', '.join(keys[:3])}{more}; config and weights disagree"
            )
    for part in fetched:
        source, module = model.config.sources[part], getattr(model, part)
        own = {k: v.clone() for k, v in module.state_dict().items() if f"{part}.{k}" not in missing}
        load_part(module, part_weights(part, source, model.dtype), source)
        module.load_state_dict(own, strict=False)
    info["missing_keys"] = set()
    if "language_model" in fetched:
        put_special_token_rows(model, folder)


@torch.no_grad()
def put_special_token_rows(model, folder: str | Path) -> None:
    """Give an unsharded model the markers' embeddings that its checkpoint holds.

    Raises:
        ValueError: the checkpoint lacks them.
    """
    file = Path(folder) / SPECIAL_TOKENS_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: lacks {SPECIAL_TOKENS_FILE}, the embeddings of the speech markers; copy it too")
    rows = load_file(file)
    for which, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if which in rows:
            layer.weight[rows["ids"].to(layer.weight.device)] = rows[which].to(layer.weight)


def _special_ids(config) -> list[int]:
    ids = [config.audio_token_id, config.audio_end_token_id, config.video_token_id, config.video_end_token_id]
    return sorted({*ids, *(() if config.pad_token_id is None else (config.pad_token_id,))})
