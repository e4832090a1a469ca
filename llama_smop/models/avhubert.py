"""The video half of AV-HuBERT (Shi et al., ICLR 2022, arXiv 2201.02184): lip frames in, features at 25 Hz out.

The front-end is written here; the transformer is transformers' HuBERT encoder, which computes the same thing.
"""

import torch
from torch import Tensor, nn
from transformers import HubertConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.hubert.modeling_hubert import HubertEncoder, HubertEncoderStableLayerNorm

from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig

# Blocks before the layers that must not be split over devices.
FRONT_BLOCKS = ("ResidualBlock", "HubertPositionalConvEmbedding")


class ResidualBlock(nn.Module):
    """ResNet's basic block, by default with a PReLU slope for each channel."""

    def __init__(self, config: AvHubertVideoConfig, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = _norm(config, outer)
        self.act1 = _activation(config, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = _norm(config, outer)
        self.act2 = _activation(config, outer)
        self.shortcut = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), _norm(config, outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(y)) + self.shortcut(x))


class LipFrontend(nn.Module):
    """Conv3d over time and space, then a ResNet on each frame: (B, T, 1, H, W) -> (B, T, C)."""

    def __init__(self, config: AvHubertVideoConfig):
        super().__init__()
        C, stride = config.frontend_channels, config.frontend_stride
        self.conv = nn.Conv3d(1, C, (5, 7, 7), (1, stride, stride), (2, 3, 3), bias=False)
        self.norm = _norm(config, C)
        self.act = _activation(config, C)
        self.pool = nn.MaxPool2d(3, 2, 1) if config.frontend_pool else nn.Identity()
        stages, inner = {}, C
        for stage, (outer, blocks) in enumerate(zip(config.trunk_channels, config.trunk_blocks, strict=True)):
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            widths = [inner] + [outer] * (blocks - 1)
            stages[f"layer{stage + 1}"] = nn.Sequential(
                *(ResidualBlock(config, w, outer, s) for w, s in zip(widths, strides, strict=True))
            )
            inner = outer
        self.trunk = nn.ModuleDict(stages)

    def forward(self, video: Tensor) -> Tensor:
        B, T = video.shape[:2]
        x = self.conv(video.transpose(1, 2))
        # Frames join the batch: the ResNet sees one frame at a time.
        x = x.transpose(1, 2).flatten(0, 1)
        x = self.pool(self.act(self.norm(x)))
        for stage in self.trunk.values():
            x = stage(x)
        return x.mean(dim=(2, 3)).view(B, T, -1)


class AvHubertVideoEncoder(PreTrainedModel):
    """AV-HuBERT fed with video alone: zeros stand in the audio's place before the fusion."""

    config_class = AvHubertVideoConfig
    base_model_prefix = "video_tower"
    main_input_name = "video_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = (*FRONT_BLOCKS, "HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm")

    def __init__(self, config: AvHubertVideoConfig):
        super().__init__(config)
        D = config.hidden_size
        self.frontend = LipFrontend(config)
        self.proj = nn.Linear(config.trunk_channels[-1], D)
        self.layer_norm = nn.LayerNorm(2 * D, eps=config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(2 * D, D)
        encoder = HubertEncoderStableLayerNorm if config.layer_norm_first else HubertEncoder
        self.encoder = encoder(_hubert_config(config))
        self.post_init()

    def forward(self, video_values: Tensor, video_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        """Features of lip frames.

        Args:
            video_values: (B, T, 1, H, W), normalised grey frames at 25 Hz.
            video_mask: (B, T) bool, True = real frame, real frames first. A clip's features do not depend on the
                padding: padded frames are the zeros that the convolutions see beyond the end of an unpadded clip.

        Returns:
            `last_hidden_state` (B, T, D); values at padded frames are undefined.
        """
        if video_values.dim() != 5 or video_values.shape[2] != 1:
            raise ValueError(f"video_values must be (B, T, 1, H, W), got {tuple(video_values.shape)}")
        if video_mask is not None:
            if video_mask.shape != video_values.shape[:2]:
                raise ValueError(
                    f"video_mask must be (B, T) = {tuple(video_values.shape[:2])}, got {tuple(video_mask.shape)}"
                )
            video_mask = video_mask.bool()
            video_values = video_values.masked_fill(~video_mask[:, :, None, None, None], 0)
        # `set_attn_implementation` reaches sub-configs only, and the encoder's own config is none.
        self.encoder.config._attn_implementation = self._encoder_attention()
        x = self.proj(self.frontend(video_values))
        x = self.layer_norm(torch.cat([torch.zeros_like(x), x], dim=-1))
        # A copy: the encoder zeroes padded frames in place, which the output of a quantised layer does not allow.
        return self.encoder(self.post_extract_proj(x).clone(), attention_mask=video_mask)

    def get_input_embeddings(self) -> nn.Module:
        return self.frontend.conv

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.frontend.conv = value

    def get_output_embeddings(self) -> None:
        return None

    def _encoder_attention(self) -> str:
        """The chosen attention, or "sdpa" where that has no mask function and would ignore the padding mask."""
        chosen = self.config._attn_implementation
        return chosen if chosen in ALL_MASK_ATTENTION_FUNCTIONS else "sdpa"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif hasattr(module, "pos_conv_embed"):
            conv = module.pos_conv_embed.conv
            v, g = conv.parametrizations.weight.original1, conv.parametrizations.weight.original0
            # fairseq's: variance 4 / (kernel · width); the magnitudes start as those of v.
            init.normal_(v, std=(4 / (conv.kernel_size[0] * conv.in_channels)) ** 0.5)
            init.copy_(g, torch.norm_except_dim(v, 2, 2))
            init.zeros_(conv.bias)


def _norm(config: AvHubertVideoConfig, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if config.norm == "batch" else nn.GroupNorm(config.norm_groups, channels)


def _activation(config: AvHubertVideoConfig, channels: int) -> nn.Module:
    return nn.PReLU(channels) if config.frontend_activation == "prelu" else nn.ReLU(inplace=True)


def _hubert_config(config: AvHubertVideoConfig) -> HubertConfig:
    return HubertConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        do_stable_layer_norm=config.layer_norm_first,
        layer_norm_eps=config.layer_norm_eps,
        num_conv_pos_embeddings=config.num_conv_pos_embeddings,
        num_conv_pos_embedding_groups=config.num_conv_pos_embedding_groups,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        layerdrop=config.layerdrop,
        attn_implementation=config._attn_implementation or "sdpa",
    )


__all__ = ["AvHubertVideoEncoder", "LipFrontend", "ResidualBlock"]
