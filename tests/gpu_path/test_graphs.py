"""CUDA graphs of a whole training step, captured once and replayed with other tokens, routing, masks and weights."""

import pytest
import torch

from tests.gpu_path.problems import Expected, batch, loss_of, projector, results, step

pytestmark = pytest.mark.gpu


class Captured:
    """A module's training step as a graph over fixed inputs."""

    def __init__(self, module, *inputs):
        self.module, self.inputs = module, [t.clone() for t in inputs]
        self.x = self.inputs[0].requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(module, *self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for t in (self.x, *module.parameters()):
            t.grad = torch.zeros_like(t)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for t in (self.x, *module.parameters()):
                t.grad.zero_()
            self.out = module(*self.inputs)
            self.loss = loss_of(self.out)
            self.loss.backward()

    def replay(self, *inputs) -> dict:
        with torch.no_grad():
            for mine, new in zip(self.inputs, inputs, strict=True):
                mine.copy_(new)
        self.graph.replay()
        return results(self.module, self.out, self.loss, self.x)


@pytest.mark.parametrize("tokens", (64, 200), ids=("dense", "sorted"))
def test_replays_with_other_tokens_routing_masks_and_weights(backend, tokens):
    module = projector(backend)
    captured = Captured(module, *batch(tokens=tokens))
    for seed in (2, 3):
        inputs = batch(tokens=tokens, seed=seed)
        Expected(module, *inputs).check(captured.replay(*inputs))
    other = projector(backend, seed=9)
    with torch.no_grad():
        for mine, new in zip(module.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    x, modality, _ = batch(tokens=tokens, seed=4)
    for mask in (torch.ones_like(modality, dtype=torch.bool), torch.arange(tokens, device="cuda") < 3):
        for ids in (modality, torch.zeros_like(modality)):
            Expected(module, x, ids, mask).check(captured.replay(x, ids, mask))


def test_a_graph_replayed_on_another_stream(backend):
    module = projector(backend)
    captured = Captured(module, *batch())
    stream, inputs = torch.cuda.Stream(), batch(seed=2)
    expected = Expected(module, *inputs)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = captured.replay(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    expected.check(got)


def test_an_optimizer_within_the_graph(backend):
    """Three replays train as three eager steps do, bit by bit."""
    modules = [projector(backend) for _ in range(2)]
    inputs = batch()
    graphed, eager = (torch.optim.SGD(m.parameters(), lr=0.1) for m in modules)
    for optimizer, module in ((graphed, modules[0]), (eager, modules[1])):
        step(module, *inputs)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    graphed.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        graphed.zero_grad(set_to_none=False)
        loss_of(modules[0](*inputs)).backward()
        graphed.step()
    for _ in range(3):
        graph.replay()
        step(modules[1], *inputs)
        eager.step()
    for (name, mine), other in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(mine, other), f"{name} differs"
