"""No command removes or writes over what it did not write itself, and each says so before it computes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_smop.cli import main
from llama_smop.convert import convert
from llama_smop.data.synthetic.corpus import make_corpus
from llama_smop.models import seal
from llama_smop.reports.ablation.page import write_page
from llama_smop.training.record import check_run_folder

pytestmark = pytest.mark.xdist_group("places")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", clips=8, seed=3, progress=False, workers=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code not in (0, None)
    return f"{stop.value.code} {capsys.readouterr().err}"


@pytest.fixture
def model_file(tmp_path) -> Path:
    save_file({"llm.lm_head.weight": torch.zeros(1)}, tmp_path / "authors.safetensors")
    return tmp_path / "authors.safetensors"


def test_a_corpus_that_is_given_as_a_target_is_still_there(corpus, capsys, tmp_path, model_file):
    before, run = tree(corpus), tmp_path / "run"
    (run / "checkpoints/checkpoint-4").mkdir(parents=True)
    (run / "checkpoints/checkpoint-4/trainer_state.json").write_text("{}")
    seal.seal(run / "checkpoints/checkpoint-4")
    files_of_run = tree(run)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"{{model: {{tiny: {{}}}}, data: {{root: {corpus}}}, optimizer: {{steps: 1}}, run: {{save_every: 1}}}}"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    for command, words in (
        (("evaluate", "--model", run, "--root", corpus, "--json", corpus), "is a folder; name a file"),
        (("average", run, "--to", corpus), "is not empty"),
        (("average", run, "--to", run), "is not empty"),
        (("average", run, "--to", run / "checkpoints/checkpoint-4"), "is a checkpoint of a training"),
        (("convert", model_file, "--to", corpus, "--language-model", "x"), "is not empty"),
        (("corpus", "show", corpus, "--png", corpus), "is a folder; name a file"),
        (("corpus", "shard", corpus, "--out", corpus), "choose another folder"),
        (("corpus", "labels", corpus, "--from", "train.csv", "--to", "."), "plain name of a label file"),
        (("corpus", "labels", corpus, "--from", "train.csv", "--to", "../generated"), "plain name of a label file"),
        (("corpus", "labels", corpus, "--from", "train.csv", "--to", corpus / "a.csv"), "plain name of a label file"),
        (("corpus", "labels", corpus, "--from", "../../x.csv", "--to", "a.csv"), "plain name of a label file"),
        (("demo", "--out", corpus), "is not empty and holds no demo"),
        (("train", "--config", config, "--out", tmp_path / "other", "--no-resume"), "not the folder of a training"),
    ):
        assert words in refused(capsys, *command), command
    assert tree(corpus) == before and tree(run) == files_of_run
    assert sorted(os.listdir(tmp_path)) == ["authors.safetensors", "config.yaml", "other", "run"]


def test_a_training_takes_its_own_folder_and_an_empty_one(tmp_path):
    check_run_folder(tmp_path / "new")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds config\.json"):
        check_run_folder(tmp_path)
    (tmp_path / "starts.json").write_text("[]")
    check_run_folder(tmp_path)


def test_a_model_of_others_in_a_runs_folder_is_found_before_the_training(corpus, tmp_path, capsys):
    (tmp_path / "lock").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("mine")
    (tmp_path / "c.yaml").write_text(f"{{model: {{tiny: {{}}}}, data: {{root: {corpus}}}, optimizer: {{steps: 1}}}}")
    assert "model: is not empty" in refused(capsys, "train", "--config", tmp_path / "c.yaml", "--out", tmp_path)


def test_a_readme_of_others_is_not_written_over(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(FileExistsError, match=r"README\.md: is not an ablation's page"):
        write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("unwritable", ("/proc/none/scores.json", "/dev/null/scores.json"))
def test_a_place_that_cannot_be_written_is_said_before_the_model_is_read(unwritable, corpus, capsys, tmp_path):
    said = refused(capsys, "evaluate", "--model", tmp_path / "none", "--root", corpus, "--json", unwritable)
    assert unwritable.rpartition("/")[0] in said and "no model here" not in said


def test_convert_asks_for_its_place_before_it_reads(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/mine.txt").write_text("mine")
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(tmp_path / "none.safetensors", tmp_path / "to")
