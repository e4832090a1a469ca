"""What the CUDA backend refuses besides what operators refuse for every backend."""

import sys

import pytest
import torch

from llama_smop.ops import dispatch, trust
from llama_smop.ops.backend import Experts, Schedule
from llama_smop.ops.backends import cuda as cuda_backend
from llama_smop.ops.backends import cuda_extension
from tests.cuda import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
T, D, H, O, X, K = 6, 16, 24, 32, 4, 2
bf16, i32 = torch.bfloat16, torch.int32


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """The extension as compiled for the tests; a launch raises RuntimeError, for there is no device."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for module in (cuda_backend, cuda_extension):
        monkeypatch.setattr(module, "extension", extension.static)


def projection(**changed):
    parameters = {
        "w1": torch.zeros(X, H, D, dtype=bf16), "b1": torch.zeros(X, H, dtype=bf16),
        "w2": torch.zeros(X, O, H, dtype=bf16), "b2": torch.zeros(X, O, dtype=bf16),
        "ln_weight": torch.zeros(X, O, dtype=bf16), "ln_bias": torch.zeros(X, O, dtype=bf16),
    }  # fmt: skip
    schedule = Schedule(torch.zeros(T * K, dtype=i32), torch.zeros(T, K, dtype=i32), torch.zeros(X, dtype=i32))
    return cuda_backend.expert_projection_fwd(
        torch.zeros(T, D, dtype=bf16), torch.zeros(T, K), torch.zeros(T, K, dtype=i32), schedule,
        Experts(**(parameters | changed)), "relu", 1e-5,
    )  # fmt: skip


def test_arguments_that_fit_reach_the_device():
    with pytest.raises(RuntimeError, match=r"llama_smop\._C\.grouped_gemm: "):
        projection()


@pytest.mark.parametrize(
    "changed",
    [{"ln_bias": torch.zeros(X, O)}, {n: torch.zeros(X, O, dtype=torch.float64) for n in ("ln_weight", "ln_bias")}],
)
def test_layer_norm_has_one_dtype_that_the_kernels_know(changed):
    with pytest.raises(TypeError, match=r"ln_weight and ln_bias must both be torch\.bfloat16 or both float32"):
        projection(**changed)


def test_too_many_experts():
    with pytest.raises(ValueError, match="1 to 128 experts, got 129"):
        cuda_backend.schedule(torch.zeros(T, K, dtype=i32), 129)


def test_it_says_why_it_cannot_serve(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "bfloat16 and float16, got torch.float32" in cuda_extension.unsupported(torch.float32, cuda, 2, 8)
    assert "1 to 128 experts, got 200" in cuda_extension.unsupported(bf16, cuda, 2, 200)
    assert "needs a CUDA device, got cpu" in cuda_extension.unsupported(bf16, cpu, 2, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in cuda_extension.unsupported(bf16, cuda, 2, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "built for sm_80, sm_90a; cuda is sm_100" in cuda_extension.unsupported(bf16, cuda, 2, 8)
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert cuda_extension.unsupported(bf16, cuda, 2, 8) is None


def test_without_the_extension_an_explicit_choice_names_the_remedy(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llama_smop._C", None)  # its import fails
    cuda_extension.extension.cache_clear()
    with pytest.raises(RuntimeError, match=r'backend="cuda" cannot run(?s:.*)LLAMA_SMOP_BUILD_CUDA=1'):
        dispatch.resolve("cuda", bf16, torch.device("cuda"))
    cuda_extension.extension.cache_clear()


def test_auto_leaves_it_alone_until_a_doctor_has_found_it_right_and_quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "unsupported", lambda *_: None)
    gpu = torch.device("cuda")
    assert dispatch.resolve("auto", bf16, gpu) == "triton"
    for right, not_slower, chosen in ((False, True, "triton"), (True, False, "triton"), (True, True, "cuda")):
        trust.store_doctors(gpu, {("cuda", bf16): {"right": right, "not_slower": not_slower}})
        assert dispatch.resolve("auto", bf16, gpu) == chosen
    assert dispatch.resolve("auto", torch.float16, gpu) == "triton", "the verdict is one dtype's"
    trust.known.clear()
