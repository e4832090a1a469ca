"""`python -m benchmarks tune`: search Triton tile configurations on this GPU and rewrite the shipped table.

For each workload the five grouped products of a training step are timed with the table's tile; then, greedily, with its
neighbours (one field changed) until none is quicker or time is up. A tile enters the table only where it wins by more
than the noise, summed over the products of the operation.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import CudaClock
from benchmarks.workloads import Workload, headline, make
from llama_smop.system import files
from llama_smop.triton_kernels import configs, projection, tables
from llama_smop.triton_kernels.grouped_gemm import grouped_gemm
from llama_smop.triton_kernels.grouped_wgrad import grouped_wgrad
from llama_smop.triton_kernels.launch import Launch, dot_precision, target_arch
from llama_smop.triton_kernels.tiles import GroupedShape, TileConfig

SAMPLES = 15
NOISE = 0.02  # of the time: a smaller gain counts as none
CHOICES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (2, 3, 4, 5, 6),
    "group_m": (1, 4, 8, 16),
    "blocks": (1, 2),
}


@dataclass(frozen=True)
class Product:
    """One grouped product of a step: its operation and shape, and its launch with any tile."""

    op: str  # "gemm" or "wgrad"
    shape: GroupedShape
    build: Callable[[TileConfig], Launch]


@dataclass(frozen=True)
class Finding:
    """What a search for one operation came to; microseconds summed over its products."""

    workload: str
    op: str
    arch: int
    kind: str
    factor: float  # the table's, of the shipped tile
    shipped: TileConfig
    shipped_us: float
    best: TileConfig
    best_us: float
    modelled: float  # cost of the best tile over that of the shipped one
    tried: int

    @property
    def wins(self) -> bool:
        return self.best_us < (1 - NOISE) * self.shipped_us


def products(workload: Workload, device: str = "cuda") -> list[Product]:
    """The five grouped products of a training step, in expert order, on the workload's own routing."""
    p = make(workload, torch.device(device))
    K, X = workload.top_k, workload.total_experts
    routing = projection.route_fwd(p.x, p.gate_weight, None, None, K, X)
    order, _, offs = routing[6:]
    rows, H, O = order.numel(), p.w1.shape[1], p.w2.shape[1]
    h, z, dz, dh = (p.x.new_empty(rows, width).normal_() for width in (H, O, O, H))
    dw1, dw2 = torch.empty_like(p.w1), torch.empty_like(p.w2)
    gathered = {"gather": True, "order": order, "top_k": K}
    w1, w2 = p.w1.transpose(1, 2), p.w2.transpose(1, 2)

    def gemm(a, b, out, **options) -> Product:
        shape = configs.gemm_shape(rows, X, b.shape[2], b.shape[1])
        return Product("gemm", shape, lambda config: grouped_gemm(a, b, offs, out, config=config, **options))

    def wgrad(a, b, out, **options) -> Product:
        shape = configs.wgrad_shape(rows, X, *out.shape[1:])
        return Product("wgrad", shape, lambda config: grouped_wgrad(a, b, offs, out, config=config, **options))

    return [
        gemm(p.x, w1, h, bias=p.b1, activation="relu", **gathered),
        gemm(h, w2, z, bias=p.b2),
        gemm(dz, p.w2, dh, pre=h, gradient=True, activation="relu"),
        wgrad(dz, h, dw2),
        wgrad(dh, p.x, dw1, **gathered),
    ]


def neighbours(config: TileConfig) -> Iterator[TileConfig]:
    """Tiles that differ by one step in one field."""
    for field, choices in CHOICES.items():
        at = choices.index(getattr(config, field))
        for i in (at - 1, at + 1):
            if 0 <= i < len(choices):
                yield replace(config, **{field: choices[i]})


def search(start: TileConfig, cost: Callable[[TileConfig], float], deadline: float) -> tuple[TileConfig, dict]:
    """The quickest tile of a greedy search from `start`, and the cost of each tile that was tried."""
    costs = {start: cost(start)}
    best, moved = start, True
    while moved and time.monotonic() < deadline:
        moved, centre = False, best
        for config in neighbours(centre):
            if config not in costs and time.monotonic() < deadline:
                costs[config] = cost(config)
                if costs[config] < costs[best]:
                    best, moved = config, True
    return best, costs


def tune_workload(workload: Workload, deadline: float) -> list[Finding]:
    """Search the tiles of a workload's products."""
    clock, arch = CudaClock(cold=False), target_arch()
    dtype = workload.torch_dtype
    precision = dot_precision(dtype)
    kind = configs.kind(dtype, precision)
    found = []
    every = products(workload)
    for op in ("gemm", "wgrad"):
        mine = [p for p in every if p.op == op]
        factor, shipped = configs.entry(op, arch, dtype, precision, mine[0].shape)

        def cost(config: TileConfig, mine=mine) -> float:
            if not all(p.shape.rows and config.supports(p.shape, dtype, arch) for p in mine):
                return float("inf")
            try:
                return sum(statistics.median(clock(p.build(config).run) for _ in range(SAMPLES)) for p in mine)
            except Exception as error:  # Triton raises many types if a tile cannot be compiled or launched
                print(f"  {config}: {type(error).__name__}")
                return float("inf")

        best, costs = search(shipped, cost, deadline)
        modelled = [sum(configs.cost(op, arch, dtype, precision, p.shape, t) for p in mine) for t in (best, shipped)]
        key = (workload.key, op, configs.table_arch(arch), kind, factor)
        timed = (shipped, costs[shipped], best, costs[best])
        found.append(Finding(*key, *timed, modelled[0] / modelled[1], len(costs)))
    return found


def improved(table: dict, findings: list[Finding]) -> dict:
    """The table with the tiles of the findings that win, each with the factor that its measured gain says."""
    tiles = {key: {config: factor for factor, config in entries} for key, entries in table.items()}
    for f in findings:
        if f.wins:
            tiles[f.op, f.arch, f.kind][f.best] = round(f.factor * f.best_us / f.shipped_us / f.modelled, 3)
    return {key: tuple((factor, config) for config, factor in row.items()) for key, row in tiles.items()}


def render(table: dict, note: str) -> str:
    """`tables.py` with this table, as ruff formats it."""
    lines = [
        '"""The shipped table of tiles: (operation, sm, kind) → ((factor, tile), ...).',
        "",
        note,
        '"""',
        "",
        "from .tiles import TileConfig",
        "",
        "TABLE = {",
    ]
    for (op, arch, kind), entries in table.items():
        lines.append(f'    ("{op}", {arch}, "{kind}"): (')
        for factor, c in entries:
            options = f"num_warps={c.num_warps}, num_stages={c.num_stages}"
            options += f", group_m={c.group_m}" if c.group_m != 8 else ""
            options += f", blocks={c.blocks}" if c.blocks != 1 else ""
            lines.append(f"        ({factor}, TileConfig({c.block_m}, {c.block_n}, {c.block_k}, {options})),")
        lines.append("    ),")
    return "\n".join([*lines, "}", ""])


def tune(workloads: list[Workload], out: Path | None, budget_s: float) -> list[Finding]:
    """Search for each workload in turn, with equal shares of the budget; save the findings after each."""
    began, findings = time.monotonic(), []
    for i, workload in enumerate(workloads):
        findings += tune_workload(workload, began + budget_s * (i + 1) / len(workloads))
        for f in findings[-2:]:
            print(f"{f.workload} {f.op}: {f.shipped_us:.1f} → {f.best_us:.1f} µs with {f.best} ({f.tried} tried)")
        if out is not None:
            files.write_text(out, json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    return findings


def stage(workloads: list[Workload], out: Path, budget_s: float, dry: bool) -> str:
    """A stage of `python -m benchmarks gpu`: the findings go to `out`; the shipped table does not change."""
    if dry:
        return "a dry run tunes nothing: there is no GPU to time"
    findings = tune(workloads or headline()[-2:], out, budget_s)
    return f"{sum(f.wins for f in findings)} of {len(findings)} table entries beaten"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="stop within about this time")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--out", type=Path, help="JSON file for what was measured")
    parser.add_argument("--write", action="store_true", help="write the winners into triton_kernels/tables.py")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device; torch sees none here")
    findings = tune(headline(options.dtype), options.out, options.budget)
    if options.write:
        note = (
            f"Tuned by `python -m benchmarks tune` on {torch.cuda.get_device_name()}; the entries it could not\n"
            "beat, and those of other architectures, are chosen by compile-time evidence and tile arithmetic."
        )
        files.write_text(tables.__file__, render(improved(tables.TABLE, findings), note))
    return 0
