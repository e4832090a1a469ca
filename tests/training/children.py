"""Trainings in processes of their own, forked from a server that has done the imports already."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

LIMIT_S = 900  # a child that is not done by then hangs
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.preload"])
# What Python does to the file system; safetensors and torch.save open their files in C++, out of sight.
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def start(target, *args) -> multiprocessing.Process:
    """A child that sees no GPU: ranks that share one would hang in NCCL."""
    with mock.patch.dict(os.environ, NO_GPU):
        forkserver.ensure_running()  # children have the server's environment, and it that of this moment
    child = CONTEXT.Process(target=_quiet, args=(target, *args))
    child.start()
    return child


def run(target, *args) -> int:
    """Exit code of a child."""
    child = start(target, *args)
    join([child])
    return child.exitcode


def join(children: list) -> None:
    """Wait until all have ended; when one fails, or they take longer than LIMIT_S, the others are killed."""
    end = time.monotonic() + LIMIT_S
    while running := [child for child in children if child.is_alive()]:
        failed = any(child.exitcode for child in children)  # one may have, before anyone waited
        ended = failed or connection.wait([child.sentinel for child in running], end - time.monotonic())
        if not ended or any(child.exitcode for child in children):
            for child in running:
                child.kill()
    for child in children:
        child.join()


def blank_picture(figure, caption: str) -> str:
    """In place of a report's pictures: to draw four of them takes longer than a training of a few steps."""
    import matplotlib.pyplot as plt

    plt.close(figure)
    return ""


def _quiet(target, *args) -> None:
    import torch

    from llama_smop.reports import plots, training

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # a data worker from a server of its own would import anew
    training.picture = blank_picture
    for name in ("losses", "schedule", "expert_load", "router_entropy"):
        setattr(plots, name, lambda *_, **__: None)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    target(*args)


def train(config: dict, out: Path, die_at: int | None = None, die_in: str = "") -> None:
    """A training; die_at: SIGKILL just before that change of the file system, counted from 1, of the paths in `out`
    that hold `die_in`."""
    from llama_smop.training.config import TrainConfig
    from llama_smop.training.run import train

    if die_at is not None:
        _kill_before_write(str(out), die_in, die_at)
    train(TrainConfig.model_validate(config), out)


def _kill_before_write(folder: str, part: str, number: int) -> None:
    left = number

    def watch(event: str, args: tuple) -> None:
        nonlocal left
        writes = event in WRITES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        path = str(args[0]) if args else ""
        if writes and path.startswith(folder) and part in path:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def ranks(target, world: int, *args) -> None:
    """Run `target(*args)` as torchrun would, in `world` processes over gloo; all must end well."""
    children = _start_ranks(target, world, args)
    join(children)
    codes = [child.exitcode for child in children]
    assert codes == [0] * world, f"the ranks ended with {codes}"


def killed_rank(target, world: int, victim: int, *args) -> int:
    """As `ranks`, where `victim` alone is given `args`' last two, `die_at` and `die_in`; its exit code.

    When it has ended so do the others, as torchrun would have it.
    """
    *common, die_at, die_in = args
    children = _start_ranks(target, world, common, {victim: (*common, die_at, die_in)})
    join([children[victim]])
    for child in children:
        child.kill()
        child.join()
    return children[victim].exitcode


def _start_ranks(target, world: int, args: tuple, of_rank: dict[int, tuple] | None = None) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = of_rank or {}
    return [start(_as_rank, rank, world, port, target, *own.get(rank, args)) for rank in range(world)]


def _as_rank(rank: int, world: int, port: int, target, *args) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    target(*args)
