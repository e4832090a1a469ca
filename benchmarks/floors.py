"""The roofline floor: the least time of a workload, from its operations, its bytes and two measured ceilings.

    floor = max(FLOPs / matrix-product rate, bytes / copy bandwidth)

Only useful operations count: those of a token's K experts. The bytes are a minimum: every input is read once, every
result is written once, and fused steps exchange nothing through memory. Backward has no gradient for x, because the
encoders are frozen, and reads h and z from forward.
"""

import time
from dataclasses import dataclass

import torch

from benchmarks.workloads import DTYPES, Workload

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one pass."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """Measured on the device in the same run. flops: FLOP/s of a large matrix product, by dtype."""

    bytes_per_s: float
    flops: dict[str, float]

    def floor_us(self, work: Work, dtype: str) -> float | None:
        """Microseconds; None if no matrix product of this dtype was measured."""
        if dtype not in self.flops:
            return None
        return 1e6 * max(work.flops / self.flops[dtype], work.bytes / self.bytes_per_s)


def smop_work(w: Workload, which: str) -> Work:
    """Work of the sparse layer in pass `which`: "forward", "backward" or "both"."""
    T, D, H, U, O, E = w.tokens, w.in_features, w.hidden_features, w.up_features, w.out_features, w.num_experts
    rows, size = T * w.top_k, BYTES[w.dtype]
    gate = w.routers * E * D
    touched = min(w.total_experts, _experts_used(w))
    first, second = touched * U * D, touched * O * H
    small = touched * (U * w.has_bias + O * (w.has_bias + 2 * w.has_layer_norm))
    forward = Work(
        flops=2 * rows * (U * D + O * H) + 2 * T * E * D,
        bytes=size * (T * D + gate + first + second + small + T * O),
    )
    written = w.total_experts * (U * D + O * H) + gate + small
    kept = rows * (H + (U if w.expert == "swiglu" else 0) + (O if w.has_layer_norm else 0))
    backward = Work(
        flops=2 * rows * (2 * O * H + U * D) + 2 * T * E * D,
        bytes=size * (T * D + T * O + second + kept + written),
    )
    training = Work(forward.flops, forward.bytes + size * kept)
    return {"forward": forward, "backward": backward, "both": training + backward}[which]


def dense_work(w: Workload, hidden: int, which: str) -> Work:
    """Work of a dense projector of `hidden` units (one for each router's modality) on the same tokens."""
    T, D, O, size = w.tokens, w.in_features, w.out_features, BYTES[w.dtype]
    weights = w.routers * hidden * (D + O)
    forward = Work(2 * T * hidden * (D + O), size * (T * D + weights + T * O))
    kept = T * hidden
    backward = Work(2 * T * hidden * (2 * O + D), size * (T * D + T * O + w.routers * hidden * O + kept + weights))
    training = Work(forward.flops, forward.bytes + size * kept)
    return {"forward": forward, "backward": backward, "both": training + backward}[which]


def _experts_used(w: Workload) -> int:
    """The number of experts with tokens; for random routing its upper bound."""
    if w.routing == "one":
        return w.top_k * (2 if w.sharing == "DEDR" else 1)
    return w.tokens * w.top_k


# --------------------------------------------------------------------------------------------------------- ceilings


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...], quick: bool = False) -> Ceilings:
    """Measure a large copy (bytes read plus written) and a large matrix product of each dtype, best of several.

    The best, because a ceiling is what the device can do without other load.
    """
    cuda = device.type == "cuda"
    size = (1 << 24) if quick else (1 << 30 if cuda else 1 << 28)
    repeats = 2 if quick else 12
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, repeats)
    flops = {}
    for name in dtypes:
        side = 256 if quick else (_cuda_side(name) if cuda else 2048)
        a = torch.randn(side, side, device=device).to(DTYPES[name])
        b = torch.randn(side, side, device=device).to(DTYPES[name])
        out = torch.empty_like(a)
        try:
            seconds = _best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, repeats)
        except RuntimeError:  # this device has no product of this dtype
            continue
        flops[name] = 2 * side**3 / seconds
    return Ceilings(2 * size / copy, flops)


def _cuda_side(dtype: str) -> int:
    return 8192 if dtype in ("bfloat16", "float16") else 4096


def _best_seconds(fn, device: torch.device, repeats: int) -> float:
    fn()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            fn()
            best = min(best, time.perf_counter() - begin)
    return best
