"""The CUDA backend's checks: kernels trust their pointers, so a tensor that does not fit must never reach them."""

import sys

import pytest
import torch

from llama_smop.ops import dispatch
from llama_smop.ops.backends import cuda as cuda_backend
from tests.cuda import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
T, D, H, O, X, K = 6, 16, 24, 32, 4, 2
bf16, i32 = torch.bfloat16, torch.int32


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """The extension as compiled for the tests; a launch raises RuntimeError, for there is no device."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(cuda_backend, "extension", extension.static)


def projection(**changed):
    arguments = {
        "x": torch.zeros(T, D, dtype=bf16), "weights": torch.zeros(T, K), "experts": torch.zeros(T, K, dtype=i32),
        "order": torch.zeros(T * K, dtype=i32), "inverse": torch.zeros(T, K, dtype=i32),
        "offs": torch.zeros(X, dtype=i32), "w1": torch.zeros(X, H, D, dtype=bf16), "b1": torch.zeros(X, H, dtype=bf16),
        "w2": torch.zeros(X, O, H, dtype=bf16), "b2": torch.zeros(X, O, dtype=bf16),
        "ln_weight": torch.zeros(X, O, dtype=bf16), "ln_bias": torch.zeros(X, O, dtype=bf16), "activation": "relu",
        "eps": 1e-5,
    }  # fmt: skip
    return cuda_backend.expert_projection_fwd(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(T, D)}, TypeError, 'bfloat16 and float16, got torch.float32; use backend="triton"'),
        ({"weights": torch.zeros(T, K, dtype=bf16)}, TypeError, "weights must be torch.float32"),
        ({"experts": torch.zeros(T, K, dtype=torch.int64)}, TypeError, "experts must be torch.int32"),
        ({"order": torch.zeros(T, dtype=i32)}, ValueError, r"order must have shape \(12,\), got \(6,\)"),
        ({"offs": torch.zeros(X + 1, dtype=i32)}, ValueError, "offs must have shape"),
        ({"w1": torch.zeros(X, D, H, dtype=bf16).transpose(1, 2)}, ValueError, "w1 must be contiguous"),
        ({"w2": torch.zeros(X, O, H, dtype=torch.float16)}, TypeError, "w2 must be torch.bfloat16"),
        ({"b1": torch.zeros(X, O, dtype=bf16)}, ValueError, "b1 must have shape"),
        ({"ln_bias": torch.zeros(X, O)}, TypeError, "ln_bias must be torch.bfloat16"),
        ({"ln_weight": torch.zeros(X, O, dtype=torch.float64)}, TypeError, "ln_weight must be torch.bfloat16 or"),
        ({"x": torch.zeros(T, D, dtype=bf16, device="meta")}, ValueError, "weights must be on meta, got cpu"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_projection_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        projection(**changed)


def test_arguments_that_fit_reach_the_device():
    with pytest.raises(RuntimeError, match=r"llama_smop\._C\.grouped_gemm: "):
        projection()


def test_too_many_experts():
    with pytest.raises(ValueError, match="1 to 128 experts, got 129"):
        cuda_backend.schedule(torch.zeros(T, K, dtype=i32), 129)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gate_weight": torch.zeros(3, X, D, dtype=bf16)}, ValueError, "1 or 2 routers, got 3"),
        ({"gate_weight": torch.zeros(1, X, D)}, TypeError, "gate_weight must be torch.bfloat16"),
        ({"gate_weight": torch.zeros(2, X, D, dtype=bf16)}, ValueError, "modality is required"),
        ({"modality": torch.zeros(T, dtype=torch.int64)}, TypeError, "modality must be torch.int32"),
        ({"mask": torch.zeros(T, dtype=i32)}, TypeError, "mask must be torch.bool"),
        ({"top_k": X + 1}, ValueError, r"top_k must lie in \[1, 4\], got 5"),
        ({"num_experts": 7}, ValueError, "num_experts must be 4 or 4, got 7"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_router_arguments(changed, error, message):
    arguments = {
        "x": torch.zeros(T, D, dtype=bf16), "gate_weight": torch.zeros(1, X, D, dtype=bf16), "modality": None,
        "mask": None, "top_k": K, "num_experts": X,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        cuda_backend.route_fwd(**(arguments | changed))


@pytest.mark.parametrize(
    ("a", "b", "offs", "error", "message"),
    [
        (torch.zeros(6, 8), torch.zeros(2, 8, 4), torch.zeros(2, dtype=i32), TypeError, "bfloat16 and float16"),
        (torch.zeros(6, 8, dtype=bf16), torch.zeros(2, 8, 4), torch.zeros(2, dtype=i32), TypeError, "b must be"),
        (torch.zeros(6, 8, dtype=bf16), torch.zeros(2, 8, 4, dtype=bf16), torch.zeros(2), TypeError, "offs must be"),
        (
            torch.zeros(6, 8, dtype=bf16), torch.zeros(3, 8, 4, dtype=bf16), torch.zeros(2, dtype=i32), ValueError,
            "2 groups as offs, got 3",
        ),
        (
            torch.zeros(6, 8, dtype=bf16), torch.zeros(2, 8, 8, dtype=bf16)[:, :, ::2], torch.zeros(2, dtype=i32),
            ValueError, "unit stride along K or N",
        ),
        (
            torch.zeros(6, 8, dtype=bf16), torch.zeros(9, 4, dtype=bf16), torch.zeros(2, dtype=i32), ValueError,
            "must share M",
        ),
    ],
)  # fmt: skip
def test_grouped_mm_arguments(a, b, offs, error, message):
    with pytest.raises(error, match=message):
        cuda_backend.grouped_mm(a, b, offs, None, None)


def test_it_says_why_it_cannot_serve(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "bfloat16 and float16, got torch.float32" in cuda_backend.unsupported(torch.float32, cuda, 2, 8)
    assert "1 to 128 experts, got 200" in cuda_backend.unsupported(bf16, cuda, 2, 200)
    assert "needs a CUDA device, got cpu" in cuda_backend.unsupported(bf16, cpu, 2, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in cuda_backend.unsupported(bf16, cuda, 2, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "built for sm_80, sm_90a; cuda is sm_100" in cuda_backend.unsupported(bf16, cuda, 2, 8)
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert cuda_backend.unsupported(bf16, cuda, 2, 8) is None


def test_without_the_extension_an_explicit_choice_names_the_remedy(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llama_smop._C", None)  # its import fails
    cuda_backend.extension.cache_clear()
    with pytest.raises(RuntimeError, match=r'backend="cuda" cannot run(?s:.*)LLAMA_SMOP_BUILD_CUDA=1'):
        dispatch.resolve("cuda", bf16, torch.device("cuda"))
    cuda_backend.extension.cache_clear()


def test_auto_leaves_it_alone_until_it_has_passed_on_a_gpu(monkeypatch):
    assert cuda_backend.build_info()["verified_on_gpu"] is cuda_backend.VERIFIED_ON_GPU
    served = {"cuda": None, "triton": None, "torch": None}
    monkeypatch.setattr(dispatch, "unsupported", lambda name, *_: served[name])
    for verified, chosen in ((False, "triton"), (True, "cuda")):
        monkeypatch.setattr(cuda_backend, "VERIFIED_ON_GPU", verified)
        assert dispatch.resolve("auto", bf16, torch.device("cuda")) == chosen
