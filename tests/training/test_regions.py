"""Gradient checkpointing leaves the routing alone; compiled regions compute what eager ones do, in one graph."""

import torch

from llama_smop.models.tiny import build_tiny
from llama_smop.ops.backends import torch as torch_backend
from llama_smop.training.build import compile_regions
from tests.rounding import TINY_MODEL, assert_same_gradients

WORDS = ["bin", "lay", "place", "set", "blue", "green", "red", "at", "by", "with"]


def model_and_processor(**settings):
    torch.manual_seed(0)
    sizes = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 2, "hidden_features": 16}
    model, processor = build_tiny(WORDS, max_seconds=1.0, ctc_weight=0.5, **sizes, **settings)
    return model.train(), processor


def batch(processor, clips: int, frames: int, words: int) -> dict:
    generator = torch.Generator().manual_seed(frames)
    audio = [torch.randn(frames * 640, generator=generator) for _ in range(clips)]
    video = [torch.randn(frames, 1, 88, 88, generator=generator) for _ in range(clips)]
    return dict(processor(text=[" ".join(WORDS[:words])] * clips, audio=audio, video=video))


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_never_routes_again(monkeypatch):
    model, processor = model_and_processor()
    inputs = batch(processor, clips=2, frames=20, words=4)
    route, calls = torch_backend.route_fwd, {"routings": 0, "layers": 0}

    def count(name: str) -> None:
        calls[name] += 1

    monkeypatch.setattr(torch_backend, "route_fwd", lambda *args: count("routings") or route(*args))
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(lambda *_: count("layers"))
    expected = gradients(model, inputs)
    assert calls == {"routings": 1, "layers": 2}
    model.gradient_checkpointing_enable()
    found = gradients(model, inputs)
    assert calls == {"routings": 1 + 1, "layers": 2 + 2 * 2}, "layers are computed again for backward, routings are not"
    assert_same_gradients(found, expected, TINY_MODEL)


def test_one_graph_serves_every_length_and_every_layer():
    """With gradient checkpointing too. Counted with a backend that runs the graphs as they are."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    eager, processor = model_and_processor()
    compiled, _ = model_and_processor()
    compile_regions(compiled, backend=backend)
    compiled.gradient_checkpointing_enable()
    for clips, frames, words in ((2, 20, 4), (3, 24, 6), (4, 12, 3)):
        inputs = batch(processor, clips, frames, words)
        expected, found = gradients(eager, inputs), gradients(compiled, inputs)
        assert_same_gradients(found, expected, TINY_MODEL)
    assert len(graphs) == 2, "one of the projector, one of a layer"
    assert compiled.state_dict().keys() == eager.state_dict().keys()
