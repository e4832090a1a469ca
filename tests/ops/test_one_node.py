"""In plain eager mode routing and experts are one autograd node: nothing else may differ from the two operators."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llama_smop import functional
from llama_smop.ops import layer
from tests.ops.problems import PARAMETERS, Problem, make

EVERYTHING = ("y", "logits", "weights", "balance", "z")


def smop(p: Problem, **options) -> dict[str, torch.Tensor]:
    """The results that may have a gradient."""
    out = functional.smop(
        p.x, p.gate_weight, *p.parameters.values(), top_k=p.top_k, sharing=p.sharing, modality=p.modality,
        mask=p.mask, **options,
    )  # fmt: skip
    found = out.hidden_states, out.router_logits, out.expert_weights, out.load_balancing_loss, out.router_z_loss
    return dict(zip(EVERYTHING, found, strict=True))


def problem(frozen: tuple[str, ...] = (), shared: int = 0) -> Problem:
    """With shared experts: JEDR, of whose stacked parameters the last are theirs."""
    p = make(T=20, sharing="DEDR", masked=True, dtype=torch.float32)
    if shared:
        p.sharing = "JEDR"
        p.parameters = {name: t.detach()[: 4 + shared].requires_grad_() for name, t in p.parameters.items()}
    for name in frozen:
        p.leaves()[name].requires_grad_(False)
    return p


def gradients(p: Problem, results: dict, losses: tuple[str, ...], **options) -> dict[str, torch.Tensor | None]:
    wanted = [results[name] for name in losses]
    seeds = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r) + 0.3 for r in wanted]
    leaves = {name: t for name, t in p.leaves().items() if t.requires_grad}
    found = torch.autograd.grad(wanted, list(leaves.values()), seeds, allow_unused=True, **options)
    return dict(zip(leaves, found, strict=True))


@pytest.fixture
def two_operators(monkeypatch):
    """`two_operators(function, …)`: what it returns where the layer is not one node."""

    def call(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "in_one_node", lambda *args: None)
            return function(*args, **options)

    return call


def same(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None, f"{name} has a gradient"
            continue
        assert got[name] is not None, f"{name} has no gradient"
        assert got[name].requires_grad == value.requires_grad, name
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize(
    "losses", (EVERYTHING, ("y",), ("y", "balance", "z"), ("balance",), ("weights",), ("y", "weights"))
)
@pytest.mark.parametrize("frozen", ((), ("x",), ("x", "gate_weight"), PARAMETERS, ("gate_weight", "b1")), ids=str)
def test_the_same_bits_and_gradients(losses, frozen, two_operators):
    p, q = problem(frozen), problem(frozen)
    results, expected = smop(p), two_operators(smop, q)
    same(results, expected)
    losses = tuple(name for name in losses if expected[name].requires_grad)
    if losses:
        same(gradients(p, results, losses), gradients(q, expected, losses))


@pytest.mark.parametrize("recompute", ("h", "z", "hz", 700))
def test_recompute(recompute, two_operators):
    p, q = problem(), problem()
    results, expected = smop(p, recompute=recompute), two_operators(smop, q, recompute=recompute)
    same(results, expected)
    same(gradients(p, results, EVERYTHING), gradients(q, expected, EVERYTHING))


@pytest.mark.parametrize("frozen", ((), ("x",)), ids=str)
def test_autocast_around_forward_and_backward(frozen, two_operators):
    """With a gradient of x, router and experts each round theirs, before they are added up in x's dtype."""
    found = []
    for run in (lambda function, *args: function(*args), two_operators):
        p = problem(frozen)
        with torch.autocast("cpu", torch.bfloat16):
            results = run(smop, p)
            found.append(results | gradients(p, results, ("y", "balance", "z")))
    assert found[0]["y"].dtype == torch.bfloat16
    same(*found)


@pytest.mark.parametrize("losses", (EVERYTHING, ("y", "balance", "z"), ("y",)))
@pytest.mark.parametrize("recompute", ("none", "hz"))
def test_shared_experts(losses, recompute, two_operators):
    p, q = problem(shared=2), problem(shared=2)
    options = {"shared_experts": 2, "recompute": recompute}
    results, expected = smop(p, **options), two_operators(smop, q, **options)
    same(results, expected)
    same(gradients(p, results, losses), gradients(q, expected, losses))


@pytest.mark.parametrize("shared", (0, 1))
def test_it_is_one_node(shared):
    results = smop(problem(shared=shared), shared_experts=shared)
    assert len({r.grad_fn for r in results.values()}) == 1


def test_a_graph_that_is_kept_gives_its_gradients_again():
    p = problem()
    results = smop(p)
    first = gradients(p, results, EVERYTHING, retain_graph=True)
    same(gradients(p, results, EVERYTHING), first)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(p, results, EVERYTHING)


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant):
    p, q = problem(), problem()

    def forward(x):
        p.x = x
        results = smop(p)
        return results["y"], results["balance"]

    leaves = list(p.leaves().values())
    y, balance = checkpoint(forward, p.x, use_reentrant=reentrant)
    (y.square().sum() + balance).backward()
    results = smop(q)
    (results["y"].square().sum() + results["balance"]).backward()
    for leaf, (name, expected) in zip(leaves, q.leaves().items(), strict=True):
        assert torch.equal(leaf.grad, expected.grad), name


def test_tensors_that_are_not_contiguous(two_operators):
    p, q = problem(), problem()
    for one in (p, q):
        for name in ("w1", "w2"):
            transposed = one.parameters[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
            one.parameters[name] = transposed.requires_grad_()
        one.x = one.x.detach().t().contiguous().t().requires_grad_()
    results, expected = smop(p), two_operators(smop, q)
    same(results, expected)
    same(gradients(p, results, EVERYTHING), gradients(q, expected, EVERYTHING))


@pytest.mark.parametrize("losses", (EVERYTHING, ("y", "balance", "z")))
def test_second_derivatives_are_refused_by_name(losses):
    p = problem()
    results = smop(p)
    grads = torch.autograd.grad([results[n].sum() for n in losses], [p.x, p.gate_weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"smop::\w+ cannot be differentiated twice"):
        sum(g.sum() for g in grads).backward()


def test_saved_tensors_may_be_kept_elsewhere(two_operators):
    """`save_on_cpu` and the like: hooks see what is kept, and backward takes what they give back."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor.clone()

    p, q = problem(), problem()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        results = smop(p)
    assert sum(kept) > 4 * p.x.shape[0] * p.top_k * p.parameters["w2"].shape[2]
    same(gradients(p, results, EVERYTHING), gradients(q, two_operators(smop, q), EVERYTHING))
