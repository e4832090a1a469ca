"""DDP with an idle expert on one rank, and FSDP2 with stacked expert weights: two processes on gloo."""

import pytest
import torch

from tests.integrations.distributed_ranks import BALANCES, RANKS, batch, loss_of, mask, projector, run
from tests.rounding import assert_same_gradients, assert_same_sums
from tests.training import children

ADDITIONS = 200  # widths 12, 16 and 12 forward and back, LayerNorm, 48 tokens


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [children.start(run, rank, str(folder)) for rank in range(RANKS)]
    children.join(ranks)
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
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
    assert_same_gradients(results[wrapper], averaged_gradients(projector()), ADDITIONS)


@pytest.mark.parametrize("balance", BALANCES)
def test_joint_router_losses_are_those_of_one_process_with_all_tokens(results, balance):
    """Not the mean of the ranks' own: these differ in their tokens, and one has no video."""
    whole, found = projector(balance=balance), results[f"joint {balance}"]
    parts = [(*batch(rank), mask(rank)) for rank in range(RANKS)]
    out = whole(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    (out.load_balancing_loss + 0.1 * out.router_z_loss).backward()
    expected = torch.stack([out.load_balancing_loss, out.router_z_loss]).detach()
    for value, want, what in zip(found["losses"], expected, ("balance", "z-loss"), strict=True):
        assert_same_sums(value, want, ADDITIONS, what)
    assert_same_sums(found["gate_weight"], whole.gate_weight.grad, ADDITIONS, "the gate's gradient")
    own = [projector(balance=balance)(*part) for part in parts]
    assert not torch.isclose(sum(o.load_balancing_loss for o in own) / RANKS, expected[0], rtol=1e-3)


@pytest.mark.parametrize("autocast", (False, True))
def test_global_aux_losses_of_one_process_are_its_own(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, joint = projector()(*batch(1), mask(1)), projector(global_aux_losses=True)(*batch(1), mask(1))
    assert_same_sums(joint.load_balancing_loss, own.load_balancing_loss, ADDITIONS, "balance")
    assert_same_sums(joint.router_z_loss, own.router_z_loss, ADDITIONS, "z-loss")


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
        assert_same_sums(results["trained"][name], parameter.detach(), 2 * ADDITIONS, name)
