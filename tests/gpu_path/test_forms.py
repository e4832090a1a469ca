"""Forms beyond the paper's on a GPU: PyTorch's operators around the kernels, and no wait of the host."""

import pytest
import torch

from tests.gpu_path.problems import Expected, batch, projector, step

pytestmark = pytest.mark.gpu

# No "rms" here: smopcuda has no backward of PyTorch's fused RMSNorm.
FORMS = {
    "shared": {"shared_experts": 1, "balance": "mse", "activation": "gelu", "layer_norm": False},
    "gated": {"gated": True, "activation": "silu", "normalize_weights": False, "weight_scale": 2.5},
    "router": {"router": "mlp", "router_hidden": 16, "router_bias": True, "balance": None},
    "merged": {"merge": "utterance", "balance": "mse"},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_step_is_right_and_waits_for_nothing(backend, name):
    module, (x, modality, mask) = projector(backend, **FORMS[name]), batch()
    if name == "merged":
        x, modality, mask = (t.unflatten(0, (3, -1)) for t in (x, modality, mask))
    if FORMS[name].get("gated") and backend == "cuda":
        with pytest.raises(RuntimeError, match="no gated experts"):
            module(x, modality, mask)
        return
    expected = Expected(module, x, modality, mask)
    step(module, x, modality, mask)  # the first use compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(module, x, modality, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected.check(got)
