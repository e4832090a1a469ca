"""Measures projectors on this machine: tokens per second, bytes kept for backward, parameters."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama_smop.projector import DenseProjector, SMoPProjector
from llama_smop.reports.saved_tensors import SavedStorages


def paper_projectors(hidden: int = 2048, num_experts: int = 4, top_k: int = 2) -> dict[str, nn.Module]:
    """The paper's sparse projector (1024 → 2048, Llama 3.2-1B) and dense projectors to compare it with.

    Same active FLOPs: an MLP of K·H hidden units. Same parameters: one of E·H. Half the FLOPs: one of H.
    """
    D, H, O = 1024, hidden, 2048
    return {
        f"sparse, top-{top_k} of {num_experts}": SMoPProjector(D, H, O, num_experts, top_k, sharing="JEJR"),
        f"dense, {top_k}·H (same FLOPs)": DenseProjector(D, top_k * H, O, modalities=1, layer_norm=True),
        f"dense, {num_experts}·H (same parameters)": DenseProjector(
            D, num_experts * H, O, modalities=1, layer_norm=True
        ),
        "dense, H (half the FLOPs)": DenseProjector(D, H, O, modalities=1, layer_norm=True),
    }


def compare(
    projectors: Mapping[str, nn.Module], tokens: int = 256, rounds: int = 7, device: str = "cpu", progress: bool = True
) -> list[dict]:
    """Medians of forward and backward of each projector. The rounds are interleaved, so that load affects all alike."""
    x = torch.randn(tokens, 1024, device=device)
    times: dict[str, list[float]] = {name: [] for name in projectors}
    for module in projectors.values():
        module.to(device)
        _step(module, x)  # warm-up
    for _ in tqdm(range(rounds), desc="projectors", disable=not progress):
        for name, module in projectors.items():
            start = time.perf_counter()
            _step(module, x)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return [
        {
            "name": name,
            "sparse": isinstance(module, SMoPProjector),
            "tokens_per_second": tokens / statistics.median(times[name]),
            "kept_bytes": kept_bytes(module, x),
            "parameters": sum(p.numel() for p in module.parameters()),
        }
        for name, module in projectors.items()
    ]


def _step(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    module(x).hidden_states.sum().backward()


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, without parameters and input."""
    saved = SavedStorages((*module.parameters(), x))
    with saved:
        output = module(x).hidden_states
    total = saved.bytes
    del output
    return total
