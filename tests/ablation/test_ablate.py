"""A tiny grid, whole: killed, gone on with, a cell that fails, and the same command again."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from llama_smop.ablation import ablate, cell, run
from llama_smop.data.synthetic.corpus import make_corpus
from tests.training import children

pytestmark = pytest.mark.xdist_group("ablate")
STEPS = 12
BASE = {
    "model": {
        "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
        "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
    },
    "data": {
        "stages": [{"modalities": {"audio": 1, "video": 1, "audiovisual": 1}}],
        "max_clips": 2,
        "buckets": 2,
        "noise": {"snrs": [0, None]},
    },
    "optimizer": {"learning_rate": 1e-3, "steps": STEPS, "precision": "fp32"},
    "run": {"log_every": 1, "save_every": 2},
}
SPARSE, DENSE = "jedr-e2-k1-r4.2-s0", "dense-h16-r4.2-s0"


def start(grid, out):
    ablate(grid, out, jobs=1)  # one cell by `_start`, whose imports take seconds


class ForkedCell:
    """A cell without the imports of a new interpreter; for `run_children`, the `Popen` of one."""

    def __init__(self, folder: Path, threads: int, device: str | None):
        (folder / "log.txt").touch()
        self._child = children.start(logged_cell, folder)

    returncode = property(lambda self: self._child.exitcode)

    def poll(self) -> int | None:
        return self._child.exitcode

    def terminate(self) -> None:
        self._child.terminate()

    def wait(self) -> None:
        self._child.join()


def logged_cell(folder: Path) -> None:
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    cell.main(folder, os.getppid())


def test_a_grid_is_killed_fails_in_part_and_ends_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, grid = tmp_path / "out", tmp_path / "grid.yaml"
    corpus = make_corpus(tmp_path / "corpus", clips=8, seed=3, progress=False, workers=1)
    base = BASE | {"data": BASE["data"] | {"root": str(corpus)}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    asked = {"base": ["base.yaml"], "axes": {"sharing": ["JEDR", "dense"]}, "score": {"snrs": [None, 0]}}
    grid.write_text(yaml.safe_dump(asked | {"jobs": 2, "threads": 1}))
    blocked = out / "cells" / DENSE / "run"  # a file where the training wants its folder
    blocked.parent.mkdir(parents=True)
    blocked.touch()

    killed = children.start(start, grid, out)
    while not (out / "cells" / SPARSE / "used.json").exists() and killed.is_alive():  # written with a checkpoint
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another ablation is running"):
        ablate(grid, out)
    killed.kill()
    killed.join()
    result = out / "cells" / SPARSE / "result.json"
    assert not result.exists(), "the cell ended before it could be killed"
    monkeypatch.setattr(run, "_start", ForkedCell)  # those that were killed were as `_start` has them

    with pytest.raises(RuntimeError, match="1 of 2 cells failed") as error:
        ablate(grid, out)
    assert f"{DENSE}: NotADirectoryError" in str(error.value), "the cell and its last log line"
    cells = {cell["name"]: cell for cell in json.loads((out / "results.json").read_text())["cells"]}
    assert "NotADirectoryError" in cells[DENSE]["failed"]
    done = cells[SPARSE]
    assert done["seconds"]["training"]["starts"] == 2, "the interrupted cell began anew"
    assert [(r["modality"], r["snr"], r["noise"]) for r in done["rows"]] == [
        ("audio", None, None),
        ("audio", 0, "babble"),
        ("video", None, None),
        ("audiovisual", None, None),
        ("audiovisual", 0, "babble"),
    ]
    steps = [point["step"] for point in done["router_entropy"]]
    assert steps == list(range(1, STEPS + 1)), "the log has a gap where the cell was interrupted"
    assert all(0 <= point.get(m, 0) <= 0.6932 for point in done["router_entropy"] for m in ("audio", "video"))
    assert f"**{DENSE} failed**" in (out / "README.md").read_text()

    blocked.unlink()
    before = result.stat().st_mtime_ns
    text = ablate(grid, out).read_text()
    assert result.stat().st_mtime_ns == before, "a finished cell was computed again"
    assert "failed" not in text and "| dense |" in text and "wer_snr.png" in text

    trained = (out / "cells" / SPARSE / "trained.json").stat().st_mtime_ns
    rescored = asked | {"axes": {"sharing": ["JEDR"]}, "score": {"snrs": [None], "modalities": ["audio"]}}
    grid.write_text(yaml.safe_dump(rescored | {"score": {"labels": "tset.csv"}}))
    with pytest.raises(ValueError, match=r"tset\.csv: no such label file"):
        ablate(grid, out)
    assert result.stat().st_mtime_ns == before, "a slip of the pen cost a result"
    grid.write_text(yaml.safe_dump(rescored))
    ablate(grid, out)
    (rescored_cell,) = json.loads((out / "results.json").read_text())["cells"]
    assert [(r["modality"], r["snr"]) for r in rescored_cell["rows"]] == [("audio", None)]
    assert (out / "cells" / SPARSE / "trained.json").stat().st_mtime_ns == trained, "it was only to be scored anew"

    grid.write_text(yaml.safe_dump(asked | {"set": {"optimizer": {"steps": STEPS + 1}}}))
    with pytest.raises(ValueError, match="holds a cell of other settings"):
        ablate(grid, out)


def test_a_cell_that_dies_without_a_word_is_named_too(tmp_path, monkeypatch):
    import subprocess

    def start(folder, threads, device):
        (folder / "log.txt").touch()
        words = {
            "killed": "echo all is well; kill -9 $$",
            "silent": "exit 3",
            "loud": "echo first; echo last; exit 1",
            "good": "echo '{}' > result.json",
        }
        command = ["sh", "-c", words[folder.name]]
        return subprocess.Popen(command, cwd=folder, stdout=open(folder / "log.txt", "w"))

    monkeypatch.setattr(run, "_start", start)
    folders = [tmp_path / name for name in ("killed", "silent", "loud", "good")]
    for folder in folders:
        folder.mkdir()
    assert run.run_children(folders, jobs=1, threads=1) == {
        "killed": "ended by signal 9",
        "silent": "ended with 3",
        "loud": "last",
    }
    assert (tmp_path / "good/result.json").exists(), "the others did not go on"
