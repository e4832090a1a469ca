"""What a training leaves about itself, and the page made of it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_smop.reports.demo import write_report
from llama_smop.system import files, provenance
from llama_smop.training import record
from llama_smop.training.config import TrainConfig
from llama_smop.training.record import RunFolder
from llama_smop.training.run import train


def config(optimizer=(), **run) -> TrainConfig:
    optimizer = {"steps": 40, **dict(optimizer)}
    return TrainConfig.model_validate(
        {"model": {"tiny": {}}, "data": {"root": "nowhere"}, "optimizer": optimizer, "run": run}
    )


def row(step: int, **more) -> dict:
    load = {f"expert_load/{e}": 1 / 8 for e in range(8)}
    return {"step": step, "loss": 2.0, "lm_loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.7, **load, **more}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run started twice, killed or still going on."""
    folder = RunFolder(tmp_path / "run", config(), writes=True)
    folder.begin(None, processes=1, steps=40, fresh=False)
    folder.on_log(None, SimpleNamespace(log_history=[row(10), row(20)]), None)
    folder.begin(tmp_path / "run/checkpoints/checkpoint-20", processes=2, steps=40, fresh=False)
    return tmp_path / "run"


def test_a_run_that_is_going_on_can_be_read(run):
    assert json.loads((run / "config.json").read_text())["optimizer"]["betas"] == [0.9, 0.98], "defaults too"
    assert [r["step"] for r in json.loads((run / "metrics.json").read_text())] == [10, 20]
    first, second = json.loads((run / "starts.json").read_text())
    assert (first["from_step"], second["from_step"], second["processes"]) == (0, 20, 2)
    assert first["run"] == second["run"] and first["versions"]["torch"] and first["machine"]["cpu"]
    page = write_report(run).read_text()
    assert "Not ended, logged up to step 20" in page
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_going_on_with_other_processes_is_warned_of(run, caplog):
    """The fixture went on with two: what is the same is no news, what differs changes which clips are drawn."""
    checkpoint = run / "checkpoints/checkpoint-20"
    folder = RunFolder(run, config(), writes=True)
    folder.begin(checkpoint, processes=2, steps=40, fresh=False)
    assert not caplog.messages
    folder.begin(checkpoint, processes=4, steps=40, fresh=False)
    assert "resumes with 4 processes of 0 data workers, before it had 2 of 0" in caplog.text


def test_from_the_beginning_again_nothing_is_left_of_before(run):
    before = json.loads((run / "starts.json").read_text())[0]["run"]
    RunFolder(run, config(), writes=True).begin(None, processes=1, steps=40, fresh=True)
    (only,) = json.loads((run / "starts.json").read_text())
    assert only["run"] != before


def test_only_the_first_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", config(), writes=False)
    folder.begin(None, processes=2, steps=40, fresh=False)
    folder.on_log(None, SimpleNamespace(log_history=[row(10)]), None)
    folder.end([row(10)])
    assert not (tmp_path / "run").exists()


def test_the_page_shows_what_happened(run, pictures):
    log = [row(10, skipped_steps=0), row(20, skipped_steps=3, **{"router_entropy/audio": 1.2}), {"step": 40}]
    files.write_json(run / "bad_clips.json", {"corpus/<torn>.mp4": "no frames"})
    scored = [{"labels": "test", "modality": "audio", "snr": snr, "wer": wer} for snr, wer in ((None, 0.1), (0, 0.345))]
    files.write_json(run / "evaluation.json", scored)
    RunFolder(run, config(), writes=True).end([*log[:2], log[2] | {"train_runtime": 7300.0}])
    page = (run / "report.html").read_text()
    assert "Ended after 40 steps; its last start took 2.0 h" in page
    assert "loss or gradient was not finite: 3." in page and "replaced by others: 1." in page
    assert "corpus/&lt;torn&gt;.mp4" in page and "34.5 %" in page
    assert page.count('src="data:image/png;base64,') == 5, "losses, schedule, experts, entropy, WER"
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page refers to other files"


def test_a_run_without_a_log_is_refused(tmp_path):
    RunFolder(tmp_path, config(), writes=True).begin(None, processes=1, steps=40, fresh=False)
    with pytest.raises(ValueError, match="nothing was logged yet"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    (
        ({"report_to": ["tensorboard", "wandb"]}, r"run\.report_to names wandb, .*pip install wandb"),
        ({"optimizer": {"fused_loss": "liger"}}, r'"liger" needs a CUDA device, got cpu; use "chunked"'),
    ),
    ids=("wandb", "liger"),
)
def test_what_cannot_be_had_is_said_before_anything_is_done(tmp_path, monkeypatch, asked, message):
    monkeypatch.setattr(record, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train(config(**asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


MARK = "<script>alert(1)</script>"


def test_nothing_that_is_shown_is_taken_for_html(run, pictures):
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["projector"]["sharing"] = MARK
    settings["model"]["modalities"] = [MARK]
    files.write_json(run / "config.json", settings)
    starts = json.loads((run / "starts.json").read_text())
    starts[0] |= {"command": MARK, "commit": MARK, "modified": False, "time": MARK, "from_step": MARK}
    files.write_json(run / "starts.json", starts)
    files.write_json(run / "bad_clips.json", {MARK: MARK})
    scored = [{"labels": MARK, "modality": m, "snr": snr, "wer": 0.1} for m in ("audio", MARK) for snr in (None, 0)]
    files.write_json(run / "evaluation.json", scored)
    page = write_report(run).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("metrics", [{"loss": 1.0}]),
        ("metrics", [{"step": "<b>"}]),
        ("metrics", [{"step": 1, "lm_loss": "x"}]),
        ("metrics", {"step": 1}),
        ("metrics", [5]),
        ("config", {}),
        ("config", []),
        ("config", {"model": {"projector": 5}}),
        ("bad_clips", [1]),
        ("evaluation", [{"labels": "test"}]),
        ("evaluation", {"rows": []}),
        ("starts", [{"machine": 5}]),
        ("starts", {"run": 1}),
    ),
)
def test_a_file_that_holds_something_else_is_named(run, name, content):
    files.write_json(run / f"{name}.json", content)
    with pytest.raises(ValueError, match=rf"{run}/{name}\.json: cannot be shown") as error:
        write_report(run)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_json_is_named(run):
    (run / "metrics.json").write_text("[{")
    with pytest.raises(ValueError, match=r"metrics\.json: damaged, no JSON"):
        write_report(run)


def test_a_report_is_not_written_over_a_folder(run):
    (run / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match=r"report\.html: is a folder"):
        write_report(run)


def test_all_starts_are_one_run_in_wandb(tmp_path, monkeypatch):
    calls = []
    wandb = SimpleNamespace(init=lambda **settings: calls.append(settings), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = config(report_to=["wandb"], name="first")
    for _ in range(2):
        RunFolder(tmp_path, settings, writes=True).begin(None, processes=1, steps=40, fresh=False)
    RunFolder(tmp_path, settings, writes=True).end([row(10)])
    first, second, end = calls
    assert first == second and first["resume"] == "allow" and first["name"] == "first" and end == "finish"


def test_the_commit_is_that_of_the_code_and_of_nothing_round_it(tmp_path, monkeypatch):
    """A package that was installed into some project's folder is not of that project's commit."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments], cwd=tmp_path, check=True)

    package = tmp_path / "llama_smop"
    package.mkdir()
    source = shutil.copy(provenance.__file__, package)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(source))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "other work")
    assert provenance.commit() == {"commit": None, "modified": None}
    git("add", ".")
    git("commit", "-q", "-m", "the code")
    found = provenance.commit()
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and not found["modified"]
    (package / "new.py").touch()
    assert provenance.commit()["modified"]
