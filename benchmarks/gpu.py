"""`python -m benchmarks gpu --budget SECONDS --out DIR`: one command for a machine with one NVIDIA GPU.

Everything that uses the GPU runs in a child process (benchmarks/worker.py). If the child dies, hangs or loses the
device, the rival that was running is recorded and excluded, and a new child retries the case. The results are saved
after every case. Files in DIR: results.json, log.txt, summary.md, build.txt, pytest.txt, tuned.json. The CUDA
extension is compiled beside the first stages.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import build, results, say
from benchmarks.gpu_stages import Stage, stages
from benchmarks.rivals import BY_NAME
from llama_smop.system import files

MODES = ("eager", "graph", "compiled")
MAX_ATTEMPTS = 3  # of a case, each in a new child
BAN_AFTER = 2  # failed cases after which a rival is excluded from all others
SILENCE_S = 150  # without an event: the child hangs (the longest silence is a compilation)


@dataclass
class Progress:
    """What has been done, and what the next child must not run."""

    found: dict
    excluded: dict[str, dict[str, str]] = field(default_factory=dict)  # case ("*": all) → rival[ mode] → reason
    attempts: dict[str, int] = field(default_factory=dict)
    blamed: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)  # stages whose time was up in this run
    stage: str | None = None
    case: str | None = None
    running: str | None = None
    patience_s: float = 0.0  # longer silence that the running case has announced

    def state(self, stage: str) -> dict:
        return self.found["stages"].setdefault(stage, {"status": "open", "seconds": 0.0, "finished": [], "failed": {}})

    def apply(self, event: dict, say) -> None:
        kind = event["event"]
        if kind == "stage":
            self.stage, self.case = event["stage"], None
            self.state(self.stage)["status"] = "open"
            say(f"{event['stage']}: {event['cases']} to do")
        elif kind == "begin":
            self.case, self.running, self.patience_s = event["case"], None, 0.0
        elif kind == "running":
            self.running, self.patience_s = event["what"], event.get("patience_s", 0.0)
        elif kind == "end":
            record = event["found"]
            results.add(self.found, record)
            for name in ("environment", "ceilings"):
                self.found[name].update(record.get(name, {}))
            if event["workload"]:
                key, sizes = event["workload"]
                self.found["workloads"][key] = sizes
            self._close(event, record.get("note"))
            say(f"  {event['seconds']:6.1f} s  {event['case']}" + (f": {record['note']}" if "note" in record else ""))
        elif kind == "failed":
            self.state(event["stage"])["failed"][event["case"]] = event["error"]
            self._close(event)
            say(f"  failed: {event['case']}: {event['error']}")
        elif kind == "lost":
            self.blame(event["error"])
        elif kind == "cut":
            self.cut.add(event["stage"])
            self.state(event["stage"])["status"] = f"cut: {event['left']} cases left, time was up"
            say(f"  {event['left']} left, this stage's time was up")
        elif kind == "stage_done":
            self.state(event["stage"])["status"] = "done"

    def _close(self, event: dict, note: str | None = None) -> None:
        state = self.state(event["stage"])
        state["finished"].append(event["case"])
        state["seconds"] = round(state["seconds"] + event["seconds"], 1)
        if note:
            state["note"] = note
        self.case = self.running = None

    def blame(self, reason: str) -> None:
        """The child ended during a case: exclude the rival that was running, or else the case."""
        if self.case is None:
            return
        rival, mode, *_ = [*(self.running or "").split(" "), "", ""]
        culprit = f"{rival} {mode}" if mode in MODES else rival
        self.attempts[self.case] = self.attempts.get(self.case, 0) + 1
        if rival in BY_NAME and self.attempts[self.case] < MAX_ATTEMPTS:
            self.excluded.setdefault(self.case, {})[culprit] = reason
            self.blamed[culprit] = self.blamed.get(culprit, 0) + 1
            if self.blamed[culprit] >= BAN_AFTER:
                self.excluded.setdefault("*", {})[culprit] = f"brought down {self.blamed[culprit]} cases: {reason}"
        else:
            state = self.state(self.stage)
            state["failed"][self.case] = f"{self.running or 'starting'}: {reason}"
            state["finished"].append(self.case)
        self.case = self.running = None


def run(
    out: Path,
    budget_s: float,
    resume: bool = False,
    dry: bool = False,
    only: Iterable[str] | None = None,
    command: list[str] | None = None,
    silence_s: float = SILENCE_S,
    say: Callable[[str], None] = say,
    device: str | None = None,
) -> dict:
    """Run the stages within the budget; the results are also in `out`/results.json.

    Args:
        resume: go on with what `out` holds. dry: on the CPU, tiny shapes. only: names of stages.
        device: where it runs; by default "cpu" in a dry run, else "cuda".
        command: the child's command line before the event descriptor; for tests.

    Raises:
        FileExistsError: `out` holds results and `resume` is not set. ValueError: an unknown stage.
    """
    path = Path(out) / "results.json"
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: give --resume to go on with it, or another --out")
    device = device or ("cpu" if dry else "cuda")
    plan = _plan(only)
    Path(out).mkdir(parents=True, exist_ok=True)
    progress = Progress(results.load(path) if path.exists() else results.new("gpu"))
    if dry:
        progress.found["note"] = f"a dry run on {device} with tiny shapes: proves the path, its numbers mean nothing"
    # Failures are tried again by a later run; what was measured is not.
    for state in progress.found["stages"].values():
        state["finished"] = [c for c in state["finished"] if c not in state["failed"]]
        state["failed"] = {}
    deadline = time.time() + budget_s
    compiles = device == "cuda" and not dry and any(s.name == "build" and _open(progress, s, dry) for s in plan)
    with (Path(out) / "log.txt").open("a") as log, build.running(Path(out)) if compiles else contextlib.nullcontext():
        while (todo := [s for s in plan if _open(progress, s, dry)]) and time.time() < deadline:
            before = _position(progress)
            reason = _child(
                progress, todo, deadline, budget_s, dry, device, Path(out), command, log, silence_s, path, say
            )
            if reason is None or time.time() >= deadline:
                break  # done, or out of time
            if progress.case is not None:
                say(f"  {reason} during {progress.running or 'the start'} of {progress.case}")
                progress.blame(reason)
            elif before == _position(progress):
                say(f"stopping: the worker {reason} before it began a case; see log.txt")
                break
    for stage in plan:
        state = progress.state(stage.name)
        if state["status"] == "open":
            state["status"] = "not reached" if not state["finished"] else "cut"
    results.save(progress.found, path)
    _summary(progress.found, Path(out) / "summary.md")
    say(f"saved {path}")
    return progress.found


def _plan(only: Iterable[str] | None) -> list[Stage]:
    known = stages()
    unknown = set(only or ()) - {s.name for s in known}
    if unknown:
        raise ValueError(f"stages are {', '.join(s.name for s in known)}; got {', '.join(sorted(unknown))}")
    return [s for s in known if only is None or s.name in only]


def _open(progress: Progress, stage: Stage, dry: bool) -> bool:
    """Whether the stage has cases left and time left in this run."""
    state = progress.found["stages"].get(stage.name)
    if stage.name in progress.cut:
        return False
    return state is None or any(c.key not in state["finished"] for c in stage.cases(dry))


def _position(progress: Progress) -> tuple:
    """Changes whenever a child makes progress."""
    finished = tuple(len(state["finished"]) for state in progress.found["stages"].values())
    return finished, dict(progress.attempts), frozenset(progress.cut)


def _child(progress, todo, deadline, budget_s, dry, device, out, command, log, silence_s, path, say) -> str | None:
    """Start a worker on `todo` and follow it. None when it ended well, else what happened to it."""
    job = {
        "results": progress.found,
        "stages": {s.name: s.limit(budget_s, dry) for s in todo},
        "deadline": deadline,
        "finished": {name: state["finished"] for name, state in progress.found["stages"].items()},
        "excluded": progress.excluded,
        "dry": dry,
        "device": device,
        "out": str(out),
    }
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [*(command or [sys.executable, "-m", "benchmarks.worker"]), str(writing)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(writing,),
        env={**os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {})},
        start_new_session=True,
    )
    os.close(writing)
    try:
        child.stdin.write(json.dumps(job).encode())
        child.stdin.close()
        trouble = _follow(progress, reading, deadline, silence_s, path, say)
        if trouble is not None:
            _kill(child)
            return trouble
        status = child.wait(timeout=30)
        return None if status == 0 else f"ended with status {status}"
    except (BrokenPipeError, subprocess.TimeoutExpired):
        _kill(child)
        return "did not end"
    finally:
        os.close(reading)


def _follow(progress: Progress, reading: int, deadline: float, silence_s: float, path: Path, say) -> str | None:
    """Apply the child's events until it closes the pipe. Returns the reason if the child must be killed instead."""
    selector = selectors.DefaultSelector()
    selector.register(reading, selectors.EVENT_READ)
    rest = b""
    while True:
        patience_s = progress.patience_s + 10 if progress.patience_s else 0.0
        wait = min(max(silence_s, patience_s), deadline + 5 - time.time())
        if wait <= 0 or not selector.select(wait):
            return "was stopped at the end of the budget" if time.time() >= deadline else f"was silent for {wait:.0f} s"
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            results.save(progress.found, path)
            return None
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            progress.apply(event, say)
            if event["event"] in ("end", "failed"):
                results.save(progress.found, path)


def _kill(child: subprocess.Popen) -> None:
    """Kill the worker and its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()


def _summary(found: dict, path: Path) -> None:
    from benchmarks.report import tables

    files.write_text(path, tables.document([found]))
