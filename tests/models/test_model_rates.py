"""A model for several compression rates: at each it is the model for that one."""

import json
import shutil

import pytest
import torch

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models import model_folder, seal
from llama_smop.models.card_records import add_results, read_results
from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
from llama_smop.models.decoding import recognise_batch
from llama_smop.models.rates import tokens_a_second
from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, chosen, clip

RATES = [[4, 2], [16, 5]]
SIZES = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "hidden_features": 16, "max_seconds": 1.5}
CLIPS = [clip(20, 1), clip(25, 2)]
TEXTS = ["bin blue", "set red at"]
FORMS = [("shared", "pool", "smop"), ("separate", "pool", "dense"), ("separate", "stack", "smop")]


def build(**settings):
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, **SIZES | settings)
    return model.eval(), processor


def for_one(model, rate):
    """A model and a processor for one rate alone, with the weights that the model for several has for it."""
    audio, video = rate
    config = model.config.to_dict() | {"rates": None, "rate_audio": audio, "rate_video": video}
    alone = LlamaSmopForConditionalGeneration(LlamaSmopConfig(**config))
    own = {f"multi_modal_projector.{audio}_{video}.": "multi_modal_projector."}
    own |= {f"ctc_heads.{name}_{number}.": f"ctc_heads.{name}." for name, number in zip(("audio", "video"), rate)}  # noqa: B905
    state = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in own if name.startswith(prefix)), "")
        state[own.get(prefix, "") + name.removeprefix(prefix)] = value
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    return alone.eval()


@pytest.mark.parametrize(("projectors", "compression", "kind"), FORMS)
@pytest.mark.parametrize("modality", ["audio", "audiovisual"])
def test_at_each_rate_it_is_the_model_for_that_rate(projectors, compression, kind, modality):
    model, processor = build(rates=RATES, rate_projectors=projectors, compression=compression, kind=kind)
    lengths = set()
    for rate in ((4, 2), (16, 5)):
        alone = for_one(model, rate)
        sizes = {"rate_audio": rate[0], "rate_video": rate[1]}
        batch = build(**sizes)[1](text=TEXTS, **chosen(CLIPS, modality))
        ours = processor(text=TEXTS, rate=rate, **chosen(CLIPS, modality))
        assert ours.pop("rate") == rate and ours.keys() == batch.keys()
        for name, value in batch.items():
            assert torch.equal(ours[name], value), f"{name} of rate {rate}"
        expected, found = alone(**batch), model(**ours, rate=rate)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        lengths.add(batch["input_ids"].shape[1])
    assert len(lengths) == 2, "both rates give as many tokens"


@pytest.mark.parametrize("projectors", ["shared", "separate"])
def test_the_first_rate_is_the_default_also_when_loaded_again(tmp_path, projectors):
    model, processor = build(rates=[[16, 5], [4, 2]], rate_projectors=projectors)
    assert (model.config.rate_audio, model.config.rate_video) == (16, 5)
    loaded, again = model_folder.load(model_folder.save(model, processor, tmp_path / "model"), "cpu")
    streams = chosen(CLIPS, "audiovisual")
    texts = {}
    for rate in (None, "16,5", (4, 2)):
        texts[rate], speech = recognise_batch(model, processor, rate=rate, max_new_tokens=4, **streams)
        assert speech.rate == (rate if rate == (4, 2) else (16, 5))
        read = again(rate=rate, do_normalize=False, **streams)  # the batch says its rate, and generate follows it
        generated = loaded.generate(**read, max_new_tokens=4)
        assert again.decode_new(generated, read["input_ids"].shape[1]) == texts[rate]
    assert texts[None] == texts["16,5"]


def test_only_the_projector_of_the_rate_learns():
    model, processor = build(rates=RATES, rate_projectors="separate")
    model(**processor(text=TEXTS, rate="16,5", **chosen(CLIPS, "audiovisual"))).loss.backward()
    learns = {
        rate: all(p.grad is not None for p in model.projector_at(rate).parameters()) for rate in ((4, 2), (16, 5))
    }
    assert learns == {(4, 2): False, (16, 5): True}


@pytest.mark.parametrize("rate", ["8,4", (16, 2), [4], 16])
def test_an_unknown_rate_is_refused_with_those_there_are(rate):
    model, processor = build(rates=RATES)
    batch = processor(text=TEXTS, **chosen(CLIPS, "audio"))
    calls = (
        lambda: processor(rate=rate, **chosen(CLIPS, "audio")),
        lambda: model(**batch | {"rate": rate}),
        lambda: model.generate(**batch | {"rate": rate}),
        lambda: recognise_batch(model, processor, rate=rate, **chosen(CLIPS, "audio")),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^the rates of this model are 4,2 and 16,5 .* got [^\n]*$"):
            call()


def test_a_rate_that_cannot_be_one_is_refused(pair):
    model, processor = pair
    for text in ("16", "16,5,1", "a,b", "-4,2", "４,2", "9" * 99 + ",1"):
        with pytest.raises(ValueError, match="a rate is frames of audio, of video in a token, such as 16,5"):
            processor(rate=text, **chosen(CLIPS, "audio"))
    with pytest.raises(ValueError, match="the only rate of this model is 4,2"):
        model.config.rate("16,5")
    assert model.config.rate("4,2") == (4, 2)


def test_a_batch_of_another_rate_than_the_models_is_refused():
    model, processor = build(rates=RATES)
    batch = dict(processor(text=TEXTS, rate=(16, 5), **chosen(CLIPS, "audio")))
    del batch["rate"]
    with pytest.raises(ValueError, match="and at one rate"):
        model(**batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": []}, "rates must be a list of 1 to 32 different pairs"),
        ({"rates": [[4, 2], [4, 2]]}, "different pairs"),
        ({"rates": [[4, 2], [16]]}, "pairs (audio, video)"),
        ({"rates": [[4, 2], [0, 5]]}, "whole numbers from 1 to 1000"),
        ({"rates": [[4, 2], [True, 5]]}, "whole numbers"),
        ({"rates": "4,2"}, "must be a list"),
        ({"rates": {"4": 2}}, "must be a list"),
        ({"rates": [[n, n] for n in range(1, 40)]}, "1 to 32"),
        ({"rates": [[4, 2], [16, 5]], "rate_audio": 8}, "leave rate_audio and rate_video out"),
        ({"rates": RATES, "rate_projectors": "one"}, "one of shared, separate"),
        ({"rates": RATES, "compression": "stack"}, "use compression 'pool' or rate_projectors 'separate'"),
        (
            {"rates": RATES, "compression": "stack", "rate_projectors": "separate", "sharing": "JEJR"},
            "JEJR shares its experts",
        ),
    ],
    ids=str,
)
def test_rates_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=r".") as error:
        build(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_rate_is_the_model_for_one_rate():
    model, processor = build(rates=[[16, 5]], rate_projectors="separate")
    plain, _ = build(rate_audio=16, rate_video=5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.rates is None and model.config.known_rates == ((16, 5),)
    assert "rate" not in processor(text=TEXTS, **chosen(CLIPS, "audio"))


def test_a_folder_of_an_earlier_version_loads_unchanged(tmp_path):
    model, processor = build()
    folder = model_folder.save(model, processor, tmp_path / "model")
    for name in ("config.json", "processor_config.json"):
        written = json.loads((folder / name).read_text())
        for key in ("rates", "rate_projectors"):
            written.pop(key, None)
        (folder / name).write_text(json.dumps(written))
    (folder / seal.SEAL).unlink()
    loaded, again = model_folder.load(folder, "cpu")
    batch = again(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return model_folder.save(*build(rates=RATES, rate_projectors="separate"), folder)


def test_the_card_has_the_rates_and_a_line_for_each_result(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    text = (folder / seal.CARD).read_text()
    assert "one for each rate" in text and "the first is the default): 4,2 and 16,5." in text
    model, _ = model_folder.load(folder, "cpu")
    whole = sum(p.numel() for p in model.parameters())
    active = int(text.split("Active for a token: ")[1].split(" ")[0].replace(",", ""))
    other = sum(p.numel() for p in model.projector_at((16, 5)).parameters())
    assert active < whole - other, "the projector of the other rate counts as at work"

    row = {"labels": "test", "modality": "audio", "snr": None, "noise": None, "beams": 1, "clips": 3, "words": 40}
    row |= {"substitutions": 3, "deletions": 1, "insertions": 1, "corpus": "lrs3"}
    row |= {"model_sha256": seal.fingerprint(folder)}
    add_results(folder, [row | {"rate": rate} for rate in ("4,2", "16,5")], "results.json")
    assert [r["rate"] for r in read_results(folder)] == ["4,2", "16,5"]
    model_folder.describe(LlamaSmopForConditionalGeneration, folder, "model")
    card = (folder / seal.CARD).read_text()
    assert "| lrs3 | test | audio | 16,5 | clean |" in card and "audio, clean, rate 16,5" in card
    add_results(folder, [row], "results.json")  # of a version without rates
    assert [r["rate"] for r in read_results(folder)] == ["4,2", "16,5", None]
    for wrong in ("8", 3, "4,2,1", "04,2", "| x"):
        with pytest.raises(ValueError, match="a row whose rate is"):
            add_results(folder, [row | {"rate": wrong}], "results.json")


def test_tokens_a_second():
    assert [tokens_a_second((16, 5), modality) for modality in ("audio", "video", "audiovisual")] == [3.125, 5, 8.125]
