"""`grouped_mm` and caller-made schedules, against the float64 loop."""

import pytest
import torch

from llama_smop import functional
from llama_smop.ops import checks, naive
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.ops.self_check import error
from llama_smop.triton_kernels.grouped_gemm import grouped_gemm
from tests.kernels.runners import poisoned_memory, triton_params
from tests.rounding import two_orders

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": bf16, "fp16": fp16, "fp32": fp32}

# Group sizes: balanced, an empty group first and in the middle, rows past the last offset, all in one.
SIZES = {"balanced": (40, 30, 35), "empty": (0, 70, 0, 35), "tail": (20, 0, 30), "one": (105,)}
ROWS = 105


def offsets(name: str) -> torch.Tensor:
    return torch.tensor(SIZES[name]).cumsum(0).to(torch.int32)


def check(runner, a, b, offs, bias=None, activation=None):
    """Returns (out, pre) of the runner once their error is at most twice PyTorch's."""
    move = [None if t is None else t.to(runner.device) for t in (a, b, offs, bias)]
    runner.vary(1)
    with poisoned_memory():
        out, pre = (t.cpu() for t in runner.module.grouped_mm(*move, activation))
    plain, plain_pre = torch_backend.grouped_mm(a, b, offs, bias, activation)
    exact = naive.grouped_mm(a.double(), b.double(), offs, None if bias is None else bias.double(), activation)
    assert out.dtype == a.dtype and out.shape == exact.shape and pre.shape == plain_pre.shape
    bound = 2 * error(plain, exact) + 1e-5
    assert error(out, exact) <= bound, f"off by {error(out, exact):.2e}, allowed {bound:.2e}"
    return out, pre


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 90), ("fp32", 80)))
def test_rows_times_matrices(runner, dtype):
    dtype = DTYPES[dtype]
    if dtype not in runner.dtypes:
        pytest.skip(f"{dtype} is not for this runner")
    g = torch.Generator().manual_seed(0)
    with runner.running():
        for name in SIZES:
            offs = offsets(name)
            a = torch.randn(ROWS, 40, generator=g).to(dtype)
            b = torch.randn(len(offs), 40, 56, generator=g).to(dtype) / 6
            bias = torch.randn(len(offs), 56, generator=g).to(dtype)
            out, _ = check(runner, a, b, offs, bias, "silu")
            assert (out[offs[-1] :] == 0).all(), "rows past the last offset are not zero"
            transposed = b.transpose(1, 2).contiguous().transpose(1, 2)  # K-major, as weights (G, N, K) come
            check(runner, a, transposed, offs)


@pytest.mark.parametrize(("runner", "dtype"), triton_params((bf16, 90), (fp16, 80)))
def test_a_sum_over_nothing_is_zero(runner, dtype):
    """K 0: the bias is left. Gradients through what was saved take one step, of masks alone."""
    if dtype not in runner.dtypes:
        pytest.skip(f"{dtype} is not for this runner")
    offs, N = offsets("empty"), 40
    a, b = torch.empty(ROWS, 0, dtype=dtype), torch.empty(len(offs), 0, N, dtype=dtype)
    bias = torch.randn(len(offs), N, generator=torch.Generator().manual_seed(5)).to(dtype)
    with runner.running():
        check(runner, a, b, offs, bias, "relu")
        a, b, offs = (t.to(runner.device) for t in (a, b, offs))
        for activation, width in (("swiglu", 2 * N), ("silu", N)):
            saved = torch.randn(ROWS, width, dtype=dtype, device=runner.device)
            out = torch.full_like(saved, float("nan"))
            grouped_gemm(a, b, offs, out, pre=saved, gradient=True, activation=activation).run()
            assert not out.any(), activation


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 90), ("fp16", 80)))
def test_matrices_inside_a_larger_tensor(runner, dtype):
    """Experts' weights packed with others, either way round; what lies between them may be anything."""
    dtype = DTYPES[dtype]
    if dtype not in runner.dtypes:
        pytest.skip(f"{dtype} is not for this runner")
    g = torch.Generator().manual_seed(4)
    a, offs = torch.randn(ROWS, 40, generator=g).to(dtype), offsets("empty")
    packed = torch.randn(len(offs), 2, 72, 56, generator=g).to(dtype)
    weights = packed[:, 1, :56, :40]  # (G, N, K) of a (G, 2, N', K')
    exact = naive.grouped_mm(a.double(), weights.transpose(1, 2).double(), offs, None, None)
    plain = torch_backend.grouped_mm(a, weights.transpose(1, 2), offs, None, None)[0]
    for rows_first in (False, True):
        store = packed.new_full((len(offs), 2, *((56, 72) if rows_first else (72, 56))), float("nan"))
        inside = store[:, 1, :40, :56] if rows_first else store[:, 1, :56, :40].transpose(1, 2)
        inside.copy_(weights.transpose(1, 2))
        with runner.running():
            out = torch.empty(ROWS, 56, dtype=dtype, device=runner.device)
            grouped_gemm(a.to(runner.device), inside.to(runner.device), offs.to(runner.device), out).run()
        assert error(out.cpu(), exact) <= 2 * error(plain, exact) + 1e-5


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 80), ("fp16", 90)))
def test_columns_times_rows(runner, dtype):
    """The 2d x 2d form: one product a group, zeros for an empty one; `a` as backward passes it, transposed."""
    dtype = DTYPES[dtype]
    if dtype not in runner.dtypes:
        pytest.skip(f"{dtype} is not for this runner")
    g = torch.Generator().manual_seed(1)
    with runner.running():
        for name in SIZES:
            a, b = torch.randn(ROWS, 24, generator=g).to(dtype), torch.randn(ROWS, 40, generator=g).to(dtype)
            out, pre = check(runner, a.t(), b, offsets(name))
            assert pre.numel() == 0
            for i, size in enumerate(SIZES[name]):
                assert size or (out[i] == 0).all(), "an empty group's product is not zero"
        check(runner, torch.ones(1, ROWS, dtype=dtype), b, offsets("empty"))


@pytest.mark.parametrize(("runner", "case"), triton_params(("few", 80), ("many", 90)))
def test_schedule_of_a_callers_routing(runner, case):
    """Any ids: repeats within a token, skipped choices (X and beyond, negative), unused experts; stable order."""
    X, T, K = {"few": (5, 300, 3), "many": (128, 400, 2)}[case]
    g = torch.Generator().manual_seed(2)
    with runner.running():
        for tokens in (0, 1, T):
            experts = torch.randint(-1, X + 2, (tokens, K), generator=g, dtype=torch.int32)
            runner.vary(2)
            with poisoned_memory():
                order, inverse, offs = (t.cpu() for t in runner.module.schedule(experts.to(runner.device), X))
            exact_order, exact_inverse, exact_offs = naive.schedule(experts, X)
            assert offs.tolist() == exact_offs
            assert order.tolist()[: exact_offs[-1]] == exact_order
            assert inverse.shape == (tokens, K) and inverse.flatten().tolist() == exact_inverse


@pytest.mark.parametrize(("runner", "tokens"), triton_params((80, 90), (40, 80)))
def test_a_callers_routing_may_repeat_and_skip_experts(runner, tokens):
    """Choices of one expert twice add up; skipped ones contribute nothing and get a zero gate gradient."""
    X, T, K, D, H, O = 4, tokens, 3, 24, 40, 32
    g = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    experts = torch.randint(0, X + 1, (T, K), generator=g, dtype=torch.int32)
    x, weights, dy = randn(T, D), torch.rand(T, K, generator=g), randn(T, O)
    params = [
        randn(X, H, D) / D**0.5,
        randn(X, H),
        randn(X, O, H) / H**0.5,
        randn(X, O),
        1 + randn(X, O) / 9,
        randn(X, O),
    ]
    with runner.running():
        backend = runner.module
        d = [t.to(runner.device) for t in (x, weights, experts, *params, dy)]
        schedule = backend.schedule(d[2], X)
        with poisoned_memory():
            y, *kept = backend.expert_projection_fwd(*d[:3], schedule, d[3:9], "relu", 1e-5)
            grads = backend.expert_projection_bwd(d[9], *d[:3], schedule, d[3:9], kept, "relu", 1e-5, True, True, True)
    leaves = [t.double().requires_grad_() for t in (x, weights, *params)]
    exact = naive.expert_projection(leaves[0], leaves[1], experts, *leaves[2:])
    exact_grads = torch.autograd.grad((exact * dy).sum(), leaves)
    sums = two_orders(D + H + O)
    assert error(y, exact.detach()) < sums
    for name, got, truth in zip(
        ("x", "weights", "w1", "b1", "w2", "b2", "gamma", "beta"), grads, exact_grads, strict=True
    ):
        assert error(got, truth) < 2 * sums * truth.abs().max(), f"the gradient of {name} is wrong"


@pytest.mark.parametrize(("runner", "name"), triton_params(("beyond", 90)))
def test_a_callers_offsets_beyond_the_rows_reach_no_memory(runner, name, monkeypatch):
    """Under ptxrun an access out of bounds is an error. On a GPU nothing reads the offsets to check them."""
    T, X, D, H, O = 40, 2, 24, 40, 32
    x, w1, w2 = torch.randn(T, D), torch.randn(X, H, D), torch.randn(X, O, H)
    rows = torch.arange(T, dtype=torch.int32)
    schedule = rows, rows[:, None], torch.tensor([T // 2, 10 * T], dtype=torch.int32)
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    with runner.running():
        given = [t.to(runner.device) for t in (x, torch.ones(T, 1), rows[:, None] // (T // 2), w1, w2)]
        options = {"schedule": [t.to(runner.device) for t in schedule], "backend": "triton"}
        y = functional.expert_projection(*given[:4], None, given[4], None, **options)
    assert y.isfinite().all()


@pytest.mark.parametrize(("runner", "dtype"), triton_params(("bf16", 90), ("fp32", 80)))
def test_a_kernel_compiled_for_one_call_serves_only_calls_like_it(runner, dtype):
    """Alignment, a size of 1 and dtypes are compiled into a kernel: each call after another that differs in one."""
    dtype = DTYPES[dtype]
    if dtype not in runner.dtypes:
        pytest.skip(f"{dtype} is not for this runner")
    g = torch.Generator().manual_seed(0)
    offs = offsets("tail")
    with runner.running():
        for _ in range(2):  # the second time from the table
            for shift, K, N in ((0, 32, 48), (1, 32, 48), (0, 32, 1), (0, 1, 48), (0, 33, 48)):
                storage = torch.randn(ROWS * K + shift, generator=g).to(dtype)
                a = storage[shift:].view(ROWS, K)
                check(runner, a, torch.randn(len(offs), K, N, generator=g).to(dtype), offs)
