"""fairseq's AV-HuBERT checkpoints: their names, their settings, and the video tower made of them."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from llama_smop.models.avhubert import AvHubertVideoEncoder
from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig
from llama_smop.models.formats.key_map import KeyReport, Rule, rename
from llama_smop.models.formats.safe_load import load_checkpoint, state_dict_of

_NOT_VIDEO = "not needed for video features"
FRONTEND = r"feature_extractor_video\.resnet\."
AVHUBERT_RULES = (
    Rule(FRONTEND + r"frontend3D\.0\.weight", "frontend.conv.weight"),
    Rule(FRONTEND + r"frontend3D\.1\.(\w+)", r"frontend.norm.\1"),
    Rule(FRONTEND + r"frontend3D\.2\.weight", "frontend.act.weight"),
    Rule(FRONTEND + r"trunk\.(layer\d+\.\d+)\.conv([12])\.weight", r"frontend.trunk.\1.conv\2.weight"),
    Rule(FRONTEND + r"trunk\.(layer\d+\.\d+)\.bn([12])\.(\w+)", r"frontend.trunk.\1.norm\2.\3"),
    Rule(FRONTEND + r"trunk\.(layer\d+\.\d+)\.relu([12])\.weight", r"frontend.trunk.\1.act\2.weight"),
    Rule(FRONTEND + r"trunk\.(layer\d+\.\d+)\.downsample\.([01])\.(\w+)", r"frontend.trunk.\1.shortcut.\2.\3"),
    Rule(r"feature_extractor_video\.proj\.(weight|bias)", r"proj.\1"),
    Rule(r"(layer_norm|post_extract_proj)\.(weight|bias)", r"\1.\2"),
    Rule(r"encoder\.pos_conv\.0\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    Rule(r"encoder\.pos_conv\.0\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    Rule(r"encoder\.pos_conv\.0\.bias", "encoder.pos_conv_embed.conv.bias"),
    Rule(r"encoder\.layer_norm\.(weight|bias)", r"encoder.layer_norm.\1"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn\.([kqv]|out)_proj\.(weight|bias)", r"\1.attention.\2_proj.\3"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn\.lora_down_Q\.weight", r"\1.attention.q_proj.lora_A.default.weight"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn\.lora_up_Q\.weight", r"\1.attention.q_proj.lora_B.default.weight"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn\.lora_down_V\.weight", r"\1.attention.v_proj.lora_A.default.weight"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn\.lora_up_V\.weight", r"\1.attention.v_proj.lora_B.default.weight"),
    Rule(r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(weight|bias)", r"\1.layer_norm.\2"),
    Rule(r"(encoder\.layers\.\d+)\.final_layer_norm\.(weight|bias)", r"\1.final_layer_norm.\2"),
    Rule(r"(encoder\.layers\.\d+)\.fc1\.(weight|bias)", r"\1.feed_forward.intermediate_dense.\2"),
    Rule(r"(encoder\.layers\.\d+)\.fc2\.(weight|bias)", r"\1.feed_forward.output_dense.\2"),
    Rule(r"feature_extractor_audio\..+|mask_emb|label_embs_concat|final_proj\..+", None, _NOT_VIDEO),
)
# Checkpoints fine-tuned for lip reading carry the encoder under this prefix, and a decoder.
FINE_TUNED = "encoder.w2v_model."


def load_avhubert(
    path: str | Path, *, settings: dict | None = None, partial: bool = False
) -> tuple[AvHubertVideoEncoder, KeyReport]:
    """The video tower of a fairseq AV-HuBERT checkpoint, Base or Large, pre-trained or fine-tuned, in eval mode.

    Args:
        settings: fairseq's names (`encoder_attention_heads`, `layer_norm_first`) for a file that carries none, or in
            place of its own. Without any: width / 64 heads, layer norm first from width 1024 on (Large).
        partial: load even with keys missing or unexpected.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`; an unsupported variant; missing or unexpected keys.
    """
    checkpoint = load_checkpoint(path)
    state = state_dict_of(checkpoint, path)
    if any(k.startswith(FINE_TUNED) for k in state):
        state = {k.removeprefix(FINE_TUNED): v for k, v in state.items() if k.startswith(FINE_TUNED)}
    config = avhubert_config(state, model_settings(checkpoint, path) | (settings or {}), source=path)
    with no_init_weights():
        tower = AvHubertVideoEncoder(config)
    tensors, report = rename(state, AVHUBERT_RULES, {k: v.shape for k, v in tower.state_dict().items()})
    report.check(path, partial)
    tower.load_state_dict(tensors, strict=False)
    return tower.eval(), report


def is_avhubert(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is fairseq's AV-HuBERT, pre-trained or fine-tuned."""
    return any(k.removeprefix(FINE_TUNED).startswith("feature_extractor_video.") for k in state)


def model_settings(checkpoint: Any, source: str | Path = "AV-HuBERT") -> dict:
    """fairseq's settings of the encoder ("cfg" or "args"), {} where the file has none.

    Raises:
        ValueError: what should be settings is something else.
    """
    if not isinstance(checkpoint, dict):
        return {}
    cfg = _settings(checkpoint.get("cfg"), "cfg", source)
    settings = _settings(cfg.get("model"), "cfg.model", source) or _settings(checkpoint.get("args"), "args", source)
    inner = settings.get("w2v_args")
    if isinstance(inner, argparse.Namespace):
        return vars(inner)
    inner = _settings(inner, "w2v_args", source)
    return (_settings(inner["model"], "w2v_args.model", source) if "model" in inner else inner) or settings


def _settings(found, name: str, source: str | Path) -> dict:
    if found is None:
        return {}
    found = vars(found) if isinstance(found, argparse.Namespace) else found
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {name} holds a {type(found).__name__}, expected fairseq's settings by name")
    return found


def avhubert_config(
    state: dict[str, Tensor], settings: dict | None = None, *, source: str | Path = "AV-HuBERT"
) -> AvHubertVideoConfig:
    """Sizes from the tensors' shapes, the rest from fairseq's settings.

    Raises:
        ValueError: no AV-HuBERT video encoder, or a variant other than concatenation with PReLU.
    """
    settings = settings or {}
    try:
        width = state["post_extract_proj.weight"].shape[0]
        frontend = state["feature_extractor_video.resnet.frontend3D.0.weight"].shape[0]
        kernel = state["encoder.pos_conv.0.weight_v"]
        ffn = state["encoder.layers.0.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{source}: holds no AV-HuBERT video encoder ({error.args[0]} is not in it)") from None
    for name, wanted in (("modality_fuse", "concat"), ("resnet_relu_type", "prelu"), ("activation_fn", "gelu")):
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"{source}: {name} = {settings[name]!r} is not supported, only {wanted!r}")
    heads = settings.get("encoder_attention_heads") or max(1, width // 64)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{source}: encoder_attention_heads = {heads!r} does not divide the width, {width}")
    norm_first = settings.get("layer_norm_first", width >= 1024)
    if not isinstance(norm_first, bool):
        raise ValueError(f"{source}: layer_norm_first = {norm_first!r} is neither true nor false")
    blocks = sorted({(int(s), int(b)) for k in state for s, b in re.findall(r"trunk\.layer(\d+)\.(\d+)\.conv1", k)})
    stages = sorted({s for s, _ in blocks})
    return AvHubertVideoConfig(
        frontend_channels=frontend,
        trunk_channels=[
            state[f"feature_extractor_video.resnet.trunk.layer{s}.0.conv1.weight"].shape[0] for s in stages
        ],
        trunk_blocks=[sum(stage == s for stage, _ in blocks) for s in stages],
        hidden_size=width,
        num_hidden_layers=1 + max(int(m) for k in state for m in re.findall(r"^encoder\.layers\.(\d+)\.", k)),
        num_attention_heads=heads,
        intermediate_size=ffn,
        layer_norm_first=norm_first,
        num_conv_pos_embeddings=kernel.shape[2],
        num_conv_pos_embedding_groups=kernel.shape[0] // kernel.shape[1],
        dtype=torch.float32,
    )
