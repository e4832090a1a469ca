"""`python -m benchmarks gpu`: a dry run walks every stage; whatever a worker does, the run goes on."""

import json
import sys
import textwrap

import pytest

from benchmarks import gpu, gpu_stages, results
from benchmarks.__main__ import main


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Of three stages."""
    out = tmp_path_factory.mktemp("gpu")
    gpu.run(out, budget_s=900, dry=True, only=["environment", "correctness", "headline"], say=quiet)
    return out


def all_done(out) -> dict:
    """The results, of which no stage has failed or was cut."""
    found = results.load(out / "results.json")
    states = {name: (s["status"], s["failed"]) for name, s in found["stages"].items()}
    assert states == dict.fromkeys(states, ("done", {})), f"see {out / 'log.txt'}"
    return found


def test_a_dry_run_measures(dry_run):
    found = all_done(dry_run)
    assert found["ceilings"]["copy_gb_per_s"] > 0 and found["environment"]["versions"]["torch"]
    assert {c["backend"] for c in found["correctness"]} >= {"torch"} and all(c["within"] for c in found["correctness"])
    assert {t["pass"] for t in found["timings"]} == {"forward", "both"}
    assert "dry run" in found["note"]


@pytest.mark.slow
def test_a_dry_run_walks_every_stage(tmp_path):
    gpu.run(tmp_path, budget_s=900, dry=True, say=quiet)
    found = all_done(tmp_path)
    assert set(found["stages"]) == {s.name for s in gpu_stages.stages()}
    assert {t["pass"] for t in found["timings"]} == {"forward", "backward", "both"}
    assert {r["projector"] for r in found["model"]} == {"smop", "eager", "dense"}
    assert_few_small_files(tmp_path)


def assert_few_small_files(out) -> None:
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) <= 8 and sum(p.stat().st_size for p in files) < 1 << 20


def test_it_leaves_few_small_files(dry_run):
    assert_few_small_files(dry_run)
    summary = (dry_run / "summary.md").read_text()
    assert "correctness against float64" in summary and "dry run" in summary


def test_it_resumes_with_what_is_missing(dry_run):
    before = results.load(dry_run / "results.json")
    said = []
    gpu.run(dry_run, 900, resume=True, dry=True, only=["correctness", "headline", "hot"], say=said.append)
    after = results.load(dry_run / "results.json")
    assert [line for line in said if line.startswith(("correctness:", "headline:"))] == [], "measured twice"
    assert after["stages"]["hot"]["status"] == "done" and after["correctness"] == before["correctness"]
    assert len(after["timings"]) > len(before["timings"])


def test_results_are_not_overwritten_unasked(dry_run):
    with pytest.raises(FileExistsError, match="--resume"):
        gpu.run(dry_run, 10, dry=True, say=quiet)


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stages are environment, .*; got speed"):
        gpu.run(tmp_path, 10, dry=True, only=["speed"], say=quiet)


# ------------------------------------------------------------------------- workers that misbehave, in place of ours

WORKER = """
import json, os, sys, time
fd, job = int(sys.argv[1]), json.load(sys.stdin)
def tell(event, **more):
    os.write(fd, (json.dumps({"event": event, **more}) + "\\n").encode())
def end(stage, case, found):
    tell("end", stage=stage, case=case, found=found, seconds=0.1, workload=None)
"""


def worker(tmp_path, body: str) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER + textwrap.dedent(body))
    return [sys.executable, str(script)]


def correctness_keys() -> list[str]:
    return [c.key for c in next(s for s in gpu_stages.stages() if s.name == "more correctness").cases(True)]


def test_a_backend_that_kills_the_process_costs_its_own_cases_only(tmp_path):
    """Cases of triton end the process; those of torch and cuda must all be in the results."""
    command = worker(
        tmp_path,
        f"""
        tell("stage", stage="more correctness", cases=0)
        for case in {correctness_keys()!r}:
            if case in job["finished"].get("more correctness", ()):
                continue
            tell("begin", stage="more correctness", case=case)
            backend = case.split(":")[0]
            rival = "ours_" + backend
            out = job["excluded"].get("*", {{}}) | job["excluded"].get(case, {{}})
            if rival in out:
                skipped = {{"workload": case, "rival": rival, "reason": out[rival]}}
                end("more correctness", case, {{"skipped": [skipped]}})
                continue
            tell("running", what=rival)
            if backend == "triton":
                os.abort()
            end("more correctness", case, {{"correctness": [{{"workload": case, "backend": backend, "within": True}}]}})
        tell("stage_done", stage="more correctness")
        """,
    )
    out = tmp_path / "out"
    found = gpu.run(out, 60, dry=True, only=["more correctness"], command=command, say=quiet)
    keys = correctness_keys()
    assert [c["workload"] for c in found["correctness"]] == [k for k in keys if not k.startswith("triton")]
    assert {s["rival"] for s in found["skipped"]} == {"ours_triton"}
    assert "status -6" in found["skipped"][0]["reason"]
    assert any("brought down 2 cases" in s["reason"] for s in found["skipped"]), "after two it is left alone"
    assert found["stages"]["more correctness"]["status"] == "done"
    assert json.loads((out / "results.json").read_text()) == found


def test_a_worker_that_hangs_is_killed_and_the_case_counted_as_failed(tmp_path):
    command = worker(
        tmp_path,
        """
        tell("stage", stage="environment", cases=1)
        tell("begin", stage="environment", case="device and ceilings")
        time.sleep(600)
        """,
    )
    found = gpu.run(tmp_path / "out", 60, dry=True, only=["environment"], command=command, silence_s=0.5, say=quiet)
    assert "was silent" in found["stages"]["environment"]["failed"]["device and ceilings"]


def test_a_worker_that_cannot_start_ends_the_run_with_what_there_is(tmp_path):
    said = []
    found = gpu.run(tmp_path / "out", 60, dry=True, only=["environment"], command=["false"], say=said.append)
    assert found["stages"]["environment"]["status"] == "not reached"
    assert any("before it began a case" in line for line in said) and (tmp_path / "out" / "results.json").exists()


def test_the_budget_ends_the_run(tmp_path):
    command = worker(
        tmp_path,
        """
        tell("stage", stage="environment", cases=1)
        tell("begin", stage="environment", case="device and ceilings")
        while True:
            tell("running", what="something")
            time.sleep(0.2)
        """,
    )
    found = gpu.run(tmp_path / "out", -4.0, dry=True, only=["environment"], command=command, say=quiet)
    assert found["stages"]["environment"]["status"] == "not reached"


def test_the_tuner_gets_the_shapes_furthest_from_the_floor():
    found = results.new("gpu")
    for w, share in zip(gpu_stages.workloads.headline(), (0.5, 0.9, 0.2, 0.7, 0.3), strict=True):
        record = {"workload": w.key, "rival": "ours_triton", "pass": "both", "share_of_floor": share}
        results.add(found, {"timings": [record, {**record, "share_of_floor": share / 2}]}, w)
    assert [w.tokens for w in gpu_stages.furthest_from_floor(found)] == [1024, 16384]


# ------------------------------------------------------------------------------------------------------ command line


def test_without_a_gpu_the_command_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "x")]) == 2
    assert "--dry-run" in capsys.readouterr().err and not (tmp_path / "x").exists()
