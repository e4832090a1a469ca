"""Many recordings at once: batches over them, processes that share them, and the same words as one by one."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription import pieces as module
from llama_smop.transcription.attempts import Transcript, attempts
from llama_smop.transcription.ranks import Ranks
from llama_smop.transcription.recording import Options
from tests.data.recordings import numbered, record
from tests.training.children import _start_ranks, join

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 4.0}
BAD = "c.mp4"


@pytest.fixture(autouse=True)
def _by_energy(monkeypatch):
    """Planted sound is loud or quiet, and no speech."""
    from llama_smop.transcription.voice_activity import SileroVoiceActivity

    monkeypatch.setattr(SileroVoiceActivity, "installed", classmethod(lambda cls: None))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(5)
    model, processor = build_tiny(["bin", "blue", "now", "at", "nine"], **SIZES)
    return model.eval(), processor


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    return model_folder.save(*pair, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    """Short clips of both kinds, one that is no film, and a longer recording of three pieces."""
    where, rng = tmp_path_factory.mktemp("in"), np.random.default_rng(0)

    def loud(seconds: float) -> np.ndarray:
        return (0.1 * rng.standard_normal(round(seconds * 16000))).astype(np.float32)

    for name, frames in (("a", 30), ("b", 45), ("e", 38)):
        record(where / f"{name}.mp4", numbered(frames), sound=loud(frames / 25))
    (where / BAD).write_text("no film")
    talk = np.concatenate([np.concatenate([loud(1.5), 1e-3 * loud(4)]) for _ in range(3)])
    record(where / "d.m4a", sound=talk, audio="aac")
    record(where / "f.m4a", sound=loud(1.2), audio="aac")
    return [where / name for name in ("a.mp4", "b.mp4", BAD, "d.m4a", "e.mp4", "f.m4a")]


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_in_place_of_a_list_is_named(pair, kind):
    with pytest.raises(TypeError, match=r"a list of files, got one path; write \['talk\.mp4'\]"):
        next(attempts(kind("talk.mp4"), *pair))


def words(found) -> list[str | None]:
    return [item.text if isinstance(item, Transcript) else None for item in found]


def test_batches_over_files_give_the_words_of_one_by_one(recordings, pair):
    alone = [words(attempts([path], *pair, Options(pieces_at_once=1)))[0] for path in recordings]
    assert [text is None for text in alone] == [path.name == BAD for path in recordings]
    assert len(set(alone)) > 3, f"the clips must differ in their words for this test: {alone}"
    for at_once, workers in ((2, 1), (3, 4), (16, 2)):
        options = Options(pieces_at_once=at_once, workers=workers)
        assert words(attempts(recordings, *pair, options)) == alone, f"{at_once} at once, {workers} workers"


def test_pieces_of_several_files_go_through_the_model_together(recordings, pair, monkeypatch):
    batches, real = [], module.recognise_batch

    def counted(*arguments, **given):
        batches.append(len(given.get("audio") or given["video"]))
        return real(*arguments, **given)

    monkeypatch.setattr(module, "recognise_batch", counted)
    clips = [path for path in recordings if path.suffix == ".mp4"]
    assert len(words(attempts(clips, *pair, Options(pieces_at_once=8)))) == 4
    assert batches == [3]
    batches.clear()
    list(attempts([path for path in recordings if path.suffix == ".m4a"], *pair, Options(pieces_at_once=2)))
    assert batches == [2, 1, 1], "a long one does not wait for those after it"


def test_files_are_shared_out_by_size_and_each_once(tmp_path):
    paths = [tmp_path / str(i) for i in range(7)]
    for path, size in zip(paths, (10, 900, 20, 30, 40, 50, 0), strict=True):
        path.write_bytes(bytes(size))
    paths[6].unlink()
    shares = [Ranks(rank, 2).share(paths) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(7))
    assert all(share == sorted(share) for share in shares)
    assert [1] in [[i for i in share if i != 6] for share in shares], "the largest alone"


def as_rank(arguments: list[str], out: Path) -> None:
    import os

    from llama_smop.cli import main

    stream = io.StringIO()
    try:
        with contextlib.redirect_stdout(stream):
            main(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps([status, stream.getvalue()]))


def test_two_processes_share_the_files_and_the_first_tells_in_order(recordings, folder, pair, tmp_path):
    out = tmp_path / "out"
    places = ["--json", str(out), "--srt", str(out)]
    arguments = ["transcribe", *map(str, recordings), "--model", str(folder), *places]
    children = _start_ranks(as_rank, 2, (arguments, tmp_path))
    join(children)
    (status, said), (other, silent) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert "1 of 6 files could not be transcribed" in status
    assert (other, silent) == (0, ""), "torchrun takes its status from the first"
    lines = [line.split("\t") for line in said.splitlines()]
    assert [Path(path) for path, _ in lines] == [path for path in recordings if path.name != BAD]
    assert any(text for _, text in lines)
    for path, text in lines:
        assert json.loads((out / f"{Path(path).stem}.json").read_text())["text"] == text
        assert (out / f"{Path(path).stem}.srt").exists()
