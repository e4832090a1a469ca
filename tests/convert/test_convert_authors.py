"""The authors' checkpoint converted: their embeddings, losses, logits, gradients and transcripts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_smop import LlamaSmopForConditionalGeneration, LlamaSmopProcessor
from llama_smop.convert import convert
from llama_smop.convert.authors import AUTHORS_RULES, convert_authors, dense_rules
from llama_smop.models.formats.key_map import rename
from tests.golden_files import GOLDEN, golden
from tests.published_run import PublishedProcessor
from tests.rounding import TINY_MODEL, assert_same_gradients, assert_same_sums

FULL = GOLDEN / "full_model"
SOURCE = FULL / "state_dict.safetensors"
PARTS = {
    "language_model": str(FULL / "llm_hf"),
    "audio_tower": str(GOLDEN / "whisper/hf_model"),
    "video_tower": FULL / "large_tiny_iter5.pt",
    "lora_scale": 0.25,
}
SPEECH = ("input_features", "audio_mask", "video_values", "video_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    report = convert(SOURCE, folder, **PARTS)
    assert not report.missing
    assert not report.unexpected
    return folder


@pytest.fixture
def model(folder):
    return LlamaSmopForConditionalGeneration.from_pretrained(folder)


def train_batch(folder):
    """Their collated batch, under their padding."""
    data, notes = golden("full_model/train_step")
    processor = PublishedProcessor.from_pretrained(folder)
    return data, processor(
        text=notes["texts"],
        audio=[a[:n] for a, n in zip(data["audio"], data["lengths"].tolist(), strict=True)],
        video=[v[:n] for v, n in zip(data["video"], notes["frames"], strict=True)],
        do_normalize=False,
    )


def test_every_key_is_accounted_for(folder):
    account = json.loads((folder / "conversion.json").read_text())["keys"]
    keys = set(load_file(SOURCE))
    assert set(account["used"]) | set(account["renamed"]) | set(account["left_out"]) == keys
    assert all("video_encoder." in k for k in account["left_out"])
    assert account["renamed"]["audiovisual_proj.experts.2.0.weight"] == "multi_modal_projector.w1[2]"


@pytest.mark.parametrize("skip_logits", (False, True))
def test_embeddings_losses_logits_and_gradients(folder, model, skip_logits):
    data, batch = train_batch(folder)
    speech = model.get_speech_features(**{k: batch[k] for k in SPEECH})
    assert_same_sums(speech.tokens, data["proj_out"], TINY_MODEL)
    assert_same_sums(speech.projection.router_logits.flatten(0, 1), data["router_logits"], TINY_MODEL)
    assert_same_sums(model.place_speech(batch["input_ids"], speech), data["inputs_embeds"], TINY_MODEL)
    assert torch.equal(batch["labels"][:, 1:], data["labels_out"][:, 1:])

    output = model(**batch, skip_logits=skip_logits)
    if skip_logits:
        assert output.logits is None
    else:
        assert_same_sums(output.logits, data["logits"], TINY_MODEL)
    for ours, theirs in (
        (output.lm_loss, "llm_loss"),
        (output.load_balancing_loss, "load_balancing_loss"),
        (output.router_z_loss, "router_z_loss"),
        (output.loss, "total_loss"),
    ):
        assert_same_sums(ours.reshape(1), data[theirs], TINY_MODEL, theirs)

    output.loss.backward()
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    gradients, report = rename(theirs, AUTHORS_RULES, {n: p.shape for n, p in ours.items()})
    report.check("gradients", partial=False)  # so what they train is what we train
    assert_same_gradients({name: ours[name].grad for name in gradients}, gradients, TINY_MODEL)


def test_batch_norm_in_train_mode_as_published(folder, model):
    _, batch = train_batch(folder)
    expected, _ = golden("full_model/train_step_bn_train_mode")
    model.config.tower_batch_norm_train = True
    output = model.train()(**batch)
    for ours, theirs in (
        (output.lm_loss, "llm_loss"),
        (output.load_balancing_loss, "load_balancing_loss"),
        (output.router_z_loss, "router_z_loss"),
    ):
        assert_same_sums(ours.reshape(1), expected[theirs], TINY_MODEL, theirs)


def test_our_padding_moves_only_the_shorter_clip(folder, model):
    """Without the parity switch the shorter clip is as alone, and so differs from the published batch."""
    data, published = train_batch(folder)
    _, notes = golden("full_model/train_step")
    processor = LlamaSmopProcessor.from_pretrained(folder)
    batch = processor(
        text=notes["texts"],
        audio=[a[:n] for a, n in zip(data["audio"], data["lengths"].tolist(), strict=True)],
        video=[v[:n] for v, n in zip(data["video"], notes["frames"], strict=True)],
        do_normalize=False,
    )
    with torch.no_grad():
        ours, theirs = model(**batch).logits, model(**published).logits
    longer = batch["attention_mask"][0].bool()
    assert_same_sums(ours[0][longer], theirs[0][longer], TINY_MODEL)
    assert batch["attention_mask"][1].sum() < published["attention_mask"][1].sum()


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_transcripts(folder, model, beams):
    data, notes = golden("full_model/generate")
    processor = LlamaSmopProcessor.from_pretrained(folder)
    # The 19th frame, cut from their video before it was stored, set the length of the audio.
    video = torch.cat([data["video"][0], torch.zeros(1, 1, 88, 88)])
    batch = processor(audio=[data["audio"][0]], video=[video], do_normalize=False)
    speech = model.get_speech_features(**{k: batch[k] for k in SPEECH})
    assert_same_sums(model.place_speech(batch["input_ids"], speech), data["inputs_embeds"], TINY_MODEL)
    ids = model.generate(**batch, num_beams=beams, max_new_tokens=notes["max_new_tokens"])
    assert ids[:, batch["input_ids"].shape[1] :].tolist() == data[f"generated_beam{beams}"].tolist()


def test_sampling_in_the_base_folder_is_not_inherited(tmp_path):
    base = tmp_path / "llm"
    base.mkdir()
    for file in (FULL / "llm_hf").iterdir():
        if file.name != "model.safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    (base / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "eos_token_id": 1}')
    convert_authors(SOURCE, tmp_path / "model", **PARTS | {"language_model": str(base)})
    model = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.generation_config.do_sample is False


def test_disjoint_experts_by_a_key_map(tmp_path):
    """JEDR's and DEDR's names are not published: a user's table names them."""
    state = load_file(SOURCE)
    for key in [k for k in state if k.startswith("audiovisual_proj.")]:
        value = state.pop(key)
        state[key.replace("audiovisual_proj", "a_mix")] = value
        state[key.replace("audiovisual_proj", "v_mix")] = value + 1
    save_file(state, tmp_path / "dedr.safetensors")
    with pytest.raises(ValueError, match="name its keys in a key map"):
        convert_authors(tmp_path / "dedr.safetensors", tmp_path / "model", **PARTS)
    names = {"0": ("w1", "bias1"), "2": ("w2", "b2"), "3": ("layernorm_weight", "ln_bias")}  # earlier names too
    rules = []
    for prefix, router, shift in (("a_mix", 0, ""), ("v_mix", 1, "+4")):
        rules.append({"pattern": rf"{prefix}\.gate\.weight", "target": f"multi_modal_projector.gate_weight[{router}]"})
        for layer, pair in names.items():
            for leaf, name in zip(("weight", "bias"), pair, strict=True):
                pattern = rf"{prefix}\.experts\.(\d+)\.{layer}\.{leaf}"
                rules.append({"pattern": pattern, "target": rf"multi_modal_projector.{name}[\1{shift}]"})
    (tmp_path / "map.yaml").write_text(json.dumps(rules))
    convert_authors(tmp_path / "dedr.safetensors", tmp_path / "model", key_map=tmp_path / "map.yaml", **PARTS)
    model = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config.projector_config.sharing == "DEDR"
    w1 = model.multi_modal_projector.w1
    assert torch.equal(w1[:4] + 1, w1[4:])
    assert torch.equal(w1[2], load_file(SOURCE)["audiovisual_proj.experts.2.0.weight"])


@pytest.mark.parametrize("compression", ["pool", "stack"])
def test_llama_avsr_dense_projectors(tmp_path, compression):
    """Llama-AVSR: one MLP a modality; stacked tokens of two widths become one product, and give the same result."""
    state = {k: v for k, v in load_file(SOURCE).items() if not k.startswith("audiovisual_proj.")}
    torch.manual_seed(0)
    mlps = {}
    for m, rate in (("audio", 4), ("video", 2)):
        D = 32 * (rate if compression == "stack" else 1)
        mlps[m] = torch.nn.Sequential(torch.nn.Linear(D, 40), torch.nn.ReLU(), torch.nn.Linear(40, 64))
        state |= {f"{m}_proj.{k}": v.detach() for k, v in mlps[m].state_dict().items()}
    save_file(state, tmp_path / "avsr.safetensors")
    convert_authors(tmp_path / "avsr.safetensors", tmp_path / "model", compression=compression, **PARTS)
    model = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config.projector_config.kind == "dense"
    data, _ = golden("full_model/train_step")
    _, batch = train_batch(tmp_path / "model")
    with torch.no_grad():
        speech = model.get_speech_features(**{k: batch[k] for k in SPEECH})
        for m, start in (("audio", 0), ("video", speech.audio_tokens)):
            rate = getattr(model.config, f"rate_{m}")
            x, _ = model.compress(speech.states[m], speech.state_masks[m], rate)
            tokens = speech.tokens[:, start : start + x.shape[1]]
            assert_same_sums(tokens, mlps[m](x), TINY_MODEL, m)
    if compression == "pool":
        assert data["audio_features"].shape[1] == speech.audio_tokens
        with pytest.raises(ValueError, match=r"takes tokens of width 32 .* the towers make .*128"):
            convert_authors(tmp_path / "avsr.safetensors", tmp_path / "other", compression="stack", **PARTS)


def test_one_modality_alone(tmp_path):
    state = {k: v for k, v in load_file(SOURCE).items() if not k.startswith(("audiovisual_proj.", "audio_encoder."))}
    mlp = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.ReLU(), torch.nn.Linear(40, 64))
    state |= {f"video_proj.{k}": v.detach() for k, v in mlp.state_dict().items()}
    save_file(state, tmp_path / "vsr.safetensors")
    parts = {k: v for k, v in PARTS.items() if k != "audio_tower"}
    convert_authors(tmp_path / "vsr.safetensors", tmp_path / "model", **parts)
    model = LlamaSmopForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config.modalities == ["video"]
    assert torch.equal(model.multi_modal_projector.w1[0], mlp[0].weight)


def test_the_published_1b_has_a_place_for_every_key():
    """Names and shapes of the full-size release, on the meta device."""
    from llama_smop.convert.authors import _projector_config
    from llama_smop.models.configuration_llama_smop import LlamaSmopConfig
    from llama_smop.models.formats.fairseq import avhubert_config

    shapes = json.loads((GOLDEN / "common/avsr_llms_smop_1B_keys.json").read_text())
    state = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    video = {k.removeprefix("video_encoder."): v for k, v in state.items() if k.startswith("video_encoder.")}
    rules = [*dense_rules(["audio", "video"]), *AUTHORS_RULES]
    config = LlamaSmopConfig(
        video_config=avhubert_config(video),
        projector_config=_projector_config(state, rules, 2, "auto", "1B"),
        lora={"language_model": {"r": 64, "alpha": 8}},
    )
    with torch.device("meta"):
        model = LlamaSmopForConditionalGeneration(config)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    with torch.device("meta"):
        _, report = rename(state, rules, expected)
    assert report.missing == []
    assert report.unexpected == []


def _without(tmp_path, *keys, **added):
    state = {k: v for k, v in load_file(SOURCE).items() if k not in keys} | added
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_a_partial_load_is_refused_unless_told(tmp_path):
    source = _without(tmp_path, "llm.model.norm.weight", strange=torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"1 missing \(language_model.model.norm.weight\) and 1 unexpected \(strange\)"
    ):
        convert_authors(source, tmp_path / "model", **PARTS)
    assert not (tmp_path / "model").exists()
    report = convert_authors(source, tmp_path / "model", partial=True, **PARTS)
    assert (report.missing, report.unexpected) == (["language_model.model.norm.weight"], ["strange"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_tower": None}, "say which Whisper"),
        ({"compression": "stack"}, "must be of one width, got 128 and 64"),
        ({"language_model": str(GOLDEN / "whisper/hf_model")}, "whisper/hf_model"),
        ({"language_model": "nobody/no-such-model"}, "nobody/no-such-model: no such folder, not in the cache"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message) as error:
        convert_authors(SOURCE, tmp_path / "model", **PARTS | settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
