"""What a configuration describes, built: model and processor, clips, plan, batches."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from llama_smop.data.noise import Noise, NoiseFile
from llama_smop.data.sources import ClipSource, FolderClips
from llama_smop.data.training_plan import DrawnClips, Stage, TrainingPlan, batches_in
from llama_smop.data.transforms import AudioTransform, ClipTransform, VideoTransform
from llama_smop.models.lm_loss import target_positions
from llama_smop.training.config import TrainConfig


def build(config: TrainConfig, texts: Sequence[str]):
    """The model and processor that a configuration describes; a tiny one learns the words of `texts`."""
    section = config.model
    projector = section.projector
    common = {
        "modalities": section.modalities,
        "rate_audio": section.rate_audio,
        "rate_video": section.rate_video,
        "compression": section.compression,
        "load_balancing_coef": section.load_balancing_coef,
        "router_z_coef": section.router_z_coef,
    }
    if section.tiny is not None:
        from llama_smop.models.tiny import build_tiny

        words = sorted({word for text in texts for word in text.lower().split()})
        return build_tiny(words, **section.tiny.model_dump(), **projector.model_dump(), **common)
    from llama_smop.models.assemble import assemble

    reduced = config.optimizer.precision == "bf16"
    model, processor = assemble(
        language_model=section.language_model,
        audio_tower=section.audio_tower,
        video_tower=section.video_tower,
        lora=section.lora,
        projector=projector.model_dump(),
        dtype=torch.bfloat16 if reduced else torch.float32,
        **common,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # what learns keeps float32 values; autocast lowers them for the products
            parameter.data = parameter.data.float()
    return model, processor


def training_clips(config: TrainConfig, world: int = 1) -> DrawnClips:
    """What a training draws from, on each of `world` processes."""
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
    """One process's share of the batches; in each step all of them draw the same modality."""
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
    return TrainingPlan(batches, stages, seed=config.run.seed)


class Collator:
    """Items of one modality to a batch of model inputs."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict:
        streams = {name: [item[name] for item in items] for name in ("audio", "video") if items[0][name] is not None}
        batch = dict(self.processor(text=[item["text"] for item in items], **streams))
        batch["target_positions"] = target_positions(batch["labels"])
        return batch | {"bad_clips": {path: why for item in items for path, why in item.get("bad_clips", {}).items()}}


def compile_regions(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the projector and the language model's layers in place; names of parameters stay.

    The number of tokens is a variable of the graph from the start. Only `forward` is compiled: the hooks of FSDP and
    gradient checkpointing stay around it.
    """
    language_model = model.language_model
    layers = [m for m in language_model.modules() if type(m).__name__ in language_model._no_split_modules]
    for module in (model.multi_modal_projector, *layers):
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
