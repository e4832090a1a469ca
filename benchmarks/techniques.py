"""What the kernels do on argument alone, timed beside what it replaced: what a GPU is to decide first.

    Triton     operands of z by TMA, against pointers, where there is TMA
    CUDA C++   every width of the tiles of z and of dW2, by blocks alone and in clusters of two
    both       a forward pass of few tokens with weights brought into the L2 ahead, and without

Each is timed as the replay of a CUDA graph, so that no host is in it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measure, say
from benchmarks.predictions import Operands
from benchmarks.workloads import Workload, make, tiny
from llama_smop.ops import dispatch
from llama_smop.ops.backend import Experts, Schedule

CLIP, BATCH, MANY = Workload(64), Workload(1024), Workload(4096)
WIDTHS = (64, 128, 160, 192, 256)
NO_SUCH_CUT = "invalid argument", "not supported"  # in the extension, or of this shape; on this GPU


def trials(device: torch.device, backend: str, dry: bool) -> Iterator[tuple[str, Workload, dict[str, Callable]]]:
    """(question, workload, {way: callable}); ways of `backend` to the same end."""
    clip, batch, many = (tiny(w) if dry else w for w in (CLIP, BATCH, MANY))
    if backend == "triton":
        if _has_tma():
            yield "z, its operands by TMA or by pointers", many, _by_tma(Operands.of(many, device, backend))
    else:
        for w in (batch, many):
            operands = Operands.of(w, device, backend)
            yield "z, by columns of a tile and blocks of a cluster", w, _cuts_of_z(operands)
            yield "dW2, by columns of a tile and blocks of a cluster", w, _cuts_of_dw2(operands)
    yield "a forward pass, with weights brought into the L2 ahead or not", clip, _ahead(clip, device, backend)


def _has_tma() -> bool:
    from llama_smop.triton_kernels.launch import target_arch

    return target_arch() >= 90


def _by_tma(o: Operands) -> dict[str, Callable[[], Tensor]]:
    from llama_smop.triton_kernels.grouped_gemm import grouped_gemm

    def z(by_tma: bool) -> Tensor:
        grouped_gemm(o.h, o.w2.transpose(1, 2), o.offs, o.z, bias=o.b2, by_tma=by_tma).run()
        return o.z

    return {"TMA": partial(z, True), "pointers": partial(z, False)}


def _cuts_of_z(o: Operands) -> dict[str, Callable[[], Tensor]]:
    from llama_smop.ops.backends import cuda

    def z(cut: tuple[int, int]) -> Tensor:
        with cuda.launches(o.h) as stream:
            return cuda.gemm(
                stream, o.h, o.w2.transpose(1, 2), o.offs, o.h.shape[0], bias=o.b2, out=o.z, cut=cut, first=True
            )

    return _possible(z)


def _cuts_of_dw2(o: Operands) -> dict[str, Callable[[], Tensor]]:
    from llama_smop.ops.backends import cuda

    def dw2(cut: tuple[int, int]) -> Tensor:
        with cuda.launches(o.h) as stream:
            return cuda.wgrad(stream, o.dz, o.h, o.offs, cut=cut, first=True)

    return _possible(dw2)


def _possible(run: Callable[[tuple[int, int]], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The cuts that there are of a product, and the one that is chosen by itself."""
    found: dict[str, Callable] = {"chosen": partial(run, (0, 0))}
    for cut in [(width, blocks) for width in WIDTHS for blocks in (1, 2)]:
        try:
            run(cut)
        except RuntimeError as error:
            if not str(error).endswith(NO_SUCH_CUT):
                raise
            continue
        found[f"{cut[0]} columns, {'alone' if cut[1] == 1 else 'clusters'}"] = partial(run, cut)
    return found


def _ahead(w: Workload, device: torch.device, backend: str) -> dict[str, Callable]:
    module = dispatch.module(backend)
    limit: ModuleType = module
    if backend == "triton":
        from llama_smop.triton_kernels import ahead as limit
    p = make(w, device)
    parameters = Experts(p.w1, p.b1, p.w2, p.b2, p.ln_weight, p.ln_bias)

    def forward(rows: int) -> Tensor:
        # A replay would not ask for the limit again.
        route, project = module.route_fwd.__wrapped__, module.expert_projection_fwd.__wrapped__
        with mock.patch.object(limit, "FEW_ROWS", rows):
            routed = route(p.x, p.gate_weight, p.modality, None, w.top_k, w.total_experts, 0, p.w1)
            return project(p.x, routed[1], routed[2], Schedule(*routed[6:9]), parameters, "relu", 1e-5)[0]

    return {"brought": partial(forward, limit.FEW_ROWS), "not": partial(forward, 0)}


def measured(device: torch.device, backend: str, budget_s: float, dry: bool, say: Callable[[str], None] = say) -> list:
    """A record for each way: median and quartiles of its graph's replay."""
    found = []
    for question, w, ways in trials(device, backend, dry):
        runs = {name: measure.captured(run) for name, run in ways.items()}
        timings, _ = measure.interleaved(runs, measure.clock(device), budget_s, min_rounds=3 if dry else 10)
        say(f"{backend}: {question}: " + ", ".join(f"{name} {t.median_us:.1f} µs" for name, t in timings.items()))
        for name, timing in timings.items():
            found.append({"question": question, "workload": w.key, "backend": backend, "way": name, **timing.json()})
    return found
