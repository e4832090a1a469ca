"""The public operators with backend="cuda": grouped products over any layout, caller-made routing, the router alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop import functional
from llama_smop.ops import naive
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.ops.self_check import error
from tests.cuda import runners
from tests.cuda.runners import CudaPtx, params
from tests.kernels.runners import poisoned_memory
from tests.rounding import assert_same_sums

bf16, fp16 = torch.bfloat16, torch.float16
SM80, SM90, FEW_SMS = CudaPtx(arch=80), CudaPtx(arch=90), CudaPtx(arch=90, sms=2)
QUIET = {"deadline": None, "derandomize": True, "database": None}


def operands(shape_a, shape_b, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).div(s[-1] ** 0.5).to(dtype) for s in (shape_a, shape_b))


def compare(runner, a, b, offs, bias=None, activation=None):
    """grouped_mm on the runner against the float64 loop, PyTorch's error in the same dtype being the measure."""
    device = runner.device
    here = [None if t is None else t.to(device) for t in (a, b, offs, bias)]
    with poisoned_memory():
        out = functional.grouped_mm(*here[:3], bias=here[3], activation=activation, backend="cuda").cpu()
    wide = [None if t is None else t.double() for t in (a, b, bias)]
    exact = naive.grouped_mm(wide[0], wide[1], offs, wide[2], activation)
    plain = functional.grouped_mm(a, b, offs, bias=bias, activation=activation, backend="torch")
    assert out.shape == exact.shape
    assert error(out, exact) <= 2 * error(plain, exact) + 1e-5
    return out


@pytest.mark.parametrize("runner", params(SM80, SM90, FEW_SMS))
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_rows_times_stacked_matrices(runner, activation):
    """Both layouts of b, an empty group, and rows past the last offset, which are zero."""
    a, b = operands((150, 72), (4, 72, 136), bf16)
    offs = torch.tensor([60, 60, 61, 140], dtype=torch.int32)
    bias = torch.randn(4, 136, generator=torch.Generator().manual_seed(1)).to(bf16)
    with runner.running():
        out = compare(runner, a, b, offs, bias, activation)
        assert out[140:].eq(0).all()
        k_major = b.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(compare(runner, a, k_major, offs, bias, activation), out)


@pytest.mark.parametrize("runner", params(SM80, SM90, FEW_SMS))
def test_columns_times_rows(runner):
    """Segments of the summed dimension, an empty one included; both layouts of both operands."""
    a, b = operands((136, 150), (150, 72), fp16)
    offs = torch.tensor([60, 60, 61, 140], dtype=torch.int32)
    with runner.running():
        out = compare(runner, a, b, offs)
        assert out[1].eq(0).all()
        flipped = compare(runner, a.t().contiguous().t(), b.t().contiguous().t(), offs)
        assert torch.equal(flipped, out)


@pytest.mark.parametrize("runner", params(SM90))
def test_layouts_choose_the_kernels(runner):
    """TMA needs 16-byte rows and bases: other layouts take the portable kernels, and give the same numbers."""
    offs = torch.tensor([20, 40], dtype=torch.int32)
    a, b = operands((40, 64), (2, 64, 48), bf16)
    wide = torch.zeros(2, 64, 56, dtype=bf16)[:, :, :48].copy_(b)
    odd = torch.zeros(2, 64, 51, dtype=bf16)[:, :, :48].copy_(b)
    shifted = torch.zeros(2 * 64 * 48 + 1, dtype=bf16)[1:].view(2, 64, 48).copy_(b)
    results = []
    for layout, hopper in ((b, True), (wide, True), (odd, False), (shifted, False)):
        with runner.running():
            results.append(compare(runner, a, layout, offs))
            if runner.device == "cpu":
                assert ("sm90" in runners.launches.kernels[0]) == hopper
    for other in results[1:]:
        assert error(other, results[0]) <= 1e-3 * results[0].float().square().mean().sqrt()


@pytest.mark.parametrize("runner", params(CudaPtx(arch=90, sms=1)))
@pytest.mark.parametrize(
    ("n", "k_major", "width"),
    [
        (56, False, 64),
        (120, True, 128),
        (152, False, 160),
        (152, True, 160),
        (184, False, 192),
        (184, True, 192),
        (248, False, 256),
    ],
)
def test_every_tile_width_round_the_ring(runner, n, k_major, width):
    """Products long enough in k to use every stage of the shared-memory ring more than once, in two orders. On one SM
    the narrowest tile that holds all columns is the cheapest, which chooses the width."""
    a, b = operands((56, 1096), (2, 1096, n), bf16)
    if k_major:
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    ends, rows = torch.tensor([20, 56], dtype=torch.int32), torch.tensor([30, 1090], dtype=torch.int32)
    results = []
    with runner.running():
        for seed in (0, 1):  # copies and products at once, and as late as allowed
            runner.vary(seed)
            results.append((compare(runner, a, b, ends), compare(runner, a, b[0], rows)))
            if runner.device == "cpu":
                product, _, wgrad = runners.launches.kernels
                assert f", {width}, " in product
                assert f", {128 if width <= 128 else 256}, " in wgrad
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second), "differs from run to run"


@pytest.mark.parametrize("runner", params(SM80, SM90, FEW_SMS))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_other_groups_may_hold_anything(runner, poison):
    """Copies take whole boxes of rows; what lies behind a group's last row must not reach its sums, nor as 0·inf."""
    a, b = operands((150, 72), (4, 72, 136), bf16)
    left, right = operands((136, 150), (150, 72), bf16)
    offs = torch.tensor([30, 50, 61, 140], dtype=torch.int32)
    strange = torch.zeros(150, dtype=torch.bool)
    strange[30:50] = strange[140:] = True  # the second group's rows, and those of no group
    with runner.running():
        clean = compare(runner, a, b, offs), compare(runner, left, right, offs)
        a[strange], left[:, strange], right[strange] = poison, poison, poison
        to = [t.to(runner.device) for t in (a, b, left, right, offs)]
        with poisoned_memory():
            rows = functional.grouped_mm(to[0], to[1], to[4], backend="cuda").cpu()
            columns = functional.grouped_mm(to[2], to[3], to[4], backend="cuda").cpu()
    assert torch.equal(rows[~strange], clean[0][~strange])
    assert rows[140:].eq(0).all()
    for group in (0, 2, 3):
        assert torch.equal(columns[group], clean[1][group]), f"group {group}"
    assert not columns[1].isfinite().any()


@pytest.mark.parametrize("runner", params(SM80, SM90))
def test_caller_made_routing(runner):
    """An expert chosen twice by a token counts twice; ids outside [0, X) are skipped and get no gate gradient."""
    T, K, X, D, H, O = 50, 3, 4, 24, 40, 32
    g = torch.Generator().manual_seed(7)
    experts = torch.randint(0, X + 1, (T, K), generator=g, dtype=torch.int32)
    experts[0] = 2

    def leaf(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(bf16)

    tensors = [
        leaf(T, D), torch.rand(T, K, generator=g), leaf(X, H, D, scale=D**-0.5), leaf(X, H),
        leaf(X, O, H, scale=H**-0.5), leaf(X, O), leaf(X, O), leaf(X, O),
    ]  # fmt: skip
    dy = leaf(T, O)
    results = {}
    with runner.running(), poisoned_memory():
        for name, device in (("cuda", runner.device), ("torch", "cpu")):
            x, weights, *parameters = leaves = [t.to(device).clone().requires_grad_() for t in tensors]
            y = functional.expert_projection(x, weights, experts.to(device), *parameters, backend=name)
            results[name] = [t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, dy.to(device)))]
    x, weights, *parameters = leaves = [t.double().requires_grad_() for t in tensors]
    y = naive.expert_projection(x, weights, experts, *parameters)
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    for got, plain, truth in zip(results["cuda"], results["torch"], exact, strict=True):
        assert error(got, truth) <= 2 * error(plain, truth) + 1e-5
    assert results["cuda"][2][experts == X].eq(0).all()


@pytest.mark.parametrize("runner", params(SM80, SM90))
def test_grouped_mm_gradients(runner):
    a, b = operands((70, 40), (3, 40, 24), bf16, seed=2)
    offs = torch.tensor([30, 30, 66], dtype=torch.int32)
    bias = torch.randn(3, 24, generator=torch.Generator().manual_seed(3)).to(bf16)
    grads = {}
    with runner.running():
        for name, device in (("cuda", runner.device), ("torch", "cpu")):
            leaves = [t.to(device).clone().requires_grad_() for t in (a, b, bias)]
            out = functional.grouped_mm(*leaves[:2], offs.to(device), bias=leaves[2], activation="relu", backend=name)
            grads[name] = [g.cpu() for g in torch.autograd.grad(out.float().square().sum(), leaves)]
    wide = [t.double().requires_grad_() for t in (a, b, bias)]
    exact = torch.autograd.grad(naive.grouped_mm(wide[0], wide[1], offs, wide[2], "relu").square().sum(), wide)
    for got, plain, truth in zip(grads["cuda"], grads["torch"], exact, strict=True):
        assert error(got, truth) <= 2 * error(plain, truth) + 1e-5


@pytest.mark.parametrize("runner", params(SM80))
def test_schedule_is_the_stable_sort(runner):
    @settings(max_examples=12, **QUIET)
    @given(
        experts=st.integers(1, 5).flatmap(
            lambda k: st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k), max_size=70)
        )
    )
    def sorts(experts):
        chosen = torch.tensor(experts, dtype=torch.int32).view(len(experts), -1 if experts else 2)
        order, inverse, offs = naive.schedule(chosen, 9)  # id 9 skips the choice
        with poisoned_memory():
            got = runner.module.schedule(chosen.to(runner.device), 9)
        assert got[0].tolist()[: len(order)] == order
        assert got[1].reshape(-1).tolist() == inverse
        assert got[2].tolist() == offs

    with runner.running():
        sorts()


@pytest.mark.parametrize("runner", params(SM80))
def test_many_blocks_of_tokens(runner):
    """More tokens than one pass of the routing blocks; ties everywhere: the lower expert wins, the sort is stable."""
    T, D, E, K = 2100, 8, 4, 2
    g = torch.Generator().manual_seed(5)
    x = torch.randint(-1, 2, (T, D), generator=g).to(bf16)
    gate = torch.randint(-1, 2, (2, E, D), generator=g).to(bf16)
    modality = torch.randint(0, 2, (T,), generator=g, dtype=torch.int32)
    mask = torch.rand(T, generator=g) > 0.1
    with runner.running(), poisoned_memory():
        to = [t.to(runner.device) for t in (x, gate, modality, mask)]
        got = [t.cpu() for t in runner.module.route_fwd(*to, K, 2 * E)]
    want = torch_backend.route_fwd(x, gate, modality, mask, K, 2 * E)
    names = ("logits", "weights", "experts", "counts", "balance", "z", "order", "inverse", "offs")
    rows = int(want[-1][-1])
    for name, mine, theirs in zip(names, got, want, strict=True):
        if name == "order":
            mine, theirs = mine[:rows], theirs[:rows]
        assert_same_sums(mine, theirs, x.shape[1] + T, name)


@pytest.mark.parametrize("runner", params(SM90))
def test_smop_with_autograd(runner):
    """The public function end to end; float32 LayerNorm parameters as autocast keeps them."""
    T, D, H, O, E = 40, 32, 48, 40, 3
    g = torch.Generator().manual_seed(9)

    def leaf(*shape, scale=1.0, dtype=bf16):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    tensors = [
        leaf(2, T // 2, D), leaf(2, E, D, scale=D**-0.5), leaf(2 * E, H, D, scale=D**-0.5), leaf(2 * E, H),
        leaf(2 * E, O, H, scale=H**-0.5), leaf(2 * E, O), leaf(2 * E, O, dtype=torch.float32),
        leaf(2 * E, O, dtype=torch.float32),
    ]  # fmt: skip
    modality = torch.randint(0, 2, (2, T // 2), generator=g)
    results = {}
    with runner.running():
        for name, device in (("cuda", runner.device), ("torch", "cpu")):
            leaves = [t.to(device).clone().requires_grad_() for t in tensors]
            out = functional.smop(*leaves, top_k=2, sharing="DEDR", modality=modality.to(device), backend=name)
            loss = out.hidden_states.float().square().mean() + out.load_balancing_loss + 0.1 * out.router_z_loss
            results[name] = [t.detach().cpu() for t in (out.hidden_states, *torch.autograd.grad(loss, leaves))]
    for got, want in zip(results["cuda"], results["torch"], strict=True):
        assert got.dtype == want.dtype
        assert error(got, want) <= 0.02 * want.double().square().mean().sqrt() + 1e-6
