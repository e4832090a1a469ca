"""`backend="auto"` on a GPU nobody has checked: a wrong backend is found at its first use, and PyTorch serves."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llama_smop.ops import dispatch, self_check, trust
from llama_smop.ops.backend import Backend
from llama_smop.ops.backends import torch as right
from llama_smop.projector import SMoPProjector

CPU, FP32 = torch.device("cpu"), torch.float32


def backend(**changed) -> SimpleNamespace:
    """PyTorch's backend, counting its routings, with some of its functions changed."""
    made = SimpleNamespace(**{n: getattr(right, n) for n in vars(Backend) if n in vars(right)}, asked=0)

    def route_fwd(*args):
        made.asked += 1
        return right.route_fwd(*args)

    made.route_fwd = route_fwd
    vars(made).update(changed)
    return made


def a_gradient_off(*args):
    dx, dweights, dw1, *others = right.expert_projection_bwd(*args)
    return dx, dweights, dw1 * 1.05, *others


def a_nan(*args):
    *others, dln_bias = right.expert_projection_bwd(*args)
    dln_bias = dln_bias.clone()
    dln_bias[-1, -1] = torch.nan
    return *others, dln_bias


def does_not_compile(*args):
    raise RuntimeError("ptxas\nfailed")


@pytest.fixture
def first_use(monkeypatch, tmp_path):
    """`first_use(backend)`: what "auto" chooses when a process starts with `backend` as Triton's, on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_SMOP_CHECK", "1")
    monkeypatch.setattr(trust, "known", {})
    monkeypatch.setattr(dispatch, "_auto_candidates", lambda device: dispatch.BACKENDS_BY_SPEED)

    def choose(made, dtype=FP32, new_process=True) -> str:
        modules = {"triton": made, "torch": right}
        monkeypatch.setattr(dispatch, "module", modules.get)
        if new_process:
            trust.known.clear()
        return dispatch.resolve("auto", dtype, CPU, 2, 4)

    return choose


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_a_right_backend_is_checked_once_and_remembered(first_use, dtype, caplog):
    good = backend()
    for new_process in (True, False, True):
        assert first_use(good, dtype, new_process) == "triton"
    assert good.asked == 1
    assert not caplog.messages
    assert trust.stored(CPU)[f"triton {str(dtype)[6:]}"] == {"right": True, "faults": [], "by": "first use"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (backend(expert_projection_bwd=a_gradient_off), "dw1 is off by"),
        (backend(expert_projection_bwd=a_nan), "dln_bias is off by inf"),
        (backend(schedule=None, route_fwd=does_not_compile), "RuntimeError: ptxas failed"),
    ],
    ids=["a-gradient-off", "nan", "does-not-compile"],
)
def test_a_wrong_backend_is_refused_with_one_warning(first_use, wrong, named, caplog):
    assert first_use(wrong) == "torch"
    assert first_use(wrong, new_process=False) == "torch"
    (warning,) = caplog.messages
    assert named in warning and "llama-smop doctor" in warning and "\n" not in warning
    assert dispatch.resolve("triton", FP32, CPU, 2, 4) == "triton", "an explicit choice is the user's own"


def test_a_wrong_backend_is_refused_in_the_next_process_too(first_use, caplog):
    wrong = backend(expert_projection_bwd=a_gradient_off)
    assert [first_use(wrong), first_use(wrong)] == ["torch", "torch"]
    assert wrong.asked == 1
    assert len(caplog.messages) == 2, "each process says it"


def test_one_that_could_not_be_compiled_is_tried_again_by_the_next_process(first_use):
    assert first_use(backend(route_fwd=does_not_compile)) == "torch"
    assert first_use(backend()) == "triton"


def by_boxes(error: float):
    return lambda a, b, offs: right.grouped_mm(a, b, offs, None, None)[0] * (1 + error)


def test_one_that_is_wrong_in_large_products_alone_does_without_what_is_wrong(first_use, caplog):
    """In the next process too, which does not check again."""
    refused = []
    made = backend(product_by_boxes=by_boxes(0.05), refuse_boxes=lambda *what: refused.append(what))
    for process in (1, 2):
        for new_process in (True, False):
            assert first_use(made, new_process=new_process) == "triton"
        assert refused == [(FP32, CPU)] * process
        assert len(caplog.messages) == process
    assert made.asked == 1
    for warning in caplog.messages:
        assert "without TMA" in warning and "a·b by TMA is off by" in warning and "llama-smop doctor" in warning


def test_large_products_that_could_not_be_compiled_are_tried_again_by_the_next_process(first_use, caplog):
    refused = []
    made = backend(product_by_boxes=does_not_compile, refuse_boxes=lambda *what: refused.append(what))
    assert first_use(made) == "triton"
    assert refused and "RuntimeError: ptxas failed" in caplog.text
    made.product_by_boxes = by_boxes(0.0)
    assert first_use(made) == "triton"
    assert len(refused) == len(caplog.messages) == 1
    assert trust.stored(CPU)["triton float32"] == {"right": True, "faults": [], "by": "first use"}


def test_another_version_or_device_is_asked_again(first_use, monkeypatch):
    good = backend()
    first_use(good)
    for name, changed in (("device_name", lambda device: "another GPU"), ("driver", lambda: "999.1")):
        monkeypatch.setattr(trust, name, changed)
        assert first_use(good) == "triton"
    monkeypatch.setattr(trust.provenance, "versions", lambda packages: {"triton": "99.0"})
    assert first_use(good) == "triton"
    assert good.asked == 4
    assert len(json.loads(trust.cache_file().read_text())) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"KEY": 3}', '{"KEY": {"triton float32": "yes"}}'])
def test_a_damaged_cache_is_as_good_as_none(first_use, content):
    trust.cache_file().parent.mkdir(parents=True)
    trust.cache_file().write_text(content.replace("KEY", trust._key(CPU)))
    good = backend()
    assert first_use(good) == "triton"
    assert good.asked == 1
    assert trust.stored(CPU)["triton float32"]["right"] is True


def test_a_cache_that_cannot_be_written_is_no_error(first_use, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert first_use(backend()) == "triton"


def test_it_can_be_turned_off(first_use, monkeypatch):
    monkeypatch.setenv("LLAMA_SMOP_CHECK", "0")
    wrong = backend(expert_projection_bwd=a_gradient_off)
    assert first_use(wrong) == "triton"
    assert wrong.asked == 0 and not trust.cache_file().exists()


def test_threads_that_come_at_once_share_one_check(first_use):
    good, chosen = backend(), []
    threads = [threading.Thread(target=lambda: chosen.append(first_use(good, new_process=False))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["triton"] * 8
    assert good.asked == 1


def test_the_check_sees_nothing_of_the_callers_state(first_use):
    good = backend()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        assert first_use(good) == "triton"
    assert trust.stored(CPU)["triton float32"]["right"] is True


def test_it_runs_while_a_compiler_traces(first_use):
    first_use(backend())
    trust.known.clear()
    trust.cache_file().unlink()
    projector = SMoPProjector(8, 12, 8)
    out = torch.compile(projector, backend="eager", fullgraph=True)(
        torch.randn(5, 8), torch.zeros(5, dtype=torch.int64)
    )
    assert out.hidden_states.shape == (5, 8)
    assert trust.stored(CPU)["triton float32"]["right"] is True


def test_a_capture_is_left_alone(first_use, monkeypatch):
    """A check would end it: the backend is trusted for now, and checked at the next call."""
    gpu, good = torch.device("cuda", 0), backend()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trust.checked("triton", good, FP32, gpu)
    assert good.asked == 0 and not trust.known


def test_no_near_tie_decides_the_check():
    """Rounding must not choose other experts than float64 does."""
    for dtype in (FP32, torch.bfloat16, torch.float16):
        model = replace(trust.MODEL, dtype=dtype)
        inputs = self_check.make(model, trust.TOKENS, seed=trust.SEED, masked=0.2).to(torch.float64)
        routed = self_check.through_backend(right, model, inputs)
        logits = routed["logits"][inputs.mask].sort(-1, descending=True).values[:, : trust.MODEL.K + 1]
        assert -logits.diff(dim=-1).max() > 0.05
        assert routed["counts"].min() > 0, "every expert is used"
