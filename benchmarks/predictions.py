"""Single launches beside what a model of the H100 predicts for them from their machine code.

The predictions are those of `benchmarks/predicted/`. Each launch is timed as the replay of a CUDA graph that holds it
alone, so its time includes the start of a graph, which is measured too.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure, say
from benchmarks.workloads import Workload, make, tiny
from llama_smop.ops import dispatch

PREDICTED = Path(__file__).resolve().parent / "predicted" / "nvidia-h100.json"
FILLS = 21  # of a graph that shows the gap between launches
MANY, FEW = Workload(4096), Workload(512, sharing="DEDR")


def load() -> dict:
    return json.loads(PREDICTED.read_text())


@dataclass
class Operands:
    """What the grouped products of a step read and write, in expert order, on the workload's own routing."""

    x: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    order: Tensor
    offs: Tensor
    h: Tensor
    z: Tensor
    dz: Tensor
    dh: Tensor
    top_k: int

    @classmethod
    def of(cls, w: Workload, device: torch.device, backend: str) -> "Operands":
        p = make(w, device)
        assert p.b1 is not None and p.b2 is not None, "projectors have biases"
        routed = dispatch.module(backend).route_fwd(p.x, p.gate_weight, p.modality, None, w.top_k, w.total_experts)
        rows = w.tokens * w.top_k
        h, dh = (p.x.new_empty(rows, w.hidden_features).normal_() for _ in range(2))
        z, dz = (p.x.new_empty(rows, w.out_features).normal_() for _ in range(2))
        return cls(p.x, p.w1, p.b1, p.w2, p.b2, routed[6], routed[8], h, z, dz, dh, w.top_k)


def checks(device: torch.device, backend: str, dry: bool) -> Iterator[tuple[str, Workload, dict[str, Callable]]]:
    """(question, workload, {launch: callable}): launches of `backend` that are compared with each other."""
    many, few = (tiny(w) if dry else w for w in (MANY, FEW))
    if backend == "triton":
        yield "the start of a graph, and the gap between its launches", many, _graph_start(device)
        yield "tiles of few rows against the widest", few, _triton_tiles(Operands.of(few, device, backend))
        yield (
            "the weight gradient; dh with and without the sums of db1",
            many,
            _triton_backward(Operands.of(many, device, backend)),
        )
    else:
        yield "dh, which reads saved activations, against z = h·W2", many, _cuda(Operands.of(many, device, backend))


def _graph_start(device: torch.device) -> dict[str, Callable]:
    sink = torch.zeros(1, device=device)

    def fill(times: int) -> None:
        for _ in range(times):
            sink.fill_(1.0)

    return {"1 fill": partial(fill, 1), f"{FILLS} fills": partial(fill, FILLS)}


def _triton_tiles(o: Operands) -> dict[str, Callable]:
    from llama_smop.triton_kernels.grouped_gemm import grouped_gemm
    from llama_smop.triton_kernels.tiles import TileConfig

    found = {}
    for tile in (
        TileConfig(64, 128, 64, num_warps=4, num_stages=4, blocks=2),
        TileConfig(128, 256, 64, num_warps=8, num_stages=4),
    ):
        gathered = {"bias": o.b1, "activation": "relu", "gather": True, "order": o.order, "top_k": o.top_k}
        h = grouped_gemm(o.x, o.w1.transpose(1, 2), o.offs, o.h, config=tile, **gathered)
        z = grouped_gemm(o.h, o.w2.transpose(1, 2), o.offs, o.z, config=tile, bias=o.b2)
        found |= {f"h {tile.block_m}x{tile.block_n}": h.run, f"z {tile.block_m}x{tile.block_n}": z.run}
    return found


def _triton_backward(o: Operands) -> dict[str, Callable]:
    from llama_smop.triton_kernels.grouped_gemm import gemm_tile_rows, grouped_gemm
    from llama_smop.triton_kernels.grouped_wgrad import grouped_wgrad
    from llama_smop.triton_kernels.partials import new_partials

    X = o.w2.shape[0]
    sums = new_partials(o.dh, X, gemm_tile_rows(o.dh, X, o.dh.shape[1], o.dz.shape[1]), sums=1).sums
    dh = partial(grouped_gemm, o.dz, o.w2, o.offs, o.dh, pre=o.h, gradient=True, activation="relu")
    return {
        "dW2": grouped_wgrad(o.dz, o.h, o.offs, torch.empty_like(o.w2)).run,
        "dh without db1": dh().run,
        "dh": dh(sums=sums).run,
    }


def _cuda(o: Operands) -> dict[str, Callable]:
    from llama_smop.ops.backends import cuda

    def product(*operands: Tensor, **options) -> Tensor:
        with cuda.launches(operands[0]) as stream:
            return cuda.gemm(stream, *operands, o.offs, o.h.shape[0], first=True, **options)

    return {
        "z": partial(product, o.h, o.w2.transpose(1, 2), bias=o.b2),
        "dh": partial(product, o.dz, o.w2, aux=o.h, epilogue="relu_grad"),
    }


def measured(device: torch.device, backend: str, budget_s: float, dry: bool, say: Callable[[str], None] = say) -> list:
    """A record for each launch: median and quartiles of its graph's replay, and what was predicted for it."""
    predicted, found = load(), []
    for question, w, launches in checks(device, backend, dry):
        runs = {name: measure.captured(run) for name, run in launches.items()}
        timings, _ = measure.interleaved(runs, measure.clock(device), budget_s, min_rounds=3 if dry else 10)
        for name, timing in timings.items():
            alone = predicted["launches"].get(f"{backend} {name}")
            known = None if alone is None or dry else round(alone + predicted["graph_start_us"], 1)
            record = {"question": question, "workload": w.key, "backend": backend, "launch": name}
            found.append({**record, **timing.json(), "predicted_us": known})
            beside = "" if known is None else f", predicted {known:.1f} ({timing.median_us / known - 1:+.0%})"
            say(f"{backend} {name}: {timing.median_us:.1f} µs{beside}")
    return found
