"""The shipped table of tiles: (operation, sm, kind) → ((factor, tile), ...).

A product takes the tile of the least modelled cost (`tiles.TileConfig.cost`) times its factor: measured over modelled
time, 1.0 where nothing was measured. Chosen by compile-time evidence (registers, spills, shared memory, tensor-core
instruction); not yet measured on a GPU. `python -m benchmarks tune` writes this file.
"""

from .tiles import TileConfig

TABLE = {
    ("gemm", 80, "half"): (
        (1.0, TileConfig(64, 64, 64, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(64, 128, 64, num_warps=4, num_stages=3, blocks=2)),
        (1.0, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    ),
    ("gemm", 80, "tf32"): (
        (1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 64, 32, num_warps=4, num_stages=4)),
    ),
    ("gemm", 80, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("gemm", 90, "half"): (
        (1.0, TileConfig(64, 128, 64, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 128, 64, num_warps=8, num_stages=3, blocks=2)),
        (1.0, TileConfig(128, 256, 64, num_warps=8, num_stages=4)),
    ),
    ("gemm", 90, "tf32"): (
        (1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("gemm", 90, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("gemm", 100, "half"): (
        (1.0, TileConfig(64, 64, 64, num_warps=4, num_stages=6, blocks=2)),
        (1.0, TileConfig(64, 128, 64, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    ),
    ("gemm", 100, "tf32"): (
        (1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("gemm", 100, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 80, "half"): (
        (1.0, TileConfig(64, 128, 32, num_warps=4, num_stages=4, blocks=2)),
        (1.0, TileConfig(128, 128, 32, num_warps=8, num_stages=4)),
    ),
    ("wgrad", 80, "tf32"): ((1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 80, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 90, "half"): (
        (1.0, TileConfig(128, 128, 64, num_warps=8, num_stages=3, blocks=2)),
        (1.0, TileConfig(128, 256, 64, num_warps=8, num_stages=3)),
    ),
    ("wgrad", 90, "tf32"): ((1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 90, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
    ("wgrad", 100, "half"): ((1.0, TileConfig(128, 128, 64, num_warps=8, num_stages=3)),),
    ("wgrad", 100, "tf32"): ((1.0, TileConfig(64, 64, 32, num_warps=4, num_stages=3)),),
    ("wgrad", 100, "ieee"): ((1.0, TileConfig(64, 64, 16, num_warps=8, num_stages=3)),),
}
