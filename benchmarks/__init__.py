"""Benchmarks: speed, memory and correctness of the projector against its peers and the roofline.

`python -m benchmarks --help` lists the commands; `benchmarks/results/` holds the results, one JSON file per device.
"""


def say(line: str) -> None:
    """Print progress unbuffered, so that it shows at once in a pipe."""
    print(line, flush=True)
