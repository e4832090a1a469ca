"""The child process that uses the GPU: runs its cases and reports events, one JSON line each.

`python -m benchmarks.worker EVENTS_FD`, with the job as JSON on stdin. It exits with status 3 if the device is lost. If
it crashes, its parent (benchmarks/gpu.py) knows from the events which case and which rival were running.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.compare import DeviceLost, describe, raise_if_device_is_lost
from benchmarks.gpu_stages import Case, Context, stages

DEVICE_LOST = 3


def main(events_fd: int) -> int:
    job = json.load(sys.stdin)
    found, end = job["results"], time.time()
    device = torch.device(job["device"])

    def tell(event: str, **details) -> None:
        os.write(events_fd, (json.dumps({"event": event, **details}) + "\n").encode())

    for stage in stages():
        if stage.name not in job["stages"]:
            continue
        cases = [c for c in stage.cases(job["dry"]) if c.key not in job["finished"].get(stage.name, ())]
        tell("stage", stage=stage.name, cases=len(cases))
        end = min(job["deadline"], end + job["stages"][stage.name])  # includes the time that earlier stages did not use
        for position, case in enumerate(cases):
            left = end - time.time()
            if left <= 0:
                tell("cut", stage=stage.name, left=len(cases) - position)
                break
            where = {"stage": stage.name, "case": case.key}
            tell("begin", **where)
            context = Context(
                device=device,
                dry=job["dry"],
                results=found,
                out=Path(job["out"]),
                budget_s=0.1 if job["dry"] else max(2.0, left / (len(cases) - position)),
                excluded=job["excluded"].get("*", {}) | job["excluded"].get(case.key, {}),
                starting=lambda what, patience_s=0.0: tell("running", what=what, patience_s=patience_s),
            )
            began = time.time()
            try:
                record = run(case, context)
            except DeviceLost as error:
                tell("lost", error=str(error), **where)
                return DEVICE_LOST
            except Exception as error:
                traceback.print_exc()
                tell("failed", error=describe(error), seconds=round(time.time() - began, 1), **where)
                try:
                    raise_if_device_is_lost(device, error)
                except DeviceLost:
                    return DEVICE_LOST
            else:
                merge(found, record, case)
                tell("end", found=record, seconds=round(time.time() - began, 1), workload=workload_json(case), **where)
        else:
            tell("stage_done", stage=stage.name)
    return 0


def run(case: Case, context: Context) -> dict:
    torch.manual_seed(0)
    return case.run(context)


def workload_json(case: Case) -> list | None:
    if case.workload is None:
        return None
    scratch = results.new("gpu")
    results.add(scratch, {}, case.workload)
    return [case.workload.key, scratch["workloads"][case.workload.key]]


def merge(found: dict, record: dict, case: Case) -> None:
    """Add to the worker's own copy of the results, which later cases read."""
    results.add(found, record, case.workload)
    for name in ("environment", "ceilings"):
        found[name].update(record.get(name, {}))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
