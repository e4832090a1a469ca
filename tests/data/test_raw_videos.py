"""Which videos a folder holds, and what is said in them."""

import os

import pytest

from llama_smop.data.lrs3 import LabelError
from llama_smop.data.raw_videos import find_videos


def folder(root, **content):
    """Files by name, `__` for a slash and `_dot_` for a dot."""
    for name, text in content.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_texts_lie_beside_the_videos_as_in_lrs3_or_plainly(tmp_path):
    root = folder(
        tmp_path,
        a__0001_dot_mp4="",
        a__0001_dot_txt="Text:  SO, THIS {LAUGH} IS\nConf:  5\n\nRef: x\n",
        b_dot_MOV="",
        b_dot_txt="Hello\nyou,\n",
        c_dot_webm="",
        d_dot_mkv="",
        d_dot_txt=" \n",
        notes_dot_txt="nothing",
        _dot_hidden__e_dot_mp4="",
    )
    videos, clashes = find_videos(root)
    assert [(v.source, v.path, v.text) for v in videos] == [
        ("b.MOV", "b.mp4", "hello you"),
        ("c.webm", "c.mp4", None),
        ("d.mkv", "d.mp4", None),
        ("a/0001.mp4", "a/0001.mp4", "so this laugh is"),
    ]
    assert not clashes
    assert find_videos(root, lower=False)[0][-1].text == "SO THIS LAUGH IS"
    assert [v.source for v in find_videos(root, without=[root / "a"])[0]] == ["b.MOV", "c.webm", "d.mkv"]


@pytest.mark.parametrize(
    "table",
    [
        'path,text\na/1.mp4,"Hello, you"\nb.mp4,Yes\n',
        '\ufeffa/1,"Hello, you"\nb,Yes\n\n',
        "a,1.mp4,50,0,Hello you\n.,b.mp4,50,0,Yes\nz,not_there.mp4,5,0,No\n",
    ],
)
def test_texts_of_a_table(tmp_path, table):
    root = folder(
        tmp_path / "in", a__1_dot_mp4="", b_dot_mp4="", b_dot_txt="not this", c_dot_mp4="", c_dot_txt="nor this"
    )
    (tmp_path / "t.csv").write_text(table)
    videos, _ = find_videos(root, tmp_path / "t.csv")
    assert {v.source: v.text for v in videos} == {"a/1.mp4": "hello you", "b.mp4": "yes", "c.mp4": None}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("a.mp4,one,two\n", r"t\.csv: row 1: expected path,text .* got 3 fields"),
        ("a.mp4,one\na.mp4,two\n", r"t\.csv: row 2: a\.mp4 has a text already"),
        ('a.mp4,"one\n', r"t\.csv: is no CSV file"),
        (None, r"t\.csv: no such table of texts"),
    ],
)
def test_a_damaged_table_is_named_with_its_row(tmp_path, table, reason):
    root = folder(tmp_path / "in", a_dot_mp4="")
    if table is not None:
        (tmp_path / "t.csv").write_text(table)
    with pytest.raises(LabelError, match=reason):
        find_videos(root, tmp_path / "t.csv")
    with pytest.raises(LabelError, match="is no folder of videos"):
        find_videos(tmp_path / "none")


def test_names_that_a_label_cannot_hold_are_changed_and_clashes_are_told(tmp_path):
    root = folder(tmp_path, a_dot_mp4="", a_dot_mov="")
    for name in (b"x,y.mp4", b"x_y.mp4", b"n\xff.mp4", b"two\nlines.mp4"):
        (root / os.fsdecode(name)).touch()
    videos, clashes = find_videos(root)
    assert sorted(v.path for v in videos) == ["a.mp4", "n_.mp4", "two_lines.mp4", "x_y.mp4"]
    assert clashes == {"a.mp4": "its crop would be that of a.mov", "x_y.mp4": "its crop would be that of x,y.mp4"}


def test_a_link_back_to_the_folder_does_not_loop(tmp_path):
    root = folder(tmp_path / "in", a__1_dot_mp4="")
    (root / "a" / "back").symlink_to(root)
    (root / "far").symlink_to(folder(tmp_path / "elsewhere", b_dot_mp4=""))
    assert [v.source for v in find_videos(root)[0]] == ["a/1.mp4", "far/b.mp4"]
