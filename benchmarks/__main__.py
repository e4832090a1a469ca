"""`python -m benchmarks`: cpu, gpu, data, memory, layer-memory, decoding, host-time, kernels, tune, report.

It uses argparse, because a GPU machine may have only torch, triton, numpy and pytest.
"""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the projector and its peers.")
    commands = top.add_subparsers(dest="command", required=True)

    cpu = commands.add_parser("cpu", help="the CPU suite, under five minutes on two cores")
    cpu.add_argument("--out", type=Path, help="JSON file; by default the device's under benchmarks/results/")
    cpu.add_argument("--compiled", action="store_true", help="torch.compile of the eager loop too, two minutes more")
    cpu.add_argument("--quick", action="store_true", help="tiny shapes, a smoke test (needs --out)")

    gpu = commands.add_parser("gpu", help="all GPU stages on one NVIDIA GPU, most important first")
    gpu.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="time limit")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for at most 8 small files")
    gpu.add_argument("--resume", action="store_true", help="resume the run in DIR")
    gpu.add_argument("--dry-run", action="store_true", help="the same stages on the CPU with tiny shapes")
    gpu.add_argument("--stages", help="only these, separated by commas")

    data = commands.add_parser("data", help="clips per second from tar shards, against decoding only")
    data.add_argument("--out", type=Path, help="JSON file; by default the device's under benchmarks/results/")
    data.add_argument("--quick", action="store_true", help="few clips, a smoke test (needs --out)")

    memory = commands.add_parser("memory", help="peak resident memory of a training step on this CPU, two minutes")
    memory.add_argument("--out", type=Path, help="JSON file; by default under benchmarks/results/training_memory/")
    memory.add_argument("--quick", action="store_true", help="small sizes, a smoke test (needs --out)")

    layer = commands.add_parser(
        "layer-memory", help="bytes of the projector's training pass on a CUDA device, by recompute"
    )
    layer.add_argument("--out", type=Path, help="JSON file; by default under benchmarks/results/layer_memory/")

    host = commands.add_parser("host-time", help="host time of a step of few tokens, without the kernels; minutes")
    host.add_argument("--out", type=Path, help="JSON file; by default under benchmarks/results/host_time/")
    host.add_argument("--against", nargs="+", default=(), metavar="REVISION", help="measure these of git too, by turns")
    host.add_argument("--quick", action="store_true", help="few steps, a smoke test (needs --out)")
    decoding = commands.add_parser(
        "decoding", help="tokens that generate writes on this CPU, compiled and not, minutes"
    )
    decoding.add_argument("--out", type=Path, help="JSON file; by default under benchmarks/results/decoding/")
    decoding.add_argument("--quick", action="store_true", help="few tokens, a smoke test (needs --out)")

    kernels = commands.add_parser("kernels", help="single operators (also: pytest benchmarks --benchmark-only)")
    kernels.add_argument("--out", type=Path, help="JSON file; by default only printed")

    commands.add_parser("tune", help="search Triton tile configurations on this GPU", add_help=False)

    report = commands.add_parser(
        "report", help="tables, pictures, one HTML page, the sections of docs/performance.md and docs/integrations.md"
    )
    report.add_argument("--results", type=Path, help="folder of JSON files; by default benchmarks/results/")
    report.add_argument("--no-readme", action="store_true", help="leave the documents alone")
    return top


def main(arguments: list[str] | None = None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest and options.command != "tune":
        parser().error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        commands = {
            "cpu": _cpu,
            "gpu": _gpu,
            "data": _data,
            "memory": _memory,
            "layer-memory": _layer_memory,
            "host-time": _host_time,
            "decoding": _decoding,
            "kernels": _kernels,
            "tune": _tune,
            "report": _report,
        }
        return commands[options.command](options, rest)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _keep_apart(options) -> None:
    if options.quick and options.out is None:
        raise ValueError("--quick gives no meaningful numbers: give --out a file outside benchmarks/results/")


def _cpu(options, _) -> int:
    from benchmarks import cpu

    _keep_apart(options)
    cpu.run(options.out, options.quick, compiled=options.compiled)
    return 0


def _gpu(options, _) -> int:
    import torch

    from benchmarks import gpu

    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; --dry-run runs the stages on the CPU")
    only = options.stages.split(",") if options.stages else None
    gpu.run(options.out, options.budget, options.resume, options.dry_run, only)
    return 0


def _data(options, _) -> int:
    from benchmarks import data

    _keep_apart(options)
    data.run(options.out, options.quick)
    return 0


def _memory(options, _) -> int:
    from benchmarks import training_memory

    _keep_apart(options)
    training_memory.run(options.out, options.quick)
    return 0


def _layer_memory(options, _) -> int:
    from benchmarks import layer_memory

    layer_memory.run(options.out or layer_memory.PATH)
    return 0


def _host_time(options, _) -> int:
    from benchmarks import host_time

    _keep_apart(options)
    host_time.run(options.out, tuple(options.against), options.quick)
    return 0


def _decoding(options, _) -> int:
    from benchmarks import decoding

    _keep_apart(options)
    decoding.run(options.out, options.quick)
    return 0


def _kernels(options, _) -> int:
    from benchmarks import kernels

    kernels.run(options.out)
    return 0


def _tune(_, rest: list[str]) -> int:
    from benchmarks import tune

    return tune.main(rest)


def _report(options, _) -> int:
    from benchmarks import report, results

    folder = options.results or results.FOLDER
    if options.no_readme:
        report.run(folder, document=None)
    else:
        report.run(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
