"""The model card: what the files beside it say, no result of other weights, and nobody's own text overwritten."""

import json
import os
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.cli import main
from llama_smop.models import model_folder, seal
from llama_smop.models.assemble import assemble
from llama_smop.models.card_records import EVALUATION, TRAINING
from llama_smop.models.tiny import build_tiny
from tests.golden_files import GOLDEN
from tests.models.conftest import WORDS

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16}
COUNTS = {"clips": 3, "words": 40, "substitutions": 3, "deletions": 1, "insertions": 1}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_tiny(WORDS, max_seconds=1.0, num_experts=3, **SIZES)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    facts = {"name": "first try", "steps": 20, "last loss": 0.25}
    return model_folder.save(*tiny, tmp_path_factory.mktemp("saved") / "model", training=facts)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def rows(folder, *changes: dict) -> list[dict]:
    row = COUNTS | {"labels": "test", "modality": "audio", "snr": None, "noise": None, "beams": 1, "wer": 0.125}
    own = {"corpus": "lrs3", "model_sha256": seal.fingerprint(folder), "transcripts": [{"id": "not for the card"}]}
    return [row | own | change for change in changes or ({},)]


def write(folder, *arguments, results=None) -> str:
    """The card after `llama-smop card`."""
    if results is not None:
        (folder.parent / "results.json").write_text(json.dumps(results))
        arguments = ("--results", str(folder.parent / "results.json"), *arguments)
    main(["card", "--model", str(folder), *arguments])
    return (folder / seal.CARD).read_text()


def metadata(folder):
    return ModelCard((folder / seal.CARD).read_text()).data


def test_a_saved_model_has_a_card_that_claims_nothing(folder):
    data, text = metadata(folder), (folder / seal.CARD).read_text()
    assert (data.pipeline_tag, data.library_name) == ("automatic-speech-recognition", "llama-smop")
    assert not any((data.license, data.datasets, data.base_model, data.eval_results, data.language))
    assert "# first try\n" in text and "| steps | 20 |" in text and "None are recorded in these files" in text
    assert checked(folder)


def checked(folder) -> bool:
    """The seal knows all files, the card too."""
    assert set(seal.read(folder)) == {p.name for p in folder.iterdir()} - {seal.SEAL}
    return seal.is_whole(folder)


@pytest.mark.parametrize("kind", ("smop", "dense"))
def test_the_parameters_are_those_of_the_model(tmp_path, kind):
    """Those at work are counted by which of them get a gradient from one audio token and one text token."""
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, max_seconds=1.0, num_experts=3, top_k=2, kind=kind, **SIZES)
    text = (model_folder.save(model, processor, tmp_path / "model") / seal.CARD).read_text()
    whole, trainable = re.search(r"\| all \| \| ([\d,]+) \| ([\d,]+) \|", text).groups()
    (active,) = re.findall(r"Active for a token: ([\d,]+) parameters", text)
    number = {n: p.numel() for n, p in model.named_parameters()}
    assert int(whole.replace(",", "")) == sum(number.values())
    assert int(trainable.replace(",", "")) == sum(number[n] for n, p in model.named_parameters() if p.requires_grad)
    idle = sum(n for name, n in number.items() if name.startswith("ctc_heads"))
    projector = model.multi_modal_projector
    projector(torch.randn(1, 1, 16), torch.zeros(1, 1, dtype=torch.int32)).hidden_states.square().sum().backward()
    for name, p in projector.named_parameters():
        used = 1 if name == "gate_weight" else sum(bool(row.any()) for row in projector.bias2.grad)
        idle += p.numel() // len(p) * (len(p) - used)
    assert int(active.replace(",", "")) == sum(number.values()) - idle


def test_results_stand_in_the_text_and_in_the_index(folder):
    noisy = {"snr": -5, "noise": "babble", "modality": "audiovisual", "substitutions": 8}
    text = write(folder, results=rows(folder, {}, noisy))
    results = metadata(folder).eval_results
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in results] == [
        ("wer", 12.5, "lrs3", "test"),
        ("wer", 25.0, "lrs3", "test"),
    ]
    assert len({r.unique_identifier for r in results}) == 2, "the hub would take two conditions for one"
    assert "| lrs3 | test | audiovisual | babble at -5 dB | 1 | 3 | 40 | 25.00 |" in text
    assert "not for the card" not in text + (folder / EVALUATION).read_text()
    assert checked(folder)
    again = write(folder, results=rows(folder, {"substitutions": 0}))  # one condition measured again
    assert "| clean | 1 | 3 | 40 | 5.00 |" in again and "babble at -5 dB" in again and "12.50" not in again
    assert write(folder) == again


def test_pictures_made_worse_are_no_result_of_the_card(folder):
    from llama_smop.models.card_records import add_results, read_results

    add_results(
        folder, rows(folder, {"degradation": None}, {"degradation": "blur:3", "substitutions": 40}), "scores.json"
    )
    (kept,) = read_results(folder)
    assert kept["substitutions"] == COUNTS["substitutions"]
    with pytest.raises(ValueError, match=r"scores\.json: holds no rows"):
        add_results(folder, rows(folder, {"degradation": "blur:3"}), "scores.json")


def test_what_people_say_is_kept(folder):
    options = (
        "--license",
        "llama3.2",
        "--dataset",
        "me/lrs3",
        "--language",
        "en",
        "--base-model",
        "a/b",
        "--name",
        "x",
    )
    write(folder, *options)
    text = write(folder, "--license", "mit", results=rows(folder))
    data = metadata(folder)
    assert (data.license, data.datasets, data.language, data.base_model) == ("mit", ["me/lrs3"], ["en"], ["a/b"])
    assert "# x\n" in text


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"model_sha256": "0" * 64}, "was measured with other weights or settings"),
        ({"words": 0}, "words is 0"),
        ({"words": -40}, "words is -40"),
        ({"substitutions": "3"}, "substitutions is '3'"),
        ({"clips": True}, "clips is True"),
        ({"snr": float("nan")}, "snr is nan"),
        ({"modality": "smell"}, "modality is 'smell'"),
        ({"corpus": None}, "corpus is None"),
    ),
)
def test_results_that_are_none_of_this_model_are_refused(folder, change, message):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SystemExit, match=rf"results\.json: .*{message}"):
        write(folder, results=rows(folder, change))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("content", (None, 3, [], {}, [3], [{}], [{"wer": 0.1, "labels": "test"}]))
def test_files_that_are_no_results_are_refused(folder, content):
    with pytest.raises(SystemExit, match=r"results\.json: (holds no rows of|does not say)"):
        (folder.parent / "results.json").write_text(json.dumps(content))
        main(["card", "--model", str(folder), "--results", str(folder.parent / "results.json")])


def test_options_that_are_no_names_are_refused(folder):
    for option in ("--license", "--dataset", "--base-model", "--language"):
        with pytest.raises(SystemExit, match="names that the hub knows"):
            write(folder, option, "a: b\n- c")
    with pytest.raises(SystemExit, match="no model here"):
        main(["card", "--model", str(folder.parent)])


def test_other_weights_have_no_results_and_no_training(folder):
    write(folder, "--license", "mit", results=rows(folder))
    model, _ = model_folder.load(folder, "cpu")
    with torch.no_grad():
        model.multi_modal_projector.w1.add_(1)
    model.save_pretrained(folder)
    data, text = metadata(folder), (folder / seal.CARD).read_text()
    assert data.license == "mit" and not data.eval_results and "| steps |" not in text and "12.50" not in text
    assert model_folder.load(folder, "cpu")


def test_a_card_that_somebody_edited_stays(tiny, folder):
    edited = (folder / seal.CARD).read_text().replace("## Model", "Do not use in traffic.\n\n## Model")
    (folder / seal.CARD).write_text(edited)
    model, _ = model_folder.load(folder, "cpu")
    model.save_pretrained(folder)
    assert (folder / seal.CARD).read_text() == edited
    model_folder.save(*tiny, folder)
    assert (folder / seal.CARD).read_text() == edited, "saved over"
    assert seal.is_whole(folder) and seal.CARD not in seal.owned(folder)
    with pytest.raises(SystemExit, match="was edited, so it stays as it is"):
        write(folder)
    os.remove(folder / seal.CARD)
    assert "## Model" in write(folder)


@pytest.mark.parametrize("content", (b"", b"---\n: [\n---\n", b"\xff\xfe", b"---\nlicense: 3\n---"))
def test_any_file_of_that_name_is_somebodys(tiny, folder, content):
    (folder / seal.CARD).write_bytes(content)
    model_folder.save(*tiny, folder)
    assert (folder / seal.CARD).read_bytes() == content


@pytest.mark.parametrize("name", (EVALUATION, TRAINING))
@pytest.mark.parametrize("content", ("", "[3]", '{"a": 1}', "null", "\xff"))
def test_a_strange_record_does_not_end_a_save(tiny, folder, name, content):
    (folder / name).write_text(content, encoding="latin-1")
    tiny[0].save_pretrained(folder)
    assert model_folder.load(folder, "cpu")


def test_no_folder_of_this_machine_is_told(tmp_path):
    model, processor = assemble(
        language_model=GOLDEN / "full_model/llm_hf",
        audio_tower=GOLDEN / "whisper/hf_model",
        projector={"hidden_features": 16},
        lora={"language_model": {"r": 4, "alpha": 1}},
    )
    folder = model_folder.save(model, processor, tmp_path / "model")
    text = (folder / seal.CARD).read_text()
    assert "the language model from `llm_hf`" in text and str(GOLDEN.parent) not in text
    assert metadata(folder).base_model is None
    config = json.loads((folder / "config.json").read_text())
    config["sources"] |= {"language_model": "meta-llama/Llama-3.2-1B"}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder)
    assert metadata(folder).base_model == ["meta-llama/Llama-3.2-1B"]


def test_what_it_shows_runs(folder, monkeypatch):
    write(folder, "--name", "model")
    monkeypatch.chdir(folder.parent)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / seal.CARD).read_text(), re.S)
    names: dict = {}
    exec(snippet, names)
    assert isinstance(names["model"], LlamaSmopForConditionalGeneration)
