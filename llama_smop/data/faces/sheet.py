"""A picture of what was found in a video: frames with the faces marked, and the crops below them."""

import os
from pathlib import Path

import cv2
import numpy as np

from llama_smop.data.faces.crop import Faces, Selection, crop_mouths, frames_beside_sound
from llama_smop.system import files

COLUMNS = 8
WIDTH = 192  # pixels of a column
COLOURS = ((46, 134, 171), (209, 73, 91), (58, 125, 68), (237, 174, 73), (102, 46, 155))


def check_sheet(out: str | os.PathLike) -> None:
    """ValueError: the name says another format than `write_sheet` writes."""
    files.check_suffix(out, "PNG", ".png")


def write_sheet(path: str | os.PathLike, faces: Faces, chosen: int | None, out: str | os.PathLike) -> Path:
    """Write a PNG: evenly spaced frames, every face in its colour, the crops of `chosen` below."""
    wanted = np.linspace(0, faces.frames - 1, min(COLUMNS, faces.frames)).round().astype(int).tolist()
    height = max(1, round(faces.size[0] * WIDTH / faces.size[1]))
    frames = []
    for number, frame in enumerate(frames_beside_sound(path)):
        if number in wanted:
            picture = frame.copy()
            for index, track in enumerate(faces.tracks):
                if track.first <= number < track.end:
                    _mark(picture, track.filled_boxes(number, number + 1)[0], index, index == chosen)
            frames.append(cv2.resize(picture, (WIDTH, height), interpolation=cv2.INTER_AREA))
    rows = [np.hstack(frames)]
    if chosen is not None:
        track = faces.tracks[chosen]
        shown = [number for number in wanted if track.first <= number < track.end]
        crops = crop_mouths(path, [Selection(number, number + 1, track) for number in shown])
        below = np.zeros((96, rows[0].shape[1], 3), np.uint8)
        for column, number in enumerate(wanted):
            if number in shown:
                left = column * WIDTH + (WIDTH - 96) // 2
                below[:, left : left + 96] = next(crops)[0]
        rows.append(below)
    encoded = cv2.imencode(".png", cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])[
        1
    ]
    return files.write_bytes(Path(out), encoded.tobytes())


def _mark(picture: np.ndarray, box: np.ndarray, index: int, chosen: bool) -> None:
    left, top, right, bottom = (int(v) for v in box.round())
    thickness = max(1, picture.shape[1] // 200) * (2 if chosen else 1)
    colour = COLOURS[index % len(COLOURS)]
    cv2.rectangle(picture, (left, top), (right, bottom), colour, thickness, cv2.LINE_AA)
    size = picture.shape[1] / 640
    cv2.putText(
        picture, str(index), (left, max(12, top - 4)), cv2.FONT_HERSHEY_SIMPLEX, max(0.4, size), colour, thickness
    )
