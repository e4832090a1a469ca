"""torch.compile on a GPU: inductor's kernels around ours, and its CUDA graphs."""

import copy

import pytest
import torch

from tests.gpu_path.problems import Expected, batch, projector, step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_a_compiled_step_is_the_eager_one(backend, mode):
    module = projector(backend)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, mode=mode)
    for seed in (1, 1, 2, 3):  # reduce-overhead warms up, records, then replays
        inputs = batch(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        Expected(module, *inputs).check(step(compiled, *inputs))


def test_compiled_on_a_side_stream(backend):
    module, inputs = projector(backend), batch()
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True)
    step(compiled, *inputs)
    expected, stream = Expected(module, *inputs), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(compiled, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    expected.check(got)
