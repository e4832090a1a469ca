"""Builds what a configuration describes: model and processor, clips, training plan, collator."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import ProcessorMixin

from llama_smop.data.noise import Noise, NoiseFile
from llama_smop.data.sources import ClipSource, FolderClips
from llama_smop.data.training_plan import DrawnClips, Stage, TrainingPlan, batches_in
from llama_smop.data.transforms import AudioTransform, ClipTransform, VideoTransform
from llama_smop.models.lm_loss import target_positions
from llama_smop.training.config import TrainConfig


def build_model(config: TrainConfig, texts: Sequence[str]) -> tuple[nn.Module, ProcessorMixin]:
    """The model, ready to train, and its processor. The vocabulary of a tiny model is the words of `texts`."""
    model, processor = _from_scratch(config, texts) if config.model.tiny is not None else _from_parts(config)
    optimizer = config.optimizer
    model.fused_loss = optimizer.fused_loss
    if optimizer.global_aux_losses and config.model.projector.kind == "smop":
        for projector in model.projectors:
            projector.global_aux_losses = True
    if optimizer.compile:
        compile_regions(model)
    return model, processor


def _from_scratch(config: TrainConfig, texts: Sequence[str]):
    from llama_smop.models.tiny import build_tiny

    section = config.model
    words = sorted({word for text in texts for word in text.lower().split()})
    return build_tiny(words, **section.tiny.model_dump(), **section.projector.model_dump(), **section.common())


def _from_parts(config: TrainConfig):
    from llama_smop.models.assemble import assemble

    section = config.model
    model, processor = assemble(
        language_model=section.language_model,
        audio_tower=section.audio_tower,
        video_tower=section.video_tower,
        lora=section.lora,
        projector=section.projector.model_dump(),
        dtype=torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32,
        **section.common(),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained weights stay in float32; autocast casts them for the products
            parameter.data = parameter.data.float()
    return model, processor


def training_clips(config: TrainConfig, world: int = 1) -> DrawnClips:
    """The dataset of a training, on each of `world` processes."""
    data, seed = config.data, config.run.seed
    masked = data.time_mask
    transform = ClipTransform(
        AudioTransform(train=True) if masked else AudioTransform(train=True, mask_window=1),
        VideoTransform(train=True) if masked else VideoTransform(train=True, mask_window=1),
    )
    if data.shards is None:
        clips = FolderClips(data.root, data.train, seed, data.keep_decoded)
    else:
        from llama_smop.data.shards.index import read_index
        from llama_smop.data.shards.read import ShardClips

        clips = ShardClips(read_index(data.shards), world, max(1, data.workers), data.window, seed)
    noise = None
    if data.noise is not None:
        source = clips.babble if data.noise.source == "babble" else NoiseFile(data.noise.source)
        noise = Noise(source, data.noise.snrs)
    return DrawnClips(clips, transform, noise, seed)


def training_plan(config: TrainConfig, clips: ClipSource, rank: int = 0, world: int = 1) -> TrainingPlan:
    """The batches of one process; in each step all processes draw the same modality and the same rate."""
    data, optimizer = config.data, config.optimizer
    batches = clips.batches(
        rank,
        world,
        max_frames=data.max_frames,
        num_buckets=data.buckets,
        max_clips=data.max_clips,
    )
    steps = optimizer.steps or max(1, math.ceil(batches_in(batches, optimizer.epochs) / optimizer.accumulate))
    stages = [Stage(round(s.until * steps) * optimizer.accumulate, s.modalities, s.noise) for s in data.stages]
    return TrainingPlan(batches, stages, seed=config.run.seed, rates=config.model.rates)


class Collator:
    """Makes a batch of model inputs from items of one modality and one rate."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict:
        streams = {name: [item[name] for item in items] for name in ("audio", "video") if items[0][name] is not None}
        texts, rate = [item["text"] for item in items], items[0].get("rate")
        batch = dict(self.processor(text=texts, do_normalize=False, rate=rate, **streams))
        batch["target_positions"] = target_positions(batch["labels"])
        return batch | {"bad_clips": {path: why for item in items for path, why in item.get("bad_clips", {}).items()}}


def compile_regions(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the projector and the language model's layers in place. Parameter names do not change.

    The number of tokens is dynamic from the first call. Only `forward` is compiled, so the hooks of FSDP and gradient
    checkpointing run outside the graph.
    """
    language_model = model.language_model
    layers = [m for m in language_model.modules() if type(m).__name__ in language_model._no_split_modules]
    for module in (*model.projectors, *layers):
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
