"""In plain eager mode operators run without the dispatcher; what watches still sees them, and nothing else changes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_smop import SMoPProjector
from llama_smop import functional as F
from llama_smop.ops.operator import is_plain

OPERATORS = {"smop.route.default", "smop.expert_projection.default"}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def run(autocast: bool = False, watch: bool = False) -> tuple[dict, set]:
    torch.manual_seed(0)
    projector = SMoPProjector(12, 16, 20, num_experts=3, top_k=2, sharing="DEDR")
    x = torch.randn(2, 9, 12, requires_grad=True)
    mode = Watch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), mode if watch else torch.enable_grad():
        out = projector(x, torch.arange(18).view(2, 9) % 2)
        (out.hidden_states.float().square().mean() + out.load_balancing_loss + out.router_z_loss).backward()
    found = {"y": out.hidden_states.detach(), "dx": x.grad} | {n: p.grad for n, p in projector.named_parameters()}
    return found, mode.seen


@pytest.mark.parametrize("autocast", (False, True))
def test_the_fast_path_gives_the_same_bits(autocast):
    short, _ = run(autocast)
    watched, seen = run(autocast, watch=True)
    assert seen >= OPERATORS | {"smop.route_bwd.default", "smop.expert_projection_bwd.default"}
    for name, value in watched.items():
        assert short[name].dtype == value.dtype and torch.equal(short[name], value), name


def test_nothing_is_dispatched_in_plain_eager_mode(monkeypatch):
    dispatched, call = [], torch.library.CustomOpDef.__call__
    monkeypatch.setattr(
        torch.library.CustomOpDef, "__call__", lambda op, *args: dispatched.append(op._qualname) or call(op, *args)
    )
    run()
    assert not dispatched
    run(watch=True)
    assert dispatched


def test_a_profile_names_the_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    assert {"smop::route", "smop::expert_projection"} <= names


@pytest.mark.parametrize(
    "args",
    [
        (torch.randn(2, 2, device="meta"), 1),
        (torch.randn(2, 2).as_subclass(Subclass), 1),
        (torch.randn(2, 2), torch.randn(2).as_subclass(Subclass), "triton"),
    ],
    ids=("meta", "subclass", "second argument"),
)
def test_other_tensors_are_dispatched(args):
    assert is_plain((torch.randn(2, 2), None, 1, 0.5, True, "torch"))
    assert not is_plain(args)


def test_a_schedule_of_the_callers_is_checked():
    """Operators check what they are given; the fast path must not trust it either."""
    x, weights, experts = torch.randn(4, 3), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32)
    w1, w2 = torch.randn(2, 5, 3), torch.randn(2, 6, 5)
    schedule = torch.zeros(3, dtype=torch.int32), experts, torch.tensor([4, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"order must have shape \(4,\), got \(3,\)"):
        F.expert_projection(x, weights, experts, w1, None, w2, None, schedule=schedule)
