"""`grouped_mm`: the stand-in for torch's, and what torch's lacks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_smop import functional
from llama_smop.ops import naive
from tests.ops.problems import relative_error
from tests.rounding import assert_same_sums, two_orders


def offsets(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def normal(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(out, leaves):
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, up)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", ("2d x 3d", "2d x 2d"))
def test_stands_in_for_torch(dtype, form):
    """Same arguments, same result, same gradients; torch wants 16-byte rows and leaves rows past the end undefined."""
    offs = offsets(8, 8, 24, 32)
    if form == "2d x 3d":
        leaves = normal(32, 16, dtype=dtype), normal(4, 16, 24, dtype=dtype, seed=1)
    else:
        leaves = normal(16, 32, dtype=dtype), normal(32, 24, dtype=dtype, seed=1)
    ours, theirs = functional.grouped_mm(*leaves, offs), F.grouped_mm(*leaves, offs=offs)
    # Sums of up to 32 in float32, each result then rounded to the dtype, by one of the two perhaps the other way.
    tolerance = two_orders(32) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert ours.dtype == theirs.dtype and relative_error(ours, theirs) < tolerance
    for got, want in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert relative_error(got, want) < tolerance


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ends=st.lists(st.integers(0, 12), min_size=1, max_size=5).map(sorted),
    K=st.integers(1, 5),
    N=st.integers(1, 5),
    bias=st.booleans(),
    activation=st.sampled_from((None, "relu", "gelu", "silu")),
    transposed=st.booleans(),
)
def test_any_groups_bias_and_activation(ends, K, N, bias, activation, transposed):
    """Rows past the last offset are zero, and so are their gradients; any width, any alignment."""
    G, offs = len(ends), offsets(*ends)
    a = normal(12, K)
    b = normal(G, N, K, seed=1) if transposed else normal(G, K, N, seed=1)
    shift = normal(G, N, seed=2) if bias else None
    leaves = [t for t in (a, b, shift) if t is not None]
    weight = b.transpose(1, 2) if transposed else b
    ours = functional.grouped_mm(a, weight, offs, bias=shift, activation=activation)
    want = naive.grouped_mm(a, weight, offs, shift, activation)
    assert_same_sums(ours, want, 12, scale=1.0)
    assert not ours[ends[-1] :].any()
    if ends[-1] == 0:  # nothing depends on the inputs: the loop has no graph
        assert not any(g.any() for g in gradients(ours, leaves))
        return
    for got, expected in zip(gradients(ours, leaves), gradients(want, leaves), strict=True):
        assert_same_sums(got, expected, 12, scale=1.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(ends=st.lists(st.integers(0, 12), min_size=1, max_size=5).map(sorted), M=st.integers(1, 4), N=st.integers(1, 4))
def test_products_over_column_groups(ends, M, N):
    a, b, offs = normal(M, 12), normal(12, N, seed=1), offsets(*ends)
    ours, want = functional.grouped_mm(a, b, offs), naive.grouped_mm(a, b, offs, None, None)
    assert_same_sums(ours, want, 12, scale=1.0)
    for got, expected in zip(gradients(ours, (a, b)), gradients(want, (a, b)), strict=True):
        assert_same_sums(got, expected, 12, scale=1.0)


def test_expanded_gradients_are_taken():
    """torch's refuses the stride-0 gradient that `.sum()` sends back."""
    a, b = normal(8, 16, dtype=torch.float32), normal(2, 16, 8, dtype=torch.float32, seed=1)
    functional.grouped_mm(a, b, offsets(4, 8)).sum().backward()
    assert_same_sums(b.grad[0], a[:4].sum(0)[:, None].expand(16, 8).detach(), 4)


def test_any_strides():
    a = normal(20, 10)[::2, ::2]
    b = normal(6, 10, 14, seed=1)[::2, ::2, ::2]
    offs = offsets(3, 3, 9)
    expected = functional.grouped_mm(a.contiguous(), b.contiguous(), offs)
    assert_same_sums(functional.grouped_mm(a, b, offs), expected, 10)
    wide = normal(9, 10, seed=2).t()[::2]
    assert_same_sums(
        functional.grouped_mm(wide, normal(9, 4, seed=3), offs),
        functional.grouped_mm(wide.contiguous(), normal(9, 4, seed=3), offs),
        additions=9,
    )


@pytest.mark.parametrize("shape", ((0, 3, 4), (5, 0, 4), (5, 3, 0)), ids=str)
def test_empty_sizes(shape):
    M, K, N = shape
    out = functional.grouped_mm(normal(M, K), normal(2, K, N), offsets(0, M))
    assert out.shape == (M, N) and not out.any()


def test_no_group_at_all_gives_zeros_and_gradients_of_zero():
    leaves = normal(5, 3), normal(0, 3, 4), normal(0, 4)
    for activation in (None, "relu", "gelu"):
        out = functional.grouped_mm(*leaves[:2], offsets(), bias=leaves[2], activation=activation)
        assert out.shape == (5, 4) and not out.any()
        found = gradients(out, leaves)
        assert [g.shape for g in found] == [x.shape for x in leaves] and not found[0].any()
    assert functional.grouped_mm(normal(3, 5), normal(5, 4), offsets()).shape == (0, 3, 4)


def test_is_deterministic():
    a, b = normal(64, 48, dtype=torch.float32), normal(4, 48, 32, dtype=torch.float32, seed=1)
    runs = []
    for _ in range(2):
        out = functional.grouped_mm(a, b, offsets(10, 20, 40, 60), activation="silu")
        runs.append((out, *gradients(out, (a, b))))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_compiles_in_every_dtype(dtype):
    torch._dynamo.reset()
    a, b = normal(9, 5, dtype=dtype), normal(2, 5, 3, dtype=dtype, seed=1)
    bias = normal(2, 3, dtype=dtype, seed=2)
    compiled = torch.compile(functional.grouped_mm, fullgraph=True, backend="aot_eager")
    got, want = (f(a, b, offsets(4, 7), bias=bias, activation="gelu") for f in (compiled, functional.grouped_mm))
    assert torch.equal(got, want)
    for g, w in zip(gradients(got, (a, b, bias)), gradients(want, (a, b, bias)), strict=True):
        assert_same_sums(g, w, 9)
    torch._dynamo.reset()
