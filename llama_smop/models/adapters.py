"""LoRA out of a model and into it: peft's adapter folders, and weights with LoRA folded in."""

import math
import re
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama_smop.models import seal
from llama_smop.models.checkpoint_checks import refuse_non_finite
from llama_smop.models.lora import inject_lora, lora_settings, peft_config
from llama_smop.models.modeling_llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.system import files

PARTS = ("language_model", "video_tower")
ADAPTER_PREFIX = "base_model.model."  # before the names of the base model's modules
# Settings of peft that leave W + alpha / r · B·A as it is; with any other that is set, something else is computed.
PLAIN = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *(
        "layers_pattern",
        "init_lora_weights",
        "use_rslora",
        "loftq_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    ),
}


def lora_weights(model: LlamaSmopForConditionalGeneration, part: str = "language_model") -> dict[str, Tensor]:
    """The LoRA factors of a part under peft's names, A (r, inputs) and B (outputs, r).

    Raises:
        ValueError: the model has no such part, or no LoRA in it.
    """
    _expect_part(model, part)
    if part not in model.config.lora:
        known = f"only in {', '.join(model.config.lora)}" if model.config.lora else "nowhere"
        raise ValueError(f"this model has no LoRA in its {part} ({known}), so there is no adapter to export")
    state = getattr(model, part).state_dict()
    return {ADAPTER_PREFIX + _without_adapter(name): value for name, value in state.items() if "lora_" in name}


def export_adapter(model: LlamaSmopForConditionalGeneration, folder: str | Path, part: str = "language_model") -> Path:
    """Write a part's LoRA as the folder that `PeftModel.from_pretrained(base, folder)` reads.

    Raises:
        ValueError: see `lora_weights`.
        OSError: `folder` cannot be written (`seal.check_target`).
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in lora_weights(model, part).items()}
    config = peft_config(
        model.config.lora[part],
        base_model_name_or_path=model.config.sources.get(part),
        task_type="CAUSAL_LM" if part == "language_model" else None,
        inference_mode=True,
    )

    def write(aside: Path) -> None:
        config.save_pretrained(str(aside))
        save_file(weights, aside / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})

    return seal.write_sealed(folder, write)


@torch.no_grad()
def import_adapter(
    model: LlamaSmopForConditionalGeneration, folder: str | Path, part: str = "language_model"
) -> LlamaSmopForConditionalGeneration:
    """Put the LoRA of peft's adapter folder into a part, in place of the LoRA that is there; the part is then frozen.

    Raises:
        ValueError: no adapter there, one of another method than LoRA, or one that does not fit the part; the model is
            as it was.
    """
    _expect_part(model, part)
    module, folder = getattr(model, part), Path(folder)
    settings, weights = _read_adapter(folder)
    settings["targets"] = _targets(module, weights, folder)
    had_lora, learnt = part in model.config.lora, any(p.requires_grad for p in module.parameters())
    before = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    remove_lora(module)
    inject_lora(module, settings)
    own = {_without_adapter(name): value for name, value in module.named_parameters() if "lora_" in name}
    wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
    if wrong:
        remove_lora(module)
        for name, layer in before.items():
            module.set_submodule(name, layer)
        raise ValueError(f"{folder}: does not fit this model's {part}: {_difference(wrong[0], own, weights)}")
    for name, value in own.items():
        value.copy_(weights[name])
    model.config.lora = model.config.lora | {part: settings}
    if learnt and not had_lora:
        _keep_weights(model, part)
    model.freeze()
    return model


@torch.no_grad()
def merge_lora(model: LlamaSmopForConditionalGeneration) -> LlamaSmopForConditionalGeneration:
    """Fold LoRA into the weights: W + alpha / r · B·A, summed in float32 and rounded to W's dtype. In place.

    The merged parts are then saved whole, and no longer fetched from `config.sources`.

    Raises:
        ValueError: no LoRA, quantised weights, or LoRA on an embedding that is tied to the head; nothing is changed.
    """
    if not model.config.lora:
        raise ValueError("this model has no LoRA, so there is nothing to merge")
    for part in model.config.lora:
        for name, layer in getattr(model, part).named_modules():
            if isinstance(layer, LoraLayer):
                _expect_mergeable(model, layer, f"{part}.{name}")
    for part in model.config.lora:
        for layer in getattr(model, part).modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + _delta(layer))
        remove_lora(getattr(model, part))
        _keep_weights(model, part)
    model.config.lora = {}
    model.freeze()
    return model


def remove_lora(module: nn.Module) -> None:
    """Put the layers without LoRA back, with their own weights."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            module.set_submodule(name, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def _delta(layer: LoraLayer) -> Tensor:
    adapter = {name: value for name, value in layer.named_parameters() if "lora_" in name}
    if any("embedding" in name for name in adapter):
        (a,), (b,) = (
            [value.float() for name, value in adapter.items() if f"lora_embedding_{which}" in name] for which in "AB"
        )
        return layer.scaling["default"] * (b @ a).T
    return layer.scaling["default"] * (layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float())


def _expect_part(model: LlamaSmopForConditionalGeneration, part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"LoRA stands in {' or '.join(PARTS)}, got {part!r}")
    if not hasattr(model, part):
        raise ValueError(f"this model has no {part}: its modalities are {', '.join(model.config.modalities)}")


def _expect_mergeable(model: LlamaSmopForConditionalGeneration, layer: LoraLayer, name: str) -> None:
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, nn.Embedding) or type(base.weight) is not nn.Parameter:
        raise ValueError(f"{name}: LoRA cannot be folded into quantised weights; load the model without quantisation")
    tied = {id(e) for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    if model.config.tie_word_embeddings and id(layer) in tied:
        raise ValueError(f"{name}: LoRA cannot be folded into an embedding that is also the head")


def _keep_weights(model: LlamaSmopForConditionalGeneration, part: str) -> None:
    """Have a part, whose weights are not its source's, saved with the model."""
    model.config.sources = {p: source for p, source in model.config.sources.items() if p != part}
    if part == "language_model":
        model.config.first_added_token = None


def _read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """{"r", "alpha", "init"} and the factors by name, without peft's prefix."""
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no adapter here ({name} is missing); give the folder that peft saved")
    said = files.read_json(folder / CONFIG_NAME)
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else said
        raise ValueError(f"{folder}: is an adapter of kind {kind!r:.40}, and only LORA can be imported")
    other = [name for name, value in said.items() if name not in PLAIN and value and value != "none"]
    if said.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        other.append("init_lora_weights")  # whose other methods also change the base's weights
    if other:
        raise ValueError(f"{folder}: uses {', '.join(other)} of peft, and only plain LoRA can be imported")
    try:
        settings = lora_settings({"r": said.get("r"), "alpha": said.get("lora_alpha")})
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if said.get("use_rslora"):  # whose scale is alpha / √r
        settings["alpha"] *= math.sqrt(settings["r"])
    refuse_non_finite(weights, folder)
    foreign = [name for name in weights if not name.startswith(ADAPTER_PREFIX) or "lora_" not in name]
    if foreign or not weights:
        raise ValueError(f"{folder}: {foreign[0] if foreign else 'nothing in it'} is no factor of LoRA")
    return settings, {name.removeprefix(ADAPTER_PREFIX): value for name, value in weights.items()}


def _targets(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> list[str]:
    """Names by which peft finds exactly the modules that the weights are for."""
    modules = {re.sub(r"\.lora_.*", "", name) for name in weights}
    there = {name.replace(".base_layer", "") for name, _ in module.named_modules()}
    unknown = sorted(modules - there)
    if unknown:
        raise ValueError(f"{folder}: is for a module {unknown[0]}, which this model does not have")
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    found = {name for name in there if name.rpartition(".")[2] in leaves}
    return leaves if found == modules else sorted(modules)


def _difference(name: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    sizes = [tuple(values[name].shape) if name in values else "none" for values in (weights, own)]
    return f"{name} is {sizes[0]} there, and {sizes[1]} here"


def _without_adapter(name: str) -> str:
    return name.replace(".default", "")
