"""The doctor's round: the environment, the checks, the times, and one line at the end."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from llama_smop.doctor import checks, timing
from llama_smop.doctor.checks import Finding
from llama_smop.doctor.environment import environment
from llama_smop.doctor.timing import DENSE, EAGER, Time
from llama_smop.ops import dispatch, trust
from llama_smop.ops.checks import GATED

SECONDS = 55.0  # what is left is not begun after that, and named
TIMING_SECONDS = 20.0
SLOWER = 1.02  # the CUDA extension may be this much slower than Triton: noise


def examine(progress: bool = True, seconds: float = SECONDS) -> dict[str, Any]:
    """Check and time the backends on the current GPU, else on the CPU. On a GPU the verdicts are kept: see `trust`.

    Returns:
        "environment", "device", "checks", "times", "left_out" (what there was no time for), "right", "verdict".
    """
    begun = time.monotonic()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    found: dict[str, Any] = {"environment": environment(), "device": str(device)}
    backends = [n for n in dispatch.BACKENDS if _serves(n, torch.bfloat16, device)]
    findings, left_out = _checked(backends, device, progress, begun + seconds - (TIMING_SECONDS if gpu else 5))
    times: list[Time] = []
    if not any(f.check == LOST for f in findings):
        times, untimed = _timed(backends, device, progress, begun + seconds)
        left_out += untimed
    if gpu:
        trust.store_doctors(device, verdicts(findings, times, left_out))
    return found | {
        "checks": [finding._asdict() for finding in findings],
        "times": [t.json() for t in times],
        "left_out": left_out,
        "right": not any(finding.faults for finding in findings),
        "seconds": round(time.monotonic() - begun, 1),
        "verdict": verdict(findings, times, left_out),
    }


def _serves(name: str, dtype: torch.dtype, device: torch.device, gated: bool = False) -> bool:
    return dispatch.unsupported(name, dtype, device, 2, 4, gated) is None


# ---------------------------------------------------------------------------------------------------------- checks

LOST = "device lost"


def _checked(backends: list[str], device: torch.device, progress: bool, end: float) -> tuple[list[Finding], list[str]]:
    """PyTorch first: what it cannot do, no other can be held against. A backend that raises is wrong."""
    rounds: list[tuple[str, str, str, Callable[[], Finding]]] = []
    for backend in backends:
        for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
            if _serves(backend, dtype, device):
                for name, check in checks.in_training(backend, dtype, device):
                    rounds.append((backend, name, str(dtype)[6:], check))
        for dtype in (torch.bfloat16, torch.float16) if backend == "triton" else ():
            if _serves(backend, dtype, device):
                check_large = partial(checks.of_large_products, backend, dtype, device)
                rounds.append((backend, checks.LARGE, str(dtype)[6:], check_large))
        for shape in checks.SHAPES if device.type == "cuda" else checks.FEW:
            if _serves(backend, shape.model.dtype, device, shape.model.activation in GATED):
                check = _of(backend, shape, device)
                rounds.append((backend, str(shape), str(shape.model.dtype)[6:], check))
    findings, left_out = [], []
    for backend, name, dtype, check in tqdm(rounds, desc="checks", unit="check", disable=not progress, leave=False):
        if time.monotonic() > end:
            left_out.append(f"{backend} {dtype}: {name}")
            continue
        try:
            findings.append(check())
        except Exception as error:
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            findings.append(Finding(backend, name, dtype, [line[:300]]))
            if not _answers(device):
                findings.append(Finding(backend, LOST, dtype, ["the device does not answer any more"]))
                break
    return findings, left_out


def _of(backend: str, shape: checks.Shape, device: torch.device) -> Callable[[], Finding]:
    return lambda: checks.against_definition(backend, shape, device)


def _answers(device: torch.device) -> bool:
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


# ----------------------------------------------------------------------------------------------------------- times


def _timed(backends: list[str], device: torch.device, progress: bool, end: float) -> tuple[list[Time], list[str]]:
    sizes = timing.GPU if device.type == "cuda" else timing.CPU
    backends = [name for name in backends if _serves(name, sizes.dtype, device)]
    made = timing.contestants(backends, sizes, device)
    rounds = [(tokens, name) for tokens in sizes.tokens for name in made]
    seconds = max(0.1, (end - time.monotonic()) / len(rounds)) / 2
    times: list[Time] = []
    left_out = []
    for tokens, name in tqdm(rounds, desc="times", unit="run", disable=not progress, leave=False):
        if time.monotonic() > end:
            left_out.append(f"times of {name} at T {tokens}")
            continue
        try:
            times += timing.timed(name, made[name], tokens, sizes, device, seconds)
        except RuntimeError as error:  # short of memory, or a backend that the checks have found wrong
            left_out.append(f"times of {name} at T {tokens} ({' '.join(str(error).split())[:200]})")
    return times, left_out


# --------------------------------------------------------------------------------------------------------- verdicts


def verdicts(
    findings: list[Finding], times: list[Time], left_out: list[str]
) -> dict[tuple[str, torch.dtype], dict[str, Any]]:
    """What `trust` keeps. Where something was left out, right is not said of a backend, and wrong still is.

    A backend that is wrong in large products alone is right: it can do without what is wrong.
    """
    found: dict[tuple[str, torch.dtype], dict[str, Any]] = {}
    for backend, dtype in {(f.backend, f.dtype) for f in findings if f.backend != "torch"}:
        own = [f for f in findings if (f.backend, f.dtype) == (backend, dtype)]
        faults = [f"{line} ({f.check})" for f in own if f.check != checks.LARGE for line in f.faults]
        large = [line for f in own if f.check == checks.LARGE for line in f.faults]
        unfinished = any(line.startswith(f"{backend} {dtype}") for line in left_out)
        if faults or not unfinished:
            found[backend, getattr(torch, dtype)] = {"right": not faults, "faults": faults[:4]}
            if large:
                found[backend, getattr(torch, dtype)]["large"] = large
            if backend == "cuda":
                found[backend, getattr(torch, dtype)]["not_slower"] = _not_slower(times)
    return found


def _not_slower(times: list[Time]) -> bool:
    """Whether the CUDA extension needs no more time than Triton, in bfloat16, at every number of tokens."""
    spent = {(t.name, t.run, t.tokens): t.device for t in times}
    pairs = [(us, spent.get(("triton", *rest))) for (name, *rest), us in spent.items() if name == "cuda"]
    return bool(pairs) and all(triton is not None and us <= SLOWER * triton for us, triton in pairs)


def verdict(findings: list[Finding], times: list[Time], left_out: list[str]) -> str:
    """One line: what is right, what is wrong, how quick."""
    names = list(dict.fromkeys(f.backend for f in findings))
    wrong = {name: [f for f in findings if f.backend == name and f.faults] for name in names}
    right = [f"{n} ({sum(f.backend == n for f in findings)} checks)" for n in names if not wrong[n]]
    bad = [
        f"{n} ({len(w)} of {sum(f.backend == n for f in findings)} checks; first: {w[0].faults[0]}, {w[0].check})"
        for n, w in wrong.items() if w
    ]  # fmt: skip
    parts = [f"right: {', '.join(right) or 'nothing'}", f"wrong: {', '.join(bad) or 'nothing'}"]
    parts += [f"quick: {quick}" for quick in [_quick(names, times)] if quick]
    parts += [f"left out for want of time: {len(left_out)}"] if left_out else []
    return " | ".join(parts)


def _quick(names: list[str], times: list[Time]) -> str:
    lines = []
    spent = {(t.name, t.tokens): t.device for t in times if t.run == "forward+backward"}
    for tokens in sorted({t.tokens for t in times})[1:2]:  # the middle one
        for name in names:
            us, eager, dense = (spent.get((n, tokens)) for n in (name, EAGER, DENSE))
            if us and eager and dense:
                lines.append(f"{name} {us / 1e3:.2f} ms = eager loop / {eager / us:.1f} = dense × {us / dense:.2f}")
        if lines:
            lines[0] = f"forward+backward at T {tokens}: {lines[0]}"
    return ", ".join(lines)


def table(found: dict[str, Any]) -> str:
    """The checks that failed and all times, as lines."""
    lines = [
        f"WRONG {c['backend']} {c['dtype']}: {'; '.join(c['faults'])} [{c['check']}]"
        for c in found["checks"]
        if c["faults"]
    ]
    if found["times"]:
        lines.append(f"{'µs':24s}{'run':18s}{'T':>6s}{'host':>10s}{'device':>10s}{'graph':>10s}")
    for t in found["times"]:
        graph = "" if t["graph"] is None else f"{t['graph']:.0f}"
        lines.append(f"{t['name']:24s}{t['run']:18s}{t['tokens']:6d}{t['host']:10.0f}{t['device']:10.0f}{graph:>10s}")
    lines += [f"left out: {name}" for name in found["left_out"][:10]]
    return "\n".join(lines)
