"""Frozen towers give the same features for the same clip every time: keep them on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VERSION = "1"


def tower_hash(tower: nn.Module) -> str:
    """A name for what a tower computes: its config, and every parameter and buffer with its dtype."""
    digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Tower frames of clips, one file each, under a folder that several workers and runs may share.

    A file's name is the hash of the clip, the transform and the tower, so nothing in it can be stale: other weights
    or another transform have other names. Files are written aside and renamed; a damaged one counts as absent.

    Args:
        folder: made when needed.
        model: its towers must be frozen. transform: a description of all that happens to a clip before the towers; two
            transforms of one description must do the same, so a random one has no place here.

    Raises:
        ValueError: a tower that is still trained.
    """

    def __init__(self, folder: str | Path, model, transform: str):
        for modality, tower in model.towers.items():
            if any(p.requires_grad for p in tower.parameters()):
                raise ValueError(
                    f"the {modality} tower is trained, so its features change with every step; freeze it "
                    "(freeze_towers, no LoRA in it) or use no feature cache"
                )
        self.folder, self.model, self.transform = Path(folder), model, transform
        self._towers = {modality: tower_hash(tower) for modality, tower in model.towers.items()}

    def states(self, clip: str, modalities: tuple[str, ...], load: Callable[[], tuple], processor) -> dict[str, Tensor]:
        """Tower frames (F, D) by modality, for `LlamaSmopProcessor(audio_states=…, video_states=…)`.

        Args:
            clip: names the clip's content, for example its path, size and time of change.
            modalities: "audio", "video" or both; with both the audio is cut to the video, and cached as such.
            load: gives the transformed (audio, video) of the clip; called only if something is not in the cache.
        """
        together = "+".join(modalities)
        files = {m: self._file(clip, m, together) for m in modalities}
        found = {m: _read(file) for m, file in files.items()}
        if any(v is None for v in found.values()):
            found = self._compute(modalities, load(), processor)
            for modality, file in files.items():
                _write(file, found[modality])
        return found

    def _file(self, clip: str, modality: str, together: str) -> Path:
        key = json.dumps([VERSION, clip, self.transform, modality, together, self._towers[modality]])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    @torch.no_grad()
    def _compute(self, modalities, clip: tuple, processor) -> dict[str, Tensor]:
        streams = {m: [stream] for m, stream in zip(("audio", "video"), clip, strict=True) if m in modalities}
        batch = processor(**streams).to(self.model.device)
        states = {}
        if "audio" in modalities:
            frames = batch["audio_mask"].shape[1]
            states["audio"] = self.model.get_audio_states(batch["input_features"])[0, :frames]
        if "video" in modalities:
            states["video"] = self.model.get_video_states(batch["video_values"], batch["video_mask"])[0]
        return {m: v.cpu().contiguous() for m, v in states.items()}


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["states"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(file: Path, states: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=file.parent)
    os.close(handle)
    try:
        save_file({"states": states}, aside)
        os.replace(aside, file)
    finally:
        Path(aside).unlink(missing_ok=True)
