"""Speed, memory and correctness of the projector against its peers and against the roofline.

`python -m benchmarks --help` lists what can be run; `benchmarks/results/` holds what was measured, one JSON a device.
"""


def say(line: str) -> None:
    """Progress, seen at once even in a pipe."""
    print(line, flush=True)
