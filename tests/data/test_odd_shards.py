"""Shards of any kind of file, and shards and indices with something wrong in them."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from llama_smop.data.lrs3 import read_labels
from llama_smop.data.media import MediaError, read_audio, read_video, write_audio
from llama_smop.data.shards.index import ShardError, read_index
from llama_smop.data.shards.write import write_shards
from llama_smop.data.sources import FolderClips
from llama_smop.data.training_plan import Draw
from llama_smop.training.setbacks import ReplacedClips
from tests.data.recordings import record
from tests.data.test_shards import clips, drawn

pytest.importorskip("webdataset")


@pytest.mark.parametrize("ending", ("mkv", "MP4", "webm"))
def test_clips_in_any_container_are_read_from_shards_as_from_the_folder(small_corpus, tmp_path, ending):
    """With their sound inside them, and with a .wav beside them."""
    (tmp_path / "labels").mkdir()
    lines = []
    for number, clip in enumerate(read_labels(small_corpus, "train.csv")[:4]):
        source = clip.video_path(small_corpus)
        frames, sound = read_video(source), read_audio(source.with_suffix(".wav"))
        path = tmp_path / "d" / f"{number}.{ending}"
        path.parent.mkdir(exist_ok=True)
        webm = {"video": "libvpx", "audio": "libopus", "rate": 48000, "sound": np.repeat(sound, 3)}
        record(path, frames, **({"sound": sound} | (webm if ending == "webm" else {})), later=0.12)
        if number % 2:
            write_audio(path.with_suffix(".wav"), sound)
        lines.append(f"d,{path.name},{clip.n_frames},0,{clip.text}\n")
    (tmp_path / "labels/train.csv").write_text("".join(lines))
    write_shards(tmp_path, "train.csv", tmp_path / "shards", clips_per_shard=2, progress=False)
    plain, sharded = FolderClips(tmp_path, "train.csv"), clips(tmp_path / "shards")
    for number in range(4):
        one, other = (source.load(number, "audiovisual", 0) for source in (plain, sharded))
        np.testing.assert_array_equal(one.video, other.video)
        np.testing.assert_array_equal(one.audio, other.audio)
        assert (one.id, one.text) == (other.id, other.text)


def test_sound_alone_in_shards(small_corpus, tmp_path):
    (tmp_path / "labels").mkdir()
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    (tmp_path / "labels/train.csv").write_text(".,a.flac,25,0,well\n")
    write_shards(tmp_path, "train.csv", tmp_path / "shards", progress=False)
    source = clips(tmp_path / "shards")
    np.testing.assert_array_equal(
        source.load(0, "audio", 0).audio, FolderClips(tmp_path, "train.csv").load(0, "audio").audio
    )
    with pytest.raises(MediaError, match=r"clips-000000\.tar/.*a\.flac: has no video stream"):
        source.load(0, "video", 0)
    assert source.babble.sample(1000, np.random.default_rng(0)).std() > 0


def with_members(tar, change):
    """The shard again, its files as `change` leaves them: [(name, content), …]."""
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]
    with tarfile.open(tar, "w") as new:
        for name, content in change(members):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            new.addfile(header, io.BytesIO(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (lambda n, m: [(k, b"{not json" if k == f"{n}.json" else v) for k, v in m], "its .json does not say"),
        (lambda n, m: [(k, b"{}" if k == f"{n}.json" else v) for k, v in m], "its .json does not say"),
        (lambda n, m: [(k, b"[1]" if k == f"{n}.json" else v) for k, v in m], "its .json does not say"),
        (lambda n, m: [(k, b"\xff" if k == f"{n}.json" else v) for k, v in m], "its .json does not say"),
        (lambda n, m: [(k, b"[" * 100_000 if k == f"{n}.json" else v) for k, v in m], "its .json does not say"),
        (lambda n, m: [(k, v) for k, v in m if k != f"{n}.json"], "its .json does not say"),
        (lambda n, m: [(k, v) for k, v in m if k not in (f"{n}.wav", f"{n}.mp4")], "has no media file"),
        (lambda n, m: [*m, *((k, v) for k, v in m if k == f"{n}.wav")], "has its .wav twice"),
        (lambda n, m: [(k, b"" if k == f"{n}.wav" else v) for k, v in m], "the file is empty"),
    ),
)
def test_a_bad_member_of_a_shard_is_named_and_another_clip_takes_its_place(small_corpus, tmp_path, change, reason):
    out = tmp_path / "shards"
    write_shards(small_corpus, "train.csv", out, clips_per_shard=5, progress=False)
    first = read_index(out).shards[0]
    number = first.numbers[0]
    with_members(out / first.name, lambda members: change(f"{number:08d}", members))
    source = clips(out)
    with pytest.raises(MediaError, match=rf"^{first.name}/.*{reason}"):
        source.load(number, "audio", 0)
    item = ReplacedClips(drawn(source), limit=2)[Draw(number, 0, "audio", False)]
    assert len(item["bad_clips"]) == 1 and item["audio"] is not None
    assert source.babble.sample(16000, np.random.default_rng(0)).std() > 0


@pytest.mark.parametrize(
    "change",
    (
        lambda index: index.pop("shards"),
        lambda index: index.pop("words"),
        lambda index: index["shards"][0].pop("name"),
        lambda index: index["shards"][1].pop("frames"),
        lambda index: index["shards"][0]["frames"].pop(),
        lambda index: index["shards"][0].update(frames=["x"] * len(index["shards"][0]["numbers"])),
        lambda index: index["shards"][0].update(frames=[0] * len(index["shards"][0]["numbers"])),
        lambda index: index["shards"][0].update(name=7),
        lambda index: index.update(shards=[]),
        lambda index: index.update(shards=3, words=None),
        lambda index: index.update(words="bin blue"),
        lambda index: index["shards"].append("clips"),
    ),
)
def test_an_index_that_is_none_is_named(shards, tmp_path, change):
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=rf"^{tmp_path}/index\.json: ") as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(ShardError, match=rf"^{tmp_path}/index\.json: not the index"):
        read_index(tmp_path)
