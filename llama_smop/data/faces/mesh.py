"""468 landmarks of one face, by MediaPipe's face mesh.

Source: Kartynnik et al., Real-time Facial Surface Geometry from Monocular Video on Mobile GPUs (arXiv 1907.06724).
"""

from dataclasses import dataclass

import cv2
import numpy as np

from llama_smop.data.faces.detector import Detection
from llama_smop.data.faces.model_files import load_network, run_network

SIZE = 192  # of the network's input
POINTS = 468
MARGIN = 1.5  # the network sees the face with this much round it
EYE_CORNERS = (33, 263)  # outer corners, left and right in the picture


@dataclass(frozen=True)
class Region:
    """A rotated square of a picture: centre and side in pixels, angle in radians."""

    centre: np.ndarray
    side: float
    angle: float

    @classmethod
    def of_detection(cls, detection: Detection) -> "Region":
        return cls._round(detection.box, *detection.keypoints[:2])

    @classmethod
    def of_points(cls, points: np.ndarray) -> "Region":
        """Where to look in the next frame; points: (468, 2)."""
        return cls._round(box_of(points), *points[list(EYE_CORNERS)])

    @classmethod
    def _round(cls, box: np.ndarray, left_eye: np.ndarray, right_eye: np.ndarray) -> "Region":
        across = right_eye - left_eye
        side = MARGIN * float(max(box[2] - box[0], box[3] - box[1]))
        return cls((box[:2] + box[2:]) / 2, side, float(np.arctan2(across[1], across[0])))

    def to_picture(self) -> np.ndarray:
        """float64 (2, 3): from the network's pixels to the picture's."""
        scale = self.side / SIZE
        cos, sin = scale * np.cos(self.angle), scale * np.sin(self.angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        return np.column_stack([turn, self.centre - turn @ np.full(2, SIZE / 2)])


class FaceMesh:
    """Call it with an RGB picture, uint8 (height, width, 3), and the region of a face."""

    def __init__(self):
        self._network = load_network("face_landmark")

    def __call__(self, frame: np.ndarray, region: Region) -> tuple[np.ndarray, float]:
        """Landmarks in the picture's pixels, float32 (468, 2), and how sure it is that this is a face, 0 to 1."""
        matrix = region.to_picture()
        face = cv2.warpAffine(frame, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        inputs = np.ascontiguousarray((face.astype(np.float32) / 255).transpose(2, 0, 1)[None])
        logit, points = run_network(self._network, inputs)
        points = points.reshape(POINTS, 3)[:, :2]
        return (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32), float(1 / (1 + np.exp(-logit.item())))


def box_of(points: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of landmarks."""
    return np.concatenate([points.min(axis=0), points.max(axis=0)])
