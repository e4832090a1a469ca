"""Clips whose length is not what their label says, in `evaluate`: at the edge of the model's window, or too short."""

import json

import numpy as np
import pytest
import torch

from llama_smop.cli import main
from llama_smop.data.media import write_audio, write_video
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny

WINDOW = 75  # frames, 3 s
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return model_folder.save(*build_tiny(["bin", "blue", "now"], **SIZES), tmp_path_factory.mktemp("model") / "model")


def corpus(root, frames: int, samples: int, label: int):
    """A plain clip, and one of another length than its label's."""
    rng, lines = np.random.default_rng(0), []
    (root / "labels").mkdir()
    for name, n_frames, n_samples, said in (("plain", 50, 50 * 640, 50), ("odd", frames, samples, label)):
        write_video(root / f"d/{name}.mp4", rng.integers(0, 255, (n_frames, 96, 96, 3), dtype=np.uint8))
        write_audio(root / f"d/{name}.wav", rng.standard_normal(n_samples) * 0.1)
        lines.append(f"d,{name}.mp4,{said},0,bin blue now\n")
    (root / "labels/test.csv").write_text("".join(lines))
    return root


@pytest.mark.parametrize("modality", ("audio", "video", "audiovisual"))
@pytest.mark.parametrize(
    ("frames", "samples"), ((WINDOW, WINDOW * 640 + 256), (WINDOW + 1, WINDOW * 640), (WINDOW + 3, WINDOW * 640 + 4000))
)
def test_what_is_a_little_longer_than_the_window_is_scored_to_its_labels_length(
    model, tmp_path, modality, frames, samples
):
    root = corpus(tmp_path, frames, samples, WINDOW)
    out = tmp_path / "rows.json"
    main(["evaluate", "--model", str(model), "--root", str(root), "--modality", modality, "--json", str(out)])
    (row,) = json.loads(out.read_text())
    assert row["clips"] == 2 and len(row["transcripts"]) == 2


@pytest.mark.parametrize(
    ("frames", "samples", "modality", "reason"),
    (
        (1, 50 * 640, "video", "shorter than one token"),
        (1, 50 * 640, "audiovisual", "shorter than one token"),
        (50, 5 * 16000, "audio", "longer than the audio window"),
    ),
)
def test_a_clip_far_from_its_label_is_named(model, tmp_path, frames, samples, modality, reason):
    root = corpus(tmp_path, frames, samples, 50)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", str(model), "--root", str(root), "--modality", modality])
    message = str(ended.value.code)
    assert f"{root}/d/odd.mp4: " in message and reason in message and "its label says 50 frames" in message
    assert "\n" not in message
