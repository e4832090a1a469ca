"""DDP with an idle expert on one rank, and FSDP2 with stacked expert weights: two processes on gloo."""

import pytest
import torch

from tests.integrations.distributed_ranks import RANKS, batch, loss_of, projector, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(str(folder),), nprocs=RANKS)
    return torch.load(folder / "results.pt", weights_only=True)


def averaged_gradients(module):
    """What every rank must hold: the mean of the ranks' gradients."""
    grads = []
    for rank in range(RANKS):
        module.zero_grad()
        loss_of(module(*batch(rank))).backward()
        grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
    return {n: sum(g[n] for g in grads) / RANKS for n in grads[0]}


@pytest.mark.parametrize("wrapper", ("ddp", "fsdp2"))
def test_gradients_are_the_mean_over_ranks(results, wrapper):
    for name, expected in averaged_gradients(projector()).items():
        torch.testing.assert_close(results[wrapper][name], expected, msg=f"{wrapper} {name}")


def test_the_idle_rank_contributes_zero():
    module = projector()
    loss_of(module(*batch(0))).backward()
    assert not module.w1.grad[4:].any() and not module.gate_weight.grad[1].any()


def test_fsdp2_trains_as_one_process_does(results):
    module = projector()
    for _ in range(2):
        grads = averaged_gradients(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter -= 0.1 * grads[name]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(results["trained"][name], parameter.detach(), msg=name)
