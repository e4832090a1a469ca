"""Names the optional extra of this package that installs a missing module."""

import re
from importlib.metadata import PackageNotFoundError, requires

# Modules whose distribution has a different name.
DISTRIBUTIONS = {"yaml": "pyyaml", "cv2": "opencv-python-headless", "espeakng_loader": "espeakng-loader"}


def remedy(module: str) -> str:
    """One line for an error message: how to install `module`."""
    top = module.partition(".")[0]
    distribution = DISTRIBUTIONS.get(top, top)
    try:
        lines = requires("llama-smop") or []
    except PackageNotFoundError:  # a checkout that is not installed
        lines = []
    for line in lines:
        found = re.match(r"([\w-]+)[^;]*;\s*extra == ['\"](\w+)['\"]", line)
        if found and found[1].lower() == distribution:
            extra = f"llama-smop[{found[2]}]"
            return f'{distribution} is not installed; the extra [{found[2]}] brings it: pip install "{extra}"'
    return f"{distribution} is not installed: pip install {distribution}"
