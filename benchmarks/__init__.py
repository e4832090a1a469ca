"""Speed, memory and correctness of the projector against its peers and against the roofline.

`python -m benchmarks --help` lists what can be run; `benchmarks/results/` holds what was measured, one JSON a device.
"""
