"""Runs and models of earlier versions load, resume, score and report (tests/fixtures/before_rooms/README.md)."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_smop.data.synthetic.corpus import make_corpus
from llama_smop.evaluation.run import evaluate
from llama_smop.models import model_folder
from llama_smop.reports.demo import write_report
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train

pytestmark = pytest.mark.xdist_group("pipeline")
OLD = Path(__file__).parents[1] / "fixtures/before_rooms"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The corpus that the old code trained on, whose test clips are as it drew them."""
    root = make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", clips=16, seed=3, progress=False, workers=1)
    shutil.copytree(OLD / "clips", root, dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, corpus) -> Path:
    """The old run, after the present code has resumed and finished it."""
    out = shutil.copytree(OLD / "run", tmp_path_factory.mktemp("old") / "run")
    config = json.loads((out / "config.json").read_text())
    config["data"]["root"] = str(corpus)
    train(TrainConfig.model_validate(config), out)
    return out


def losses(log: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in json.loads(log.read_text()) if "loss" in row}


def test_an_old_run_resumes_at_its_checkpoint_and_gives_the_same_losses(resumed):
    starts = json.loads((resumed / "starts.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 2], "the training did not resume at the old checkpoint"
    assert len({start["run"] for start in starts}) == 1, "the resumed run has another identity"
    assert losses(resumed / "metrics.json") == pytest.approx(losses(OLD / "uninterrupted_metrics.json"), rel=1e-3)


def test_the_model_of_a_resumed_old_run_is_scored(resumed, corpus):
    rows, _ = evaluate(*model_folder.load(resumed / "model"), corpus, "test.csv")
    assert [(row.modality, row.clips) for row in rows] == [("audio", 2)]


def test_the_report_of_a_resumed_old_run_shows_both_starts(resumed):
    page = write_report(resumed).read_text()
    assert "Ended after 4 steps" in page and "make.py OUT" in page


def test_an_old_model_gives_the_same_scores_and_transcripts(corpus):
    rows, transcripts = evaluate(*model_folder.load(OLD / "model"), corpus, "test.csv", snrs=[None, 0])
    found = [asdict(row) | {"transcripts": texts} for row, texts in zip(rows, transcripts, strict=True)]
    for new in ("degradation", "rate"):  # which rows had not yet
        assert all(row.pop(new) is None for row in found)
    assert found == json.loads((OLD / "scores.json").read_text())
