"""Two GPUs: a kernel runs on the device of its tensors, whichever is current, and leaves the current one alone."""

import pytest
import torch

from tests.gpu_path.problems import Expected, batch, check_step, loss_of, plain, projector, results, rms, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

WIDE = {"sizes": (256, 256, 256)}  # tiles whose shared memory a device has to be asked for


@pytest.fixture(autouse=True)
def both_are_in_use():
    """Until a device has a context, the runtime's current device and torch's may differ."""
    for device in range(2):
        torch.ones(1, device=f"cuda:{device}")
    yield
    assert torch.cuda.current_device() == 0, "the current device was changed"


@pytest.mark.parametrize(("current", "device"), ((0, 1), (1, 0), (1, 1)))
def test_the_current_device_is_another_one(backend, current, device):
    where = f"cuda:{device}"
    with torch.cuda.device(current):
        check_step(projector(backend, where), *batch(where))
        assert torch.cuda.current_device() == current


@pytest.mark.parametrize("first", (0, 1))
def test_one_device_after_the_other(backend, first):
    """A kernel that has been made ready on one device has not been on the other."""
    for device in (first, 1 - first, first):
        where = f"cuda:{device}"
        check_step(projector(backend, where, **WIDE), *batch(where, width=256, tokens=600))


def test_side_streams_of_both(backend):
    modules = [projector(backend, f"cuda:{device}") for device in range(2)]
    batches = [batch(f"cuda:{device}", seed=device) for device in range(2)]
    expected = [Expected(m, *b) for m, b in zip(modules, batches, strict=True)]
    for device in range(2):
        torch.cuda.synchronize(device)
    got = []
    for device in (1, 0):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            got.insert(0, step(modules[device], *batches[device]))
    for device in range(2):
        torch.cuda.synchronize(device)
        expected[device].check(got[device])


def test_one_model_over_both_devices(backend):
    """Backward runs in autograd's thread of each device, and never where the caller's current device is."""
    first, second = projector(backend, "cuda:0", sizes=(48, 56, 48)), projector(backend, "cuda:1", seed=5)
    x, modality, mask = batch("cuda:0")

    def gradients(first, second, there: str) -> dict:
        x_ = x.detach().to(first.w1.device, first.w1.dtype).requires_grad_()
        ids = [t.to(x_.device) for t in (modality, mask)]
        between = first(x_, *ids)
        out = second(between.hidden_states.to(there), *(t.to(there) for t in ids))
        loss = loss_of(out) + loss_of(between).to(there)
        loss.backward()
        return results(first, out, loss, x_) | {f"second {n}": p.grad.clone() for n, p in second.named_parameters()}

    got = gradients(first, second, "cuda:1")
    exact = gradients(*(plain(m, dtype=torch.float64) for m in (first, second)), "cpu")
    same_dtype = gradients(*(plain(m) for m in (first, second)), "cpu")
    for name, value in exact.items():
        assert rms(got[name].cpu() - value) <= 2 * rms(same_dtype[name] - value) + 1e-5, name
