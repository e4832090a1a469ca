"""A caller's schedule can be anything, and no kernel reads it on the host: it may give wrong numbers, but kernels stay
inside their tensors. ptxrun, which knows each tensor's end, is the judge."""

import torch
from torch import Tensor

from llama_smop.ops.backend import Backend, Experts, Saved, Schedule
from llama_smop.ops.self_check import Inputs, Model, make
from tests.kernels.runners import Runner

MODEL = Model(24, 40, 32, E=4, K=2, sharing="JEJR")  # multiples of 8: TMA and gathering copies on sm_90
LARGEST = 2**31 - 1
BEYOND = ([9, 20, 30, 1_000], [9, 20, LARGEST, LARGEST], [LARGEST] * 4)  # as if clamped, for 40 rows
SENSELESS = (
    [30, 4, 40, 12],
    [-5, 3, -LARGEST, 40],
    [-LARGEST - 1] * 4,
    [40, 0, 40, 0],
    [LARGEST, -LARGEST, 7, LARGEST],
)


def project(backend: Backend, model: Model, i: Inputs, **replaced: list[int]) -> dict[str, Tensor]:
    """Forward and backward of the projection, where parts of the routing are replaced; lists are repeated."""
    _, weights, experts, *_, order, inverse, offs = backend.route_fwd(
        i.x, i.gate_weight, i.modality, None, model.K, model.X
    )
    routing = {"experts": experts, "order": order, "inverse": inverse, "offs": offs}
    for name, values in replaced.items():
        size = routing[name].numel()
        repeated = torch.tensor((values * size)[:size], dtype=torch.int32, device=i.x.device)
        routing[name] = repeated.view_as(routing[name])
    experts, schedule = routing.pop("experts"), Schedule(**routing)
    options = Experts(*i.parameters()), model.activation, 1e-5
    y, *kept = backend.expert_projection_fwd(i.x, weights, experts, schedule, *options)
    saved = Saved(*(y.new_empty(0) if t is None else t for t in kept))
    grads = backend.expert_projection_bwd(
        i.dy, i.x, weights, experts, schedule, options[0], saved, *options[1:], True, True, True
    )
    names = "y", "dx", "dweights", "dw1", "db1", "dw2", "db2", "dln_weight", "dln_bias"
    return {name: t.cpu() for name, t in zip(names, (y, *grads), strict=True) if t is not None}


def products(backend: Backend, offs: list[int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Both forms of grouped_mm, 40 rows or columns in groups."""
    ends = torch.tensor(offs, dtype=torch.int32, device=device)
    a, b = (torch.randn(n, 24, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in (40, 41))
    weights = torch.randn(len(offs), 24, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    forward, _ = backend.grouped_mm(a, weights, ends, None, "relu")
    gradient, _ = backend.grouped_mm(a.t(), b[:40], ends, None, None)
    return [forward.cpu(), gradient.cpu()]


def assert_clamped(runner: Runner) -> None:
    """Offsets beyond the rows give the bits of offsets that end with the rows."""
    inputs = make(MODEL, 20, seed=1).to(runner.device)
    with runner.running():
        for offs in BEYOND:
            clamped = [min(end, 40) for end in offs]
            got, wanted = (project(runner.module, MODEL, inputs, offs=ends) for ends in (offs, clamped))
            for result in wanted:
                assert torch.equal(got[result], wanted[result]), f"{result} for offs {offs}"
            both = (products(runner.module, ends, runner.device, MODEL.dtype) for ends in (offs, clamped))
            for one, other in zip(*both, strict=True):
                assert torch.equal(one, other), f"grouped_mm for offs {offs}"


def assert_inside(runner: Runner) -> None:
    """ptxrun raises at the first access outside a tensor."""
    inputs = make(MODEL, 20, seed=2).to(runner.device)
    with runner.running():
        for offs in SENSELESS:
            project(runner.module, MODEL, inputs, offs=offs)
            products(runner.module, offs, runner.device, MODEL.dtype)


def assert_inside_for_any_order(runner: Runner) -> None:
    """`order`, `inverse` and expert ids that name what does not exist, each alone and all together."""
    inputs = make(MODEL, 20, seed=3).to(runner.device)
    senseless = [0, -1, 40, LARGEST, -LARGEST - 1, 7, 1_000]
    parts = ("order", "inverse", "experts")
    with runner.running():
        for names in (*((name,) for name in parts), parts):
            project(runner.module, MODEL, inputs, **dict.fromkeys(names, senseless))
