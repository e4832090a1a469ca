"""`evaluate --degrade`: a row a picture, beside noise; drawn as curves."""

import json

import matplotlib.pyplot as plt
import pytest
import torch

from llama_smop.cli import main
from llama_smop.data.degrade import Degradation
from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.data.noise import Noise
from llama_smop.data.sources import FolderClips
from llama_smop.evaluation.run import Row, table
from llama_smop.models import model_folder
from llama_smop.models.tiny import build_tiny
from llama_smop.reports import plots
from llama_smop.reports.html import wer_table

SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 5.0}


def test_a_degraded_clip_is_the_same_in_any_order_and_keeps_its_noise(shared_corpus):
    noise = Noise(FolderClips(shared_corpus, "train.csv").babble, (0,))
    plain, worse, again = (
        Lrs3Dataset(shared_corpus, "test.csv", noise=noise, degradation=degradation)
        for degradation in (None, Degradation.parse("drop:0.5"), Degradation.parse("drop:0.5"))
    )
    first = worse[0]
    again[1]
    assert torch.equal(first["video"], again[0]["video"])
    assert (first["audio"] == plain[0]["audio"]).all(), "the noise depends on the picture"
    changed = (first["video"] != plain[0]["video"]).flatten(1).any(dim=1)
    assert int(changed.sum()) == round(0.5 * len(changed))
    assert Lrs3Dataset(shared_corpus, "test.csv", "audio", degradation=Degradation("blur", 3))[0]["video"] is None


def test_every_picture_has_its_row_in_the_table_and_the_json(shared_corpus, tmp_path, capsys):
    torch.manual_seed(0)
    words = sorted({word for clip in Lrs3Dataset(shared_corpus, "test.csv").clips for word in clip.text.split()})
    model = model_folder.save(*build_tiny(words, **SIZES), tmp_path / "model")
    scores = tmp_path / "scores.json"
    asked = [word for text in ("none", "blur:3", "fps:10", "blur:3") for word in ("--degrade", text)]
    main(["evaluate", "--model", str(model), "--root", str(shared_corpus), *asked, "--snr", "0", "--json", str(scores)])
    rows = json.loads(scores.read_text())
    pictures = [None, "blur:3", "fps:10"]
    assert [(r["modality"], r["snr"], r["degradation"]) for r in rows] == [
        ("audio", 0, None),
        *(("video", None, picture) for picture in pictures),
        *(("audiovisual", 0, picture) for picture in pictures),
    ]
    printed = capsys.readouterr().out
    assert "| labels | modality | picture | clean | 0 dB |" in printed
    assert "| test | video | blur:3 |" in printed


def test_a_wrong_degradation_is_one_line_before_anything_is_loaded(tmp_path):
    command = ["evaluate", "--model", str(tmp_path / "none"), "--root", str(tmp_path)]
    with pytest.raises(SystemExit, match="expected a degradation of blur, occlude, drop, jitter, fps, as in blur:3"):
        main([*command, "--degrade", "fog:3"])
    with pytest.raises(SystemExit, match="drop takes a share of the frames, from 0 to 1, got 20"):
        main([*command, "--degrade", "drop:20"])


def rows(*conditions):
    return [Row("test", m, snr, 4, 24, 6, 0, 0, wer, worse) for m, snr, worse, wer in conditions]


def as_dicts(found):
    return [row.__dict__ for row in found]


def test_curves_begin_at_the_picture_as_it_is():
    found = as_dicts(
        rows(
            ("audio", 0, None, 0.5),
            ("video", None, None, 0.2),
            ("video", None, "blur:6", 0.8),
            ("video", None, "blur:2", 0.4),
            ("video", None, "fps:10", 0.3),
            ("audiovisual", 0, None, 0.1),
            ("audiovisual", 0, "blur:2", 0.2),
        )
    )
    figure = plots.wer_against_degradation(found)
    blur, slow = figure.axes
    curves = {line.get_label(): [(x, round(y)) for x, y in zip(*line.get_data(), strict=True)] for line in blur.lines}
    assert curves["video"] == [(0, 20), (2, 40), (6, 80)]
    assert curves["audio + video, 0 dB"] == [(0, 10), (2, 20)]
    assert [y for _, y in curves["audio, 0 dB"]] == [50, 50]
    assert list(slow.lines[1].get_xdata()) == [10, 25] and slow.xaxis_inverted()
    assert "blur: a standard deviation in pixels" in blur.get_xlabel()
    undegraded = plots.wer_against_snr(found).axes[0]
    assert [round(y) for y in undegraded.lines[1].get_ydata()] == [20, 20], "degraded rows are in no curve of noise"
    plt.close("all")


def test_tables_without_degradations_are_as_they_were():
    found = rows(("audio", None, None, 0.5))
    assert table(found).splitlines()[0] == "| labels | modality | clean |"
    assert "picture" not in wer_table(as_dicts(found), {})
    page = wer_table(as_dicts(rows(("video", None, "blur:2", 0.5), ("video", None, None, 0.4))), {})
    assert "<th>picture</th>" in page and "<td>blur:2</td>" in page and "<td>as it is</td>" in page
