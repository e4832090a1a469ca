import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop.data.lrs3 import LabelError, load_clip, read_labels
from llama_smop.data.synthetic import corpus as corpus_module
from llama_smop.data.synthetic.contact_sheet import contact_sheet
from llama_smop.data.synthetic.corpus import SPLITS, Settings, _plan, make_corpus
from llama_smop.data.synthetic.grammar import GRID, CorpusError, Grammar

few = settings(derandomize=True, deadline=None, max_examples=25)


def tree(root):
    """Every file's bytes by its path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def assert_same_tree(one, other):
    one, other = tree(one), tree(other)
    assert one.keys() == other.keys()
    differing = [name for name in one if one[name] != other[name]]
    assert not differing, f"{len(differing)} files differ, first {differing[:3]}"


def test_the_layout_is_the_recipes(small_corpus):
    lines = (small_corpus / "labels" / "train.csv").read_text().splitlines()
    for line in lines:
        dataset, path, n_frames, _, text = line.split(",")
        audio, video = load_clip(small_corpus / dataset / path)
        assert (small_corpus / dataset / path).with_suffix(".wav").exists()
        assert video.shape == (int(n_frames), 96, 96, 3)
        assert len(audio) == int(n_frames) * 640
        assert [word in words for word, (_, words) in zip(text.split(), GRID.slots, strict=True)] == [True] * 6


def test_the_manifest_describes_the_corpus(small_corpus):
    manifest = json.loads((small_corpus / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 3 and manifest["settings"]["clips"] == 12
    assert {split: c["clips"] for split, c in manifest["counts"].items()} == {
        split: len(read_labels(small_corpus, f"{split}.csv")) for split in SPLITS
    }
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((small_corpus / name).read_bytes()).hexdigest() == digest
    assert "synthetic" in manifest["what"] and manifest["versions"]["espeakng-loader"]


def test_words_have_their_times(small_corpus):
    for line in (small_corpus / "clips.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert " ".join(word for word, _, _ in record["words"]) == record["text"]
        edges = [t for _, start, end in record["words"] for t in (start, end)]
        assert all(a <= b + 1e-9 for a, b in pairwise(edges))
        assert edges[0] > 0 and edges[-1] < record["n_frames"] / 25


def test_mouth_and_voice_begin_together(small_corpus):
    for clip in read_labels(small_corpus, "train.csv"):
        audio, video = load_clip(clip.video_path(small_corpus))
        loudness = np.sqrt(np.mean(audio.reshape(-1, 640) ** 2, axis=1))
        sound = np.argmax(loudness > 0.1 * loudness.max())
        lips = video[:, 35:80, 20:76].astype(float).mean(axis=-1)
        moved = np.abs(lips - lips[0]).mean(axis=(1, 2))
        movement = np.argmax(moved > 0.25 * moved.max())
        assert abs(int(movement) - int(sound)) <= 4, f"{clip.id}: sound at frame {sound}, lips at frame {movement}"


@given(st.integers(8, 400), st.integers(0, 10**6), st.integers(1, 4))
@few
def test_no_sentence_is_in_two_splits(clips, seed, words):
    grammar = Grammar((("one", ("a", "b", "c", "d")[:words]), ("two", ("e", "f", "g")), ("three", ("h", "i", "j"))))
    settings_ = Settings(clips=clips, seed=seed, grammar=grammar)
    tasks = _plan(settings_)
    assert len(tasks) == clips == len({task.path for task in tasks})
    sentences = {split: {task.words for task in tasks if task.split == split} for split in SPLITS}
    assert all(sentences.values()), "a split is empty"
    assert sum(map(len, sentences.values())) == len(set().union(*sentences.values()))
    unseen = {task.voice.name for task in tasks if task.split == "test_unseen_voice"}
    seen = {task.voice.name for task in tasks if task.split != "test_unseen_voice"}
    assert not unseen & seen, "an unseen voice was heard in training"


def test_a_large_corpus_says_each_sentence_once_and_uses_every_word():
    tasks = _plan(Settings(clips=1500, seed=0))
    assert len({task.words for task in tasks}) == 1500
    train = [task for task in tasks if task.split == "train"]
    for i, (slot, words) in enumerate(GRID.slots):
        assert {task.words[i] for task in train} == set(words), f"training lacks words of {slot}"
    assert len({task.voice.name for task in train}) == 6


def test_interrupted_by_ctrl_c_and_run_again(small_corpus, tmp_path, monkeypatch):
    made = corpus_module.make_clip
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(corpus_module, "make_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "c", clips=12, seed=3, progress=False, workers=1)
    assert not (tmp_path / "c" / "manifest.json").exists()
    calls[:] = [None] * 10
    make_corpus(tmp_path / "c", clips=12, seed=3, progress=False, workers=1)
    assert len(calls) == 10 + 12 - 4, "finished clips were made again"
    assert_same_tree(tmp_path / "c", small_corpus)
    make_corpus(tmp_path / "c", clips=12, seed=3, progress=False, workers=1)
    assert len(calls) == 10 + 12 - 4, "a finished corpus was made again"


KILLED = """
from llama_smop.data.synthetic.corpus import make_corpus
make_corpus({out!r}, clips=24, seed=3, progress=False, workers=2)
"""


def test_killed_in_the_middle_and_run_again_in_other_processes(tmp_path):
    make_corpus(tmp_path / "whole", clips=24, seed=3, progress=False, workers=1)
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", KILLED.format(out=str(out))])
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("generated/*/*.mp4"))) < 6:
            assert child.poll() is None, "the corpus was done before it could be killed"
            assert time.monotonic() < deadline, "no clip was made in two minutes"
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    before, after = -1, 0
    while before != after:  # its workers notice within half a second, and may finish a clip
        time.sleep(1.0)
        before, after = after, len(list(out.glob("generated/*/*.mp4")))
    assert after < 24, "the workers outlived their killed parent"
    with open(out / "clips.jsonl", "a") as journal:
        journal.write('{"index": 23, "pa')  # a line cut by the kill
    make_corpus(out, clips=24, seed=3, progress=False, workers=1)
    assert_same_tree(out, tmp_path / "whole")


def test_a_damaged_clip_is_made_again(small_corpus, corpus_copy):
    clips = sorted(corpus_copy.glob("generated/*/*.mp4"))
    clips[0].write_bytes(clips[0].read_bytes()[:100])
    clips[1].with_suffix(".wav").unlink()
    (clips[2].parent / f".{clips[2].name}.writing-77").write_bytes(b"half")
    make_corpus(corpus_copy, clips=12, seed=3, progress=False, workers=1)
    assert_same_tree(corpus_copy, small_corpus)


def of_an_older_version(corpus):
    """Settings as they were noted before the corpus said which version drew its clips."""
    note = json.loads((corpus / "settings.json").read_text())
    del note["drawing"]
    (corpus / "settings.json").write_text(json.dumps(note))
    return corpus


def test_an_unfinished_corpus_of_other_drawings_is_not_continued(corpus_copy):
    of_an_older_version(corpus_copy)
    next(corpus_copy.glob("generated/*/*.mp4")).unlink()
    before = tree(corpus_copy)
    with pytest.raises(CorpusError, match="is unfinished, and this version draws clips differently: delete it"):
        make_corpus(corpus_copy, clips=12, seed=3, progress=False, workers=1)
    assert tree(corpus_copy) == before


def test_a_finished_corpus_of_other_drawings_stays_usable(corpus_copy):
    of_an_older_version(corpus_copy)
    before = tree(corpus_copy / "generated")
    make_corpus(corpus_copy, clips=12, seed=3, progress=False, workers=1)
    assert tree(corpus_copy / "generated") == before, "clips were drawn again"
    manifest = json.loads((corpus_copy / "manifest.json").read_text())
    assert "drawing" not in manifest["settings"], "the manifest says that this version drew the clips"


@pytest.mark.parametrize(
    "line", (b"5", b"{}", b'{"index": [], "path": 3}', b"\xff\xfe", b"[" * 100_000), ids=lambda line: repr(line[:12])
)
def test_damaged_lines_of_the_journal_are_left_out(small_corpus, corpus_copy, tmp_path, line):
    with open(corpus_copy / "clips.jsonl", "ab") as journal:
        journal.write(line + b"\n")
    assert contact_sheet(corpus_copy, tmp_path / "sheet.png", n=1).exists()
    make_corpus(corpus_copy, clips=12, seed=3, progress=False, workers=1)
    assert_same_tree(corpus_copy, small_corpus)


def test_another_seed_gives_other_clips(small_corpus, tmp_path):
    other = make_corpus(tmp_path / "other", clips=8, seed=4, progress=False, workers=1)
    assert not set(tree(other).values()) & set(tree(small_corpus).values())


def test_a_folder_with_something_else_is_left_alone(small_corpus, tmp_path):
    with pytest.raises(CorpusError, match=r"other settings \(clips, seed\)"):
        make_corpus(small_corpus, clips=13, seed=4, progress=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="is not empty and holds no generated corpus"):
        make_corpus(tmp_path, clips=12, progress=False)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"clips": 3}, "at least 8 clips"),
        ({"shares": (0.9, 0.1, 0.1, 0.1)}, "expected numbers > 0 of sum 1"),
        ({"unseen_voices": ()}, "voices and unseen voices"),
        ({"grammar": Grammar((("one", ("yes", "no")),))}, "2 sentences, too few"),
    ],
)
def test_impossible_settings_write_nothing(tmp_path, arguments, reason):
    with pytest.raises(CorpusError, match=reason):
        make_corpus(tmp_path / "c", progress=False, **arguments)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("word", ["Bin", "bin,", "two words", "", "b1n"])
def test_a_grammar_takes_words_that_fit_a_label_line(word):
    with pytest.raises(CorpusError, match="slot 'verb'"):
        Grammar((("verb", ("lay", word)),))


def test_a_grammar_from_a_file(tmp_path):
    path = tmp_path / "grammar.yaml"
    path.write_text("slots:\n  verb: [lay, put]\n  letter: [a, b]\nspoken: {a: eigh}\n")
    grammar = Grammar.from_file(path)
    assert [grammar.sentence(i) for i in range(4)] == [("lay", "a"), ("lay", "b"), ("put", "a"), ("put", "b")]
    assert grammar.as_spoken(("lay", "a")) == "lay eigh"
    for text, reason in (
        ("slots: {answer: [yes, maybe]}", "a word is text, got True"),
        ("slots: [lay, put]", "list of words each"),
        ("slots: {verb: [lay]}\nwords: 3", "and nothing else"),
        ("slots: {verb: [lay]}\nspoken: {a: 5}", "grammar.yaml: .*respells words as text"),
        ("slots: {verb: [{a: b}]}", "grammar.yaml: .*a word is text"),
        ("slots: {verb: &v [*v]}", "grammar.yaml: a value contains itself"),
        ("slots: {verb: [lay", "grammar.yaml: not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(CorpusError, match=reason) as caught:
            Grammar.from_file(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match=r"none\.yaml: no such file"):
        Grammar.from_file(tmp_path / "none.yaml")


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "find_spec", lambda name: None if name == "cv2" else object())
    with pytest.raises(CorpusError, match=r"cv2 not installed: pip install 'llama-smop\[corpus\]'"):
        make_corpus(tmp_path / "c", progress=False)


def test_the_contact_sheet_is_a_picture(small_corpus, tmp_path):
    import cv2

    png = contact_sheet(small_corpus, tmp_path / "sheet.png", n=3)
    picture = cv2.imread(str(png))
    assert picture.shape[1] > 1000 and picture.shape[0] > 500
    assert picture.std() > 20, "the picture is blank"
    with pytest.raises(LabelError, match="holds no label file"):
        contact_sheet(tmp_path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
