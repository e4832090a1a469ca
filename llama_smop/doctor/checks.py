"""Each backend against the float64 definition, twice, and through autograd, a CUDA graph and torch.compile."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llama_smop.ops import dispatch, large_products, self_check
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.ops.self_check import Inputs, Model
from llama_smop.projector import SMoPProjector

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Shape(NamedTuple):
    """A model, T tokens, and how they are drawn."""

    model: Model
    tokens: int
    skew: float = 0.0
    masked: float = 0.0
    video: float = 0.5

    def __str__(self) -> str:
        m = self.model
        sizes = f"{m.sharing} {m.D}-{m.H}-{m.O} E {m.E} K {m.K} T {self.tokens} {m.activation}"
        return sizes + f", {self.masked:.0%} masked" * bool(self.masked) + ", one expert busy" * bool(self.skew)


SHAPES = (
    *(Shape(Model(64, 96, 80, E=4, K=2, dtype=dtype), 40, masked=0.2) for dtype in (BF16, FP16, FP32)),
    *(Shape(Model(48, 64, 32, E=4, K=2, sharing="JEJR", dtype=dtype), 33) for dtype in (BF16, FP16, FP32)),
    *(Shape(Model(48, 64, 32, E=4, K=2, sharing="JEDR", dtype=dtype), 31, masked=0.3) for dtype in (BF16, FP16, FP32)),
    *(Shape(Model(37, 51, 29, E=3, K=1, dtype=dtype), 23) for dtype in (BF16, FP16, FP32)),  # odd sizes
    Shape(Model(33, 24, 50, E=3, K=3, sharing="JEJR"), 19),  # K = E
    Shape(Model(32, 48, 40, E=4, K=4, dtype=FP32), 17, masked=0.2),
    Shape(Model(64, 96, 32, E=1, K=1, sharing="JEJR"), 21),
    Shape(Model(48, 64, 32, E=6, K=1, sharing="JEJR"), 24, skew=30.0),  # five experts without tokens
    Shape(Model(48, 64, 32, E=4, K=2, dtype=FP32), 30, skew=30.0, video=0.0),  # and a router without any
    Shape(Model(48, 64, 32, E=4, K=2), 20, masked=1.0),
    Shape(Model(48, 64, 32, E=4, K=2, dtype=FP16), 1),
    Shape(Model(48, 64, 32, E=4, K=2), 0),
    Shape(Model(37, 51, 29, E=3, K=2, activation="gelu", biases=False, dtype=FP16), 27),
    Shape(Model(40, 56, 24, E=5, K=3, sharing="JEDR", activation="silu", layer_norm=False, dtype=FP32), 22),
    Shape(Model(48, 64, 32, E=4, K=2, layer_norm_dtype=FP32), 26),
    Shape(Model(16, 24, 24, E=32, K=4, sharing="JEJR"), 28),
    Shape(Model(48, 72, 40, E=4, K=2, activation="swiglu"), 40, masked=0.2),
    Shape(Model(37, 51, 29, E=3, K=1, sharing="JEJR", activation="geglu", biases=False, dtype=FP16), 33),
)
FEW = (*SHAPES[:6], *SHAPES[12:20], *SHAPES[22:])  # for a CPU


class Finding(NamedTuple):
    backend: str
    check: str
    dtype: str
    faults: list[str]  # none: it is right


def against_definition(backend: str, shape: Shape, device: torch.device, seed: int = 0) -> Finding:
    """Forward and every gradient of one shape, run twice."""
    model, dtype = shape.model, str(shape.model.dtype)[6:]
    made = self_check.make(model, shape.tokens, seed, shape.skew, shape.masked, shape.video)
    found = []
    with self_check.on_device(device):
        inputs, module = made.to(device), dispatch.module(backend)
        first, again = (self_check.through_backend(module, model, inputs) for _ in range(2))
        plain = None if backend == "torch" else self_check.through_backend(torch_backend, model, inputs)
        exact = self_check.through_naive(model, made, first["experts"].cpu())
        found += self_check.faults(first, exact, plain)
    if not _chosen_well(shape, made, first["experts"].cpu(), exact["logits"]):
        found.append("experts are not those of the largest logits")
    # not `equal`: a NaN is a fault by itself
    found += [f"{n} differs from run to run" for n, t in first.items() if not torch.equal(_bits(t), _bits(again[n]))]
    return Finding(backend, str(shape), dtype, found)


LARGE = "large products"


def of_large_products(backend: str, dtype: torch.dtype, device: torch.device) -> Finding:
    """Computed by TMA, where large ones are: those of the shapes above are too small for it."""
    return Finding(backend, LARGE, str(dtype)[6:], large_products.faults(dispatch.module(backend), dtype, device))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def _chosen_well(shape: Shape, inputs: Inputs, experts: Tensor, logits: Tensor) -> bool:
    """Whether no expert that a real token was not given has a clearly larger logit; a masked token has none."""
    model = shape.model
    real = inputs.mask if inputs.mask is not None else torch.ones(shape.tokens, dtype=torch.bool)
    if bool((experts[~real] != model.X).any()):
        return False
    experts, logits = experts[real].long(), logits[real]
    if model.X > model.E and inputs.modality is not None:
        experts = experts - inputs.modality[real, None].long() * model.E
    if not experts.numel():
        return True
    if bool(((experts < 0) | (experts >= model.E)).any()):
        return False
    smallest = logits.gather(1, experts).min(1).values
    left = logits.scatter(1, experts, -torch.inf)
    return not bool((left > smallest[:, None] + 1e-4 * logits.abs().max()).any())


# ------------------------------------------------------------------------------------------- as a training uses it

Step = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def step_of(module: Callable, parameters: dict[str, Tensor]) -> Step:
    """(x, modality, mask) → output, losses and the gradients of all parameters, of one training step."""

    def step(x: Tensor, modality: Tensor, mask: Tensor) -> dict[str, Tensor]:
        out = module(x, modality, mask)
        y, balance, z = out.hidden_states, out.load_balancing_loss, out.router_z_loss
        loss = y.to(balance.dtype).square().sum() + 0.01 * balance + 0.001 * z
        grads = torch.autograd.grad(loss, list(parameters.values()))
        values = {"hidden_states": y, "load_balancing_loss": balance, "router_z_loss": z}
        return {n: t.detach() for n, t in (values | dict(zip(parameters, grads, strict=True))).items()}

    return step


def in_training(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """(name, check): a step of `SMoPProjector` by autograd, as a graph's replay (on a GPU), compiled."""
    generator = torch.Generator().manual_seed(1)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    projector = SMoPProjector(64, 96, 80, sharing="DEDR", backend=backend, dtype=dtype).to(device)
    torch.random.set_rng_state(torch_state)
    x = torch.randn(48, 64, generator=generator).to(device, dtype)
    other = torch.randn(48, 64, generator=generator).to(device, dtype)
    modality = torch.randint(0, 2, (48,), generator=generator).to(device)
    mask = (torch.rand(48, generator=generator) > 0.2).to(device)
    parameters = dict(projector.named_parameters())
    step = step_of(projector, parameters)

    def finding(name: str, faults: list[str]) -> Finding:
        return Finding(backend, name, str(dtype)[6:], faults)

    def twin(target: torch.dtype) -> dict[str, Tensor]:
        module = copy.deepcopy(projector).to(target)
        module.backend = "torch"
        return step_of(module, dict(module.named_parameters()))(x.to(target), modality, mask)

    def autograd() -> Finding:
        plain = None if backend == "torch" else twin(dtype)
        return finding("autograd", self_check.faults(step(x, modality, mask), twin(torch.float64), plain))

    def graph() -> Finding:
        held = x.clone()
        replay, results = captured(lambda: step(held, modality, mask))
        held.copy_(other)
        replay()
        return finding("graph", _differences(results, step(other, modality, mask), "replayed"))

    def compiled() -> Finding:
        # On a CPU without generated code, which would take a C++ compiler's time.
        by = "inductor" if device.type == "cuda" else "aot_eager"
        made = torch.compile(projector, fullgraph=True, backend=by)
        got = step_of(made, parameters)(x, modality, mask)
        return finding("torch.compile", _differences(got, step(x, modality, mask), "compiled"))

    yield "autograd", autograd
    if device.type == "cuda":
        yield "graph", graph
    yield "torch.compile", compiled


def _differences(got: dict[str, Tensor], expected: dict[str, Tensor], how: str) -> list[str]:
    """Compared up to a few roundings: a compiler may fuse what stands around the operators."""
    found = []
    for name, value in expected.items():
        scale = self_check.error(value, torch.zeros_like(value))
        off = self_check.error(got[name], value)
        if not off <= 4 * torch.finfo(value.dtype).eps * scale:
            found.append(f"{name}, {how}, is off by {off:.1e}")
    return found


def captured(run: Callable, warm_ups: int = 2) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """`run` as a CUDA graph: its replay, and the tensors that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    return graph.replay, held
