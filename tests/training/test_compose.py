"""Training files made of several, and settings of the command line."""

import pytest
import yaml

from llama_smop.cli import main
from llama_smop.training.compose import compose, parse_setting, shipped
from llama_smop.training.config import read_config

BASE = {
    "model": {"tiny": {}, "projector": {"num_experts": 4}},
    "data": {"root": "corpus", "noise": {"snrs": [0, 5]}},
    "optimizer": {"steps": 5, "learning_rate": 1e-3},
}


def written(folder, name: str, content) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_later_files_override_earlier_and_settings_come_last(tmp_path):
    base = written(tmp_path, "base.yaml", BASE)
    second = written(tmp_path, "second.yaml", {"optimizer": {"steps": 6}, "data": {"noise": {"snrs": [None]}}})
    config = read_config(
        [base, second], {"run": {"seed": 1}}, ["run.seed=2", "optimizer.learning_rate=5e-4", "data.noise.source=x.wav"]
    )
    assert config.optimizer.steps == 6 and config.optimizer.learning_rate == 5e-4
    assert config.data.noise.snrs == (None,), "a list is replaced, not merged"
    assert config.data.noise.source == "x.wav" and config.run.seed == 2
    assert config.model.projector.num_experts == 4, "what nobody overrides stays"


def test_a_file_includes_others_beside_it_and_shipped_ones(tmp_path):
    written(tmp_path, "own.yaml", {"model": {"projector": {"hidden_features": 7}}})
    path = written(tmp_path, "top.yaml", {"include": ["demo", "own.yaml"], "optimizer": {"steps": 9}})
    config = read_config(path)
    assert (config.model.projector.hidden_features, config.optimizer.steps) == (7, 9)
    assert config.data.max_clips == read_config("demo").data.max_clips


def test_an_include_that_leads_back_is_refused(tmp_path):
    written(tmp_path, "a.yaml", {"include": ["b.yaml"]})
    written(tmp_path, "b.yaml", {"include": ["a.yaml"]})
    with pytest.raises(ValueError, match="includes itself"):
        read_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "settings", "named", "message"),
    [
        ({"optimizer": {"step": 3}}, [], "second.yaml", "unknown key optimizer.step"),
        ({"optimizer": {"steps": 0}}, [], "second.yaml", "optimizer.steps"),
        ({"model": {"projector": {"sharing": "DDDD"}}}, [], "second.yaml", "model.projector.sharing"),
        ({}, ["optimizer.steps=-1"], "--set optimizer.steps=-1", "optimizer.steps"),
        ({}, ["data.noise=3"], "--set data.noise=3", "data.noise"),
        ({}, ["optimizer.steps"], "--set optimizer.steps", "expected key.path=value"),
        ({}, ["optimizer.steps=[1"], "--set optimizer.steps=[1", "not YAML"),
        ("- a list", [], "second.yaml", "expected a mapping"),
        ("a: [1", [], "second.yaml", "not YAML"),
        ({"include": "base.yaml"}, [], "second.yaml", "include"),
        ({"include": ["nowhere"]}, [], "nowhere", "no such file"),
    ],
)
def test_a_mistake_is_one_line_that_names_who_made_it(tmp_path, content, settings, named, message):
    files = [written(tmp_path, "base.yaml", BASE), written(tmp_path, "second.yaml", content)]
    with pytest.raises(ValueError, match=r".") as error:
        read_config(files, settings=settings)
    text = str(error.value)
    assert named in text and message in text and "\n" not in text
    assert "base.yaml: " not in text, "the file that was right is blamed"


def test_a_conflict_between_files_names_both(tmp_path):
    files = [written(tmp_path, "base.yaml", BASE), written(tmp_path, "second.yaml", {"optimizer": {"epochs": 2}})]
    with pytest.raises(ValueError, match="either steps or epochs") as error:
        read_config(files)
    assert files[0] in str(error.value) and files[1] in str(error.value)


def test_a_mapping_replaced_by_a_value_and_back_again(tmp_path):
    first = written(tmp_path, "first.yaml", {"model": {"lora": {"language_model": "llama-3.2-1b"}}})
    second = written(tmp_path, "second.yaml", {"model": {"lora": None}})
    third = written(tmp_path, "third.yaml", {"model": {"lora": {"video_tower": "av-hubert-large"}}})
    assert compose([first, second]).content["model"]["lora"] is None
    assert compose([first, second, third]).content["model"]["lora"] == {"video_tower": "av-hubert-large"}


def test_a_setting_takes_yaml_values():
    assert parse_setting("a.b=[1, null]") == {"a": {"b": [1, None]}}
    assert parse_setting("a=x=y") == {"a": "x=y"}


def test_shipped_files_are_listed_and_every_one_says_what_it_is(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(shipped()) >= {"demo", "recipe", "llm/3b", "ablation/sharing"}
    assert all(len(line.split()) > 2 for line in lines), "a shipped file without a first line of comment"
