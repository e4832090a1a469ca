"""What remembering calls takes: what is picked, the tensors without memory, and threads that remember at once."""

import sys
from threading import Thread

import pytest
import torch

from llama_smop.triton_kernels import calls


@pytest.fixture
def hasty_threads():
    """They take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_remember_and_forget_at_once(hasty_threads):
    """As two GPUs' backward passes do in a training whose batches all have another length."""
    known: dict[tuple, None] = {}
    errors: list[Exception] = []

    def work(thread: int) -> None:
        try:
            for call in range(20_000):
                calls.remember(known, (thread, call), None, most=64)
                if call % 100 == 0:
                    calls.forget(known)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(known) <= 64


def test_the_oldest_makes_room_for_what_is_new_alone():
    known: dict[tuple, int] = {}
    for number in (0, 1, 2, 2, 2):
        calls.remember(known, (number,), number, most=2)
    assert known == {(1,): 1, (2,): 2}


def test_arguments_are_picked_by_class():
    kinds = (torch.Tensor, int, torch.nn.Parameter, str, float)
    values = ("x", 1, "w", "relu", 1e-5)
    tensors, texts, others = calls.pickers(kinds, torch.Tensor, str)
    assert (tensors(values), texts(values), others(values)) == (("x", "w"), ("relu",), (1, 1e-5))
    (none,) = calls.pickers((), *())
    assert none(()) == ()


@pytest.mark.parametrize("shape", [(), (7,), (3, 1), (1, 4), (2, 1, 5), (5, 3, 2), (1,), (1, 1), (0, 4), (4, 0)])
def test_tensors_are_made_contiguous_of_what_holds_no_memory(shape):
    like = calls.without_memory(torch.ones(2, 3), shape, torch.float16)
    made = torch.empty_like(like)
    assert like.untyped_storage().nbytes() == 0
    assert made.dtype == torch.float16 and made.shape == shape
    assert made.stride() == torch.empty(shape).stride()


def test_results_that_are_views_have_no_memory_of_their_own():
    given, made, other = torch.ones(4, 3), torch.ones(4, 3), torch.ones(2)
    own = calls.have_their_own_memory
    assert own((made, other, None, 3, given, made, torch.ones(0), torch.ones(0)), (given, None))
    assert not own((made, made.t()), (given,))
    assert not own((given.detach(),), (given,))
