"""`python -m benchmarks layer-memory`: bytes the projector keeps for backward and its peak, by `recompute`, on "cuda".

Every allocation of a training pass is made and no kernel is launched, so the bytes are exact and nothing is timed. They
are those of PyTorch's allocator; the weights and the tokens are left out, their gradients are in the peak.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks import results, say
from benchmarks.workloads import Workload
from llama_smop import functional
from llama_smop.ops.checks import RECOMPUTE

PATH = results.FOLDER / "layer_memory" / "triton.json"
TOKENS = (4096, 16384)


def run(path: Path = PATH, tokens: tuple[int, ...] = TOKENS, say: Callable[[str], None] = say) -> dict:
    """Raises ValueError: there is no CUDA device, whose allocator counts."""
    if not torch.cuda.is_available():
        raise ValueError("the bytes are counted by the allocator of a CUDA device, and torch sees none here")
    found = {"schema": results.SCHEMA, "torch": torch.__version__, "cases": []}
    for T in tokens:
        for recompute in RECOMPUTE:
            kept, peak = _bytes(Workload(T), recompute)
            found["cases"].append({"tokens": T, "recompute": recompute, "kept_bytes": kept, "peak_bytes": peak})
            say(f'T {T} recompute="{recompute}": kept {kept / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB')
    results.save(found, path)
    return found


def _bytes(w: Workload, recompute: str) -> tuple[int, int]:
    """Allocated between forward and backward, and at most, beyond what was there before."""
    from llama_smop.triton_kernels.launch import Launch

    X, D, H, O = w.total_experts, w.in_features, w.hidden_features, w.out_features
    shapes = (w.routers, w.num_experts, D), (X, H, D), (X, H), (X, O, H), (X, O), (X, O), (X, O)
    factory = {"device": "cuda", "dtype": w.torch_dtype}
    weights = [torch.empty(shape, **factory, requires_grad=True) for shape in shapes]
    x, dy, one = torch.empty(w.tokens, D, **factory), torch.empty(w.tokens, O, **factory), torch.ones((), device="cuda")

    def step() -> int:
        out = functional.smop(
            x, *weights, top_k=w.top_k, sharing=w.sharing, recompute=recompute, backend="triton"
        )  # fmt: skip
        kept = torch.cuda.memory_allocated()
        torch.autograd.grad((out.hidden_states, out.load_balancing_loss), weights, (dy, one))
        return kept

    with mock.patch.object(Launch, "run", lambda launch: None):
        step()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step() - before
    return kept, torch.cuda.max_memory_allocated() - before
