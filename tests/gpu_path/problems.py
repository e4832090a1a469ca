"""A projector, batches for it, and one training step compared with the step of PyTorch's own operators.

Everything goes through the public classes, so that what is compared is what a user runs.
"""

import copy
import os

import torch
from torch import Tensor

from llama_smop import SMoPProjector

Step = dict[str, Tensor]  # result or parameter → value or gradient
D, H, O, TOKENS = 48, 56, 40, 90
STAND_IN = bool(os.environ.get("SMOPCUDA"))  # whether the GPU is smopcuda


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    half = (torch.bfloat16, torch.float16)
    return half if backend == "cuda" else (torch.float32, *half)


def projector(
    backend: str,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    sizes: tuple[int, int, int] = (D, H, O),
    sharing: str = "DEDR",
    seed: int = 0,
    **options,
) -> SMoPProjector:
    torch.manual_seed(seed)  # on the CPU: the same parameters for every device
    module = SMoPProjector(*sizes, sharing=sharing, backend=backend, dtype=dtype, **options)
    return module.to(device)


def batch(
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, width: int = D, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, modality, mask), drawn on the CPU."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g).to(dtype)
    modality = torch.randint(0, 2, (tokens,), generator=g)
    mask = torch.rand(tokens, generator=g) > 0.2
    return x.to(device), modality.to(device), mask.to(device)


def loss_of(out) -> Tensor:
    y = out.hidden_states.float()
    return y.square().sum() / max(1, y.numel()) + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss


def results(module, out, loss: Tensor, x: Tensor) -> Step:
    """What a step leaves behind, as copies."""
    kept = {"hidden_states": out.hidden_states, "loss": loss, "x": x.grad}
    kept |= {name: p.grad for name, p in module.named_parameters()}
    return {name: t.detach().clone() for name, t in kept.items()}


def step(module, x: Tensor, modality: Tensor, mask: Tensor) -> Step:
    """Output, loss and every gradient of one training step."""
    x = x.detach().requires_grad_()  # the same memory, wherever it begins
    x.grad = None
    module.zero_grad()
    out = module(x, modality, mask)
    loss = loss_of(out)
    loss.backward()
    return results(module, out, loss, x)


def plain(module, backend: str = "torch", device: str = "cpu", dtype: torch.dtype | None = None) -> SMoPProjector:
    """A copy that computes with PyTorch's operators."""
    twin = copy.deepcopy(module).to(device=device, dtype=dtype)
    twin.backend = backend
    return twin


class Expected:
    """The float64 step of a module, and how far PyTorch's step in the module's own dtype is from it."""

    def __init__(self, module, x: Tensor, modality: Tensor, mask: Tensor):
        x, modality, mask = (t.detach().cpu() for t in (x, modality, mask))
        self.exact = step(plain(module, dtype=torch.float64), x.double(), modality, mask)
        same_dtype = step(plain(module), x, modality, mask)
        self.allowed = {name: 2 * rms(same_dtype[name] - value) + 1e-5 for name, value in self.exact.items()}
        self.allowed["loss"] += rms(self.exact["loss"]) * torch.finfo(module.w1.dtype).eps  # one number may be luck

    def check(self, got: Step, relative: float = 0.0) -> None:
        """`relative` allows that share of a value's own size besides: for TF32, which PyTorch lacks on a CPU."""
        for name, exact in self.exact.items():
            off, allowed = rms(got[name].cpu() - exact), self.allowed[name] + relative * rms(exact)
            assert off <= allowed, f"{name} is off by {off:.2e}, allowed {allowed:.2e}"


def rms(difference: Tensor) -> float:
    """Root mean square; infinite where a value is not a number."""
    if not difference.numel():
        return 0.0
    return difference.double().square().mean().nan_to_num(nan=float("inf")).sqrt().item()


def check_step(module, *inputs: Tensor, relative: float = 0.0) -> Step:
    got = step(module, *inputs)
    Expected(module, *inputs).check(got, relative)
    return got
