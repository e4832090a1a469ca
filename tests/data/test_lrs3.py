import os

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from llama_smop.data.lrs3 import LabelError, Lrs3Dataset, read_labels
from llama_smop.data.media import MediaError
from llama_smop.data.noise import Babble, Noise
from tests.data.conftest import TRAINING

GOOD = "lrs3,test/a/00001.mp4,50,0,so this is it\n"


def labels(root, text):
    folder = root / "labels"
    folder.mkdir(exist_ok=True)
    path = folder / "x.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read_by_name_and_by_path(tmp_path):
    path = labels(tmp_path, GOOD + "\n" + "vox, b/00002.mp4 ,25,7, Grüße \n")
    first, second = read_labels(tmp_path, "x.csv")
    assert read_labels("elsewhere", path) == [first, second]
    assert (first.dataset, first.path, first.n_frames, first.text) == ("lrs3", "test/a/00001.mp4", 50, "so this is it")
    assert first.id == "lrs3/test/a/00001" and second.text == "Grüße"
    assert first.video_path(tmp_path) == tmp_path / "lrs3" / "test" / "a" / "00001.mp4"


def test_a_name_is_looked_for_in_the_corpus_first(tmp_path, monkeypatch):
    labels(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text(GOOD.replace("so this is it", "an older file"))
    assert read_labels(tmp_path, "x.csv")[0].text == "so this is it"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("lrs3,b.mp4,50,0", "expected 5 fields .* got 4; `llama-smop corpus labels` writes"),
        ("lrs3,b.mp4,50,0,well, yes", "expected 5 fields .* got 6"),
        ("lrs3,b.mp4,fifty,0,well", "positive number of frames, got 'fifty'"),
        ("lrs3,b.mp4,0,0,well", "positive number of frames, got '0'"),
        ("lrs3,b.mp4,-3,0,well", "positive number of frames"),
        ("lrs3,,50,0,well", "must not be empty"),
        ("lrs3,b.mp4,50,0,", "must not be empty"),
        ("lrs3,../../etc/b.mp4,50,0,well", "below the dataset's folder"),
        ("lrs3,/etc/b.mp4,50,0,well", "below the dataset's folder"),
        ("lrs3,test/a/00001.mp4,50,0,again", "already on line 1"),
        ("../lrs2,b.mp4,50,0,well", "dataset's folder below the corpus, got '../lrs2'"),
        ("/etc,b.mp4,50,0,well", "dataset's folder below the corpus, got '/etc'"),
        ("a/../..,b.mp4,50,0,well", "dataset's folder below the corpus"),
        (f"lrs3,b.mp4,{'9' * 5000},0,well", r"positive number of frames, got '9{5,20}\.\.\.9+'$"),
        ("lrs3,b.mp4,10000001,0,well", "positive number of frames"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, reason):
    path = labels(tmp_path, GOOD + line + "\n")
    with pytest.raises(LabelError, match=rf"x\.csv:2: .*{reason}") as caught:
        read_labels(tmp_path, "x.csv")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_label_files_that_are_missing_empty_or_not_text(tmp_path):
    with pytest.raises(LabelError, match="no such label file"):
        read_labels(tmp_path, "train.csv")
    path = labels(tmp_path, "\n\n")
    with pytest.raises(LabelError, match="holds no clip"):
        read_labels(tmp_path, path)
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(LabelError, match="UTF-8"):
        read_labels(tmp_path, path)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1d"])
def test_a_byte_order_mark_and_odd_spaces_are_no_part_of_a_label(tmp_path, odd):
    """As spreadsheets and word processors leave them."""
    path = labels(tmp_path, "")
    path.write_bytes(f"\ufefflrs3,a.mp4,50,0,so this{odd}is it\r\nlrs3,b.mp4,50,0,well\r\n".encode())
    clips = read_labels(tmp_path, "x.csv")
    assert [(c.dataset, c.path, c.text) for c in clips] == [
        ("lrs3", "a.mp4", "so this is it"),
        ("lrs3", "b.mp4", "well"),
    ]
    path.write_bytes(path.read_bytes() + b"lrs3,c.mp4\n")
    with pytest.raises(LabelError, match=r"x\.csv:3: expected 5 fields"):
        read_labels(tmp_path, "x.csv")


def test_label_files_without_an_end_are_refused(tmp_path):
    """A pipe waits for ever, a device fills the memory; a name may be longer than a file system takes."""
    (tmp_path / "labels").mkdir()
    os.mkfifo(tmp_path / "labels/pipe.csv")
    (tmp_path / "labels/zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "zero.csv", "."):
        with pytest.raises(LabelError, match="is not a regular file"):
            read_labels(tmp_path, name)
    for name in ("n" * 300, "a\0.csv"):
        with pytest.raises(LabelError, match="cannot be read"):
            read_labels(tmp_path, name)


@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_items(small_corpus, modality):
    data = Lrs3Dataset(small_corpus, "train.csv", modality)
    assert len(data) == len(data.lengths) == 9
    for item, clip, length in zip(data, data.clips, data.lengths, strict=False):
        assert item["text"] == clip.text and item["id"] == clip.id
        if modality == "audio":
            assert item["video"] is None
        else:
            assert item["video"].shape == (length, 1, 88, 88) and item["video"].dtype == torch.float32
        if modality == "video":
            assert item["audio"] is None
        else:
            assert item["audio"].shape == (length * 640,) and item["audio"].dtype == np.float32
    with pytest.raises(ValueError, match="expected a modality"):
        Lrs3Dataset(small_corpus, "train.csv", "smell")


def training_data(root, seed=0):
    noise = Noise(Babble([clip.video_path(root) for clip in read_labels(root, "train.csv")], speakers=2))
    return Lrs3Dataset(root, "train.csv", transform=TRAINING, noise=noise, seed=seed)


def same(a, b):
    return np.array_equal(a["audio"], b["audio"]) and torch.equal(a["video"], b["video"])


def test_augmentation_depends_on_seed_and_index_alone(small_corpus):
    data = training_data(small_corpus)
    forwards = [data[i] for i in range(3)]
    backwards = [training_data(small_corpus)[i] for i in (2, 1, 0)][::-1]
    assert all(map(same, forwards, backwards))
    loader = DataLoader(data, batch_size=None, num_workers=1, sampler=[0, 1, 2])
    assert all(map(same, forwards, loader)), "a data worker gives other items"
    assert not same(forwards[0], training_data(small_corpus, seed=1)[0])


def test_a_clip_without_wav_is_heard_from_its_mp4(corpus_copy):
    data = Lrs3Dataset(corpus_copy, "test.csv")
    before = data[0]["audio"]
    data.clips[0].video_path(corpus_copy).with_suffix(".wav").unlink()
    after = data[0]["audio"]
    assert after.shape == before.shape
    assert np.corrcoef(before, after)[0, 1] > 0.9


def test_unusable_clips_are_named(corpus_copy):
    data = Lrs3Dataset(corpus_copy, "test.csv")
    mp4 = data.clips[0].video_path(corpus_copy)
    mp4.write_bytes(mp4.read_bytes()[:3000])
    with pytest.raises(MediaError, match=mp4.name):
        data[0]
    mp4.unlink()
    with pytest.raises(MediaError, match=f"{mp4.name}: no such file"):
        data[0]
    mp4.with_suffix(".wav").unlink()
    with pytest.raises(MediaError, match="no such file"):
        Lrs3Dataset(corpus_copy, "test.csv", "audio")[0]


def test_an_unusable_clip_in_a_worker_is_named_in_the_caller(corpus_copy):
    data = Lrs3Dataset(corpus_copy, "test.csv")
    mp4 = data.clips[0].video_path(corpus_copy)
    mp4.write_bytes(b"")
    try:
        data[0]
    except MediaError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")  # how a DataLoader's worker sends its errors
    with pytest.raises(MediaError) as caught:
        sent.reraise()
    assert str(caught.value) == f"{mp4}: the file is empty", "expected one line, without the worker's traceback"
