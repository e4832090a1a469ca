"""Bytes kept for backward, counted exactly, and the CPU memory that is kept between steps."""

import threading

import pytest
import torch
import torch.nn.functional as F

from llama_smop import functional
from llama_smop.ops.backends import cpu_memory
from tests.ops.problems import Problem, make, relative_error
from tests.rounding import two_orders


def eager_loop(p: Problem):
    """The masked `where` and `index_add_` form of Mixtral-like code."""
    x, E, K = p.x, p.num_experts, p.top_k
    w1, b1, w2, b2, ln_weight, ln_bias = p.parameters.values()
    probabilities = F.softmax(x @ p.gate_weight[0].t(), dim=-1, dtype=torch.float32)
    weights, chosen = probabilities.topk(K, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    out = x.new_zeros(x.shape[0], w2.shape[1])
    hits = F.one_hot(chosen, E).permute(2, 1, 0)
    for e in range(E):
        k, tokens = torch.where(hits[e])
        h = F.linear(F.relu(F.linear(x[tokens], w1[e], b1[e])), w2[e], b2[e])
        y = F.layer_norm(h, h.shape[-1:], ln_weight[e], ln_bias[e]) * weights[tokens, k, None]
        out.index_add_(0, tokens, y.to(x.dtype))
    return out


def kept_bytes(function, p: Problem) -> int:
    """Bytes of distinct storages saved for backward, parameters apart."""
    parameters = {t.untyped_storage().data_ptr() for n, t in p.leaves().items() if n != "x"}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(p)
    del result
    return sum(kept.values())


def smop(p: Problem, recompute: str = "none"):
    return functional.smop(
        p.x, p.gate_weight, *p.parameters.values(), top_k=p.top_k, sharing=p.sharing, recompute=recompute
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_at_most_055_of_the_eager_loop(dtype):
    p = make(T=256, D=128, H=256, O=256, dtype=dtype)
    # The same layer: equal but for D + 2·H + O additions, or for the loop's rounding of h, z and each expert's output.
    allowed = two_orders(896) if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert relative_error(smop(p).hidden_states, eager_loop(p)) < allowed
    ours, eager = kept_bytes(smop, p), kept_bytes(eager_loop, p)
    assert 0 < ours <= 0.55 * eager, f"{ours} bytes kept, the eager loop {eager}: {ours / eager:.3f}"


def test_recompute_keeps_less():
    p = make(T=256, D=128, H=256, O=256, dtype=torch.float32)
    rows, row = 256 * 2, 256 * 4  # T·K rows of h, and of z, 4 bytes a value
    everything = kept_bytes(smop, p)
    for recompute, saved in (("h", 1), ("z", 1), ("hz", 2)):
        assert kept_bytes(lambda q, r=recompute: smop(q, r), p) == everything - saved * rows * row, recompute


def test_large_cpu_memory_is_used_again_once_no_tensor_holds_it():
    like = torch.empty(0)
    first = cpu_memory.empty((1024, 1024), like)
    address, view = first.data_ptr(), first[10:].detach()
    del first
    other = cpu_memory.empty((1024, 1024), like)
    assert other.data_ptr() != address, "memory that a view still holds was handed out"
    del view
    assert cpu_memory.empty((1024, 1024), like).data_ptr() == address
    cpu_memory.release()


@pytest.mark.parametrize("activation, widths", (("relu", (96, 128)), ("gelu", (2 * 96, 128))))
def test_a_budget_keeps_no_more_and_recomputes_the_least(activation, widths):
    """z costs more arithmetic to compute again than h, as its products are wider."""
    p = make(T=64, D=64, H=96, O=128)
    rows = 64 * p.top_k * p.x.element_size()
    h, z = (rows * width for width in widths)

    def kept(recompute):
        weights = p.gate_weight, *p.parameters.values()
        shared = {"top_k": p.top_k, "sharing": p.sharing, "activation": activation}
        return kept_bytes(lambda q: functional.smop(q.x, *weights, **shared, recompute=recompute), p)

    for budget, same in ((h + z, "none"), (h + z - 1, "h"), (z, "h"), (min(h, z) - 1, "hz"), (0, "hz")):
        assert kept(budget) == kept(same), f"{budget} bytes"
    if h < z:
        assert kept(z - 1) == kept("z")


def test_kept_cpu_memory_is_bounded(monkeypatch):
    cpu_memory.release()
    monkeypatch.setattr(cpu_memory, "KEPT_BYTES", 10 << 20)
    tensors = [cpu_memory.empty((1 << 20,), torch.empty(0)) for _ in range(5)]  # 4 MiB each
    del tensors
    assert sum(len(m) for m in cpu_memory._free) <= 10 << 20
    cpu_memory.release()
    assert not cpu_memory._free


def test_the_longest_unused_memory_goes_first(monkeypatch):
    cpu_memory.release()
    monkeypatch.setattr(cpu_memory, "KEPT_BYTES", 10 << 20)
    sizes = (4, 2, 6)  # MiB
    for size in sizes:
        cpu_memory.empty((size << 18,), torch.empty(0))
    assert [len(m) >> 20 for m in cpu_memory._free] == [2, 6]
    cpu_memory.release()


def test_threads_never_share_memory():
    cpu_memory.release()
    failures = []

    def work(value):
        for _ in range(200):
            tensor = cpu_memory.empty((1 << 18,), torch.empty(0))
            tensor[::4096] = value
            if not (tensor[::4096] == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "two live tensors had the same memory"
    cpu_memory.release()


def test_small_and_odd_requests_are_ordinary_tensors():
    assert cpu_memory.empty((0, 5), torch.empty(0)).shape == (0, 5)
    assert cpu_memory.empty((3, 5), torch.empty(0, dtype=torch.float16)).dtype == torch.float16
    assert cpu_memory.empty((2048, 2048), torch.empty(0, device="meta")).device.type == "meta"
