"""`python -m benchmarks.build OUT`: compile the CUDA extension, beside whatever else runs; the log is OUT/build.txt."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import ROOT

LOG, DONE = "build.txt", "exit status "


@contextlib.contextmanager
def running(out: Path) -> Iterator[None]:
    """Compile in a process of its own, which is ended on leaving."""
    (out / LOG).unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.build", str(out.resolve())], cwd=ROOT, start_new_session=True
    )
    try:
        yield
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def main(out: Path) -> int:
    """Run setup.py's build; the module goes beside the package's sources."""
    built = "import llama_smop._C as ext; print(ext.build_info())"
    with (out / LOG).open("w") as log:
        options = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
        status = subprocess.run([sys.executable, "-c", built], **options).returncode
        if status:
            env = {**os.environ, "LLAMA_SMOP_BUILD_CUDA": "1"}
            status = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"], env=env, **options
            ).returncode
        print(f"{DONE}{status}", file=log, flush=True)
    return status


def wait(out: Path, seconds: float) -> str:
    """Until the compilation has ended, in one line. Raises RuntimeError: it failed, or takes longer."""
    began, log = time.monotonic(), out / LOG
    while time.monotonic() - began < seconds:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        if lines and lines[-1].startswith(DONE):
            if lines[-1] != f"{DONE}0":
                raise RuntimeError(f"{lines[-1]}; see {LOG}")
            importlib.invalidate_caches()
            return f"built; waited {time.monotonic() - began:.0f} s for it"
        time.sleep(0.5)
    raise RuntimeError(f"not done after {seconds:.0f} s more; see {LOG}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
