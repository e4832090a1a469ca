"""What PyTorch asks of an operator: opcheck, gradcheck, autocast, compile, FakeTensor, refusals."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from llama_smop import DenseProjector, SMoPProjector, functional
from llama_smop.ops import dispatch, expert_projection, grouped_mm, route
from tests.ops.problems import PARAMETERS, make, relative_error
from tests.rounding import assert_same_gradients, assert_same_sums

ADDITIONS = 100  # widths 6, 9 and 7 forward and back, LayerNorm, up to 40 tokens


def smop(p, x=None, **options):
    return functional.smop(
        p.x if x is None else x, p.gate_weight, *p.parameters.values(), top_k=p.top_k, sharing=p.sharing,
        modality=p.modality, mask=p.mask, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("sharing", "shared"), (("JEJR", 0), ("JEDR", 0), ("DEDR", 0), ("DEDR", 2)))
def test_opcheck_route(sharing, shared):
    p = make(sharing=sharing, masked=True)
    torch.library.opcheck(route.route.op, (p.x, p.gate_weight, p.modality, p.mask, 2, p.num_experts, shared, "torch"))


def test_opcheck_schedule():
    torch.library.opcheck(expert_projection.schedule.op, (torch.tensor([[0, 2], [3, 1]]), 3, "torch"))


@pytest.mark.parametrize(
    "activation, layer_norm, bias", (("relu", True, True), ("gelu", False, True), ("silu", True, False))
)
def test_opcheck_expert_projection(activation, layer_norm, bias):
    # Nothing is masked: rows of h and z past the last offset are undefined, and opcheck compares every element.
    p = make(sharing="DEDR", bias=bias, layer_norm=layer_norm)
    r = functional.route(p.x, p.gate_weight, top_k=2, num_experts=p.num_experts, modality=p.modality)
    arguments = (r.weights.detach().requires_grad_(), r.experts, r.order, r.inverse, r.offs)
    torch.library.opcheck(
        expert_projection.expert_projection.op,
        (p.x, *arguments, *(p.parameters[n] for n in PARAMETERS), activation, 1e-5, "none", "torch"),
    )


@pytest.mark.parametrize("activation", (None, "relu", "gelu", "silu"))
def test_opcheck_grouped_mm(activation):
    a, b, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((10, 4), (3, 4, 5), (3, 5)))
    offs = torch.tensor([2, 2, 8], dtype=torch.int32)
    torch.library.opcheck(grouped_mm.grouped_mm.op, (a, b, offs, bias, activation, "torch"))
    if activation is None:
        b2 = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        torch.library.opcheck(grouped_mm.grouped_mm.op, (a, b2, offs.clamp(max=4), None, None, "torch"))


@pytest.mark.parametrize("activation, recompute", (("relu", "none"), ("gelu", "hz"), ("silu", "h")))
def test_gradcheck_of_the_whole_layer(activation, recompute):
    p = make(T=5, D=4, H=5, O=4, E=3, sharing="DEDR", masked=True)
    leaves = list(p.leaves().values())

    def outputs(x, gate, *parameters):
        out = functional.smop(
            x, gate, *parameters, top_k=2, sharing="DEDR", modality=p.modality, mask=p.mask,
            activation=activation, recompute=recompute,
        )  # fmt: skip
        return out.hidden_states, out.router_logits, out.expert_weights, out.load_balancing_loss, out.router_z_loss

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_lowers_the_products_and_keeps_gate_weights_in_float32(low):
    p = make(T=40, D=32, H=48, O=32, sharing="JEDR", dtype=torch.float32)
    with torch.autocast("cpu", low):
        out = smop(p)
    assert out.hidden_states.dtype == low
    assert out.router_logits.dtype == out.expert_weights.dtype == out.load_balancing_loss.dtype == torch.float32
    out.hidden_states.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in p.leaves().values())
    expected = smop(make(T=40, D=32, H=48, O=32, sharing="JEDR", dtype=torch.float32))
    # Routing of a near tie may differ; most tokens are routed alike.
    same = (out.expert_indices == expected.expert_indices).all(-1)
    assert same.float().mean() > 0.9
    assert relative_error(out.hidden_states[same], expected.hidden_states[same]) < 2e-2


def test_autocast_mixes_dtypes_as_linear_does():
    """Under autocast activations are low and parameters float32; every public function takes that."""
    p = make(T=8, sharing="JEJR", dtype=torch.float32)
    low = p.x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert smop(p, low).hidden_states.dtype == torch.bfloat16
        r = functional.route(low, p.gate_weight, top_k=2)
        y = functional.expert_projection(low, r.weights, r.experts, *(p.parameters[n] for n in PARAMETERS))
        offs = torch.tensor([3, 8], dtype=torch.int32)
        out = functional.grouped_mm(low, p.parameters["w1"][:2].transpose(1, 2), offs, bias=p.parameters["b1"][:2])
    assert y.dtype == out.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------- compile


def layer(sharing="DEDR", **options):
    torch.manual_seed(0)
    return SMoPProjector(6, 9, 7, num_experts=4, top_k=2, sharing=sharing, **options)


def step(module, x, modality, mask):
    out = module(x, modality, mask)
    loss = out.hidden_states.square().mean() + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss
    loss.backward()
    return out, {n: p.grad for n, p in module.named_parameters()}


def batch(T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, 6, generator=g), torch.randint(0, 2, (T,), generator=g), torch.rand(T, generator=g) > 0.2


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_whole_layer_compiles_to_one_graph_forward_and_backward(backend, fresh_compiler):
    """One graph: nothing on the way reads a value on the host."""
    plain, compiled = layer(), layer()
    function = torch.compile(compiled, fullgraph=True, backend=backend)
    expected, expected_grads = step(plain, *batch(12))
    out = function(*batch(12))
    loss = out.hidden_states.square().mean() + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss
    loss.backward()
    assert_same_sums(out.hidden_states, expected.hidden_states, ADDITIONS, "the output")
    found = {name: parameter.grad for name, parameter in compiled.named_parameters()}
    assert_same_gradients(found, {name: expected_grads[name] for name in found}, ADDITIONS)


def test_the_choice_of_the_backend_is_a_constant_to_the_compiler():
    """`dispatch` sets what the decorator sets, without importing the compiler for it."""
    marks = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marks and marks.items() <= vars(dispatch.resolve).items()


def test_a_changing_number_of_tokens_does_not_recompile(fresh_compiler):
    module = layer()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(module, fullgraph=True, backend=counter)
    for T in (12, 17, 23, 5, 40, 9):
        out = function(*batch(T, seed=T))
        out.hidden_states.sum().backward()
        expected = module(*batch(T, seed=T)).hidden_states
        assert_same_sums(out.hidden_states, expected, ADDITIONS, "the output")
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times: once as given, once for any T is enough"


def test_dense_projector_compiles_to_one_graph(fresh_compiler):
    torch.manual_seed(0)
    module = DenseProjector(6, 9, 7)
    x, modality, mask = batch(12)
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled, expected = function(x, modality, mask), module(x, modality, mask)
    assert_same_sums(compiled.hidden_states, expected.hidden_states, ADDITIONS, "the output")


def test_layer_runs_on_fake_tensors():
    """No value exists there: a read on the host would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out, grads = step(
            layer(), torch.randn(12, 6), torch.ones(12, dtype=torch.int64), torch.ones(12, dtype=torch.bool)
        )
        assert out.hidden_states.shape == (12, 7) and out.expert_counts.shape == (8,)
        assert grads["w1"].shape == (8, 9, 6)


# ------------------------------------------------------------------------------------------------------- refusals


def test_second_derivatives_are_refused_by_name():
    p = make(sharing="JEJR", top_k=1)  # with one choice the routing passes no gradient: the projection itself refuses
    (grad,) = torch.autograd.grad(smop(p).hidden_states.square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: detach"):
        grad.square().sum().backward()


def test_second_derivatives_of_the_router_are_refused():
    p = make()
    r = functional.route(p.x, p.gate_weight, top_k=2)
    (grad,) = torch.autograd.grad(r.router_z_loss, p.gate_weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"smop::route cannot be differentiated twice"):
        grad.sum().backward()


def test_grouped_mm_has_second_derivatives_where_it_is_linear_in_pieces():
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    offs = torch.tensor([2, 6], dtype=torch.int32)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda a, b: functional.grouped_mm(a, b, offs), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b: functional.grouped_mm(a, b, offs, activation="relu"), leaves)
    for activation in ("gelu", "silu"):
        out = functional.grouped_mm(a, b, offs, activation=activation)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice: apply the activation outside"):
            torch.autograd.grad(out.sum(), a, create_graph=True)


def test_vmap_is_refused_by_name():
    module = layer(sharing="JEJR")
    with pytest.raises(RuntimeError, match=r"smop::route takes all tokens in one call and cannot run under vmap"):
        torch.vmap(lambda x: module(x).hidden_states)(torch.randn(3, 5, 6))
    p = make(T=4)
    experts = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="cannot run under vmap"):
        torch.vmap(
            lambda x: functional.expert_projection(x, torch.ones(4, 2), experts, *(p.parameters[n] for n in PARAMETERS))
        )(torch.randn(3, 4, 6, dtype=torch.float64))
    b, offs = torch.randn(1, 3, 2), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="smop::grouped_mm takes all tokens"):
        torch.vmap(lambda a: functional.grouped_mm(a, b, offs))(torch.randn(2, 4, 3))


def test_forward_mode_is_refused_instead_of_being_zero():
    module, x = layer(sharing="JEJR"), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="smop::route has no forward-mode derivative"):
        torch.func.jvp(lambda x: module(x).hidden_states, (x,), (x,))
    a, b, offs = torch.randn(4, 3), torch.randn(1, 3, 2), torch.tensor([4], dtype=torch.int32)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="smop::grouped_mm has no forward-mode"):
        functional.grouped_mm(a, forward_ad.make_dual(b, b), offs)


def test_functional_gradients_are_refused_by_name():
    """And what torch.func does without differentiating the operators themselves is served."""
    module, x = layer(sharing="JEJR"), torch.randn(5, 6)
    for transform in (torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)[1](x.sum())):
        with pytest.raises(RuntimeError, match=r"smop::route has no derivative under torch.func .* use .backward"):
            transform(lambda x: module(x).hidden_states.sum())(x)
    offs = torch.tensor([5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"smop::grouped_mm has no derivative under torch\.func"):
        torch.func.grad(lambda b: functional.grouped_mm(x, b, offs).sum())(torch.randn(1, 6, 2))
    expected = module(x).hidden_states
    parameters = dict(module.named_parameters())
    assert torch.equal(torch.func.functional_call(module, parameters, (x,)).hidden_states, expected)
    frozen = layer(sharing="JEJR").requires_grad_(False)
    slope = torch.func.grad(lambda scale: (scale * frozen(x).hidden_states).sum())(torch.tensor(1.0))
    assert torch.allclose(slope, frozen(x).hidden_states.sum())


# -------------------------------------------------------------------------------------------------- partial gradients


@pytest.mark.parametrize(
    "frozen", (("gate_weight",), ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias"), ("x",), ("b1",))
)
def test_frozen_inputs_get_none_and_the_rest_is_unchanged(frozen):
    p, q = make(sharing="JEDR"), make(sharing="JEDR")
    for name in frozen:
        q.leaves()[name].requires_grad_(False)
    for problem in (p, q):
        out = smop(problem)
        (out.hidden_states.square().sum() + out.load_balancing_loss).backward()
    for name, t in q.leaves().items():
        if name in frozen:
            assert t.grad is None, name
        else:
            assert_same_sums(t.grad, p.leaves()[name].grad, ADDITIONS, name)


def test_nothing_is_kept_without_gradients():
    module = layer(sharing="JEJR")
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert not module(x).hidden_states.requires_grad
    with torch.inference_mode():
        assert torch.equal(module(x).hidden_states, deepcopy(module)(x).hidden_states)


def test_module_is_an_ordinary_module():
    module = layer()
    assert isinstance(module, nn.Module) and "DEDR" in repr(module)
    with torch.device("meta"):
        empty = SMoPProjector(6, 9, 7)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    x, modality, mask = batch(9)
    assert torch.equal(empty(x, modality, mask).hidden_states, module(x, modality, mask).hidden_states)
