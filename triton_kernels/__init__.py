"""The Triton kernels of the sparse mixture of projectors. Read `projection.py` first: the launch sequence."""
