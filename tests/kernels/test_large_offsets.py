"""Offsets beyond 2³¹ elements. The tensors are larger than memory may be; only the rows in use are ever touched."""

import pytest
import torch

from llama_smop.triton_kernels.combine import combine_fwd
from llama_smop.triton_kernels.grouped_gemm import grouped_gemm
from llama_smop.triton_kernels.grouped_wgrad import grouped_wgrad
from tests.kernels.runners import triton_params

ROWS, WIDTH = 2**25 + 3, 128  # 2³² elements, 8.6 GB of addresses in bfloat16
bf16 = torch.bfloat16


def far_rows(device: str) -> torch.Tensor:
    """(ROWS, WIDTH), its last two rows filled and the rest never touched."""
    far = torch.empty(ROWS, WIDTH, dtype=bf16, device=device)
    assert far.numel() > 2**31
    far[-2:] = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)).to(bf16)
    return far


def integers(*values: int, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("runner", "name"), triton_params(("offsets", 90)))
def test_rows_far_away(runner, name):
    if bf16 not in runner.dtypes:
        pytest.skip("bfloat16 is not for this runner")
    device, far = runner.device, far_rows(runner.device)
    near = far[-2:].clone()
    with runner.running():
        # combine: the rows of the only token's two choices are the last two
        y = torch.empty(1, WIDTH, dtype=bf16, device=device)
        inverse = integers(ROWS - 2, ROWS - 1, device=device).view(1, 2)
        combine_fwd(far, None, None, inverse, y).run()
        assert torch.equal(y, near.float().sum(0, keepdim=True).to(bf16))

        # GEMM and wgrad: the only two choices are of the last two tokens
        offs, order = integers(2, device=device), integers(ROWS - 2, ROWS - 1, device=device)
        identity = torch.eye(WIDTH, dtype=bf16, device=device)
        rows = torch.empty_like(near)
        grouped_gemm(far, identity[None], offs, rows, gather=True, order=order, top_k=1).run()
        assert torch.equal(rows, near)
        gradient = torch.empty(1, 2, WIDTH, dtype=bf16, device=device)
        grouped_wgrad(identity[:2, :2].contiguous(), far, offs, gradient, gather=True, order=order, top_k=1).run()
        assert torch.equal(gradient[0], near)
