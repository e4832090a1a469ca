"""A folder of raw videos to a corpus of mouth crops in the LRS3 layout, by several processes.

OUT/NAME/…/CLIP.mp4 and .wav      96×96 at 25 frames a second with the sound; 16 kHz
OUT/labels/NAME.csv               the clips whose text is known
OUT/NAME/report.json              what was left out, and why
OUT/NAME/clips.jsonl              one line a video that is done, from which an interrupted run resumes
"""

import json
import os
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from llama_smop.data.faces.crop import Selection, frames_beside_sound, stream_crops, warnings
from llama_smop.data.faces.detector import FaceDetector
from llama_smop.data.faces.export import cut_blocks, sound_of
from llama_smop.data.faces.mesh import FaceMesh
from llama_smop.data.faces.speaker import choose, sound_envelope
from llama_smop.data.faces.tracker import PATIENCE, Tracker
from llama_smop.data.lrs3 import LabelError
from llama_smop.data.media import MediaError, stream_audio, streams, write_audio
from llama_smop.data.raw_videos import RawVideo, find_videos
from llama_smop.data.video_writer import write_frames
from llama_smop.models.units import VIDEO_RATE
from llama_smop.system import files
from llama_smop.system.lock import LOCK, folder_lock
from llama_smop.system.processes import WorkerLost, cores, unordered

JOURNAL, REPORT = "clips.jsonl", "report.json"
WORK = ".in-work-"  # files that name what each process works at


@dataclass(frozen=True)
class Limits:
    """What a clip must be, for its text to be that of its crop: `face` as in `crop_video`, lengths in seconds."""

    face: str | int = "auto"
    min_seconds: float = 0.2
    max_seconds: float = 30.0


@dataclass
class Report:
    """What was made of a folder. left_out: by reason, the videos with what is known beyond it."""

    labels: Path
    labelled: int = 0
    clips: int = 0
    seconds: float = 0.0
    warnings: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)

    def leave_out(self, source: str, reason: str, detail: str = "") -> None:
        shown = os.fsencode(source).decode("utf-8", "replace")  # a file's name is bytes, not always UTF-8
        self.left_out.setdefault(reason, {})[shown] = detail

    def as_json(self) -> dict:
        return {
            "clips": self.clips,
            "labelled": self.labelled,
            "hours": round(self.seconds / 3600, 3),
            "warnings": dict(self.warnings.most_common()),
            "left_out": {reason: dict(sorted(which.items())) for reason, which in sorted(self.left_out.items())},
        }

    def __str__(self) -> str:
        lines = [f"{self.labels}\t{self.labelled} of {self.clips} clips, {self.seconds / 3600:.2f} h"]
        for reason, which in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            lines.append(f"left out\t{len(which)} {reason}, as {next(iter(sorted(which)))}")
        lines += [f"warning\t{count} clips: {line}" for line, count in self.warnings.most_common()]
        return "\n".join(lines)


def crop_corpus(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name: str | None = None,
    table: str | os.PathLike | None = None,
    without_text: bool = False,
    limits: Limits = Limits(),
    lower: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Crop every video below `root` into the data set `name` of the corpus `out`; run again, it resumes.

    A crop has all frames of its video, so that the text is that of the crop. What cannot be cropped so is left out and
    named in the report. A kill loses at most the videos in work.

    Args:
        name: of the data set and its label file, by default that of `root`.
        table, lower: see `raw_videos.find_videos`.
        without_text: crop the videos without a text too; they are in no label file.
        workers: processes, by default one a core. The bytes do not depend on it.

    Raises:
        LabelError: no videos, or none with a text; a damaged table; a folder that holds something else; another run.
        FaceModelError: the face models are not installed. OSError: what cannot be written.
    """
    root, out = Path(root), Path(out)
    name = root.resolve().name if name is None else name
    if name != Path(name).name or name in ("", "..", "labels") or "," in name or name != name.strip():
        raise LabelError(f"{name!r}: expected a plain name for the data set, without a comma")
    _models()  # an error of theirs is told once, and first
    folder, report = out / name, Report(out / "labels" / f"{name}.csv")
    if folder.resolve() == root.resolve():
        raise LabelError(f"{folder}: the crops would lie among the videos; give another folder, or another name")
    videos, clashes = find_videos(root, table, lower=lower, without=[folder])
    if not videos:
        raise LabelError(f"{root}: holds no video")
    for source, reason in clashes.items():
        report.leave_out(source, "has the name of another", reason)
    if not without_text:
        for video in videos:
            if video.text is None:
                report.leave_out(video.source, "without a text")
        videos = [video for video in videos if video.text is not None]
        if not videos:
            where = "NAME.txt beside NAME.mp4" if table is None else str(table)
            raise LabelError(f"{root}: no video has a text in {where}; --without-text crops them all the same")
    files.check_file(report.labels)
    if report.labels.exists() and not (folder / "settings.json").exists():
        raise LabelError(f"{report.labels}: is there already, and not of such crops; give another name")
    files.claim(folder / "settings.json", {"root": str(root.resolve()), **asdict(limits)}, "set of crops", {LOCK})
    with folder_lock(folder, "another run"):
        for leftover in (*folder.rglob(".*.writing-*"), *folder.glob(f"{WORK}*")):
            leftover.unlink()
        records = _finished(root, folder, videos)
        _work(partial(_crop, root=root, folder=folder, limits=limits), folder, videos, records, workers, progress)
        return _written(folder, videos, records, report)


@lru_cache(maxsize=1)
def _models() -> tuple[FaceDetector, FaceMesh]:
    return FaceDetector(), FaceMesh()


def _one_core() -> None:
    cv2.setNumThreads(1)


# -- one video ---------------------------------------------------------------------------------------------------------


def _crop(video: RawVideo, root: Path, folder: Path, limits: Limits) -> dict:
    """The record of a video: what its crop is, or why there is none."""
    mark = folder / f"{WORK}{os.getpid()}"
    mark.write_bytes(os.fsencode(video.source))
    try:
        return _record(video, root) | _cropped(root / video.source, folder / video.path, limits)
    except MediaError as error:
        return _record(video, root) | {"left_out": "unreadable", "detail": error.reason}
    finally:
        mark.unlink(missing_ok=True)


def _record(video: RawVideo, root: Path) -> dict:
    try:
        status = os.stat(root / video.source)
        stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    except OSError:  # a link that leads nowhere
        stamp = {"size": 0, "mtime_ns": 0}
    return {"source": video.source, "path": video.path, **stamp}


def _cropped(path: Path, target: Path, limits: Limits) -> dict:
    if "video" not in streams(path):
        return {"left_out": "without a picture"}
    source = sound_of(path)
    if source is None:
        return {"left_out": "without sound"}
    most = round(limits.max_seconds * VIDEO_RATE)
    tracker, frames = Tracker(*_models()), 0
    for frame in islice(frames_beside_sound(path), most + 1):
        tracker.step(frame)
        frames += 1
    if frames > most:
        return {"left_out": f"longer than {limits.max_seconds:g} s"}
    if frames < limits.min_seconds * VIDEO_RATE:
        return {"left_out": f"shorter than {limits.min_seconds:g} s"}
    tracks = tracker.finish()
    samples = np.concatenate([*cut_blocks(stream_audio(source), 0, frames)])
    try:
        number = choose(tracks, 0, frames, sound_envelope(samples, frames), limits.face) if tracks else None
    except ValueError as error:  # no such face
        return {"left_out": f"without face {limits.face}", "detail": str(error)}
    if number is None:
        return {"left_out": "without a face"}
    track = tracks[number]
    if track.first > PATIENCE or frames - track.end > PATIENCE:
        times = f"{track.first / VIDEO_RATE:g} to {track.end / VIDEO_RATE:g} s of {frames / VIDEO_RATE:g} s"
        return {"left_out": "without one face from beginning to end", "detail": f"face {number} is seen from {times}"}
    sound = target.with_suffix(".wav")
    try:
        write_audio(sound, samples)
        write_frames(target, stream_crops(path, Selection(0, frames, track)), sound=[samples])
    except MediaError as error:
        if error.path in (str(target), str(sound)):  # no fault of the video
            raise OSError(str(error)) from None
        raise
    return {"n_frames": frames, "face": number, "warnings": warnings(track)}


# -- all of them -------------------------------------------------------------------------------------------------------


def _finished(root: Path, folder: Path, videos: list[RawVideo]) -> dict[str, dict]:
    """Records of an earlier run, by video: of those that are as they were then, and whose crops are still there."""
    wanted = {video.source: video for video in videos}
    kept: dict[str, dict] = {}
    journal = folder / JOURNAL
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            record = json.loads(line)
            video = wanted.get(record["source"])
        except (ValueError, TypeError, KeyError):  # the run was killed while it wrote this line
            continue
        if video is None or any(record.get(name) != value for name, value in _record(video, root).items()):
            continue
        crop = folder / video.path
        if "left_out" in record or (crop.exists() and crop.with_suffix(".wav").exists()):
            kept[video.source] = record
    return kept


def _work(
    crop: partial[dict],
    folder: Path,
    videos: list[RawVideo],
    records: dict[str, dict],
    workers: int | None,
    progress: bool,
) -> None:
    """Add the records of the videos that have none."""
    todo = [video for video in videos if video.source not in records]
    if workers is None:
        workers = min(cores(), len(todo))
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(videos), initial=len(records), desc="cropping", unit="clip", disable=not progress)
        )
        journal = stack.enter_context(open(folder / JOURNAL, "a", encoding="utf-8"))
        journal.write("\n")  # ends a line that a kill may have cut

        def note(record: dict) -> None:
            records[record["source"]] = record
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            bar.set_postfix_str(f"{sum('left_out' in r for r in records.values())} left out", refresh=False)
            bar.update()

        while todo:
            try:
                with closing(unordered(crop, todo, workers if workers > 1 else 0, _one_core)) as done:
                    for record in done:
                        note(record)
            except WorkerLost:
                at_work = {mark.read_bytes() for mark in folder.glob(f"{WORK}*")}
                suspects = [v for v in todo if os.fsencode(v.source) in at_work and v.source not in records]
                if not suspects:
                    raise
                for video in suspects:
                    note(_alone(crop, video))
                for mark in folder.glob(f"{WORK}*"):
                    mark.unlink()
            todo = [video for video in todo if video.source not in records]


def _alone(crop: partial[dict], video: RawVideo) -> dict:
    """The record of a video that a worker may have ended at: read once more, by a process of its own."""
    try:
        return next(unordered(crop, [video], 1, _one_core))
    except WorkerLost:
        ended = {"left_out": "unreadable", "detail": "the process that read it ended (a crash, or no memory left)"}
        return _record(video, crop.keywords["root"]) | ended


def _written(folder: Path, videos: list[RawVideo], records: dict[str, dict], report: Report) -> Report:
    lines = []
    for video in videos:
        record = records[video.source]
        if "left_out" in record:
            report.leave_out(video.source, record["left_out"], record.get("detail", ""))
            continue
        report.clips += 1
        report.seconds += record["n_frames"] / VIDEO_RATE
        report.warnings.update(line.partition(":")[0] for line in record["warnings"])
        if video.text is not None:
            lines.append(f"{folder.name},{video.path},{record['n_frames']},,{video.text}\n")
    report.labelled = len(lines)
    files.write_json(folder / REPORT, report.as_json())
    if not report.clips:
        reasons = ", ".join(f"{len(which)} {reason}" for reason, which in sorted(report.left_out.items()))
        raise LabelError(f"{report.labels}: no clip is left: {reasons}; see {folder / REPORT}")
    if lines:
        files.write_text(report.labels, "".join(lines))
    return report
