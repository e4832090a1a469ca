"""Whatever goes wrong in a command: one line, a status that is not 0, and what was computed is written."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import typer

from llama_smop.cli import main
from llama_smop.cli.evaluation import _snr
from llama_smop.evaluation import run
from llama_smop.evaluation.run import Row
from llama_smop.models import model_folder

RUNS = [sys.executable, "-m", "llama_smop.cli"]


@pytest.fixture
def command(monkeypatch):
    """`llama-smop configs`, which does what the test says."""

    def does(action) -> None:
        monkeypatch.setattr("llama_smop.training.compose.shipped", action)

    return does


def raising(error: BaseException):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "line"),
    (
        (ValueError("a.yaml: not\n  YAML"), "llama-smop: a.yaml: not YAML"),
        (KeyError("w1"), "llama-smop: KeyError: 'w1' (in: configs; LLAMA_SMOP_DEBUG=1 shows where)"),
        (MemoryError(), "llama-smop: MemoryError (in: configs; LLAMA_SMOP_DEBUG=1 shows where)"),
        (ImportError("no module x"), "llama-smop: ImportError: no module x (in: configs"),
        (OverflowError("too large"), "llama-smop: OverflowError: too large (in: configs"),
        (AttributeError("no x"), "llama-smop: AttributeError: no x (in: configs"),
    ),
    ids=lambda value: type(value).__name__,
)
def test_every_exception_is_one_line(command, error, line, monkeypatch):
    monkeypatch.delenv("LLAMA_SMOP_DEBUG", raising=False)
    command(raising(error))
    with pytest.raises(SystemExit) as stop:
        main(["configs"])
    assert str(stop.value.code).startswith(line) and "\n" not in stop.value.code
    monkeypatch.setenv("LLAMA_SMOP_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["configs"])


@pytest.mark.parametrize(("stop", "status"), ((typer.Exit(3), 3), (KeyboardInterrupt(), 130), (typer.Abort(), 1)))
def test_the_status_of_a_command_that_stops_is_kept(command, stop, status, capsys):
    command(raising(stop))
    with pytest.raises(SystemExit) as stopped:
        main(["configs"])
    assert stopped.value.code == status
    assert ("interrupted" in capsys.readouterr().err) == (status == 130)


def test_a_command_that_ends_well_returns(capsys):
    main(["configs"])
    assert "recipe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    ((["info", "--config", "absent.yaml"], "llama-smop: absent.yaml: no such file"), (["info", "--confg"], "--confg")),
    ids=("a file", "an option"),
)
def test_torchrun_is_told_why(arguments, line, tmp_path, monkeypatch):
    """It reads a file of each process that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    place = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place))
    before = time.time()
    with pytest.raises(SystemExit):
        main(arguments)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(place))
    assert line in failure.message and before - 1 <= failure.timestamp <= time.time()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "absent/error.json"))
    with pytest.raises(SystemExit):
        main(arguments)


@pytest.mark.slow
def test_what_torchrun_prints_ends_with_the_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("data: {root: nowhere}\nmodel: {tiny: {}}\noptimizer: {stepz: 3}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "llama_smop.cli", "train", "--config", str(tmp_path / "bad.yaml"), "--out", str(tmp_path)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    shown = [line for line in ended.stderr.splitlines() if "unknown key optimizer.stepz" in line]
    assert shown and shown[-1] in ended.stderr.splitlines()[-3:]


def test_output_that_cannot_be_written_is_a_failure():
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*RUNS, "configs"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "standard output" in ended.stderr and "No space left on device" in ended.stderr


def test_output_that_is_closed_from_the_start_is_none_that_fails():
    ended = subprocess.run(f"{sys.executable} -m llama_smop.cli configs >&-", shell=True, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_scores_are_written_before_they_are_printed(tmp_path, monkeypatch):
    """A full disk or a closed pipe behind stdout costs no scoring."""
    here = SimpleNamespace(device=SimpleNamespace(type="cpu"), use_distributed=False, is_main_process=True)
    here.destroy_process_group = lambda: None
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: here)
    monkeypatch.setattr(model_folder, "load", lambda *_: (None, None))
    monkeypatch.setattr(run, "fingerprint", lambda folder: "of m")
    row = Row("test", "audio", None, 1, 2, 1, 0, 0, 0.5)
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: ([row], [[{"id": "a"}]]))
    monkeypatch.setattr(run, "table", lambda rows: raising(BrokenPipeError(32, "Broken pipe"))())
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", "m", "--root", "r", "--json", str(tmp_path / "new/scores.json")])
    assert stop.value.code not in (0, None)
    (found,) = json.loads((tmp_path / "new/scores.json").read_text())
    assert found["wer"] == 0.5 and found["transcripts"] == [{"id": "a"}]


@pytest.mark.parametrize(
    "command",
    (
        ["train", "--config", "demo", "--out"],
        ["average", "run", "--to"],
        ["convert", "a.pt", "--to"],
        ["evaluate", "--model", "m", "--root", "r", "--json"],
        ["corpus", "make"],
        ["train", "--out", "run", "--config"],
        ["info", "--config", "demo", "--set"],
    ),
    ids=lambda command: f"{command[0]} {command[-1]}",
)
def test_a_place_whose_name_is_no_text_is_refused(command, tmp_path):
    with pytest.raises(SystemExit, match=r"caf\\xe9': the name is not UTF-8"):
        main([*command, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("snr", ("nan", "inf", "-1e400", "loud", "101"))
def test_a_noise_ratio_that_is_none_is_refused(snr):
    with pytest.raises(ValueError, match="--snr takes decibels"):
        _snr(snr)
    assert _snr("-5") == -5 and _snr("clean") is None


@pytest.mark.parametrize(
    "command",
    (
        ["transcribe", "talk.mp4", "--model", "m", "--srt", "talk.mp4"],
        ["transcribe", "talk.mp4", "--model", "m", "--json", "talk.wav"],
        ["transcribe", "other.mp4", "talk.mp4", "--model", "m", "--vtt", "link"],
        ["crop", "talk.mp4", "--out", "talk.mp4"],
        ["crop", "talk.mp4", "--out", "talk.wav"],
        ["crop", "talk.mp4", "--out", "new.mp4", "--sheet", "hard.mp4"],
        ["evaluate", "--model", "m", "--root", ".", "--json", "labels/test.csv"],
        ["evaluate", "--model", "m", "--root", ".", "--json", "talk.wav", "--noise", "talk.wav"],
    ),
    ids=" ".join,
)
def test_no_command_writes_over_what_it_reads(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("talk.mp4", "talk.wav", "labels/test.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    os.link("talk.mp4", "hard.mp4")
    (tmp_path / "link").mkdir()
    os.symlink(tmp_path / "talk.mp4", tmp_path / "link/talk.vtt")
    with pytest.raises(SystemExit, match="is read by this command and would be lost"):
        main(command)
    assert all((tmp_path / name).read_text() == "precious" for name in ("talk.mp4", "talk.wav", "labels/test.csv"))


@pytest.mark.parametrize(
    ("command", "remedy"),
    (
        (
            ["crop", "talk.mp4", "--out", "crop.avi"],
            "crop.avi: what is written is mp4, .* name it crop.mp4",
        ),
        (["crop", "talk.mp4", "--out", "a.mp4", "--sheet", "b.JPG"], "is written is PNG, .* name it b.png"),
        (["corpus", "show", ".", "--png", "sheet.svg"], "name it sheet.png"),
        (["transcribe", "talk.mp4", "--model", "m", "--srt", "talk.vtt"], "is written is SubRip, .* name it talk.srt"),
        (["transcribe", "talk.mp4", "--model", "m", "--json", "talk.srt"], "name it talk.json"),
        (
            ["transcribe", "talk.mp4", "--model", "m", "--vtt", "-"],
            "-: names no file .* /dev/stdout",
        ),
        (["crop", "talk.mp4", "--out", "-"], "-: names no file"),
        (["corpus", "make", "-"], "-: names no file or folder"),
        (["transcribe", "a.mp4", "b.mp4", "--model", "m", "--srt", "talk.mp4"], "talk.mp4: is a file; talk.mp4/a.srt"),
        (
            ["transcribe", "a/x.mp4", "b/x.mkv", "--model", "m", "--srt", "out"],
            "x.srt: would .* commands of their own",
        ),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_name_that_would_mislead_is_refused_before_anything_is_read(command, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.mp4").write_text("no film")
    with pytest.raises(SystemExit, match=remedy):
        main(command)
    assert {name for name in os.listdir() if os.path.isfile(name)} == {"talk.mp4"}
