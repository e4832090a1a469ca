"""Versions, devices, and which backends can serve on them; why not, where they cannot."""

import platform
from typing import Any

import torch

from llama_smop.ops import dispatch, trust
from llama_smop.ops.backends import cuda_extension
from llama_smop.system import provenance

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def devices() -> list[torch.device]:
    """The CPU, then every GPU that torch sees."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpus]


def environment() -> dict[str, Any]:
    """What a bug report needs: "python", "machine", "versions", "cuda", "commit", and "devices" with their backends."""
    return {
        "python": platform.python_version(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "cuda": {"torch": torch.version.cuda, "driver": trust.driver(), "extension": _extension()},
        **provenance.commit(("llama_smop", "triton_kernels", "csrc")),
        "devices": [_device(device) for device in devices()],
        "cache": {"first use is checked": trust.enabled(), "verdicts": trust.cache_file().is_file()},
    }


def _device(device: torch.device) -> dict[str, Any]:
    """Of a backend, by dtype: None, or why it cannot serve."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "device": str(device),
        "name": trust.device_name(device),
        "memory_bytes": memory,
        "backends": {
            name: {_name(dtype): dispatch.unsupported(name, dtype, device, 2, 4) for dtype in DTYPES}
            for name in dispatch.BACKENDS
        },
        "verdicts": trust.stored(device),
    }


def _extension() -> dict[str, Any] | None:
    """Architectures and compilers of the CUDA extension, None where it is not built."""
    try:
        return dict(cuda_extension.extension().build_info())
    except ImportError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text(found: dict[str, Any]) -> str:
    """`environment()` as lines to paste into a bug report."""
    machine, cuda = found["machine"], found["cuda"]
    commit = (found["commit"] or "none")[:12] + (" (modified)" if found["modified"] else "")
    lines = [
        f"python {found['python']}, {machine['system']}, {machine['cpu']}, {machine['cores']} cores",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"CUDA of torch {cuda['torch'] or 'none'}, driver {cuda['driver']}, commit {commit}",
    ]
    if cuda["extension"] is not None:
        lines.append("CUDA extension: " + ", ".join(f"{k} {v}" for k, v in cuda["extension"].items()))
    for device in found["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
        lines.append(f"{device['device']}: {device['name']}{memory}")
        for name, reasons in device["backends"].items():
            lines.append(f"  {name:7s} {_served(reasons)}")
        for name, verdict in device["verdicts"].items():
            right = "right" if verdict["right"] else "wrong: " + "; ".join(map(str, verdict.get("faults", [])))
            without = f"; without TMA: {'; '.join(map(str, verdict['large']))}" if verdict.get("large") else ""
            lines.append(f"  known   {name} is {right} (by {verdict.get('by')}){without}")
    return "\n".join(lines)


def _served(reasons: dict[str, str | None]) -> str:
    serves = [dtype for dtype, reason in reasons.items() if reason is None]
    if len(serves) == len(reasons):
        return "serves"
    if serves:
        return f"serves {', '.join(serves)}"
    return "cannot serve: " + next(reason for reason in reasons.values() if reason)
