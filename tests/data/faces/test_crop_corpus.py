"""`corpus crop`: a folder of raw videos becomes a corpus; what is left out is told; a run that ended is resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("cv2")

from llama_smop.cli import main
from llama_smop.data.faces import corpus as module
from llama_smop.data.lrs3 import LabelError, Lrs3Dataset
from llama_smop.data.media import read_audio, write_audio, write_video
from llama_smop.system.processes import WorkerLost
from tests.data.faces.packages import needs_face_models
from tests.data.faces.planted import track

BRIGHT, DARK, LEAVES = 200, 40, 120  # what a planted face is found in


class PlantedTracker:
    """A face in bright pictures, none in dark ones, one that leaves in those between."""

    def __init__(self, *models):
        self.levels = []

    def step(self, frame):
        self.levels.append(frame.mean())

    def finish(self):
        frames, level = len(self.levels), np.mean(self.levels)
        if level < 60:
            return []
        return [track(0, [3.0] * (frames if level > 160 else 14), shift=(-60, -100))]


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(module, "Tracker", PlantedTracker)
    monkeypatch.setattr(module, "_models", lambda: ())


def film(path, frames=20, level=BRIGHT, sound=True, text="Text:  SO THIS IS IT\nConf: 4\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.sin(np.arange(frames * 640) / 5).astype(np.float32)
    write_video(path, np.full((frames, 120, 160, 3), level, np.uint8), audio=samples if sound else None)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


@pytest.fixture
def raw(tmp_path):
    root = tmp_path / "raw"
    film(root / "a" / "one.mp4")
    film(root / "b,c" / "two.mov", frames=30, text="and, this")
    return root


def run(root, out, *options):
    main(["corpus", "crop", str(root), "--out", str(out), "--workers", "1", *options])


def labels(out, name="raw"):
    return (out / "labels" / f"{name}.csv").read_text()


def test_a_folder_becomes_a_corpus_that_training_reads(raw, tmp_path, planted, capsys):
    write_audio(raw / "a" / "one.wav", np.full(14000, 0.25, np.float32))  # beside it, and longer than the picture
    run(raw, tmp_path / "out")
    assert labels(tmp_path / "out") == "raw,a/one.mp4,20,,so this is it\nraw,b_c/two.mp4,30,,and this\n"
    assert capsys.readouterr().out.splitlines()[0].endswith("raw.csv\t2 of 2 clips, 0.00 h")
    data = Lrs3Dataset(tmp_path / "out", "raw.csv")
    assert [(len(item["video"]), len(item["audio"]), item["text"]) for item in map(data.__getitem__, range(2))] == [
        (20, 20 * 640, "so this is it"),
        (30, 30 * 640, "and this"),
    ]
    assert read_audio(tmp_path / "out/raw/a/one.wav") == pytest.approx(0.25, abs=1e-3)


def test_what_is_left_out_is_told_with_its_reason(raw, tmp_path, planted, capsys):
    film(raw / "wall.mp4", level=DARK)
    film(raw / "leaves.mp4", frames=60, level=LEAVES)
    film(raw / "long.mp4", frames=60)
    film(raw / "short.mp4", frames=2)
    film(raw / "mute.mp4", sound=False)
    film(raw / "untold.mp4", text=None)
    (raw / "two.mkv").write_text("no film")
    (raw / "two.txt").write_text("words")
    (raw / "gone.mp4").symlink_to(raw / "nowhere.mp4")
    (raw / "gone.txt").write_text("words")
    write_audio(raw / "voice.wav", np.zeros(9000, np.float32))
    (raw / "voice.wav").rename(raw / "voice.mp4")
    (raw / "voice.txt").write_text("words")
    run(raw, tmp_path / "out", "--max-seconds", "2.2", "--name", "mine")
    report = json.loads((tmp_path / "out/mine/report.json").read_text())
    assert (report["clips"], report["labelled"]) == (2, 2)
    left_out = {reason: list(which) for reason, which in report["left_out"].items()}
    assert left_out == {
        "longer than 2.2 s": ["leaves.mp4", "long.mp4"],
        "shorter than 0.2 s": ["short.mp4"],
        "unreadable": ["gone.mp4", "two.mkv"],
        "without a face": ["wall.mp4"],
        "without a picture": ["voice.mp4"],
        "without a text": ["untold.mp4"],
        "without sound": ["mute.mp4"],
    }
    assert "not a media file" in report["left_out"]["unreadable"]["two.mkv"]
    told = capsys.readouterr().out
    assert "left out\t2 unreadable, as gone.mp4" in told and "left out\t1 without a face, as wall.mp4" in told
    assert not (tmp_path / "out/mine/wall.mp4").exists()
    run(raw, tmp_path / "longer", "--name", "mine")
    report = json.loads((tmp_path / "longer/mine/report.json").read_text())
    assert report["left_out"]["without one face from beginning to end"] == {
        "leaves.mp4": "face 0 is seen from 0 to 0.56 s of 2.4 s"
    }


def test_warnings_are_counted(raw, tmp_path, planted, monkeypatch, capsys):
    monkeypatch.setattr(module, "warnings", lambda track: ["the face is small: a mouth of 9 pixels, and 22 are needed"])
    run(raw, tmp_path / "out")
    assert "warning\t2 clips: the face is small" in capsys.readouterr().out


def test_without_texts_it_says_so_first_or_crops_when_asked(tmp_path, planted):
    film(tmp_path / "raw" / "a.mp4", text=None)
    with pytest.raises(SystemExit, match=r"no video has a text in NAME\.txt beside NAME\.mp4; --without-text crops"):
        run(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "raw", tmp_path / "out", "--without-text")
    assert (tmp_path / "out/raw/a.mp4").exists() and not (tmp_path / "out/labels/raw.csv").exists()
    (tmp_path / "texts.csv").write_text("a,Now there is one\n")
    run(tmp_path / "raw", tmp_path / "out", "--texts", str(tmp_path / "texts.csv"), "--keep-case")
    assert labels(tmp_path / "out") == "raw,a.mp4,20,,Now there is one\n"


def cropped(monkeypatch):
    """The videos that are worked at from now on."""
    seen, crop = [], module._cropped
    monkeypatch.setattr(module, "_cropped", lambda path, *rest: seen.append(path.name) or crop(path, *rest))
    return seen


def test_a_run_that_ended_is_resumed(raw, tmp_path, planted, monkeypatch):
    film(raw / "wall.mp4", level=DARK)
    run(raw, tmp_path / "out")
    before = labels(tmp_path / "out")
    seen = cropped(monkeypatch)
    run(raw, tmp_path / "out")
    assert seen == [], "nothing is left to do"
    (tmp_path / "out/raw/a/one.mp4").unlink()
    with open(tmp_path / "out/raw/clips.jsonl", "a") as journal:
        journal.write('{"source": "wall.mp4", "pa')  # cut by a kill
    (tmp_path / "out/raw/a/.one.mp4.writing-77").write_bytes(b"half")
    film(raw / "new.mp4", text="new words")
    run(raw, tmp_path / "out")
    assert sorted(seen) == ["new.mp4", "one.mp4"]
    assert set(before.splitlines()) < set(labels(tmp_path / "out").splitlines())
    assert not list((tmp_path / "out").rglob(".*writing*"))
    film(raw / "wall.mp4")
    run(raw, tmp_path / "out")
    assert "raw,wall.mp4," in labels(tmp_path / "out"), "a video that changed is looked at again"


def test_a_video_that_ends_the_process_is_left_out_and_the_others_go_on(raw, tmp_path, planted, monkeypatch):
    film(raw / "bomb.mp4")

    def unordered(crop, videos, workers, prepare):
        for video in videos:
            if video.source == "bomb.mp4":
                (tmp_path / "out/raw" / f"{module.WORK}5").write_text(video.source)
                raise WorkerLost
            yield crop(video)

    monkeypatch.setattr(module, "unordered", unordered)
    report = module.crop_corpus(raw, tmp_path / "out", workers=2, progress=False)
    assert report.clips == 2
    assert report.left_out["unreadable"]["bomb.mp4"].startswith("the process that read it ended")
    assert not list((tmp_path / "out").rglob(f"{module.WORK}*"))


def test_a_full_disk_ends_the_run_and_blames_no_video(raw, tmp_path, planted, monkeypatch):
    def full(path, samples):
        raise module.MediaError(path, "cannot be written (No space left on device)")

    monkeypatch.setattr(module, "write_audio", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        run(raw, tmp_path / "out")
    monkeypatch.undo()
    journal = (tmp_path / "out/raw/clips.jsonl").read_text()
    assert not journal.strip()


def test_two_runs_at_once_and_other_settings_are_refused(raw, tmp_path, planted):
    run(raw, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"set of crops with other settings \(max_seconds\)"):
        run(raw, tmp_path / "out", "--max-seconds", "5")
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out/raw/lock"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(SystemExit, match="another run is running in this folder"):
            run(raw, tmp_path / "out")
    finally:
        holder.kill()
        holder.wait()


def test_folders_of_others_are_left_alone(raw, tmp_path, planted):
    with pytest.raises(SystemExit, match="the crops would lie among the videos"):
        run(raw, tmp_path)
    (tmp_path / "out/raw").mkdir(parents=True)
    (tmp_path / "out/raw/thesis.tex").touch()
    with pytest.raises(SystemExit, match="is not empty and holds no set of crops"):
        run(raw, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/raw").iterdir()] == ["thesis.tex"]
    for name in ("a/b", "labels", "a,b", ".."):
        with pytest.raises(LabelError, match="expected a plain name"):
            module.crop_corpus(raw, tmp_path / "out", name=name)
    (tmp_path / "out/labels").mkdir(exist_ok=True)
    (tmp_path / "out/labels/train.csv").write_text("of another\n")
    with pytest.raises(SystemExit, match=r"train\.csv: is there already, and not of such crops"):
        run(raw, tmp_path / "out", "--name", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: holds no video"):
        run(tmp_path / "empty", tmp_path / "out")


def test_where_no_clip_is_left_the_reasons_are_the_error(tmp_path, planted):
    film(tmp_path / "raw/wall.mp4", level=DARK)
    with pytest.raises(SystemExit, match=r"no clip is left: 1 without a face; see .*report\.json"):
        run(tmp_path / "raw", tmp_path / "out")


@needs_face_models
@pytest.mark.slow
def test_killed_at_any_time_it_loses_the_clips_in_work_alone(tmp_path):
    """Real faces, two processes, SIGKILL; the crops are then those of a run that was let alone."""
    from llama_smop.data.synthetic.head import filmed
    from tests.data.faces.drawn import speaker

    _, heads, samples = speaker(0, 20)
    (tmp_path / "raw").mkdir()
    for number in range(12):
        path = tmp_path / f"raw/{number}.mp4"
        write_video(path, np.stack(list(filmed(heads, (240, 320), drift=number / 100))), audio=samples)
        path.with_suffix(".txt").write_text("some words")
    command = [sys.executable, "-m", "llama_smop.cli", "corpus", "crop", str(tmp_path / "raw"), "--workers", "2"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    journal = tmp_path / "out/raw/clips.jsonl"
    child = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    try:
        while not journal.exists() or journal.read_text().count("{") < 3:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    done = journal.read_text().count("}\n")
    again = subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, capture_output=True, text=True)
    assert f"{done}/12" in again.stderr, "the clips that were done are not made again"
    for path in (tmp_path / "whole").rglob("*"):
        if path.suffix in (".mp4", ".wav", ".csv"):
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()
