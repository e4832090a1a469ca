"""Checks that a model folder's config and weights agree, made before memory is allocated for them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.former_names import present_name
from llama_smop.models.hub import Source


def check_folder(kind: type, source: Source) -> None:
    """Compare the shapes that a local folder's config asks for with those of its weights.

    Hub names and quantised weights are not checked. Missing weights are reported where the folder has only names that
    the config knows.

    Raises:
        ValueError: a config that no model can be made of, or weights of other shapes; one line with the folder.
    """
    folder = Path(str(source))
    if not (folder / CONFIG_NAME).is_file():
        return
    _check_generation_settings(folder)
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or settings.get("model_type") != LlamaSmopConfig.model_type:
            raise ValueError(f"it is not that of a {LlamaSmopConfig.model_type} model")
        config = LlamaSmopConfig.from_pretrained(folder)
        with torch.device("meta"), init.no_init_weights():
            model = kind(config)
        asked = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    except Exception as error:  # transformers and torch raise many types for an invalid config
        reason = " ".join(f"{error or type(error).__name__}".split())[:300]
        raise ValueError(f"{folder}: no model can be made of its {CONFIG_NAME}: {reason}") from error
    if settings.get("quantization_config"):
        return  # packed weights have shapes of their own
    there = _shapes(folder)
    wrong = [name for name in asked.keys() & there if asked[name] != there[name]]
    known = there and there.keys() <= asked.keys()
    missing = asked.keys() - there - model.all_tied_weights_keys.keys() if known else ()
    refuse_disagreement(source, lost=absent(missing, config)[1], wrong=wrong)


def absent(missing: Collection[str], config: LlamaSmopConfig) -> tuple[list[str], list[str]]:
    """The parts to fetch from their sources for the weights a checkpoint lacks, and the names that no source has."""
    fetched = [part for part in config.sources if any(name.startswith(f"{part}.") for name in missing)]
    prefixes = tuple(f"{part}." for part in fetched)
    return fetched, [name for name in missing if not name.startswith(prefixes) or "lora_" in name]


def refuse_disagreement(
    source: Source, *, lost: Collection[str] = (), unexpected: Collection[str] = (), wrong: Collection[str] = ()
) -> None:
    """ValueError of one line for weights, by name, that disagree with the config."""
    for keys, what in (
        (lost, "lacks"),
        (unexpected, "has, beyond what its config asks for,"),
        (wrong, "has in another shape than its config asks for"),
    ):
        if keys:
            names, more = sorted(keys), f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{source}: the checkpoint {what} {', '.join(names[:3])}{more}; config and weights disagree"
            )


def _check_generation_settings(folder: Path) -> None:
    """ValueError for a damaged file, which transformers would silently replace by its defaults."""
    file = folder / GENERATION_CONFIG_NAME
    try:
        if file.exists() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: {file.name} cannot be read ({error}); copy it again") from None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that `from_pretrained` would load, by present names; unreadable files are left out."""
    files = [folder / SAFE_WEIGHTS_NAME]
    if not files[0].is_file() and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = sorted(folder.glob("model-*-of-*.safetensors"))
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    shapes[present_name(name)] = tuple(weights.get_slice(name).get_shape())
        except (OSError, SafetensorError):
            continue  # loading reports what is wrong with it
    return shapes


@torch.no_grad()
def refuse_non_finite(weights: Mapping[str, Tensor], source: Source | str | Path) -> None:
    """ValueError for a weight with a NaN or an infinity: a training that diverged, or a damaged file."""
    names = [name for name, value in weights.items() if not _finite(value)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{source}: {names[0]}{more} holds NaN or infinity; the training diverged or the file is damaged, take "
            "another checkpoint"
        )


def _finite(value: Tensor) -> bool:
    if is_traceable_wrapper_subclass(value):  # such as torchao's: whole numbers and their scales
        return all(_finite(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    whole = not value.is_floating_point() or value.element_size() < 2  # as in quantised weights
    if whole or value.is_meta or value.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())  # aminmax passes NaN on and copies nothing
