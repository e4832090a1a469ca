"""Ranks with a GPU each: DDP over the projector gives every rank the mean of the ranks' gradients."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.gpu_path.problems import STAND_IN, batch, loss_of, plain, projector, rms

RANKS = 2
LIMIT_S = 300
# Below smopcuda there is no NCCL; gloo takes tensors of a GPU through the host.
COLLECTIVES = "gloo" if STAND_IN else "nccl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} CUDA devices, one for each rank"),
]


def run(rank: int, backend: str, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(COLLECTIVES, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    module = DistributedDataParallel(projector(backend, device), device_ids=[rank])
    loss_of(module(*batch(device, seed=rank))).backward()
    gradients = {name: p.grad.cpu() for name, p in module.module.named_parameters()}
    torch.save(gradients, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def mean_gradients(module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    module, gradients = plain(module, dtype=dtype), []
    for rank in range(RANKS):
        module.zero_grad()
        x, *ids = batch("cpu", seed=rank)
        loss_of(module(x.to(dtype), *ids)).backward()
        gradients.append({name: p.grad.double() for name, p in module.named_parameters()})
    return {name: sum(g[name] for g in gradients) / RANKS for name in gradients[0]}


def test_ddp_with_a_device_a_rank(backend, tmp_path):
    ranks = torch.multiprocessing.spawn(run, args=(backend, str(tmp_path)), nprocs=RANKS, join=False)
    try:
        assert ranks.join(LIMIT_S) or ranks.join(LIMIT_S), f"the ranks were not done after {2 * LIMIT_S} s"
    finally:
        for process in ranks.processes:
            process.kill()
    module = projector(backend, "cpu")
    exact, same_dtype = (mean_gradients(module, dtype) for dtype in (torch.float64, torch.bfloat16))
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in exact.items():
            allowed = 2 * rms(same_dtype[name] - value) + 1e-5
            assert rms(got[name] - value) <= allowed, f"{name} on rank {rank}"
