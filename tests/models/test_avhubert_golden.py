"""The video tower against the authors' AV-HuBERT: tiny, full-width front-end, and the true Large."""

import json

import pytest
import torch
from torch import nn
from transformers.initialization import no_init_weights

from llama_smop.models.avhubert import AvHubertVideoEncoder
from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig
from llama_smop.models.formats.fairseq import AVHUBERT_RULES, avhubert_config, load_avhubert
from llama_smop.models.formats.key_map import rename
from llama_smop.models.lora import inject_lora
from tests import golden_weights
from tests.golden_files import GOLDEN, golden
from tests.rounding import TINY_MODEL, assert_same_sums

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def tower():
    settings = json.loads((GOLDEN / "avhubert/state_dict.json").read_text())["model_cfg"]
    tower, report = load_avhubert(GOLDEN / "avhubert/state_dict.safetensors", settings=settings)
    assert not report.missing
    assert not report.unexpected
    return tower


def test_one_clip_matches(tower):
    data, _ = golden("avhubert/single")
    hidden = {}
    tower.post_extract_proj.register_forward_hook(lambda m, i, o: hidden.update(post_extract_proj=o))
    tower.proj.register_forward_hook(lambda m, i, o: hidden.update(proj=o))
    out = tower(data["video"]).last_hidden_state
    assert_same_sums(hidden["proj"], data["h.feature_extractor_video_BxDxT"].transpose(1, 2), TINY_MODEL)
    assert_same_sums(hidden["post_extract_proj"], data["h.post_extract_proj"], TINY_MODEL)
    assert_same_sums(out, data["out"], TINY_MODEL)


def test_a_padded_clip_is_as_alone_and_unmasked_as_the_authors_have_it(tower):
    data, _ = golden("avhubert/batch2_padded")
    lengths = data["lengths"].tolist()
    assert_same_sums(tower(data["video"]).last_hidden_state, data["out"], TINY_MODEL)
    mask = torch.arange(max(lengths))[None] < data["lengths"][:, None]
    noisy = data["video"].clone()
    noisy[1, lengths[1] :] = 7.0  # whatever stands in the padding
    ours = tower(noisy, mask).last_hidden_state
    assert_same_sums(ours[:1], data["out"][:1], TINY_MODEL)
    assert_same_sums(ours[1:, : lengths[1]], data["out_short_clip_alone"], TINY_MODEL)


def test_relu_is_prelu_of_slope_zero(tower):
    for module in tower.modules():
        if isinstance(module, nn.PReLU):
            module.weight.zero_()
    settings = tower.config.to_dict() | {"frontend_activation": "relu"}
    other = AvHubertVideoEncoder(AvHubertVideoConfig.from_dict(settings))
    slopes = tower.state_dict().keys() - other.state_dict().keys()
    assert slopes and all(".act" in name for name in slopes), "relu has other parameters than prelu without its slopes"
    other.load_state_dict({name: value for name, value in tower.state_dict().items() if name not in slopes})
    video = golden("avhubert/single")[0]["video"]
    found, expected = (t.eval()(video).last_hidden_state for t in (other, tower))
    assert_same_sums(found, expected, TINY_MODEL)


def test_lora_matches(tower):
    data, notes = golden("avhubert/single_lora")
    video = golden("avhubert/single")[0]["video"]
    inject_lora(tower, {"r": 2, "alpha": 2 * notes["scaling_lora"]})
    parameters = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    expected = {k: v.shape for k, v in tower.state_dict().items() if "lora_" in k}
    tensors, report = rename(parameters, AVHUBERT_RULES, expected)
    report.check("lora", partial=False)
    tower.load_state_dict(tensors, strict=False)
    assert_same_sums(tower(video).last_hidden_state, data["out"], TINY_MODEL)
    for name, parameter in tower.named_parameters():
        if "lora_A" in name:
            parameter.zero_()
    assert_same_sums(tower(video).last_hidden_state, data["out_zero_down"], TINY_MODEL)


def test_batch_norm_in_training_matches_output_and_moved_statistics(tower):
    data, _ = golden("avhubert/single_bn_train")
    tower.train()
    out = tower(golden("avhubert/single")[0]["video"]).last_hidden_state
    assert_same_sums(out, data["out"], TINY_MODEL)
    buffers = {k.removeprefix("buffer_after."): v for k, v in data.items() if k.startswith("buffer_after.")}
    tensors, _ = rename(buffers, AVHUBERT_RULES, {k: v.shape for k, v in tower.state_dict().items()})
    for name, value in tensors.items():
        assert_same_sums(tower.state_dict()[name], value, TINY_MODEL, name)


@pytest.mark.parametrize("size", ["avhubert_fullwidth_resnet_tiny_transformer", "avhubert_true_large"])
def test_published_sizes_match(size):
    data, notes = golden(f"common/{size}")
    large = json.loads((GOLDEN / "common/avhubert_large_keys.json").read_text())
    shapes = large if size == "avhubert_true_large" else _shrunk(large, notes["model_cfg"])
    left_out = ("feature_extractor_audio", "mask_emb", "label_embs_concat", "final_proj")
    state = {
        key: torch.from_numpy(golden_weights.weight(key, tuple(shape), notes["seed"]))
        for key, shape in shapes.items()
        if not key.startswith(left_out)
    }
    with no_init_weights():
        tower = AvHubertVideoEncoder(avhubert_config(state, notes["model_cfg"])).eval()
    tensors, report = rename(state, AVHUBERT_RULES, {k: v.shape for k, v in tower.state_dict().items()})
    report.check(size, partial=False)
    tower.load_state_dict(tensors, assign=True)
    out = tower(torch.from_numpy(golden_weights.video(notes["T"], notes["seed"]))).last_hidden_state
    additions = 17 * 9 * 256 + notes["model_cfg"]["encoder_layers"] * 8192  # 3×3 convolutions; four products D, one 4·D
    assert_same_sums(out, data["out"], additions)


def _shrunk(shapes, settings):
    """Large's shapes with a narrower, shallower transformer."""
    D, F = settings["encoder_embed_dim"], settings["encoder_ffn_embed_dim"]
    sizes = {1024: D, 4096: F, 2048: 2 * D}
    result = {}
    for key, shape in shapes.items():
        if key.startswith("feature_extractor_video.resnet"):
            result[key] = shape
        elif not (key.startswith("encoder.layers.") and int(key.split(".")[2]) >= settings["encoder_layers"]):
            result[key] = [sizes.get(n, n) for n in shape]
    result["encoder.pos_conv.0.weight_v"] = [D, D // settings["conv_pos_groups"], settings["conv_pos"]]
    return result
