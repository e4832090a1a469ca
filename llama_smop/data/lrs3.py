"""Clips in the LRS3 layout.

`root/labels/FILE.csv` has one clip a line, `dataset,relative/path.mp4,n_frames,unused,text`; the clip lies at
`root/dataset/relative/path.mp4` with its sound beside it as .wav.
"""

import os
import re
import reprlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from llama_smop.data.degrade import Degradation, degrade
from llama_smop.data.media import MediaError, audio_path, read_audio, read_video
from llama_smop.data.noise import Noise
from llama_smop.data.transforms import ClipTransform, clip_rng
from llama_smop.models.units import MODALITIES, SAMPLES_PER_VIDEO_FRAME

SPARE_FRAMES = 12  # half a second that a clip may be longer than its label, as by a codec's last block
MOST_FRAMES = 10_000_000  # four days; a label with more is damaged
DEGRADE = 0xD6  # sets the draws of degradations apart from those of the noise
ODD_SPACES = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # `splitlines` would end a line at these


class LabelError(ValueError):
    """A label file cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Clip:
    """One line of a label file. n_frames: video frames at 25 a second."""

    dataset: str
    path: str
    n_frames: int
    text: str

    @property
    def id(self) -> str:
        """A name that is unique within the corpus, `dataset/relative/path` without its ending."""
        return Path(self.dataset, self.path).with_suffix("").as_posix()

    def video_path(self, root: str | os.PathLike) -> Path:
        return Path(root, self.dataset, self.path)


def read_labels(root: str | os.PathLike, label_file: str | os.PathLike) -> list[Clip]:
    """The clips of a label file: a name under `root/labels/`, else a path. Raises LabelError naming file and line."""
    path = Path(root, "labels", label_file)
    if not os.path.exists(path) and os.path.exists(label_file):
        path = Path(label_file)
    clips: list[Clip] = []
    seen: dict[str, int] = {}  # lines by clip
    for number, line in enumerate(read_text(path, "label file").split("\n"), start=1):
        if not line.strip():
            continue
        clip = _parse(line, f"{path}:{number}")
        if clip.id in seen:
            raise LabelError(f"{path}:{number}: {clip.id} is already on line {seen[clip.id]}")
        seen[clip.id] = number
        clips.append(clip)
    if not clips:
        raise LabelError(f"{path}: holds no clip")
    return clips


def read_text(path: Path, what: str) -> str:
    """A text file's content, its lines ended by "\\n" alone; a spreadsheet's byte order mark is no part of it.

    Raises LabelError, naming `what` where it is not there, or is a pipe or device, which may have no end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LabelError(f"{path}: is not a regular file")
        return ODD_SPACES.sub(" ", path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise LabelError(f"{path}: no such {what}") from None
    except LabelError:
        raise
    except (OSError, ValueError) as error:
        raise LabelError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _parse(line: str, where: str) -> Clip:
    fields = line.split(",")
    if len(fields) != 5:
        hint = "; `llama-smop corpus labels` writes such files from auto_avsr's" if len(fields) == 4 else ""
        raise LabelError(f"{where}: expected 5 fields (dataset,path,n_frames,unused,text), got {len(fields)}{hint}")
    text = fields[4].strip()
    if not text:
        raise LabelError(f"{where}: dataset, path and text must not be empty")
    return Clip(*parse_place(fields, where), text)


def parse_place(fields: Sequence[str], where: str) -> tuple[str, str, int]:
    """Dataset, path and frames, the first three fields of a line; LabelError naming `where` if they are not those."""
    if len(fields) < 3:
        raise LabelError(f"{where}: expected dataset,path,n_frames,…, got {len(fields)} fields")
    dataset, path, n_frames = (field.strip() for field in fields[:3])
    if not dataset or not path:
        raise LabelError(f"{where}: dataset, path and text must not be empty")
    if _leads_out(dataset):
        raise LabelError(f"{where}: expected a dataset's folder below the corpus, got {dataset!r}")
    if _leads_out(path):
        raise LabelError(f"{where}: expected a path below the dataset's folder, got {path!r}")
    if not n_frames.isdecimal() or len(n_frames) > 20 or not 0 < int(n_frames) <= MOST_FRAMES:
        raise LabelError(f"{where}: expected a positive number of frames, got {reprlib.repr(n_frames)}")
    return dataset, path, int(n_frames)


def _leads_out(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


class Lrs3Dataset(Dataset):
    """Decoded and transformed clips of one label file.

    An item is a dict: `audio` float32 (samples,) numpy or None, `video` float32 (T, 1, 88, 88) tensor or None, `text`,
    `id`. transform: ClipTransform, the test one by default. noise: Noise, added to the audio. degradation: what makes
    the frames worse before they are transformed. All draw from generators seeded by (seed, index): items do not depend
    on the order they are asked for, nor on the worker, and a clip's noise does not depend on its degradation.
    `lengths` are the labels' frame counts; nothing is decoded for them. longest: frames that the model takes; a clip
    that is longer, by less than SPARE_FRAMES, is cut to its label's length. unfit: says why the model cannot take a
    clip of so many samples and frames, or None. Raises MediaError naming the file where a clip cannot be used.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        label_file: str | os.PathLike,
        modality: str = "audiovisual",
        transform: ClipTransform | None = None,
        noise: Noise | None = None,
        seed: int = 0,
        degradation: Degradation | None = None,
        longest: int | None = None,
        unfit: Callable[[int | None, int | None], str | None] | None = None,
    ):
        if modality not in MODALITIES:
            raise ValueError(f"expected a modality of {', '.join(MODALITIES)}, got {modality!r}")
        self.root = Path(root)
        self.clips = read_labels(root, label_file)
        self.modality = modality
        self.transform = transform or ClipTransform.testing()
        self.noise = noise
        self.seed, self.degradation = seed, degradation
        self.longest, self.unfit = longest, unfit

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def lengths(self) -> list[int]:
        return [clip.n_frames for clip in self.clips]

    def __getitem__(self, index: int) -> dict:
        clip = self.clips[index]
        audio, video = load_clip(clip.video_path(self.root), self.modality)
        audio, video = self._cut(audio, clip.n_frames, SAMPLES_PER_VIDEO_FRAME), self._cut(video, clip.n_frames, 1)
        if self.unfit is not None:
            reason = self.unfit(*(None if stream is None else len(stream) for stream in (audio, video)))
            if reason is not None:
                raise MediaError(clip.video_path(self.root), f"{reason} (its label says {clip.n_frames} frames)")
        if video is not None and self.degradation is not None:
            video = degrade(video, self.degradation, (self.seed, index, DEGRADE))
        rng = clip_rng(self.seed, 0, index)
        audio, video = self.transform(audio, video, rng, self.noise)
        return {
            "audio": audio,
            "video": None if video is None else torch.from_numpy(video),
            "text": clip.text,
            "id": clip.id,
        }

    def _cut(self, stream: np.ndarray | None, n_frames: int, per_frame: int) -> np.ndarray | None:
        if stream is None or self.longest is None or not n_frames <= self.longest < len(stream) / per_frame:
            return stream
        return stream if len(stream) > (n_frames + SPARE_FRAMES) * per_frame else stream[: n_frames * per_frame]


def load_clip(path: str | os.PathLike, modality: str = "audiovisual") -> tuple[np.ndarray | None, np.ndarray | None]:
    """The streams of a clip that a modality needs: samples (n,) at 16 kHz or None, frames uint8 (T, 96, 96, 3) or None.

    The sound comes from the .wav beside the clip, which begins with its first frame, or from the clip itself where
    there is none. Raises MediaError.
    """
    audio = video = None
    source = audio_path(path)
    if modality != "audio":
        video = read_video(path, with_sound=source == Path(path))
    if modality != "video":
        audio = read_audio(source)
    return audio, video
