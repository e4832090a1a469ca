"""What each of two processes runs for test_distributed.py; results go back through files."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_smop import SMoPProjector

RANKS = 2
BALANCES = ("switch", "mse")


def projector(**options) -> SMoPProjector:
    torch.manual_seed(0)
    return SMoPProjector(12, 16, 12, num_experts=4, top_k=2, sharing="DEDR", **options)


def batch(rank: int):
    """Rank 0 hears only, rank 1 sees and hears: on rank 0 the video experts and their router have no token."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(24, 12, generator=g)
    return x, torch.zeros(24, dtype=torch.int64) if rank == 0 else torch.arange(24) % 2


def mask(rank: int) -> torch.Tensor:
    """More padding on rank 1: the ranks differ in their real tokens."""
    return torch.arange(24) < 24 - 9 * rank


def loss_of(out):
    return out.hidden_states.square().mean() + 0.01 * out.load_balancing_loss + 0.001 * out.router_z_loss


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}

    ddp = DistributedDataParallel(projector())  # every parameter must get a gradient on every rank
    for _ in range(2):
        ddp.zero_grad()
        loss_of(ddp(*batch(rank))).backward()
    results["ddp"] = {n: p.grad for n, p in ddp.module.named_parameters()}

    for balance in BALANCES:
        joint = DistributedDataParallel(projector(global_aux_losses=True, balance=balance))
        out = joint(*batch(rank), mask(rank))
        (out.load_balancing_loss + 0.1 * out.router_z_loss + 0 * out.hidden_states.sum()).backward()
        values = torch.stack([out.load_balancing_loss, out.router_z_loss]).detach()
        dist.all_reduce(values)
        results[f"joint {balance}"] = {"gate_weight": joint.module.gate_weight.grad, "losses": values / RANKS}

    sharded = projector()
    fully_shard(sharded)
    assert isinstance(sharded.w1, DTensor) and sharded.w1.to_local().shape[0] == 8 // RANKS
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(sharded(*batch(rank))).backward()
        if step == 0:
            results["fsdp2"] = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
        optimizer.step()
    results["trained"] = {n: p.full_tensor().detach() for n, p in sharded.named_parameters()}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
