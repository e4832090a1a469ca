"""The doctor's checks that need a GPU, and the first use of Triton on one."""

import pytest
import torch

from llama_smop.doctor import checks, run
from llama_smop.functional import grouped_mm
from llama_smop.ops import dispatch, trust
from llama_smop.projector import SMoPProjector
from llama_smop.triton_kernels import boxes, configs, grouped_gemm, launch

pytestmark = pytest.mark.gpu


@pytest.fixture
def new_machine(monkeypatch, tmp_path) -> torch.device:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_SMOP_CHECK", "1")
    monkeypatch.setattr(trust, "known", {})
    return torch.device("cuda", torch.cuda.current_device())


def test_a_graph_replays_what_eager_computes(new_machine):
    found = dict(checks.in_training("triton", torch.float16, new_machine))
    for name in ("autograd", "graph"):
        assert found[name]().faults == []


def test_auto_checks_triton_once_and_without_it_takes_pytorch(new_machine, monkeypatch, caplog):
    assert dispatch.resolve("auto", torch.float16, new_machine, 2, 4) == "triton"
    assert trust.stored(new_machine)["triton float16"]["right"] is True
    trust.store_doctors(new_machine, {("triton", torch.float16): {"right": False, "faults": ["dw1 is off by 1"]}})
    assert dispatch.resolve("auto", torch.float16, new_machine, 2, 4) == "torch"
    (warning,) = caplog.messages
    assert "dw1 is off by 1" in warning and torch.cuda.get_device_name() in warning


def test_a_backend_made_wrong_is_refused_at_its_first_use(new_machine, monkeypatch, caplog):
    triton = dispatch.module("triton")
    honest = triton.expert_projection_bwd

    def off(*args):
        dx, dweights, dw1, *others = honest(*args)
        return dx, dweights, dw1 * 1.05, *others

    monkeypatch.setattr(triton, "expert_projection_bwd", off)
    assert dispatch.resolve("auto", torch.float16, new_machine, 2, 4) == "torch"
    assert "dw1 is off by" in caplog.text


def test_the_first_use_reaches_products_by_tma(new_machine):
    with launch.recording() as recorder:
        assert dispatch.resolve("auto", torch.float16, new_machine, 2, 4) == "triton"
    lie = {one.constexprs.get("BOXES") for one in recorder.launches}
    assert lie == ({None, "XKN", "XNK"} if torch.cuda.get_device_capability() >= (9, 0) else {None})


def test_where_descriptors_read_something_else_large_products_take_pointers(new_machine, monkeypatch, caplog):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("is not for this runner")
    honest = boxes._described
    monkeypatch.setattr(boxes, "_described", lambda tensor, *how: honest(torch.zeros_like(tensor), *how))
    monkeypatch.setattr(boxes, "refused", refused := set())
    monkeypatch.setattr(grouped_gemm, "refused", refused)
    assert dispatch.resolve("auto", torch.float16, new_machine, 2, 4) == "triton"
    (warning,) = caplog.messages
    assert "without TMA" in warning and "a·b by TMA is off by" in warning
    assert refused == {(torch.float16, new_machine)}
    monkeypatch.setattr(configs, "SMALLEST_BY_BOXES", 0)
    monkeypatch.setattr(grouped_gemm, "gemm_config", lambda *_: configs.tile_by_boxes(90, torch.float16, "tf32"))
    a, b = (torch.randn(*shape, dtype=torch.float16, device=new_machine) for shape in ((70, 64), (1, 64, 72)))
    with launch.recording() as recorder:
        out = grouped_mm(a, b, torch.tensor([70], dtype=torch.int32, device=new_machine), backend="triton")
    assert [one.constexprs["BOXES"] for one in recorder.launches] == [None]
    torch.testing.assert_close(out, a @ b[0], rtol=2e-2, atol=2e-2)


def test_a_first_use_inside_a_capture_does_not_break_it(new_machine):
    projector = SMoPProjector(64, 96, 80, sharing="JEJR", dtype=torch.float16, device=new_machine).eval()
    x = torch.randn(40, 64, dtype=torch.float16, device=new_machine)
    projector.backend = "triton"
    with torch.no_grad():
        expected = projector(x).hidden_states
        projector.backend = "auto"
        replay, held = checks.captured(lambda: {"y": projector(x).hidden_states}, warm_ups=0)
    replay()
    torch.testing.assert_close(held["y"], expected)
    assert not trust.stored(new_machine), "nothing was checked meanwhile"


def test_a_doctor_keeps_its_verdicts(new_machine, monkeypatch):
    monkeypatch.setattr(checks, "SHAPES", checks.SHAPES[1:2])
    monkeypatch.setattr(checks, "in_training", lambda *_: iter(()))
    monkeypatch.setattr(run, "_timed", lambda *_: ([], []))
    found = run.examine(progress=False, seconds=600)
    assert found["right"], found["verdict"]
    assert trust.stored(new_machine)["triton float16"] == {"right": True, "faults": [], "by": "doctor"}
