"""Every argument that cannot be served is refused before any work, in one line that names it."""

import inspect

import numpy as np
import pytest
import torch

from llama_smop import DenseProjector, SMoPProjector, functional
from llama_smop.ops import checks, dispatch, trust
from llama_smop.ops.backends import torch as torch_backend

T, D, H, O, E, K = 5, 6, 9, 7, 4, 2


def route_arguments(**changed):
    arguments = {
        "x": torch.randn(T, D),
        "gate_weight": torch.randn(2, E, D),
        "top_k": K,
        "num_experts": 2 * E,
        "modality": torch.zeros(T, dtype=torch.int64),
        "mask": torch.ones(T, dtype=torch.bool),
    }
    return {**arguments, **changed}


def projection_arguments(**changed):
    arguments = {
        "x": torch.randn(T, D),
        "weights": torch.rand(T, K),
        "experts": torch.zeros(T, K, dtype=torch.int64),
        "w1": torch.randn(E, H, D),
        "b1": torch.randn(E, H),
        "w2": torch.randn(E, O, H),
        "b2": torch.randn(E, O),
        "ln_weight": torch.ones(E, O),
        "ln_bias": torch.zeros(E, O),
    }
    return {**arguments, **changed}


def smop_arguments(**changed):
    parameters = {n: t for n, t in projection_arguments().items() if n not in ("weights", "experts")}
    return {**parameters, "gate_weight": torch.randn(1, E, D), "top_k": K, "sharing": "JEJR", **changed}


def grouped_mm_arguments(**changed):
    offs = torch.tensor([2, 5], dtype=torch.int32)
    return {
        "a": torch.randn(T, D),
        "b": torch.randn(2, D, O),
        "offs": offs,
        "bias": None,
        "activation": None,
        **changed,
    }


def schedule_with(**changed):
    """(order, inverse, offs) of tokens that all go to expert 0, with changed numbers."""
    rows = {"order": range(T * K), "inverse": [[t * K + k for k in range(K)] for t in range(T)], "offs": [T * K] * E}
    return tuple(torch.tensor(list(n), dtype=torch.int32) for n in (rows | changed).values())


ints = torch.int64
CASES = [
    # (function, arguments maker, changed arguments, error, what the message says)
    ("route", {"x": torch.randn(T)}, ValueError, r"gate_weight must have shape \(R, E|x must have shape \(T, D\)"),
    ("route", {"gate_weight": torch.randn(E, D)}, ValueError, r"gate_weight must have shape \(R, E, 6\), got \(4, 6\)"),
    ("route", {"gate_weight": torch.randn(2, E, D + 1)}, ValueError, r"gate_weight must have shape \(R, E, 6\)"),
    ("route", {"gate_weight": torch.randn(3, E, D), "num_experts": E}, ValueError, "1 router or 2 .* got 3"),
    ("route", {"top_k": 0}, ValueError, r"top_k must lie in \[1, num_experts\] = \[1, 4\], got 0"),
    ("route", {"top_k": 5}, ValueError, r"top_k must lie in .* got 5"),
    ("route", {"num_experts": 5}, ValueError, "num_experts must be 4 or 8"),
    ("route", {"modality": None}, ValueError, "modality is required with two routers"),
    ("route", {"modality": torch.zeros(T + 1, dtype=ints)}, ValueError, r"modality must have shape \(5,\), got \(6,\)"),
    ("route", {"modality": torch.zeros(T)}, TypeError, "modality must be an integer tensor, got torch.float32"),
    ("route", {"modality": torch.full((T,), 2)}, IndexError, r"modality must lie in \[0, 1\], got values from 2 to 2"),
    ("route", {"modality": torch.full((T,), -1)}, IndexError, "modality must lie in"),
    ("route", {"mask": torch.ones(T)}, TypeError, "mask must be a bool tensor, True = real token"),
    ("route", {"mask": torch.ones(1, dtype=torch.bool)}, ValueError, "mask must have shape"),
    ("route", {"x": torch.randn(T, D).double()}, TypeError, "gate_weight must have x's dtype torch.float64"),
    ("route", {"x": torch.ones(T, D, dtype=ints)}, TypeError, "x must be float64, float32, bfloat16 or float16"),
    ("route", {"x": torch.randn(T, D, device="meta")}, ValueError, "must be on x's device meta, got cpu"),
    ("route", {"backend": "numpy"}, ValueError, 'backend must be "auto" or one of'),
    ("expert_projection", {"x": torch.randn(T, D, 1)}, ValueError, r"x must have shape \(T, D\), got \(5, 6, 1\)"),
    ("expert_projection", {"w1": torch.randn(E, H, D + 1)}, ValueError, r"w1 must have shape \(X, H, 6\)"),
    ("expert_projection", {"w2": torch.randn(E + 1, O, H)}, ValueError, r"w2 must have shape \(4, O, 9\)"),
    ("expert_projection", {"b1": torch.randn(E, O)}, ValueError, r"b1 must have shape \(4, 9\)"),
    ("expert_projection", {"b2": torch.randn(O)}, ValueError, r"b2 must have shape \(4, 7\)"),
    ("expert_projection", {"ln_weight": torch.ones(E, H)}, ValueError, r"ln_weight must have shape \(4, 7\)"),
    ("expert_projection", {"ln_bias": None}, ValueError, "ln_weight and ln_bias go together"),
    ("expert_projection", {"weights": torch.rand(T + 1, K)}, ValueError, r"weights must have shape \(5, K\)"),
    ("expert_projection", {"weights": torch.ones(T, K, dtype=ints)}, TypeError, "weights must be float64"),
    ("expert_projection", {"experts": torch.zeros(T, 1, dtype=ints)}, ValueError, r"experts must have shape \(5, 2\)"),
    ("expert_projection", {"experts": torch.zeros(T, K)}, TypeError, "experts must be an integer tensor"),
    (
        "expert_projection",
        {"experts": torch.full((T, K), E + 1)},
        IndexError,
        r"must lie in \[0, 4\], got values from 5",
    ),
    ("expert_projection", {"experts": torch.full((T, K), -1)}, IndexError, "num_experts itself skips a choice"),
    ("expert_projection", {"w1": torch.randn(E, H, D).half()}, TypeError, "w1 must have x's dtype torch.float32"),
    ("expert_projection", {"ln_weight": torch.ones(E, O, dtype=ints)}, TypeError, "ln_weight must be float64"),
    ("expert_projection", {"w2": torch.randn(E, O, H, device="meta")}, ValueError, "w2 must be on x's device cpu"),
    ("expert_projection", {"activation": "tanh"}, ValueError, "activation must be one of"),
    ("expert_projection", {"recompute": "x"}, ValueError, "recompute must be one of"),
    ("expert_projection", {"recompute": -1}, ValueError, "or a number of bytes to keep, got -1"),
    ("expert_projection", {"recompute": True}, ValueError, "or a number of bytes to keep, got True"),
    (
        "expert_projection",
        {"schedule": (torch.zeros(3, dtype=torch.int32),) * 3},
        ValueError,
        r"order must have shape \(10,",
    ),
    (
        "expert_projection",
        {"schedule": schedule_with(offs=[4, 4, 4, 11])},
        IndexError,
        "offs must rise from 0 to at most 10",
    ),
    ("expert_projection", {"schedule": schedule_with(offs=[4, 2, 4, 10])}, IndexError, r"offs must rise .* got \[4, 2"),
    ("expert_projection", {"schedule": schedule_with(order=[10] * 10)}, IndexError, r"order must lie in \[0, 9\]"),
    (
        "expert_projection",
        {"schedule": schedule_with(inverse=[[10, 0]] * T)},
        IndexError,
        r"inverse must lie in \[-1, 9",
    ),
    ("smop", {"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(\.\.\., D\), got a scalar"),
    ("smop", {"sharing": "EJRJ"}, ValueError, "sharing must be one of"),
    ("smop", {"sharing": "DEDR"}, ValueError, r"gate_weight must hold 2 router\(s\) for DEDR, got 1"),
    ("smop", {"gate_weight": torch.randn(1, E + 1, D)}, ValueError, "w1 must hold 5 experts for JEJR, got 4"),
    ("smop", {"w1": torch.tensor(1.0)}, ValueError, r"w1 must have shape \(X, H, 6\), got \(\)"),
    (
        "smop",
        {"mask": torch.ones(2, dtype=torch.bool)},
        ValueError,
        r"mask must have x's leading shape \(5,\), got \(2,\)",
    ),
    ("smop", {"modality": torch.ones(T, 1, dtype=ints)}, ValueError, "modality must have x's leading shape"),
    ("smop", {"b2": torch.randn(E, O).double()}, TypeError, "b2 must have x's dtype"),
    ("grouped_mm", {"a": torch.randn(T)}, ValueError, r"a must have shape \(M, K\), got \(5,\)"),
    ("grouped_mm", {"b": torch.randn(3, D, O)}, ValueError, r"b must have shape \(2, 6, N\), got \(3, 6, 7\)"),
    ("grouped_mm", {"b": torch.randn(O)}, ValueError, r"b must be \(G, K, N\) or \(K, N\)"),
    ("grouped_mm", {"b": torch.randn(D + 1, O)}, ValueError, r"b must have shape \(6, N\)"),
    ("grouped_mm", {"b": torch.randn(D, O), "bias": torch.randn(2, O)}, ValueError, "a 2d x 2d product takes neither"),
    ("grouped_mm", {"bias": torch.randn(2, D)}, ValueError, r"bias must have shape \(2, 7\)"),
    ("grouped_mm", {"offs": torch.tensor([2, 5])}, TypeError, "offs must be int32 cumulative ends, got torch.int64"),
    ("grouped_mm", {"offs": torch.tensor([[2, 5]], dtype=torch.int32)}, ValueError, r"offs must have shape \(G,\)"),
    ("grouped_mm", {"offs": torch.tensor([2, 6], dtype=torch.int32)}, IndexError, "offs must rise from 0 to at most 5"),
    ("grouped_mm", {"offs": torch.tensor([3, 2], dtype=torch.int32)}, IndexError, r"offs must rise .* got \[3, 2\]"),
    ("grouped_mm", {"activation": "tanh"}, ValueError, "activation must be one of"),
    (
        "grouped_mm",
        {"a": torch.randn(T, D).half()},
        TypeError,
        "b must have a's dtype torch.float16, got torch.float32",
    ),
    ("grouped_mm", {"a": torch.ones(T, D, dtype=ints)}, TypeError, "a must be float64"),
]
MAKERS = {
    "route": route_arguments,
    "expert_projection": projection_arguments,
    "smop": smop_arguments,
    "grouped_mm": grouped_mm_arguments,
}


CASES += [
    (name, {tensor: make()[tensor].tolist()}, TypeError, f"^{tensor} must be a tensor, got list; torch.as_tensor")
    for name, make in MAKERS.items()
    for tensor, value in make().items()
    if isinstance(value, torch.Tensor)
]
CASES += [
    ("smop", {"x": torch.randn(T, D).numpy()}, TypeError, "x must be a tensor, got numpy.ndarray"),
    ("smop", {"mask": np.ones(T, dtype=bool)}, TypeError, "mask must be a tensor, got numpy.ndarray"),
    ("smop", {"w2": None}, TypeError, "w2 must be a tensor, got None$"),
    ("smop", {"modality": 0}, TypeError, "modality must be a tensor, got int"),
    ("smop", {"top_k": "2"}, ValueError, "top_k must lie in .* got '2'"),
    ("smop", {"top_k": 2.0}, ValueError, "top_k must lie in .* got 2.0"),
    ("smop", {"eps": "1e-5"}, ValueError, "eps must be a number of at least 0, got '1e-5'"),
    ("smop", {"x": torch.randn(T, D).bfloat16()}, TypeError, r"dtype torch.bfloat16, .* \.to\(dtype\), or .*autocast"),
    ("expert_projection", {"eps": -1.0}, ValueError, "eps must be a number of at least 0, got -1.0"),
    ("grouped_mm", {"bias": [[1.0]]}, TypeError, "bias must be a tensor, got list"),
]


@pytest.fixture
def unreachable_backend(monkeypatch):
    """Tests fail where a backend is asked for a product; routing alone is no harm."""
    for function in ("expert_projection_fwd", "grouped_mm"):
        monkeypatch.setattr(torch_backend, function, lambda *_: pytest.fail("refused arguments reached the backend"))


@pytest.mark.parametrize("name, changed, error, message", CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_functions_refuse(name, changed, error, message, unreachable_backend):
    with pytest.raises(error, match=message) as caught:
        getattr(functional, name)(**MAKERS[name](**changed))
    assert "\n" not in str(caught.value)


def test_registered_operators_refuse_too(unreachable_backend):
    """Kernels trust their pointers: a tensor that does not fit never reaches them by `torch.ops` either."""
    schedule = tuple(torch.zeros(n, dtype=torch.int32) for n in ((T * K,), (T, K), (E,)))
    a = tuple(projection_arguments(w2=torch.randn(E, O, H + 1)).values())
    with pytest.raises(ValueError, match=r"w2 must have shape \(4, O, 9\)"):
        torch.ops.smop.expert_projection(*a[:3], *schedule, *a[3:], "relu", 1e-5, "none", "torch")
    with pytest.raises(ValueError, match=r"gate_weight must have shape \(R, E, 6\)"):
        torch.ops.smop.route(torch.randn(T, D), torch.randn(1, E, D + 1), None, None, K, E, 0, "torch")
    with pytest.raises(ValueError, match=r"b must have shape \(2, 6, N\)"):
        torch.ops.smop.grouped_mm(torch.randn(T, D), torch.randn(2, D + 1, O), schedule[2][:2], None, None, "torch")


def test_the_unchanged_arguments_are_served():
    for name, make in MAKERS.items():
        getattr(functional, name)(**make())


def test_smop_checks_its_experts_before_it_routes(monkeypatch):
    calls, run = [], dispatch.module("torch").route_fwd
    monkeypatch.setattr(dispatch.module("torch"), "route_fwd", lambda *args: calls.append(args) or run(*args))
    with pytest.raises(ValueError, match="w2 must have shape"):
        functional.smop(**smop_arguments(w2=torch.randn(E, O, H + 1)))
    assert not calls, "routed before all arguments were checked"
    functional.smop(**smop_arguments())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"top_k": 5}, r"top_k must lie in \[1, num_experts\] = \[1, 4\], got 5"),
        ({"top_k": 0}, "top_k must lie in"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"out_features": 0}, "out_features must be at least 1"),
        ({"sharing": "both"}, "sharing must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"recompute": "y"}, "recompute must be one of"),
        ({"backend": "numpy"}, "backend must be"),
        ({"top_k": "2"}, "top_k must lie in .* got '2'"),
        ({"top_k": 1.0}, "top_k must lie in .* got 1.0"),
        ({"num_experts": 2.0}, "num_experts must be a whole number, got 2.0"),
        ({"in_features": "8"}, "in_features must be a whole number, got '8'"),
        ({"hidden_features": None}, "hidden_features must be a whole number, got None"),
        ({"eps": None}, "eps must be a number of at least 0, got None"),
        ({"eps": -1}, "eps must be a number of at least 0, got -1"),
        ({"layer_norm": "no"}, "layer_norm must be True or False, got 'no'"),
        ({"global_aux_losses": 1}, "global_aux_losses must be True or False, got 1"),
    ],
)
def test_projector_refuses_at_construction(changed, message):
    sizes = {"in_features": D, "hidden_features": H, "out_features": O}
    with pytest.raises(ValueError, match=message):
        SMoPProjector(**sizes | changed)
    dense = inspect.signature(DenseProjector).parameters
    if set(changed) <= set(dense):
        with pytest.raises(ValueError, match=message):
            DenseProjector(**sizes | changed)


def test_sizes_may_be_numpys():
    layer = SMoPProjector(np.int64(D), H, O, num_experts=np.int64(E), top_k=np.int32(K), sharing="JEJR")
    assert layer(torch.randn(T, D)).hidden_states.shape == (T, O)


@pytest.mark.parametrize(
    "projector",
    (SMoPProjector(D, H, O), DenseProjector(D, H, O), SMoPProjector(D, H, O, router_bias=True)),
    ids=("sparse", "dense", "another form"),
)
def test_projectors_refuse_at_the_call(projector):
    x, modality = torch.randn(2, 3, D), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must have in_features = 6 as its last size, got shape \(2, 3, 5\)"):
        projector(x[..., :5], modality)
    for given, kind in ((x.tolist(), "list"), (x.numpy(), "numpy.ndarray"), (None, "None")):
        with pytest.raises(TypeError, match=f"x must be a tensor, got {kind}"):
            projector(given, modality)
    with pytest.raises(TypeError, match=r"modality must be a tensor, got list; torch.as_tensor\(modality\) makes one"):
        projector(x, [[0, 0, 1], [0, 1, 1]])
    with pytest.raises(TypeError, match=r"mask must be a tensor, got numpy\.ndarray"):
        projector(x, modality, np.ones((2, 3), dtype=bool))
    with pytest.raises(ValueError, match="modality is required"):
        projector(x)
    with pytest.raises(IndexError, match=r"modality must lie in \[0, 1\], got values from 2 to 2"):
        projector(x, modality + 2)
    with pytest.raises(ValueError, match="modality must have x's leading shape"):
        projector(x, modality[0])
    with pytest.raises(ValueError, match="mask must have x's leading shape"):
        projector(x, modality, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        projector(x, modality, torch.ones(2, 3))
    with pytest.raises(TypeError, match="modality must be an integer tensor"):
        projector(x, modality.float())


def test_dense_projector_refuses_bad_sizes():
    with pytest.raises(ValueError, match="modalities must be at least 1"):
        DenseProjector(D, H, O, modalities=0)
    with pytest.raises(ValueError, match="backend must be"):
        DenseProjector(D, H, O, backend="numpy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU backend where there is no GPU")
def test_an_explicit_backend_that_cannot_run_says_why_and_is_not_replaced():
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: .+; backend="auto" picks one that can'):
        functional.smop(**smop_arguments(backend="triton"))


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError("the CUDA extension is not built: python csrc/build.py")

    monkeypatch.setattr(dispatch, "module", missing)
    with pytest.raises(RuntimeError, match=r"the CUDA extension is not built: python csrc/build\.py"):
        dispatch.resolve("cuda", torch.float32, torch.device("cpu"))


def test_auto_takes_the_first_backend_that_can_serve(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "known", {})

    class Fake:
        def __init__(self, why_not):
            self.why_not = why_not

        def unsupported(self, *_):
            return self.why_not

    modules = {"cuda": Fake(None), "triton": Fake(None), "torch": Fake(None)}
    monkeypatch.setattr(dispatch, "module", modules.get)
    gpu = torch.device("cuda", 0)
    assert dispatch.resolve("auto", torch.bfloat16, gpu) == "triton", "the CUDA extension waits for a doctor"
    trust.known["cuda", torch.bfloat16, gpu] = True
    assert dispatch.resolve("auto", torch.bfloat16, gpu) == "cuda"
    modules["cuda"].why_not = modules["triton"].why_not = "not this dtype"
    assert dispatch.resolve("auto", torch.float64, gpu) == "torch"
    assert dispatch.resolve("auto", torch.bfloat16, torch.device("cpu")) == "torch"
    with pytest.raises(RuntimeError, match='backend="cuda" cannot run: not this dtype; backend="auto" picks'):
        dispatch.resolve("cuda", torch.float64, gpu)
    modules["torch"].why_not = "no"
    with pytest.raises(RuntimeError, match=r"no backend can serve dtype torch\.float64 on device cuda:0"):
        dispatch.resolve("auto", torch.float64, gpu)


def test_debug_switch(monkeypatch):
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("LLAMA_SMOP_DEBUG", value)
        assert checks.debug() is expected
