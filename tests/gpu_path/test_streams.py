"""Training steps on streams other than the default one, from other threads, and several at once.

Below smopcuda with `--streams late` a launch on a wrong stream, or a wait that is missing, gives wrong numbers.
"""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

from tests.gpu_path.problems import Expected, batch, check_step, loss_of, projector, results, step

pytestmark = pytest.mark.gpu


@contextmanager
def on_a_stream_of_its_own():
    """Work inside waits for what the current stream has been given, and the current stream for it."""
    outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield stream
    outer.wait_stream(stream)


def test_default_stream(backend):
    check_step(projector(backend), *batch())


def test_side_stream(backend):
    module, inputs = projector(backend), batch()
    expected = Expected(module, *inputs)
    with on_a_stream_of_its_own():
        got = step(module, *inputs)
    expected.check(got)


def test_replayed_launches_follow_the_current_stream(backend):
    """Those of a step whose shapes came before, when another stream was current."""
    module, (x, modality, mask) = projector(backend), batch()
    for _ in range(3):
        step(module, x, modality, mask)
    expected = Expected(module, x, modality, mask)
    with on_a_stream_of_its_own():
        got = step(module, torch.zeros_like(x).copy_(x), modality, mask)
    expected.check(got)


def test_inputs_made_on_the_side_stream(backend):
    """What produces x is still to run when the projector is called: only the stream orders the two."""
    module, (x, modality, mask) = projector(backend), batch()
    expected = Expected(module, x, modality, mask)
    with on_a_stream_of_its_own():
        fresh = torch.zeros_like(x).copy_(x)
        got = step(module, fresh, modality, mask)
    expected.check(got)


def test_backward_from_another_stream_than_forward(backend):
    """Autograd runs backward on the stream of forward; joining that stream makes the results the caller's."""
    module, (x, modality, mask) = projector(backend), batch()
    expected = Expected(module, x, modality, mask)
    x = x.requires_grad_()
    with on_a_stream_of_its_own():
        out = module(x, modality, mask)
        loss = loss_of(out)
    with on_a_stream_of_its_own():
        loss.backward()
    expected.check(results(module, out, loss, x))


def test_two_streams_at_once(backend):
    first, second = projector(backend), projector(backend, seed=5)
    batches = batch(), batch(seed=7)
    expected = Expected(first, *batches[0]), Expected(second, *batches[1])
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        one = step(first, *batches[0])
    with torch.cuda.stream(streams[1]):
        two = step(second, *batches[1])
    torch.cuda.synchronize()
    expected[0].check(one)
    expected[1].check(two)


def test_a_whole_step_from_another_thread(backend):
    """A thread has a current stream of its own."""
    module, inputs, got = projector(backend), batch(), {}
    expected = Expected(module, *inputs)
    torch.cuda.synchronize()

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got.update(step(module, *inputs))
        stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(300)
    expected.check(got)


def test_backward_on_the_default_stream_while_another_thread_works(backend):
    """Autograd's thread of the device serves both; each backward keeps to the stream of its forward."""
    module, other = projector(backend), projector(backend, seed=5)
    (x, modality, mask), theirs, got = batch(), batch(seed=3), {}
    expected, expected_of_theirs = Expected(module, x, modality, mask), Expected(other, *theirs)
    torch.cuda.synchronize()

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                got.update(step(other, *theirs))
        stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    mine = [step(module, x, modality, mask) for _ in range(3)]
    thread.join(300)
    torch.cuda.synchronize()
    expected_of_theirs.check(got)
    for one in mine:
        expected.check(one)


def test_steps_in_a_row_reuse_freed_memory(backend):
    """The allocator hands memory of one step to the next: on a side stream nothing may still read it."""
    module = projector(backend)
    twin, seeds = copy.deepcopy(module), range(3)
    expected = [Expected(twin, *batch(seed=seed, tokens=40 + 30 * seed)) for seed in seeds]
    with on_a_stream_of_its_own():
        got = [step(module, *batch(seed=seed, tokens=40 + 30 * seed)) for seed in seeds]
    for one, want in zip(got, expected, strict=True):
        want.check(one)
