"""`replace_experts` on the mixtures of other speech models: a shared expert, a norm, gates, convolutions, hidden router
layers, noise and auxiliary losses. Each is written here as its paper or its code describes it."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llama_smop.integrations import replace_experts
from llama_smop.integrations.stacked_mixture import StackedMixture
from tests.rounding import assert_same_sums

ADDITIONS = 200  # as in test_replace_experts
ENCODER, WIDTH, HIDDEN, OUT, STRIDE = 6, 24, 20, 16, 4


class Adapter(nn.Module):
    def __init__(self, activation=nn.GELU, dropout=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), activation(), nn.Linear(HIDDEN, OUT)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class Gated(nn.Module):
    """SwiGLU of three layers."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    """A gate of two layers, and the second half is the gate."""

    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        up, gate = self.w12(x).chunk(2, -1)
        return self.w3(up * F.gelu(gate))


class Routed(nn.Module):
    """Frames stacked by 4, RMSNorm, top-K experts and a shared one."""

    def __init__(self, expert=Adapter, experts=4, top_k=2, normalise=True, scale=1.0, jitter=0.0, aux=None, pad=False):
        super().__init__()
        torch.manual_seed(0)
        self.k, self.top_k, self.normalise, self.pad, self.aux = STRIDE, top_k, normalise, pad, aux
        self.routed_scaling_factor, self.router_jitter_noise = scale, jitter
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))
        self.shared_expert = expert()
        self.loss = torch.zeros(())

    def get_output_length(self, frames):
        return frames // self.k

    def get_aux_loss(self):
        return self.loss

    def forward(self, x):
        B, frames, _ = x.shape
        if self.pad:
            x = F.pad(x, (0, 0, 0, -frames % self.k))
        tokens = x.shape[1] // self.k
        x = self.norm(x[:, : tokens * self.k].reshape(B, tokens, -1)).flatten(0, 1)
        logits = self.router(x)
        if self.training and self.router_jitter_noise:
            noise = torch.empty_like(logits).uniform_(1 - self.router_jitter_noise, 1 + self.router_jitter_noise)
            logits = logits * noise
        p = logits.softmax(-1)
        weights, chosen = p.topk(self.top_k)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        weights = weights * self.routed_scaling_factor
        every = torch.stack([expert(x) for expert in self.experts], 1)
        routed = (every.gather(1, chosen[..., None].expand(-1, -1, OUT)) * weights[..., None]).sum(1)
        if self.aux:
            E = len(self.experts)
            balance = (p.mean(0) - 1 / E).square().mean() * E
            self.loss = 0.02 * balance + 0.003 * logits.logsumexp(-1).square().mean()
            if self.aux == "entropy":
                self.loss = -(p * p.log()).sum(-1).mean()
        return (self.shared_expert(x) + routed).view(B, tokens, OUT)


class Dense(nn.Module):
    """MOSA: convolutions of stride 2, a router of two layers, all experts by their probabilities."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"kernel_size": 3, "stride": 2, "padding": 1}
        self.downsampler = nn.Sequential(
            nn.Conv1d(ENCODER, ENCODER, **options), nn.GELU(), nn.Conv1d(ENCODER, WIDTH, **options), nn.GELU()
        )
        self.router = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))
        self.experts = nn.ModuleList(Adapter(nn.ReLU) for _ in range(3))

    def forward(self, x):
        x = self.downsampler(x.transpose(1, 2)).transpose(1, 2)
        shares = self.router(x).softmax(-1)
        return sum(expert(x) * shares[..., e, None] for e, expert in enumerate(self.experts))


class Weighted(Routed):
    def get_aux_loss(self, weight):
        return weight * self.loss


SHAPES = {
    "tiny-audio": lambda: Routed(jitter=0.01, aux="mse"),
    "its gated one": lambda: Routed(expert=Gated, experts=8, top_k=4, normalise=False, scale=2.5, pad=True),
    "gate last": lambda: Routed(expert=Fused, top_k=3),
    "MOSA": Dense,
}


class Model(nn.Module):
    def __init__(self, projector):
        super().__init__()
        self.projector = projector


def frames(clips=3, count=29, seed=1):
    return torch.randn(clips, count, ENCODER, generator=torch.Generator().manual_seed(seed))


def step(projector, x):
    """Output, auxiliary loss, and gradients by state-dict key, in training with the same noise."""
    torch.manual_seed(5)
    projector.train()
    x = x.clone().requires_grad_()
    y = projector(x)
    aux = projector.get_aux_loss() if hasattr(projector, "get_aux_loss") else torch.zeros(())
    projector.zero_grad()
    (y.square().sum() + 10 * aux).backward()
    grads = deepcopy(projector, {id(v): None for v in vars(projector).values() if isinstance(v, torch.Tensor)})
    with torch.no_grad():
        for p, q in zip(grads.parameters(), projector.parameters(), strict=True):
            p.copy_(q.grad)
    return y, aux, x.grad, grads.state_dict()


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_numbers_and_gradients_in_training(name):
    model, x = Model(SHAPES[name]()), frames()
    y, aux, dx, grads = step(model.projector, x)
    report = replace_experts(model)
    assert report.replaced == ["projector"] and isinstance(model.projector, StackedMixture), str(report)
    ours = step(model.projector, x)
    assert_same_sums(ours[0], y, ADDITIONS, "the output")
    assert torch.allclose(ours[1], aux, rtol=1e-3), "the auxiliary loss"
    # Not of roundings alone: the other code divides by the weights' sum + 1e-6; the losses' weights are fitted.
    assert (ours[2] - dx).abs().max() < 2e-4 * dx.abs().max()
    assert ours[3].keys() == grads.keys()
    for key, grad in grads.items():
        assert (ours[3][key] - grad).abs().max() <= 1e-3 * grad.abs().max(), key
    assert_same_sums(model.projector.eval()(x), SHAPES[name]().eval()(x), ADDITIONS, "the output in eval mode")


@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_and_the_way_back(name):
    model, other, x = Model(SHAPES[name]()), Model(SHAPES[name]()), frames()
    for p in other.parameters():
        nn.init.normal_(p, std=0.3)
    original = model.projector
    report = replace_experts(model)
    assert model.state_dict().keys() == other.state_dict().keys()
    model.load_state_dict(other.state_dict())
    assert_same_sums(model.projector.eval()(x), other.projector.eval()(x), ADDITIONS, "the output")
    report.undo()
    assert model.projector is original
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_methods_and_settings_of_the_original_stay():
    model = Model(SHAPES["tiny-audio"]())
    replace_experts(model)
    assert model.projector.get_output_length(29) == 7 and model.projector.k == STRIDE
    assert not hasattr(model.projector, "no_such_method")
    assert deepcopy(model).projector.get_output_length(8) == 2


def test_bfloat16():
    model = Model(SHAPES["tiny-audio"]()).to(torch.bfloat16)
    expected = model.projector.eval()(frames().bfloat16())
    assert replace_experts(model).replaced == ["projector"]
    got = model.projector(frames().bfloat16())
    assert got.dtype == torch.bfloat16
    near = (got - expected).abs().amax(-1) < 0.05 * expected.abs().max()
    assert near.float().mean() > 0.9  # a near tie may be routed otherwise


def test_a_bad_checkpoint_is_refused():
    model = Model(SHAPES["its gated one"]())
    replace_experts(model)
    state = model.state_dict()
    del state["projector.shared_expert.up_proj.weight"]
    state["projector.shared_expert.extra"] = torch.zeros(1)
    state["projector.experts.2.gate_proj.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    for part in (
        'Missing key(s) in state_dict: "projector.shared_expert.up_proj.weight"',
        'Unexpected key(s) in state_dict: "projector.shared_expert.extra"',
        f"size mismatch for projector.experts.2.gate_proj.weight: expected ({HIDDEN}, {WIDTH}), got (3,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("projector", "why"),
    (
        (lambda: Routed(expert=lambda: Adapter(dropout=0.2)), "its experts are not"),
        (lambda: Routed(aux="entropy"), "its auxiliary loss is neither"),
        (Weighted, "its get_aux_loss takes arguments"),
    ),
)
def test_what_is_not_known_is_left_alone(projector, why):
    model = Model(projector())
    report = replace_experts(model)
    assert not report.replaced and why in report.left_alone["projector"]


def test_noise_of_another_kind_is_left_alone():
    class Noisy(Routed):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)

    report = replace_experts(Model(Noisy()))
    assert "another function in training mode" in report.left_alone["projector"]
