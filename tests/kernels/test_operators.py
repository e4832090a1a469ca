"""The modules on the Triton backend: autograd, autocast, torch.compile in one graph, no synchronisation."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llama_smop.ops.self_check import Model, error, make, through_backend
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels.launch import recording
from tests.kernels.runners import poisoned_memory, triton_params
from tests.rounding import assert_same_sums

TOKENS, IN, HIDDEN, OUT = 90, 48, 56, 40


def projector(dtype: torch.dtype = torch.float32, **options) -> SMoPProjector:
    torch.manual_seed(0)
    return SMoPProjector(IN, HIDDEN, OUT, backend="triton", dtype=dtype, **options)


def batch(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, IN, generator=g).to(dtype)
    modality = torch.randint(0, 2, x.shape[:2], generator=g)
    mask = torch.rand(x.shape[:2], generator=g) > 0.2
    return {"x": x.to(device), "modality": modality.to(device), "mask": mask.to(device)}


def step(module, inputs: dict) -> dict[str, torch.Tensor]:
    """Output, loss and gradients of one training step."""
    inputs = dict(inputs, x=inputs["x"].detach().clone().requires_grad_())
    module.zero_grad()
    out = module(**inputs)
    loss = out.hidden_states.float().square().mean() + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss
    loss.backward()
    results = {"hidden_states": out.hidden_states.detach(), "loss": loss.detach(), "x": inputs["x"].grad}
    return results | {name: p.grad.clone() for name, p in module.named_parameters()}


FORMS = {
    "the paper's": {},
    "shared": {"shared_experts": 2},
    "gated, shared": {
        "gated": True, "activation": "silu", "shared_experts": 1, "input_norm": "layer", "normalize_weights": False,
        "weight_scale": 2.5, "layer_norm": False,
    },
    "merged": {"merge": "utterance", "balance": "mse", "router": "mlp", "router_hidden": 16, "router_bias": True},
}  # fmt: skip


@pytest.mark.parametrize(("runner", "form"), triton_params(*((name, 90) for name in FORMS)))
def test_a_training_step_is_as_exact_as_pytorchs(runner, form):
    dtype = torch.bfloat16 if torch.bfloat16 in runner.dtypes else torch.float16
    module = projector(dtype, **FORMS[form])
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    plain.backend = exact.backend = "torch"
    with runner.running(), poisoned_memory():
        results = step(module.to(runner.device), batch(dtype, runner.device))
    truth = step(exact, {n: t.double() if t.is_floating_point() else t for n, t in batch(dtype).items()})
    same_dtype = step(plain, batch(dtype))
    for name, value in results.items():
        size = truth[name].square().mean().sqrt().item()
        off, bound = error(value, truth[name]), 2 * error(same_dtype[name], truth[name]) + 1e-5 * size
        assert off <= bound, f"{name} is off by {off:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize(("runner", "router"), triton_params(("linear", 90), ("mlp", 90)))
def test_a_shared_expert_launches_nothing_more(runner, router):
    names = {}
    with runner.running():
        for shared in (0, 1):
            module = projector(shared_experts=shared, router=router).to(runner.device)
            with recording() as recorder:
                step(module, batch(device=runner.device))
            names[shared] = recorder.names()
    assert names[1] == names[0]
    assert names[1].count("schedule_kernel") == 1


@pytest.mark.parametrize(("runner", "name"), triton_params(("compiled", 90)))
def test_one_graph_forward_and_backward(runner, name):
    """torch.compile(fullgraph=True) traces the layer on fake tensors: a read of a value would break the graph."""
    with runner.running():
        module, inputs = projector().to(runner.device), batch(device=runner.device)
        eager = step(module, inputs)
        module.compile(fullgraph=True, backend="aot_eager")
        compiled = step(module, inputs)
    for name, value in eager.items():  # the same kernels; only the loss is summed, and its gradient rounded, elsewhere
        assert_same_sums(compiled[name], value, 30, f"{name}, compiled,")


@pytest.mark.parametrize(("runner", "name"), triton_params(("lengths", 90)))
def test_one_graph_serves_every_number_of_tokens(runner, name):
    """Once as given, once for any number: none of them is special to an operator's shapes."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    with runner.running():
        module = projector().to(runner.device)
        function = torch.compile(module, fullgraph=True, backend=counter)
        for tokens in (40, 90, 20, 70, 6):
            x = torch.randn(tokens, IN, device=runner.device)
            modality = torch.zeros(tokens, dtype=torch.int64, device=runner.device)
            function(x, modality).hidden_states.sum().backward()
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"


@pytest.mark.parametrize(("runner", "name"), triton_params(("autocast", 90)))
def test_autocast_runs_in_the_lower_dtype(runner, name):
    with runner.running():
        module, inputs = projector().to(runner.device), batch(device=runner.device)
        dtype = runner.dtypes[1]
        with torch.autocast(runner.device, dtype):
            out = module(**inputs)
        out.hidden_states.float().sum().backward()
        lowered = copy.deepcopy(module).to(dtype)
        exact = lowered(inputs["x"].to(dtype), inputs["modality"], inputs["mask"])
    assert out.hidden_states.dtype == dtype and out.router_logits.dtype == torch.float32
    assert torch.equal(out.hidden_states, exact.hidden_states)
    assert module.w1.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_synchronises_on_a_gpu():
    from llama_smop.triton_kernels import projection

    model = Model(48, 80, 72, E=4, K=2)
    inputs = make(model, 300, masked=0.2).to("cuda")
    through_backend(projection, model, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        through_backend(projection, model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("runner", "tokens"), triton_params((80, 90), (30, 90)))
def test_the_operators_keep_their_contract(runner, tokens):
    """torch.library.opcheck: nothing is mutated or aliased, and fake results have the shapes of the real ones."""
    tests = ("test_schema", "test_faketensor")
    model = Model(24, 40, 32, E=4, K=2, sharing="JEJR", activation="gelu", dtype=torch.float32)
    with runner.running():
        i = make(model, tokens, masked=0.2).to(runner.device)
        route = (i.x, i.gate_weight, None, i.mask, model.K, model.X, 0, "triton")
        torch.library.opcheck(torch.ops.smop.route, route, test_utils=tests)
        _, weights, experts, _, _, _, *schedule, _, _ = torch.ops.smop.route(*route)
        torch.library.opcheck(torch.ops.smop.schedule, (experts, model.X, "triton"), test_utils=tests)
        projection = (i.x, weights, experts, *schedule, *i.parameters(), "gelu", 1e-5, "none", "triton")
        torch.library.opcheck(torch.ops.smop.expert_projection, projection, test_utils=tests)
        _, *saved = torch.ops.smop.expert_projection(*projection)
        backward = (i.dy, *projection[:12], *saved, "gelu", 1e-5, True, True, True, "triton")
        torch.library.opcheck(torch.ops.smop.expert_projection_bwd, backward, test_utils=tests)
        product = (i.x, i.w1.transpose(1, 2), torch.tensor([5, 9, 9, 20], dtype=torch.int32).to(runner.device), i.b1)
        torch.library.opcheck(torch.ops.smop.grouped_mm, (*product, "gelu", "triton"), test_utils=tests)
