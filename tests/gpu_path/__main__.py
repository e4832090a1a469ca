"""`python -m tests.gpu_path [--all] [NAME...]`: the GPU path under smopcuda, one pytest a row of the list below.

The rows are the ways in which the same tests see different faults: orders of streams, devices, allocators,
architectures. Two run at a time. Each row's output is in the folder of logs; that of a row that fails is shown.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = "tests/gpu_path/test_"
# The files that are left out need libraries that are not installed there, and have no test for a GPU.
LEFT_OUT = ("tests/gpu_path", "tests/serve", "tests/integrations/test_kernels_hub.py", "tests/test_distribution.py")
# With late streams smopcuda runs a copy from one device to another before what it copies is there, torch's own too.
NO_COPIES_BETWEEN = "-k not(over_both_devices)"
NO_CAPTURE = "-k 'not (cuda_graph or graph_replays or inside_a_capture)'"  # which --exact does not allow
GPU_TESTS = " ".join(("-m gpu tests", *(f"--ignore {place}" for place in LEFT_OUT)))
LIMIT_S = 1200  # a row that is not done by then hangs
# What a row may skip. Anything else that is not run is a failure: it would go unnoticed.
MAY_SKIP = (
    "does not compute in",  # a dtype a backend has not
    "no compute-sanitizer",
    "launches are counted under ptxrun",
    "needs 2 CUDA devices",
    "slow; run by make test-slow",
    "is not for this runner",
)  # fmt: skip


class Row(NamedTuple):
    name: str
    options: str  # smopcuda's
    tests: str  # names of files in tests/gpu_path; or what pytest is given, which begins with an option or a path
    backends: str = "triton,cuda"


ROWS = (  # the longest first
    Row("planted-faults", "", "planted_faults"),
    Row("gpu-tests", "", GPU_TESTS),
    Row("numbers-exact", "--exact --mode late --strict", "numbers"),
    Row("streams-late", "--streams late", "streams graphs training forms"),
    Row("streams-eager", "--streams eager", "streams graphs training"),
    Row("compiled", "", "compiled"),
    Row("two-devices", "--devices 2", "two_devices gpu_ranks"),
    Row("benchmark", "", "benchmark"),
    Row("streams-mixed", "--streams mixed:1", "streams graphs"),
    Row("numbers-sm_90", "--arch 90", "numbers"),
    Row("numbers-sm_80", "--arch 80", "numbers"),
    Row("numbers-sm_86", "--arch 86", "numbers"),
    Row("numbers-sm_89", "--arch 89", "numbers"),
    Row("numbers-sm_120", "--arch 120", "numbers", "triton"),  # the extension has no code for it
)
LONG_ROWS = (
    *(Row(f"streams-mixed-{seed}", f"--streams mixed:{seed}", "streams graphs training") for seed in range(2, 6)),
    *(Row(f"streams-late-sm_{a}", f"--streams late --arch {a}", "streams graphs compiled") for a in (80, 86, 89)),
    Row("streams-late-sm_120", "--streams late --arch 120", "streams graphs compiled", "triton"),
    Row("compiled-late", "--streams late", "compiled"),
    *(Row(f"numbers-exact-sm_{a}", f"--exact --mode late --strict --arch {a}", "numbers") for a in (80, 86, 89)),
    Row("numbers-exact-sm_120", "--exact --mode late --strict --arch 120", "numbers", "triton"),
    Row("numbers-mixed-copies", "--exact --mode mixed --strict", "numbers"),
    Row("two-devices-sm_80", "--devices 2 --arch 80", "two_devices"),
    Row("two-devices-late", "--devices 2 --streams late", f"{HERE}two_devices.py {NO_COPIES_BETWEEN}"),
    Row("two-devices-late-80", "--devices 2 --streams late --arch 80", f"{HERE}two_devices.py {NO_COPIES_BETWEEN}"),
    Row("gpu-tests-late", "--streams late", GPU_TESTS),
    Row("gpu-tests-exact", "--exact --mode late --strict", f"{GPU_TESTS} {NO_CAPTURE}"),
    Row("gpu-tests-sm_80", "--arch 80", GPU_TESTS),
)


class Done(NamedTuple):
    row: Row
    seconds: float
    trouble: str | None
    output: str


def run(row: Row) -> Done:
    as_they_are = row.tests.startswith(("-", HERE))
    tests = shlex.split(row.tests) if as_they_are else [f"{HERE}{t}.py" for t in row.tests.split()]
    command = [sys.executable, "-m", "smopcuda", *row.options.split()]
    command += ["pytest", "-p", f"{__package__}.tensor_maps", "-rfEs", "--show-capture=no", *tests]
    env = os.environ | {"LLAMA_SMOP_GPU_PATH_BACKENDS": row.backends}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output, trouble = (error.stdout or b"").decode(errors="replace"), f"was not done after {LIMIT_S} s"
    else:
        output, trouble = (
            done.stdout,
            f"ended with status {done.returncode}" if done.returncode else skipped(done.stdout),
        )
    return Done(row, time.monotonic() - began, trouble, output)


def skipped(output: str) -> str | None:
    """What was skipped that should not have been."""
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    unforeseen = [line for line in lines if not any(reason in line for reason in MAY_SKIP)]
    return "left out tests:\n" + "\n".join(unforeseen) if unforeseen else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_path", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows to run; default: all of the short list")
    parser.add_argument("--all", action="store_true", help="the long list too")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default 2)")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "build" / "gpu-path" / "logs")
    options = parser.parse_args()
    rows = [*ROWS, *(LONG_ROWS if options.all or options.names or options.list else ())]
    if options.list:
        for row in rows:
            print(f"{row.name:24} {row.options:44} {row.tests}")
        return 0
    unknown = set(options.names) - {row.name for row in rows}
    if unknown:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; see --list")
    if options.names:
        rows = [row for row in rows if row.name in options.names]
    options.logs.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), []
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, done in enumerate(pool.map(run, rows), 1):
            (options.logs / f"{done.row.name}.log").write_text(done.output)
            summary = (done.output.strip().splitlines() or [""])[-1]
            print(f"[{number}/{len(rows)}] {done.row.name:24} {done.seconds:5.0f} s  {summary}", flush=True)
            if done.trouble:
                failed.append(done.row.name)
                print(f"{done.output[-6000:]}\n{done.row.name} {done.trouble}", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, wall = used.ru_utime + used.ru_stime, time.monotonic() - began
    print(f"{len(rows) - len(failed)} of {len(rows)} rows passed in {wall:.0f} s, {cpu:.0f} s of CPU")
    if failed:
        print("failed: " + ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
