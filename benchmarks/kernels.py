"""Single operators against plain PyTorch: `python -m benchmarks kernels`, `pytest benchmarks --benchmark-only`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import environment, measure, results, say
from benchmarks.rivals.base import router, router_losses
from benchmarks.rivals.grouped import expert_order
from benchmarks.workloads import Problem, Workload, make
from llama_smop import functional
from llama_smop.ops import dispatch

Runs = dict[str, Callable[[], object]]


def workloads(device: torch.device) -> list[Workload]:
    """The workloads of the micro-benchmarks: small and large on a GPU, small on a CPU."""
    tokens = (256, 4096) if device.type == "cuda" else (150,)
    return [Workload(T, "bfloat16" if device.type == "cuda" else "float32") for T in tokens]


def backends(w: Workload, device: torch.device) -> list[str]:
    return [
        b for b in dispatch.BACKENDS if dispatch.unsupported(b, w.torch_dtype, device, w.top_k, w.total_experts) is None
    ]


def groups(w: Workload, device: torch.device) -> dict[str, Runs]:
    """{operator: {implementation: callable without arguments}}."""
    p = make(w, device)
    routed = functional.route(p.x, p.gate_weight, top_k=w.top_k, num_experts=w.total_experts, backend="torch")
    order = routed.order.long()
    rows = p.x[order // w.top_k]
    h = torch.randn(rows.shape[0], w.hidden_features, device=device).to(p.x.dtype)
    dz = torch.randn(rows.shape[0], w.out_features, device=device).to(p.x.dtype)
    found: dict[str, Runs] = {name: {} for name in ("route", "schedule", "up_product", "weight_gradient", "experts")}
    for b in backends(w, device):
        found["route"][f"ours_{b}"] = partial(functional.route, p.x, p.gate_weight, top_k=w.top_k, backend=b)
        found["schedule"][f"ours_{b}"] = partial(torch.ops.smop.schedule, routed.experts, w.total_experts, b)
        found["up_product"][f"ours_{b}"] = partial(
            functional.grouped_mm, rows, p.w1.transpose(1, 2), routed.offs, bias=p.b1, activation="relu", backend=b
        )
        found["weight_gradient"][f"ours_{b}"] = partial(functional.grouped_mm, dz.t(), h, routed.offs, backend=b)
        found["experts"][f"ours_{b}"] = partial(_experts, p, routed, b)
    found["route"]["plain"] = partial(_plain_route, p)
    found["schedule"]["plain"] = partial(expert_order, routed.experts, w.total_experts)
    if hasattr(torch.nn.functional, "grouped_mm") and (device.type == "cpu" or w.dtype == "bfloat16"):
        grouped = torch.nn.functional.grouped_mm
        expert_of_row = routed.experts.flatten()[order].long()
        found["up_product"]["torch_grouped_mm"] = lambda: (
            grouped(rows, p.w1.transpose(1, 2), offs=routed.offs) + p.b1[expert_of_row]
        ).relu()
        found["weight_gradient"]["torch_grouped_mm"] = lambda: grouped(dz.t(), h, offs=routed.offs)
    return found


def _plain_route(p: Problem) -> tuple:
    """The results of `functional.route` in plain PyTorch: weights, auxiliary losses, rows in expert order."""
    logits, weights, experts = router(p.x, p.gate_weight[0], p.workload.top_k)
    return weights, router_losses(logits, experts), expert_order(experts, p.workload.total_experts)


def _experts(p: Problem, routed, backend: str) -> Tensor:
    return functional.expert_projection(
        p.x,
        routed.weights,
        routed.experts,
        p.w1,
        p.b1,
        p.w2,
        p.b2,
        p.ln_weight,
        p.ln_bias,
        schedule=(routed.order, routed.inverse, routed.offs),
        backend=backend,
    )


def measured(w: Workload, device: torch.device, budget_s: float) -> list[dict]:
    """One record for each operator and implementation; `budget_s`: seconds for each operator."""
    found = []
    with torch.no_grad():
        for operator, runs in groups(w, device).items():
            timings, noise = measure.interleaved(runs, measure.clock(device), budget_s)
            for name, timing in timings.items():
                record = {"operator": operator, "workload": w.key, "implementation": name}
                found.append({**record, **timing.json(), "noise": round(max(noise, timing.median_error), 4)})
    return found


def run(path: Path | None = None, budget_s: float = 4.0, say: Callable[[str], None] = say) -> dict:
    """Time every operator on this machine's device; save the results if `path` is given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = results.new("gpu" if device.type == "cuda" else "cpu")
    found["environment"] = environment.describe(device)
    for w in workloads(device):
        records = measured(w, device, budget_s)
        for r in records:
            spread = f"({r['q1_us']:.1f} to {r['q3_us']:.1f})"
            say(f"{w.key}  {r['operator']:16s} {r['implementation']:18s} {r['median_us']:10.1f} µs {spread}")
        results.add(found, {"kernels": records}, w)
    if path is not None:
        results.save(found, path)
    return found
