"""Label files made of those that auto_avsr's preparation of LRS3 writes."""

import pytest

from llama_smop.cli import main
from llama_smop.data.auto_avsr import write_labels
from llama_smop.data.lrs3 import LabelError, read_labels

SEGMENTS = "lrs3_train_transcript_lengths_seg16s.csv"
CLIPS = {  # name: frames, what is said
    "pretrain/abc/00001_00": (400, "THAT'S IT, I {THINK}"),
    "pretrain/abc/00001_01": (751, "TOO LONG FOR THIRTY SECONDS"),
    "trainval/abc/50001": (4, "SHORT"),
    "trainval/abc/50002": (5, "SO"),
    "trainval/abc/50003": (50, " \n"),
}


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "labels").mkdir()
    lines = []
    for name, (frames, text) in CLIPS.items():
        said = tmp_path / f"lrs3/lrs3_text_seg16s/{name}.txt"
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(text)
        lines.append(f"lrs3,lrs3_video_seg16s/{name}.mp4,{frames},12 1 40\n")
    (tmp_path / "labels" / SEGMENTS).write_text("".join(lines))
    return tmp_path


def test_texts_take_the_place_of_token_ids_and_the_rest_is_counted(prepared, capsys):
    main(["corpus", "labels", str(prepared), "--from", SEGMENTS, "--to", "train.csv"])
    clips = read_labels(prepared, "train.csv")
    assert [(c.path, c.n_frames, c.text) for c in clips] == [
        ("lrs3_video_seg16s/pretrain/abc/00001_00.mp4", 400, "that's it i think"),
        ("lrs3_video_seg16s/trainval/abc/50002.mp4", 5, "so"),
    ]
    assert "2 clips, 0.0 h; left out: 1 too short, 1 too long, 1 without a word" in capsys.readouterr().out


def test_limits_and_case_and_several_files(prepared):
    (prepared / "labels/more.csv").write_text("lrs3,lrs3_video_seg16s/test/abc/00001.mp4,25,3\n")
    said = prepared / "lrs3/lrs3_text_seg16s/test/abc/00001.txt"
    said.parent.mkdir(parents=True)
    said.write_text("WELL")
    settings = {"min_seconds": 0, "max_seconds": 40, "lower": False, "progress": False}
    written = write_labels(prepared, [SEGMENTS, "more.csv"], "all.csv", **settings)
    assert written.kept == 5 and written.hours == pytest.approx((400 + 751 + 4 + 5 + 25) / 25 / 3600)
    assert read_labels(prepared, "all.csv")[-1].text == "WELL"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda root: (root / "labels" / SEGMENTS).unlink(), rf"{SEGMENTS}: no such label file"),
        (lambda root: (root / "lrs3/lrs3_text_seg16s/trainval/abc/50002.txt").unlink(), r"50002\.txt: no such text"),
        (lambda root: (root / "labels" / SEGMENTS).write_text("lrs3,a.mp4,50,1\n"), r"csv:1: expected a path such as"),
        (
            lambda root: (root / "labels" / SEGMENTS).write_text("lrs3,a.mp4\n"),
            r"csv:1: expected dataset,path,n_frames",
        ),
        (lambda root: (root / "labels" / SEGMENTS).write_text("\n"), "no clip is left of 0"),
    ),
)
def test_what_cannot_be_used_is_named(prepared, change, message):
    change(prepared)
    with pytest.raises(LabelError, match=message):
        write_labels(prepared, [SEGMENTS], "train.csv", progress=False)
    assert not (prepared / "labels/train.csv").exists()


def test_the_preparations_own_file_is_not_overwritten(prepared):
    before = (prepared / "labels" / SEGMENTS).read_text()
    with pytest.raises(LabelError, match="would be overwritten"):
        write_labels(prepared, [SEGMENTS], SEGMENTS, progress=False)
    assert (prepared / "labels" / SEGMENTS).read_text() == before


def test_a_byte_order_mark_is_no_part_of_a_name_or_a_text(prepared):
    said = prepared / "lrs3/lrs3_text_seg16s/test/abc/00001.txt"
    said.parent.mkdir(parents=True)
    said.write_bytes(b"\xef\xbb\xbfHELLO\xc2\x85YOU\x0c")
    row = b"\xef\xbb\xbflrs3,lrs3_video_seg16s/test/abc/00001.mp4,40,3\r\n"
    (prepared / "labels/more.csv").write_bytes(row)
    write_labels(prepared, ["more.csv"], "all.csv", progress=False)
    assert [(c.dataset, c.text) for c in read_labels(prepared, "all.csv")] == [("lrs3", "hello you")]
