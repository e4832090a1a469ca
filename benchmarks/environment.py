"""The environment of a measurement: device, versions, commit, load; no host names and no paths."""

import datetime
import os
import platform
from pathlib import Path

import torch

from llama_smop.system.provenance import commit, cores, cpu_name, versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "scattermoe", "grouped_gemm", "liger-kernel", "sonicmoe")
SOURCES = ("llama_smop", "triton_kernels", "csrc", "benchmarks", ":!benchmarks/results")


def describe(device: torch.device) -> dict:
    """Facts about the environment that a reader needs to judge the numbers."""
    return {
        "device": device_name(device),
        **(_gpu(device) if device.type == "cuda" else {"threads": torch.get_num_threads()}),
        "cpu": cpu_name(),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        **commit(SOURCES),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _gpu(device: torch.device) -> dict:
    p = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gb": round(p.total_memory / 1e9, 1),
        "l2_mb": round(getattr(p, "L2_cache_size", 0) / 1e6, 1),
        "cuda": torch.version.cuda,
    }
