"""`llama-smop doctor` and `env`: what is right is called right, and a backend made wrong on purpose is named."""

import json
from types import SimpleNamespace

import pytest
import torch

from llama_smop.cli import main
from llama_smop.doctor import checks, run, timing
from llama_smop.doctor.checks import SHAPES, Finding
from llama_smop.doctor.environment import environment, text
from llama_smop.doctor.timing import DENSE, EAGER, Time
from llama_smop.ops import dispatch, trust
from llama_smop.ops.backend import Backend
from llama_smop.ops.backends import torch as right
from tests.kernels.runners import triton_params

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Three shapes, one small size to time, nothing compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "FEW", SHAPES[2:5])
    monkeypatch.setattr(timing, "CPU", timing.Sizes(16, 24, 16, (8, 16), torch.float32))
    monkeypatch.setattr(run, "SECONDS", 30.0)
    monkeypatch.setattr(checks, "in_training", lambda *_: iter(()))


@pytest.fixture
def wrong(monkeypatch):
    """`wrong(function=…)`: PyTorch's backend with a function replaced."""

    def replace(**functions) -> None:
        made = SimpleNamespace(**{n: getattr(right, n) for n in vars(Backend) if n in vars(right)} | functions)
        module = dispatch.module
        monkeypatch.setattr(dispatch, "module", lambda name: made if name == "torch" else module(name))

    return replace


def test_a_right_machine(quick, tmp_path, capsys):
    main(["doctor", "--json", str(tmp_path / "doctor.json")])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert printed[-1] == found["verdict"]
    assert found["verdict"].startswith(
        "right: torch (3 checks) | wrong: nothing | quick: forward+backward at T 16: torch"
    )
    assert found["right"] and not found["left_out"]
    assert {(t["name"], t["run"], t["tokens"]) for t in found["times"]} == {
        (name, kind, tokens)
        for name in ("torch", EAGER, DENSE) for kind in ("forward", "forward+backward") for tokens in (8, 16)
    }  # fmt: skip
    assert found["environment"]["versions"]["torch"] == torch.__version__


def gradient_off(*args):
    dx, dweights, dw1, db1, dw2, *others = right.expert_projection_bwd(*args)
    return dx, dweights, dw1, db1, dw2 * 1.1, *others


def other_experts(x, gate_weight, *args):
    return right.route_fwd(x, gate_weight.flip(1), *args)


def raises(*args):
    raise RuntimeError("an illegal\nmemory access")


def another_time_another_sum(*args):
    y, *others = right.expert_projection_fwd(*args)
    another_time_another_sum.calls += 1
    return y * (1 + 1e-6 * (another_time_another_sum.calls % 2)), *others


another_time_another_sum.calls = 0


@pytest.mark.parametrize(
    ("functions", "named"),
    [
        ({"expert_projection_bwd": gradient_off}, "dw2 is off by"),
        ({"route_fwd": other_experts}, "logits is off by"),
        ({"route_fwd": raises}, "RuntimeError: an illegal memory access"),
        ({"expert_projection_fwd": another_time_another_sum}, "y differs from run to run"),
    ],
    ids=["gradient", "routing", "raises", "bits"],
)
def test_a_wrong_backend_is_named_and_the_status_is_1(quick, wrong, functions, named, capsys):
    wrong(**functions)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("right: nothing | wrong: torch (") and named in last


def test_experts_of_smaller_logits_are_seen():
    """The definition is computed for the experts that the backend chose; whether those are right is another check."""
    shape = SHAPES[5]
    made = checks.self_check.make(shape.model, shape.tokens)
    routed = checks.self_check.through_backend(right, shape.model, made)
    assert checks._chosen_well(shape, made, routed["experts"], routed["logits"])
    assert not checks._chosen_well(shape, made, (routed["experts"] + 1) % 4, routed["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_by_autograd_and_compiled(dtype):
    findings = [check() for _, check in checks.in_training("torch", dtype, CPU)]
    assert [(f.check, f.faults) for f in findings] == [("autograd", []), ("torch.compile", [])]


def test_what_there_is_no_time_for_is_named(quick):
    found = run.examine(progress=False, seconds=-1)
    assert len(found["left_out"]) == 3 + 6 and not found["checks"]
    assert "right: nothing" in found["verdict"] and "left out for want of time: 9" in found["verdict"]


@pytest.mark.parametrize(("runner", "name"), triton_params(("doctor", 90)))
def test_triton_passes_a_check_and_its_first_use(runner, name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_SMOP_CHECK", "1")
    monkeypatch.setattr(trust, "known", {})
    device = torch.device(runner.device, 0) if runner.device == "cuda" else CPU
    with runner.running() as module:
        assert checks.against_definition("triton", SHAPES[1], device).faults == []
        assert trust.checked("triton", module, torch.float16, device)
    assert trust.stored(device)["triton float16"] == {"right": True, "faults": [], "by": "first use"}


# ---------------------------------------------------------------------------------------- what is kept of a doctor


def times(**device) -> list[Time]:
    return [Time(name, "forward", 64, 1.0, us, None) for name, us in device.items()]


@pytest.mark.parametrize(
    ("measured", "not_slower"),
    [
        (times(cuda=9.0, triton=10.0), True),
        (times(cuda=11.0, triton=10.0), False),
        (times(cuda=9.0), False),
        ([], False),
    ],
)
def test_the_extension_is_kept_as_quick_only_beside_triton(measured, not_slower):
    kept = run.verdicts([Finding("cuda", "a", "bfloat16", [])], measured, [])
    assert kept == {("cuda", torch.bfloat16): {"right": True, "faults": [], "not_slower": not_slower}}


def test_an_unfinished_round_proves_nothing_right_but_shows_what_is_wrong():
    good, bad = Finding("triton", "a", "bfloat16", []), Finding("triton", "b", "float16", ["dw1 is off"])
    kept = run.verdicts([good, bad], [], ["triton bfloat16: c", "triton float16: c"])
    assert kept == {("triton", torch.float16): {"right": False, "faults": ["dw1 is off (b)"]}}


def test_large_products_alone_make_no_backend_wrong(monkeypatch, tmp_path):
    """The doctor names them, and what it keeps lets "auto" do without them; `llama-smop env` says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = [Finding("triton", "a", "bfloat16", []), Finding("triton", checks.LARGE, "bfloat16", ["a·b is off by 1"])]
    assert "wrong: triton (1 of 2 checks; first: a·b is off by 1, large products)" in run.verdict(found, [], [])
    trust.store_doctors(CPU, run.verdicts(found, [], []))
    assert trust.stored(CPU)["triton bfloat16"] == {
        "right": True, "faults": [], "large": ["a·b is off by 1"], "by": "doctor"
    }  # fmt: skip
    assert "triton bfloat16 is right (by doctor); without TMA: a·b is off by 1" in text(environment())


def test_env_says_why_a_backend_cannot_serve(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert any(f"torch {torch.__version__}" in line for line in lines)
    assert "  torch   serves" in lines
    assert any(line.startswith("  triton  cannot serve: ") for line in lines)
