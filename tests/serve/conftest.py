"""A tiny untrained model in a folder, and recordings that it takes: a mouth crop with sound, sound alone, odd files."""

import numpy as np
import pytest
import torch

from llama_smop.data.media import write_audio, write_video
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription.voice_activity import SileroVoiceActivity
from tests.transcription.tiny_whisper import write_whisper

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 4.0}
FRAMES = 30
together = pytest.mark.xdist_group("serve")  # one worker imports gradio, and makes the service


def site(*arguments):
    """A client of the page, `llama_smop.serve.app.build(*arguments)`."""
    from fastapi.testclient import TestClient

    from llama_smop.serve.app import build

    return TestClient(build(*arguments), base_url="http://127.0.0.1:7860")


def recording(size: int = 96):
    """Frames (30, size, size, 3) and samples of one loud second and a bit."""
    generator = np.random.RandomState(0)
    frames = generator.randint(0, 255, (FRAMES, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    return frames, (generator.randn(FRAMES * 640) * 0.2).astype(np.float32)


@pytest.fixture(autouse=True)
def _by_energy(monkeypatch):
    """Speech is what is loud here."""
    monkeypatch.setattr(SileroVoiceActivity, "installed", classmethod(lambda cls: None))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    model, processor = build_tiny(["bin", "blue", "now"], **SIZES)
    return model_folder.save(model.eval(), processor, tmp_path_factory.mktemp("served") / "tiny-model")


@pytest.fixture(scope="session")
def whisper_folder(model_path, tmp_path_factory):
    """The Whisper whose encoder is the model's audio tower, for word times."""
    return write_whisper(tmp_path_factory.mktemp("whisper") / "whisper", model_folder.load(model_path)[0])


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Paths by name."""
    folder = tmp_path_factory.mktemp("recordings")
    frames, samples = recording()
    write_video(folder / "crop.mp4", frames, audio=samples)
    write_video(folder / "silent.mp4", frames)
    write_video(folder / "faceless.mp4", np.full((FRAMES, 128, 128, 3), 90, np.uint8), audio=samples)
    write_audio(folder / "sound.wav", samples)
    folder.joinpath("one-byte.webm").write_bytes(b"\x1a")
    folder.joinpath("text.mp4").write_text("This is no video at all, it is text. " * 20)
    folder.joinpath("truncated.mp4").write_bytes((folder / "crop.mp4").read_bytes()[:3000])
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def service(model_path):
    from llama_smop.serve.service import Service

    return Service(model_path, longest_s=20)


@pytest.fixture
def shelf():
    from llama_smop.serve.shelf import Shelf

    made = Shelf()
    yield made
    made.close()
