"""Whether `backend="auto"` may choose a backend on a GPU.

Verdicts are kept in the user's cache, by device, driver and versions: `llama-smop doctor` writes them; where none has
run, Triton is checked once, on a small problem, forward and backward. LLAMA_SMOP_CHECK=0 takes it unchecked. The CUDA
extension is chosen only where a doctor has found it right and not slower than Triton.

Where Triton is wrong in large products alone (`large_products`), it is chosen, and computes them as it does small ones.
"""

import logging
import os
import re
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llama_smop.ops import large_products, self_check
from llama_smop.ops.backend import Backend
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.system import files, provenance

# Every launch of forward and backward, two routers, a mask. The seed draws no near ties between experts, which rounding
# could tip.
MODEL = self_check.Model(D=64, H=96, O=80, E=4, K=2)
TOKENS, SEED = 40, 3

known: dict[tuple[str, torch.dtype, torch.device], bool] = {}  # this process's answers
_lock = threading.Lock()
logger = logging.getLogger(__name__)


def approved_by_doctor(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a doctor has found the backend right for this dtype on this device, and not slower than Triton."""
    verdict = stored(device).get(_entry(name, dtype), {})
    known[name, dtype, device] = verdict.get("right") is True and verdict.get("not_slower") is True
    return known[name, dtype, device]


def checked(name: str, backend: Backend | ModuleType, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend is right for this dtype on this device. One that is not is named in a warning, once."""
    if not enabled():
        known[name, dtype, device] = True
        return True
    with _lock:
        if (name, dtype, device) in known:
            return known[name, dtype, device]
        verdict = stored(device).get(_entry(name, dtype))
        if verdict is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return True  # a check would break the capture; the next call asks again
            verdict = _check(backend, dtype, device)
            if verdict.pop("keep"):
                store(device, {_entry(name, dtype): verdict})
        large = verdict.get("large") if verdict["right"] else None
        if large:
            large_products.do_without(backend, dtype, device)
            logger.warning(
                'backend="auto" takes %s for %s on %s without TMA descriptors, by which large products are wrong '
                "there: %s. They take pointers instead; `llama-smop doctor` tells more",
                name, dtype, device_name(device), "; ".join(large),
            )  # fmt: skip
        known[name, dtype, device] = verdict["right"]
    if not verdict["right"]:
        logger.warning(
            'backend="auto" does without %s for %s on %s, which computes something wrong there: %s. PyTorch serves '
            "instead; `llama-smop doctor` tells more",
            name, dtype, device_name(device), "; ".join(verdict.get("faults", [])) or "no reason is recorded",
        )  # fmt: skip
    return verdict["right"]


def enabled() -> bool:
    return os.environ.get("LLAMA_SMOP_CHECK", "1") != "0"


# --------------------------------------------------------------------------------------------------------- the check


def _check(backend: Backend | ModuleType, dtype: torch.dtype, device: torch.device) -> dict:
    """{"right", "faults", "by", "keep"}: compared with PyTorch in the same dtype and in float64, on the device.
    "large": what is wrong with large products alone, if anything is.

    In a thread of its own, where there is no autocast, dispatch mode, tracer or stream of the caller's. Where the check
    itself cannot be made, the backend is trusted.
    """
    verdict: dict[str, Any] = {"right": True, "faults": [], "by": "first use", "keep": False}

    def work() -> None:
        try:
            with self_check.on_device(device):
                inputs = self_check.make(replace(MODEL, dtype=dtype), TOKENS, seed=SEED, masked=0.2).to(device)
                exact = self_check.through_backend(torch_backend, MODEL, inputs.to(torch.float64))
                plain = self_check.through_backend(torch_backend, MODEL, inputs)
                try:
                    got = self_check.through_backend(backend, MODEL, inputs)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a compiler, a driver: perhaps mended by the next process
                    verdict.update(right=False, faults=[_line(error)])
                    return
                found = self_check.faults(got, exact, plain)
                verdict.update(right=not found, faults=found[:4])
                if not found:
                    try:
                        large = large_products.faults(backend, dtype, device)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:
                        verdict.update(large=[_line(error)])
                        return
                    verdict.update({"large": large} if large else {})
            verdict.update(keep=True)
        except Exception as error:
            logger.info("the first use on %s is not checked: %s", device, error)

    thread = threading.Thread(target=work, name="llama-smop first use", daemon=True)
    thread.start()
    thread.join()
    return verdict


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# --------------------------------------------------------------------------------------------------------- the cache


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llama-smop" / "backends.json"


def stored(device: torch.device) -> dict[str, dict]:
    """Verdicts on this device with this driver and these versions: "triton bfloat16" → {"right", "by", …}."""
    entries = _read().get(_key(device), {})
    if not isinstance(entries, dict):
        return {}
    return {n: v for n, v in entries.items() if isinstance(v, dict) and isinstance(v.get("right"), bool)}


def store(device: torch.device, verdicts: dict[str, dict]) -> None:
    """Add verdicts to those that are kept. A cache that cannot be written is no error: the next process asks again."""
    content = _read()
    content[_key(device)] = stored(device) | verdicts
    try:
        files.write_json(cache_file(), content)
    except OSError as error:
        logger.info("%s: not written (%s)", cache_file(), error)


def store_doctors(device: torch.device, verdicts: dict[tuple[str, torch.dtype], dict]) -> None:
    """Keep what a doctor found, by backend and dtype: {"right", "faults"}, also "large", of "cuda" "not_slower"."""
    store(device, {_entry(name, dtype): verdict | {"by": "doctor"} for (name, dtype), verdict in verdicts.items()})
    known.clear()


def _read() -> dict:
    """What the cache holds; a damaged one is as good as none."""
    try:
        content = files.read_json(cache_file())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _entry(name: str, dtype: torch.dtype) -> str:
    return f"{name} {str(dtype).removeprefix('torch.')}"


def _key(device: torch.device) -> str:
    found = provenance.versions(("llama-smop", "torch", "triton"))
    copy = __name__.partition(".")[0]  # of this package: `integrations.kernels_hub` writes copies under other names
    return "; ".join([device_name(device), f"driver {driver()}", copy, *(f"{n} {v}" for n, v in found.items())])


def device_name(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return provenance.cpu_name() if device.type == "cpu" else str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


@cache
def driver() -> str:
    """The version of NVIDIA's driver, "none" where there is none."""
    try:
        found = re.search(r"Kernel Module\D*?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    except OSError:
        pass
    try:
        return f"for CUDA {getattr(torch._C, '_cuda_getDriverVersion')()}"  # noqa: B009
    except (AttributeError, RuntimeError):
        return "none"
