"""Training over several compression rates, and the commands that take one of them."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from llama_smop.cli import main
from llama_smop.reports import plots
from llama_smop.training import build
from llama_smop.training.config import TrainConfig, read_config
from llama_smop.training.run import train

pytestmark = pytest.mark.xdist_group("rates")

RATES = [[4, 2], [16, 5]]
CONFIG = {
    "model": {
        "tiny": {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1},
        "projector": {"hidden_features": 16, "num_experts": 2, "top_k": 1},
        "rates": RATES,
        "rate_projectors": "separate",
    },
    "data": {
        "stages": [{"modalities": {"audio": 1, "video": 1, "audiovisual": 1}}],
        "max_clips": 2,
        "buckets": 2,
        "noise": {"snrs": [0, None]},
    },
    "optimizer": {"learning_rate": 1e-3, "steps": 6, "precision": "fp32"},
    "run": {"log_every": 1, "save_every": 3},
}


def configured(root, **model) -> TrainConfig:
    content = json.loads(json.dumps(CONFIG))
    content["model"] |= model
    content["data"]["root"] = str(root)
    return TrainConfig.model_validate(content)


def draws(config: TrainConfig, rank: int = 0, world: int = 1):
    clips = build.training_clips(config, world)
    return list(build.training_plan(config, clips.source, rank, world))


def test_a_rate_is_drawn_for_each_batch_the_same_on_all_ranks(shared_corpus):
    config = configured(shared_corpus)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"steps": 200})})
    batches = draws(config)
    drawn = [{draw.rate for draw in batch} for batch in batches]
    assert all(len(rates) == 1 for rates in drawn), "two rates in a batch"
    counts = Counter(rate for (rate,) in drawn)
    assert counts.keys() == {(4, 2), (16, 5)} and min(counts.values()) > 70, f"not equally often: {counts}"
    for rank in range(2):
        assert [{draw.rate for draw in batch} for batch in draws(config, rank, 2)] == drawn, f"rank {rank}"
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    assert [{draw.rate for draw in batch} for batch in draws(other)] != drawn, "the seed changes nothing"


def test_rates_leave_the_other_draws_as_they_were(shared_corpus):
    one, several = (draws(configured(shared_corpus, rates=rates)) for rates in (None, RATES))
    assert {draw.rate for batch in one for draw in batch} == {None}
    plain = [[(d.index, d.epoch, d.modality, d.noise) for d in batch] for batch in several]
    assert [[(d.index, d.epoch, d.modality, d.noise) for d in batch] for batch in one] == plain


@pytest.fixture(scope="module")
def trained(shared_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("rates") / "run"
    train(configured(shared_corpus), out)
    return out


def test_a_training_that_goes_on_draws_the_same_rates(trained, shared_corpus, tmp_path):
    again = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints/checkpoint-6")
    train(configured(shared_corpus), again)
    logs = [json.loads((out / "metrics.json").read_text()) for out in (trained, again)]
    for log in logs:
        keys = [[k for k in row if k.startswith("lm_loss/")] for row in log if "lm_loss" in row]
        assert all(len(k) == 1 for k in keys) and {k[0] for k in keys} == {"lm_loss/4,2", "lm_loss/16,5"}
    first, second = ([{k: r[k] for k in r if "loss" in k and k != "train_loss"} for r in log] for log in logs)
    assert first == second
    weights = [load_file(out / "model/model.safetensors") for out in (trained, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(".16_5." in name for name in weights[0])


def test_evaluate_scores_every_rate_and_the_report_draws_them(trained, shared_corpus, tmp_path, capsys, pictures):
    run = shutil.copytree(trained, tmp_path / "run")
    command = ["evaluate", "--model", str(run / "model"), "--root", str(shared_corpus), "--modality", "audio"]
    main([*command, "--modality", "audiovisual", "--json", str(run / "evaluation.json")])
    rows = json.loads((run / "evaluation.json").read_text())
    assert [(r["modality"], r["rate"]) for r in rows] == [
        (modality, rate) for modality in ("audio", "audiovisual") for rate in ("4,2", "16,5")
    ]
    printed = capsys.readouterr().out
    assert "| labels | modality | rate | clean |" in printed and "| test | audio | 16,5 |" in printed

    main([*command, "--rate", "16,5", "--json", str(run / "one.json")])
    (one,) = json.loads((run / "one.json").read_text())
    assert one == rows[1], "a rate alone is scored otherwise than among all"

    main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert "rates 4,2 and 16,5 with a projector for each" in page
    assert "<th>rate</th>" in page and "at each compression rate" in page

    main(["card", "--model", str(run / "model"), "--results", str(run / "evaluation.json")])
    assert re.search(r"\| audio \| 16,5 \| clean \|", (run / "model/README.md").read_text())


def test_the_picture_has_a_point_for_each_rate():
    rows = [
        {"modality": modality, "snr": snr, "rate": rate, "wer": 0.5}
        for modality in ("audio", "audiovisual")
        for snr in (None, 0)
        for rate in ("4,2", "16,5")
    ]
    panels = plots.wer_against_tokens(rows).axes
    assert [panel.get_title() for panel in panels] == ["clean", "0 dB"]
    assert [list(line.get_xdata()) for line in panels[0].lines] == [[3.125, 12.5], [8.125, 25.0]]


def test_transcribe_takes_a_rate(trained, shared_corpus, monkeypatch):
    from transformers import pipeline

    from llama_smop.transcription import pieces

    given, real = [], pieces.recognise_batch
    monkeypatch.setattr(pieces, "recognise_batch", lambda *a, **k: given.append(k["rate"]) or real(*a, **k))
    clip = str(next(shared_corpus.rglob("*.mp4")))
    for extra in ([], ["--rate", "16,5"]):
        main(["transcribe", clip, "--model", str(trained / "model"), *extra])
    assert given == [(4, 2), (16, 5)]

    recognise = pipeline("automatic-speech-recognition", model=str(trained / "model"), device="cpu")
    assert recognise(clip, rate="16,5") and recognise(clip)
    assert given[2:] == [(16, 5), (4, 2)]
    with pytest.raises(ValueError, match="the rates of this model are 4,2 and 16,5"):
        recognise(clip, rate="8,2")


@pytest.mark.parametrize("command", ["evaluate", "transcribe"])
def test_an_unknown_rate_is_one_line_that_names_those_there_are(trained, shared_corpus, command):
    clip = str(next(shared_corpus.rglob("*.mp4")))
    arguments = {"evaluate": ["--root", str(shared_corpus)], "transcribe": [clip]}[command]
    for rate, said in (("8,2", "the rates of this model are 4,2 and 16,5"), ("fast", "a rate is frames of audio")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--model", str(trained / "model"), *arguments, "--rate", rate])
        assert said in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_the_estimate_has_a_line_for_each_rate(shared_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llama_smop.estimate.PUBLISHED", ())  # whose estimates take a minute
    (tmp_path / "rates.yaml").write_text(configured(shared_corpus).model_dump_json(exclude_unset=True))
    main(["info", "--config", str(tmp_path / "rates.yaml")])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "this file, rate" in line]
    assert [(line[1].strip(), line[2].strip()) for line in lines] == [
        (f"this file, rate {rate}", step) for rate in ("4,2", "16,5") for step in ("training", "inference, 1 beam")
    ]
    parameters = {line[3] for line in lines}
    assert len(parameters) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rates": [[16, 5], [4, 2]], "rate_audio": 4}, "leave those out"),
        ({"rates": [[4, 2], [4, 2]]}, "must differ"),
        ({"rates": [[4, 0]]}, "rates.0.1"),
        ({"rates": []}, "model.rates"),
        ({"rates": [4, 2]}, "rates.0"),
        ({"rate_projectors": "both"}, "rate_projectors"),
        ({"rates": RATES, "compression": "stack"}, "set rate_projectors separate"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, model, message):
    content = {"model": {"tiny": {}} | model, "data": {"root": "corpus"}, "optimizer": {"steps": 1}}
    (tmp_path / "train.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r".") as error:
        read_config(tmp_path / "train.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_file_has_both_published_rates(shared_corpus):
    parts = ["recipe", "llm/1b", "sharing/dedr", "rates/4-2-and-16-5", "task/avsr"]
    config = read_config(parts, {"data": {"root": str(shared_corpus)}})
    assert config.model.rates == ((4, 2), (16, 5)) and (config.model.rate_audio, config.model.rate_video) == (4, 2)
    assert TrainConfig.model_validate(config.model_dump()) == config, "a file written out is read back otherwise"
