"""The shipped table of tiles: (operation, sm, kind) → ((mean rows of a group up to, tile), ...).

Chosen by compile-time evidence (registers, spills, shared memory, tensor-core instruction) and tile arithmetic, for
1024→2048→2048; not yet measured on a GPU. `python -m benchmarks tune` writes this file.
"""

from .tiles import TileConfig

TABLE = {
    ("gemm", 80, "half"): (
        (64, TileConfig(64, 64, 64, num_warps=4, num_stages=4)),
        (256, TileConfig(64, 128, 64, num_warps=4, num_stages=3)),
        (None, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    ),
    ("gemm", 80, "tf32"): (
        (64, TileConfig(64, 64, 32, num_warps=4, num_stages=4)),
        (None, TileConfig(128, 64, 32, num_warps=4, num_stages=4)),
    ),
    ("gemm", 80, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("gemm", 90, "half"): (
        (64, TileConfig(64, 64, 128, num_warps=4, num_stages=4)),
        (256, TileConfig(64, 128, 64, num_warps=4, num_stages=4)),
        (1024, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
        (None, TileConfig(128, 256, 64, num_warps=8, num_stages=3)),
    ),
    ("gemm", 90, "tf32"): (
        (64, TileConfig(64, 64, 32, num_warps=4, num_stages=4)),
        (None, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("gemm", 90, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("gemm", 100, "half"): (
        (64, TileConfig(64, 64, 64, num_warps=4, num_stages=6)),
        (256, TileConfig(64, 128, 64, num_warps=4, num_stages=4)),
        (None, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    ),
    ("gemm", 100, "tf32"): (
        (64, TileConfig(64, 64, 32, num_warps=4, num_stages=4)),
        (None, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("gemm", 100, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 80, "half"): (
        (256, TileConfig(64, 128, 32, num_warps=4, num_stages=4)),
        (None, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("wgrad", 80, "tf32"): ((None, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 80, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 90, "half"): (
        (256, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
        (None, TileConfig(128, 256, 64, num_warps=8, num_stages=3)),
    ),
    ("wgrad", 90, "tf32"): ((None, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 90, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 100, "half"): ((None, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),),
    ("wgrad", 100, "tf32"): ((None, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 100, "ieee"): ((None, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
}
