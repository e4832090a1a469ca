"""What is timed beside what it replaced: ways to the same end that do differ, each what its name says."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import measure, results, techniques
from benchmarks.report import tables
from llama_smop.ops.backends import cuda
from llama_smop.triton_kernels.launch import INTERPRETED, Launch, recording
from tests import ptxrun_support
from tests.cuda import runners
from tests.cuda.runners import ON_PTX, CudaPtx
from tests.kernels.runners import TritonPtx

CPU = torch.device("cpu")
AHEAD = "a forward pass, with weights brought into the L2 ahead or not"
on_sm80, on_sm90 = (pytest.param(CudaPtx(arch=arch), id=f"sm{arch}", marks=ON_PTX) for arch in (80, 90))


def same_end(ways: dict[str, Callable[[], torch.Tensor]], inspect: Callable[[str], None]) -> None:
    """To the bit: no way changes the order of a sum. `inspect` sees what the one of that name has launched."""
    first = None
    for name, run in ways.items():
        end = run().clone()
        inspect(name)
        assert torch.isfinite(end).all()
        first = end if first is None else first
        assert torch.equal(end, first), f"{name} ends elsewhere"


@pytest.mark.parametrize("runner", [on_sm80, on_sm90])
def test_ways_of_the_cuda_backend(runner, monkeypatch):
    """Cuts are those that are launched; another architecture than theirs has the chosen one alone."""

    brought: list[bool] = []
    bring = cuda._brought
    monkeypatch.setattr(cuda, "_brought", lambda weights: brought.append(weights is not None) or bring(weights))

    def launched_nothing() -> None:
        runners.launches.log.clear()
        brought.clear()

    def inspect(name: str) -> None:
        if name in ("brought", "not"):
            assert any(brought) == (name == "brought")
        elif name != "chosen":
            (kernel,) = runners.launches.kernels
            columns, blocks = int(name.split()[0]), 1 if name.endswith("alone") else 2
            assert f", {columns}, " in kernel and runners.launches.log[0]["cluster"][0] == blocks
        launched_nothing()

    with runner.running():
        for question, _, ways in techniques.trials(CPU, "cuda", dry=True):
            launched_nothing()
            same_end(ways, inspect)
            if question == AHEAD:
                assert list(ways) == ["brought", "not"]
            else:
                assert ("128 columns, alone" in ways) == (runner.arch == 90) == (len(ways) > 1)


@pytest.mark.skipif(INTERPRETED or ptxrun_support.missing() is not None, reason="no PTX is run here")
@pytest.mark.parametrize("arch", [80, 90])
def test_ways_of_the_triton_backend(arch):
    seen: dict[str, list[Launch]] = {}
    questions = []
    with TritonPtx(arch=arch).running():
        for question, _, ways in techniques.trials(CPU, "triton", dry=True):
            questions.append(question)
            for name, run in ways.items():
                with recording() as recorder:
                    same_end({name: run}, lambda _: None)
                seen[name] = recorder.launches
            same_end(ways, lambda _: None)
    assert len(questions) == (2 if arch == 90 else 1), "TMA is of sm_90 and newer"
    if arch == 90:
        assert [one.constexprs["BOXES"] for name in ("TMA", "pointers") for one in seen[name]] == ["XNK", None]
    assert [sum(brings(one) for one in seen[name]) for name in ("brought", "not")] == [1, 0]


def brings(launch: Launch) -> bool:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)).get("ahead_ptr") is not None


@pytest.mark.parametrize("runner", [on_sm90])
def test_every_way_is_a_row_of_the_report(runner, monkeypatch):
    monkeypatch.setattr(measure, "captured", lambda run: run)  # a CPU has no graphs
    monkeypatch.setattr(techniques, "WIDTHS", (128, 256))
    said: list[str] = []
    with runner.running():
        found = techniques.measured(CPU, "cuda", 0.0, dry=True, say=said.append)
    table = tables.techniques(results.new("gpu") | {"techniques": found})
    assert len(table.rows) == len(found) and len(said) == 5
    for question in {record["question"] for record in found}:
        shown = [row[-1] for row in table.rows if row[0] == question]
        assert len(shown) > 1 and "1.00×" in shown, f"{question} has no quickest way"
    assert tables.techniques(results.new("gpu")) is None
