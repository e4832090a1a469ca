"""How quick: host and device time of each backend, beside the eager loop and a dense projector of the same FLOPs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_smop.doctor.checks import captured
from llama_smop.projector import SMoPProjector

EAGER, DENSE = "eager loop", "dense, same FLOPs"


@dataclass(frozen=True)
class Sizes:
    D: int
    H: int
    O: int
    tokens: tuple[int, ...]
    dtype: torch.dtype


GPU = Sizes(1024, 2048, 2048, (64, 1024, 4096), torch.bfloat16)
CPU = Sizes(128, 256, 256, (64, 256), torch.float32)


@dataclass(frozen=True)
class Time:
    """Microseconds, medians. `host` until the call returns; `device` until its work is done, from an idle device;
    `graph` that of a CUDA graph's replay, None where it cannot be captured."""

    name: str
    run: str  # "forward" or "forward+backward"
    tokens: int
    host: float
    device: float
    graph: float | None

    def json(self) -> dict:
        return {k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(self).items()}


class EagerLoop(nn.Module):
    """A projector as one would write it first: the experts in turn, each on the tokens that chose it."""

    def __init__(self, smop: SMoPProjector):
        super().__init__()
        D, H, O = smop.in_features, smop.hidden_features, smop.out_features
        self.gate = nn.Parameter(smop.gate_weight[0].detach().clone())
        self.experts = nn.ModuleList()
        for e in range(smop.num_experts):
            first, second, norm = nn.Linear(D, H), nn.Linear(H, O), nn.LayerNorm(O)
            pairs = (
                (first, smop.w1, smop.bias1),
                (second, smop.w2, smop.bias2),
                (norm, smop.layernorm_weight, smop.layernorm_bias),
            )
            for module, weight, bias in pairs:
                module.weight = nn.Parameter(weight[e].detach().clone())
                module.bias = nn.Parameter(bias[e].detach().clone())
            self.experts.append(nn.Sequential(first, nn.ReLU(), second, norm))
        self.top_k, self.out_features = smop.top_k, smop.out_features

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, self.gate).float().softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = x.new_zeros(x.shape[0], self.out_features)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            y = y.index_add(0, token, expert(x[token]) * weights[token, choice, None].to(x.dtype))
        return y


def contestants(backends: list[str], sizes: Sizes, device: torch.device) -> dict[str, nn.Module]:
    """Each called with x (T, D) → y (T, O). E 4, K 2, one router; the dense one has K·H hidden units."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        made: dict[str, nn.Module] = {}
        for name in backends:
            options = {"sharing": "JEJR", "backend": name, "device": device, "dtype": sizes.dtype}
            made[name] = SMoPProjector(sizes.D, sizes.H, sizes.O, 4, 2, **options)
        ours = made[backends[0]]
        for module in made.values():
            module.load_state_dict(ours.state_dict())
        made[EAGER] = EagerLoop(ours).to(device, sizes.dtype)
        dense = nn.Sequential(nn.Linear(sizes.D, 2 * sizes.H), nn.ReLU(), nn.Linear(2 * sizes.H, sizes.O))
        made[DENSE] = dense.to(device, sizes.dtype)
    return made


def runs(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    parameters = list(module.parameters())

    def output() -> Tensor:
        out = module(x)
        return out if isinstance(out, Tensor) else out.hidden_states

    def forward() -> Tensor:
        with torch.no_grad():
            return output()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output(), parameters, dy)

    return {"forward": forward, "forward+backward": both}


def timed(name: str, module: nn.Module, tokens: int, sizes: Sizes, device: torch.device, seconds: float) -> list[Time]:
    """Both runs of one contestant, within about `seconds`."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, sizes.D, generator=generator).to(device, sizes.dtype)
    dy = torch.randn(tokens, sizes.O, generator=generator).to(device, sizes.dtype)
    found = []
    for kind, run in runs(module, x, dy).items():
        host, done = _sample(run, device, seconds / 3)
        found.append(Time(name, kind, tokens, host, done, _graph(name, run, device, seconds / 6)))
    return found


def _sample(run: Callable, device: torch.device, seconds: float) -> tuple[float, float]:
    for _ in range(3):
        run()
    hosts, wholes, end = [], [], time.perf_counter() + seconds
    while len(hosts) < 3 or (len(hosts) < 50 and time.perf_counter() < end):
        _wait(device)
        begun = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - begun)
        _wait(device)
        wholes.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(hosts), 1e6 * statistics.median(wholes)


def _graph(name: str, run: Callable, device: torch.device, seconds: float) -> float | None:
    if device.type != "cuda" or name in (EAGER, "torch"):  # the loop reads the routing on the host
        return None
    return _sample(captured(run)[0], device, seconds)[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
