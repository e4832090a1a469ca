"""A training step in every dtype and sharing, at sizes that fit no tile and at addresses that fit no vector."""

import copy

import pytest
import torch

from tests.gpu_path.problems import D, H, O, batch, check_step, dtypes, projector, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(backend, dtype):
    if dtype not in dtypes(backend):
        pytest.skip(f"the {backend} backend does not compute in {dtype}")
    check_step(projector(backend, dtype=dtype), *batch(dtype=dtype))


def test_tf32_when_asked_for(backend):
    """TF32 cuts operands off at 10 bits, once for each of the products a result went through."""
    if torch.float32 not in dtypes(backend):
        pytest.skip(f"the {backend} backend does not compute in float32")
    module, inputs = projector(backend, dtype=torch.float32), batch(dtype=torch.float32)
    full = step(module, *inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        reduced = check_step(module, *inputs, relative=2**-8)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(full["hidden_states"], reduced["hidden_states"]), "the flag changes nothing"


@pytest.mark.parametrize("sharing", ("JEJR", "JEDR"))
def test_sharings(backend, sharing):
    check_step(projector(backend, sharing=sharing, activation="gelu"), *batch())


@pytest.mark.parametrize("sizes", ((33, 35, 37), (1, 1, 1), (200, 264, 136)), ids=str)
def test_sizes_that_fit_no_tile(backend, sizes):
    check_step(projector(backend, sizes=sizes), *batch(width=sizes[0], tokens=150))


@pytest.mark.parametrize("tokens", (0, 1, 2, 700))
def test_few_and_many_tokens(backend, tokens):
    check_step(projector(backend), *batch(tokens=tokens))


@pytest.mark.parametrize("offset", (1, 4))
def test_an_input_that_begins_anywhere(backend, offset):
    """Right after the same shapes at an aligned address: a kernel compiled for that must not be taken again."""
    module, (x, modality, mask) = projector(backend), batch()
    check_step(module, x, modality, mask)
    shifted = torch.zeros(x.numel() + offset, device="cuda", dtype=x.dtype)[offset:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    check_step(module, shifted, modality, mask)


def test_parameters_that_begin_anywhere(backend):
    """As views of one flat buffer, which optimizers and sharding make of them."""
    module, inputs = projector(backend), batch()
    check_step(module, *inputs)
    for parameter in module.parameters():
        flat = torch.zeros(parameter.numel() + 1, device="cuda", dtype=parameter.dtype)
        parameter.data = flat[1:].view_as(parameter).copy_(parameter.data)
    check_step(module, *inputs)


def test_a_strided_input(backend):
    module, (x, modality, mask) = projector(backend), batch()
    check_step(module, torch.stack((x, x), -1)[..., 0], modality, mask)


def test_the_same_bits_twice(backend):
    module, inputs = projector(backend), batch()
    first, second = step(module, *inputs), step(module, *inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs from run to run"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(backend, dtype):
    """float32 parameters under autocast give what the same parameters in the lower dtype give."""
    module, (x, modality, mask) = projector(backend, dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        out = module(x, modality, mask)
    low = copy.deepcopy(module).to(dtype)(x.to(dtype), modality, mask)
    assert out.hidden_states.dtype == dtype
    assert torch.equal(out.hidden_states, low.hidden_states)


def test_sizes_of_the_defaults_are_served(backend):
    """Few columns of the published sizes, so that the largest tiles of the table are compiled and run."""
    check_step(projector(backend, sizes=(D, 2 * H, 256), num_experts=1, top_k=1, sharing="JEJR"), *batch(tokens=1200))
    assert O % 16
