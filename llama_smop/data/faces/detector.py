"""Where faces are in a picture: BlazeFace at short and at full range together, one list of detections.

The full-range model misses faces that fill the picture, the short-range one misses distant faces.
Source: Bazarevsky et al., BlazeFace, CVPR workshops 2019 (arXiv 1907.05047); anchors and decoding as in MediaPipe.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from llama_smop.data.faces.model_files import load_network, run_network

MIN_SCORE = 0.5
SAME_FACE_IOU = 0.3
LOGIT_LIMIT = 80.0  # beyond it float32's exp overflows


@dataclass(frozen=True)
class Detection:
    """A face in a picture, in pixels.

    box: float32 (4,), left, top, right, bottom.
    keypoints: float32 (6, 2): the eye that is left in the picture, the right one, nose tip, mouth, two ears.
    score: 0.5 to 1.
    """

    box: np.ndarray
    keypoints: np.ndarray
    score: float


class FaceDetector:
    """Both detectors; call it with an RGB picture, uint8 (height, width, 3)."""

    def __init__(self):
        self._short = _Network("face_detection_short_range", size=128, grids=((16, 2), (8, 6)))
        self._full = _Network("face_detection_full_range", size=192, grids=((48, 1),))

    def __call__(self, frame: np.ndarray) -> list[Detection]:
        return suppress([*self._short(frame), *self._full(frame)])


class _Network:
    """One detector: its anchors are the cell centres of square grids, (cells a side, anchors a cell)."""

    def __init__(self, name: str, size: int, grids: tuple[tuple[int, int], ...]):
        self._network = load_network(name)
        self._size = size
        anchors = []
        for cells, repeats in grids:
            y, x = np.mgrid[0:cells, 0:cells]
            centres = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) / cells
            anchors.append(np.repeat(centres, repeats, axis=0))
        self._anchors = np.concatenate(anchors).astype(np.float32)

    def __call__(self, frame: np.ndarray) -> list[Detection]:
        picture, scale, left, top = _letterbox(frame, self._size)
        inputs = np.ascontiguousarray((picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None])
        logits, boxes = run_network(self._network, inputs)
        scores = 1 / (1 + np.exp(-np.clip(logits.reshape(-1), -LOGIT_LIMIT, LOGIT_LIMIT)))
        found = np.flatnonzero(scores > MIN_SCORE)
        # A row is centre, size and six keypoints; all but the size are relative to the anchor.
        rows = boxes.reshape(-1, 8, 2)[found] / self._size
        rows[:, [0, 2, 3, 4, 5, 6, 7]] += self._anchors[found][:, None]
        rows = (rows * self._size) / scale
        corner = np.array([left, top], np.float32) / scale
        detections = []
        for score, (centre, extent, *keypoints) in zip(scores[found], rows, strict=True):
            if (extent > 0).all():
                centre = centre - corner
                box = np.concatenate([centre - extent / 2, centre + extent / 2])
                detections.append(Detection(box, np.stack(keypoints) - corner, float(score)))
        return detections


def _letterbox(frame: np.ndarray, size: int) -> tuple[np.ndarray, float, int, int]:
    """`frame` in the middle of a black square, with the scale and the margins left and above."""
    height, width = frame.shape[:2]
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = np.zeros((size, size, 3), np.uint8)
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture[top : top + inner[1], left : left + inner[0]] = cv2.resize(frame, inner, interpolation=shrinks)
    return picture, scale, left, top


def suppress(detections: list[Detection]) -> list[Detection]:
    """One detection a face: overlapping ones are averaged, weighted by their scores; best first."""
    left = sorted(detections, key=lambda d: d.score, reverse=True)
    faces = []
    while left:
        overlaps = [iou(left[0].box, other.box) > SAME_FACE_IOU for other in left]
        same = [d for d, overlap in zip(left, overlaps, strict=True) if overlap]
        weights = np.array([d.score for d in same])
        faces.append(
            Detection(
                np.average([d.box for d in same], axis=0, weights=weights),
                np.average([d.keypoints for d in same], axis=0, weights=weights),
                left[0].score,
            )
        )
        left = [d for d, overlap in zip(left, overlaps, strict=True) if not overlap]
    return faces


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    outer = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    return float(inner / outer) if outer > 0 else 0.0
