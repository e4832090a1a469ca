"""Label files for clips prepared by auto_avsr, the usual preparation of LRS2, LRS3 and VoxCeleb2.

The preparation writes `root/labels/NAME.csv`, with `dataset,dataset_video_seg16s/path.mp4,n_frames,token ids` a line,
and the text to `root/dataset/dataset_text_seg16s/path.txt`. Its token ids are not those of a language model, so the
text is read instead.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llama_smop.data.lrs3 import LabelError, parse_place, read_text
from llama_smop.models.units import VIDEO_RATE
from llama_smop.system import files


@dataclass(frozen=True)
class Written:
    """The label file written, and how many clips it has and leaves out."""

    path: Path
    kept: int
    hours: float
    too_short: int
    too_long: int
    without_text: int

    def __str__(self) -> str:
        left_out = f"left out: {self.too_short} too short, {self.too_long} too long, {self.without_text} without a word"
        return f"{self.path}\t{self.kept} clips, {self.hours:.1f} h; {left_out}"


def write_labels(
    root: str | os.PathLike,
    prepared: Sequence[str],
    to: str,
    *,
    min_seconds: float = 0.2,
    max_seconds: float = 30.0,
    lower: bool = True,
    progress: bool = True,
) -> Written:
    """Writes `root/labels/{to}` in the layout of lrs3.py from label files of the preparation, one after the other.

    Clips outside of `min_seconds` and `max_seconds` are left out; the defaults are what the model takes: a token of
    five frames, Whisper's window. The text is lower-cased, as the published models' labels are, its commas become
    spaces, and its braces go.

    Raises:
        LabelError: a label file or a text that cannot be read, naming it; no clip that is left; names that are not
            those of files under `root/labels`.
        OSError: a label file that cannot be written.
    """
    root = Path(root)
    for name in (to, *prepared):
        if name != Path(name).name or name in ("", ".."):
            raise LabelError(f"{name!r}: expected the plain name of a label file under {root / 'labels'}")
    target = root / "labels" / to
    files.check_file(target)
    lines, frames, too_short, too_long, without_text = [], 0, 0, 0, 0
    for source in prepared:
        path = root / "labels" / source
        if path == target:
            raise LabelError(f"{path}: would be overwritten; give another name to write to")
        rows = read_text(path, "label file").split("\n")
        for number, row in enumerate(tqdm(rows, desc=source, unit="clip", disable=not progress), start=1):
            if not row.strip():
                continue
            dataset, clip, n_frames = parse_place(row.split(","), f"{path}:{number}")
            if n_frames < min_seconds * VIDEO_RATE:
                too_short += 1
            elif n_frames > max_seconds * VIDEO_RATE:
                too_long += 1
            elif text := label_text(read_text(root / dataset / _text_path(clip, f"{path}:{number}"), "text"), lower):
                lines.append(f"{dataset},{clip},{n_frames},,{text}\n")
                frames += n_frames
            else:
                without_text += 1
    if not lines:
        raise LabelError(f"{', '.join(prepared)}: no clip is left of {too_short + too_long + without_text}")
    files.write_text(target, "".join(lines))
    return Written(target, len(lines), frames / VIDEO_RATE / 3600, too_short, too_long, without_text)


def _text_path(clip: str, where: str) -> str:
    folder, _, rest = clip.partition("/")
    if "_video_" not in folder or not rest:
        raise LabelError(f"{where}: expected a path such as lrs3_video_seg16s/…/00001.mp4, got {clip!r}")
    return f"{folder.replace('_video_', '_text_')}/{Path(rest).with_suffix('.txt')}"


def label_text(said: str, lower: bool = True) -> str:
    """A text as a label's line holds it: no comma, no brace, single spaces; lower-cased unless `lower` is False."""
    said = said.replace(",", " ").replace("{", "").replace("}", "")
    return " ".join((said.lower() if lower else said).split())
