"""Faces followed through a video: detected now and then, in between found from the frame before by the mesh."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np

from llama_smop.data.faces.detector import Detection, FaceDetector, iou
from llama_smop.data.faces.geometry import KEPT
from llama_smop.data.faces.mesh import FaceMesh, Region, box_of

LOOK_EVERY = 12  # frames between two looks for new faces
RETRY_EVERY = 4  # while a face is lost
PATIENCE = 25  # frames that a face may be away (1 s) without its track ending
SHORTEST = 12  # frames; a shorter track is no face to read lips of
MIN_MESH_SCORE = 0.5
SAME_FACE_IOU = 0.2
CUT = 40.0  # mean change of a grey value between two frames that makes a cut


@dataclass
class Track:
    """One face over consecutive frames.

    first: its first frame.
    points: for every frame (len(KEPT), 2) in pixels, or None where the face was not found.
    boxes: for every frame left, top, right, bottom, or None.
    brightness: mean grey value of the face, 0 to 255, of each frame in which it was found.
    """

    first: int
    points: list[np.ndarray | None] = field(default_factory=list)
    boxes: list[np.ndarray | None] = field(default_factory=list)
    brightness: list[float] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The frame after its last one."""
        return self.first + len(self.points)

    @property
    def found(self) -> float:
        """The share of its frames in which the face was found."""
        return sum(p is not None for p in self.points) / max(1, len(self.points))

    def filled_points(self, first: int | None = None, end: int | None = None) -> np.ndarray:
        """(T, len(KEPT), 2): missing frames interpolated linearly, the ends held.

        first, end: frames of the video, within the track; by default all of its own.
        """
        return self._fill(self.points, first, end)

    def filled_boxes(self, first: int | None = None, end: int | None = None) -> np.ndarray:
        """(T, 4), likewise."""
        return self._fill(self.boxes, first, end)

    def _fill(self, values: list[np.ndarray | None], first: int | None, end: int | None) -> np.ndarray:
        """A part costs what it is long, not what the track is long."""
        begin = 0 if first is None else first - self.first
        stop = len(values) if end is None else end - self.first
        low, high = begin, stop - 1
        while low > 0 and values[low] is None:
            low -= 1
        while high < len(values) - 1 and values[high] is None:
            high += 1
        return _interpolated(values[low : high + 1])[begin - low : stop - low]

    def trim(self) -> None:
        """Drop the missing frames at its end."""
        while self.points and self.points[-1] is None:
            self.points.pop()
            self.boxes.pop()


class Tracker:
    """Give it the frames in order, RGB uint8 (height, width, 3); then ask for the tracks."""

    def __init__(self, detector: FaceDetector | None = None, mesh: FaceMesh | None = None):
        self._detector = detector or FaceDetector()
        self._mesh = mesh or FaceMesh()
        self._open: list[_OpenTrack] = []
        self._closed: list[Track] = []
        self._frame = 0
        self._thumbnail: np.ndarray | None = None

    def step(self, frame: np.ndarray) -> None:
        """Follow the known faces into `frame`, and look for new ones where it is time to."""
        if self._is_cut(frame):
            self._close(lambda track: True)
        lost = [track for track in self._open if not track.follow(frame, self._mesh)]
        due = self._frame % LOOK_EVERY == 0
        retry = (lost or not self._open) and self._frame % RETRY_EVERY == 0
        if due or retry or any(track.missing == 1 for track in lost):
            self._look(frame)
        self._close(lambda track: track.missing > PATIENCE)
        self._frame += 1

    def finish(self) -> list[Track]:
        """All tracks of at least `SHORTEST` frames, in order of their beginning."""
        self._close(lambda track: True)
        return sorted(self._closed, key=lambda track: track.first)

    def _look(self, frame: np.ndarray) -> None:
        """Take up lost faces again, and begin tracks of new ones."""
        for detection in self._detector(frame):
            same = max(self._open, key=lambda track: iou(track.box, detection.box), default=None)
            if same is not None and iou(same.box, detection.box) > SAME_FACE_IOU:
                if same.missing:
                    same.find(frame, detection, self._mesh)
                continue
            track = _OpenTrack(Track(self._frame), detection)
            track.track.points.append(None)
            track.track.boxes.append(None)
            if track.find(frame, detection, self._mesh):
                self._open.append(track)

    def _close(self, ends) -> None:
        for track in [track for track in self._open if ends(track)]:
            self._open.remove(track)
            track.track.trim()
            if len(track.track.points) >= SHORTEST:
                self._closed.append(track.track)

    def _is_cut(self, frame: np.ndarray) -> bool:
        """Whether another picture begins: the mesh would lock on to whoever is in the same place."""
        small = cv2.resize(frame, (32, 18), interpolation=cv2.INTER_AREA).mean(axis=2)
        before, self._thumbnail = self._thumbnail, small
        return before is not None and float(abs(small - before).mean()) > CUT


class _OpenTrack:
    """A track that may go on, and where its face was last."""

    def __init__(self, track: Track, detection: Detection):
        self.track = track
        self.box = detection.box
        self.missing = 0
        self._region: Region | None = None

    def follow(self, frame: np.ndarray, mesh: FaceMesh) -> bool:
        """Add `frame`: found by the mesh from the frame before, or missing."""
        self.track.points.append(None)
        self.track.boxes.append(None)
        if self._region is not None and self._take(frame, *mesh(frame, self._region)):
            return True
        self._region = None
        self.missing += 1
        return False

    def find(self, frame: np.ndarray, detection: Detection, mesh: FaceMesh) -> bool:
        """Fill in the frame that was added last, from a detection in it."""
        return self._take(frame, *mesh(frame, Region.of_detection(detection)))

    def _take(self, frame: np.ndarray, points: np.ndarray, score: float) -> bool:
        if score <= MIN_MESH_SCORE:
            return False
        self.box, self.missing, self._region = box_of(points), 0, Region.of_points(points)
        self.track.points[-1] = points[list(KEPT)]
        self.track.boxes[-1] = self.box
        left, top, right, bottom = np.clip(self.box, 0, None).astype(int)
        face = frame[top:bottom:4, left:right:4]
        if face.size:
            self.track.brightness.append(float(face.mean()))
        return True


def track_faces(frames: Iterable[np.ndarray]) -> list[Track]:
    """The faces of a video; memory grows by the landmarks alone, about 11 kB a face and second."""
    tracker = Tracker()
    for frame in frames:
        tracker.step(frame)
    return tracker.finish()


def _interpolated(values: list[np.ndarray | None]) -> np.ndarray:
    known = [i for i, value in enumerate(values) if value is not None]
    rows = np.stack([value for value in values if value is not None]).astype(np.float64)
    wanted = np.arange(len(values))
    flat = rows.reshape(len(known), -1)
    filled = np.stack([np.interp(wanted, known, column) for column in flat.T], axis=1)
    return filled.reshape(len(values), *rows.shape[1:])
