"""Files of visitors lie where only they find them, and do not stay."""

import os
import time


def test_a_file_is_found_by_its_folders_name_and_its_own_alone(shelf):
    folder = shelf.new()
    folder.joinpath("transcript.srt").write_text("1")
    assert shelf.find(folder.name, "transcript.srt") == folder / "transcript.srt"
    for key, name in (
        (folder.name[:-1], "transcript.srt"),
        (folder.name, "other"),
        (f"../results/{folder.name}", "transcript.srt"),
        (folder.name, f"../{folder.name}/transcript.srt"),
        ("..", "uploads"),
        ("ü\udcff", "transcript.srt"),
        ("", ""),
    ):
        assert shelf.find(key, name) is None, (key, name)


def test_others_on_this_machine_cannot_read_it(shelf):
    assert shelf.root.stat().st_mode & 0o077 == 0


def test_a_new_result_takes_the_place_of_the_one_before_and_leaving_removes_all(shelf):
    sent = shelf.uploads / "hash" / "talk.mp4"
    sent.parent.mkdir()
    sent.write_bytes(b"x")
    first, second, others = shelf.new(), shelf.new(), shelf.new()
    shelf.give("ann", sent, first)
    shelf.give("ann", sent, second)
    assert not first.exists() and second.exists() and sent.exists()
    shelf.give("bob", sent, others)
    shelf.leave("ann")
    assert not second.exists() and sent.exists(), "bob sent the same file"
    shelf.leave("bob")
    shelf.leave("nobody")
    assert list(shelf.root.glob("*/*")) == []


def test_a_path_elsewhere_is_never_removed(shelf, tmp_path):
    mine = tmp_path / "mine.mp4"
    mine.write_bytes(b"x")
    shelf.give("ann", mine, shelf.new())
    shelf.drop(tmp_path)
    shelf.leave("ann")
    assert mine.exists()


def test_what_has_lain_too_long_is_removed(shelf):
    old, new = shelf.new(), shelf.new()
    for folder in (old, new):
        folder.joinpath("clip.mp4").write_bytes(b"x")
    for path in (old / "clip.mp4", old):
        os.utime(path, (time.time() - 3600,) * 2)
    shelf.sweep()
    assert not old.exists() and new.exists()


def test_the_end_removes_everything(shelf):
    shelf.new().joinpath("clip.mp4").write_bytes(b"x")
    shelf.close()
    assert not shelf.root.exists()
