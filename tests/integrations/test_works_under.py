"""The projector under what people wrap around a module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from llama_smop import SMoPProjector
from llama_smop.projector import DenseProjector
from tests import rounding
from tests.ops.problems import relative_error

ADDITIONS = 200  # widths 16, 24 and 16 forward and back, LayerNorm, up to 64 tokens
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def make(sharing="DEDR", device="cpu", **options):
    torch.manual_seed(0)
    return SMoPProjector(16, 24, 16, num_experts=4, top_k=2, sharing=sharing, **options).to(device)


def batch(T=20, device="cpu", seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, 16, generator=g).to(device)
    return x, torch.randint(0, 2, (T,), generator=g).to(device), (torch.rand(T, generator=g) > 0.2).to(device)


def loss_of(out):
    return out.hidden_states.float().square().mean() + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss


def gradients(module, *inputs):
    module.zero_grad()
    loss_of(module(*inputs)).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters()}


def assert_same_output(got, expected):
    rounding.assert_same_sums(got.hidden_states, expected.hidden_states, ADDITIONS, "the output")


def assert_same_gradients(got, expected):
    rounding.assert_same_gradients(got, expected, ADDITIONS)


# ---------------------------------------------------------------------------------------------- copies and conversion


def test_deepcopy_and_pickle():
    module, inputs = make(), batch()
    expected = module(*inputs).hidden_states
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs).hidden_states, expected)
        assert other.w1.data_ptr() != module.w1.data_ptr()


@pytest.mark.parametrize("projector", (SMoPProjector, DenseProjector))
def test_meta_device_and_default_dtype(projector):
    with torch.device("meta"):
        module = projector(16, 24, 16)
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    out = module(*batch()).hidden_states
    assert torch.isfinite(out).all()
    torch.set_default_dtype(torch.float64)
    try:
        assert projector(16, 24, 16).w1.dtype == torch.float64
        assert projector(16, 24, 16, dtype=torch.bfloat16).w1.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_and_bfloat16(dtype, device):
    module = make("JEJR", device)
    x, _, _ = batch(64, device)
    expected = module(x)
    low = copy.deepcopy(module).half() if dtype == torch.float16 else copy.deepcopy(module).bfloat16()
    out = low(x.to(dtype))
    assert out.hidden_states.dtype == dtype and out.expert_weights.dtype == torch.float32
    same = (out.expert_indices == expected.expert_indices).all(-1)
    assert same.float().mean() > 0.9
    assert relative_error(out.hidden_states[same], expected.hidden_states[same]) < 2e-2


def test_sharings_convert_by_copying():
    """A joint router serves each modality; then each modality gets its own copy of the experts. Same outputs."""
    jejr, jedr, dedr = make("JEJR"), make("JEDR"), make("DEDR")
    state = jejr.state_dict()
    state["gate_weight"] = state["gate_weight"].repeat(2, 1, 1)
    jedr.load_state_dict(state)
    dedr.load_state_dict({n: t if n == "gate_weight" else t.repeat(2, *[1] * (t.dim() - 1)) for n, t in state.items()})
    x, modality, mask = batch()
    expected = jejr(x, mask=mask)
    for module in (jedr, dedr):
        out = module(x, modality, mask)
        assert_same_output(out, expected)
        assert torch.equal(out.router_logits, expected.router_logits)
        assert torch.equal(out.expert_indices % 4, expected.expert_indices % 4)


# ------------------------------------------------------------------------------------------------------------ training


def test_gradients_accumulate():
    module = make()
    first, second = (gradients(module, *batch(seed=s)) for s in (1, 2))
    module.zero_grad()
    for s in (1, 2):
        loss_of(module(*batch(seed=s))).backward()
    assert_same_gradients({n: p.grad for n, p in module.named_parameters()}, {n: first[n] + second[n] for n in first})


def test_a_gradient_that_is_kept_is_not_overwritten_by_the_next_step():
    """Large gradients live in memory that is used again: never while anything still holds them."""
    torch.manual_seed(0)
    module = SMoPProjector(256, 512, 512, sharing="JEJR")  # 2 and 4 MB of weight gradients
    x = torch.randn(64, 256)
    loss_of(module(x)).backward()
    kept = module.w2.grad.detach()
    copied = kept.clone()
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        loss_of(module(x * 2)).backward()
    assert torch.equal(kept, copied)


@pytest.mark.parametrize("frozen", ("experts", "router"))
def test_frozen_parts(frozen):
    names = (
        ("gate_weight",) if frozen == "router" else ("w1", "bias1", "w2", "bias2", "layernorm_weight", "layernorm_bias")
    )
    module, inputs = make(), batch()
    expected = gradients(module, *inputs)
    for name in names:
        getattr(module, name).requires_grad_(False)
    module.zero_grad()
    loss_of(module(*inputs)).backward()
    for name, parameter in module.named_parameters():
        if name in names:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            rounding.assert_same_sums(parameter.grad, expected[name], ADDITIONS, name)


def test_inference_mode():
    module, inputs = make(), batch()
    expected = module(*inputs)
    with torch.inference_mode():
        out = module(*inputs)
    assert out.hidden_states.is_inference() and torch.equal(out.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", (False, True), ids=("non-reentrant", "reentrant"))
def test_activation_checkpointing(reentrant, device):
    module, (x, modality, mask) = make(device=device), batch(device=device)
    expected = gradients(module, x, modality, mask)
    module.zero_grad()
    x = x.clone().requires_grad_()  # reentrant checkpointing wants an input with a gradient
    out = checkpoint(lambda x: tuple(module(x, modality, mask))[:6], x, use_reentrant=reentrant)
    (out[0].square().mean() + 0.01 * out[4] + 0.001 * out[5]).backward()
    assert_same_gradients({n: p.grad for n, p in module.named_parameters()}, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_training_step(device):
    module, inputs = make(device=device), batch(64, device)
    expected = gradients(module, *inputs)
    with torch.autocast(device, torch.bfloat16):
        out = module(*inputs)
        assert out.hidden_states.dtype == torch.bfloat16
    module.zero_grad()
    loss_of(out).backward()
    for name, p in module.named_parameters():
        assert p.grad.dtype == torch.float32
        assert relative_error(p.grad, expected[name]) < 0.2, name  # a near tie may be routed otherwise


# ------------------------------------------------------------------------------------------------------ compile, export


@pytest.mark.parametrize("device", DEVICES)
def test_compile_does_not_follow_every_length(device):
    module = make(device=device)
    counter = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T in (8, 16, 31, 5, 64):
        inputs = batch(T, device, seed=T)
        assert_same_output(compiled(*inputs), module(*inputs))
    torch._dynamo.reset()
    assert counter.frame_count <= 2


def test_export_with_any_number_of_tokens():
    module = make()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, batch(20), dynamic_shapes=({0: tokens},) * 3, strict=False)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"smop.route.default", "smop.expert_projection.default"} <= targets
    for T in (20, 33):
        inputs = batch(T, seed=T)
        assert_same_output(program.module()(*inputs), module(*inputs))


@pytest.mark.gpu
def test_cuda_graph_replays_with_other_routing():
    module = make(device="cuda")
    static = list(batch(64, "cuda"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(module, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    module.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        for p in module.parameters():
            p.grad.zero_()
        out = module(*static)
        loss_of(out).backward()
    for seed in (2, 3):
        fresh = batch(64, "cuda", seed=seed)
        for kept, new in zip(static, fresh, strict=True):
            kept.copy_(new)
        graph.replay()
        got = {n: p.grad.clone() for n, p in module.named_parameters()}
        y = out.hidden_states.clone()
        reference = copy.deepcopy(module)
        rounding.assert_same_sums(y, reference(*fresh).hidden_states, ADDITIONS, "the output")
        assert_same_gradients(got, gradients(reference, *fresh))


# ---------------------------------------------------------------------------------------------------------------- peft


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector = make()

    def forward(self, x, modality, mask):
        return self.projector(x, modality, mask)


def test_lora_on_the_stacked_expert_weights():
    import peft

    model, inputs = Speech(), batch()
    expected = model(*inputs).hidden_states.detach()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["projector.w1", "projector.w2"])
    adapted = peft.get_peft_model(model, config)
    rounding.assert_same_sums(adapted(*inputs).hidden_states, expected, ADDITIONS)  # starts at zero
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("lora_" in n for n in trainable)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = loss_of(adapted(*inputs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = adapted(*inputs).hidden_states.detach()
    merged = adapted.merge_and_unload()
    rounding.assert_same_sums(merged(*inputs).hidden_states, trained, ADDITIONS, "the output")
