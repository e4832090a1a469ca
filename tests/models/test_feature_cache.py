"""Tower features on disk: computed once, the same as without, never stale, never half-written."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_smop import LlamaSmopForConditionalGeneration
from llama_smop.models.feature_cache import FeatureCache, tower_hash
from llama_smop.models.tiny import build_tiny
from tests.models.conftest import WORDS, clip
from tests.rounding import TINY_MODEL, assert_same_sums

CLIPS = {"one": clip(20, 1), "two": clip(31, 2)}
BOTH = ("audio", "video")


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    model, processor = build_tiny(WORDS, max_seconds=2.0, width=32)
    config = type(model.config)(**model.config.to_dict() | {"freeze_towers": True})
    return LlamaSmopForConditionalGeneration(config).eval(), processor


def fill(cache, processor, modalities=BOTH, calls=None):
    states = {m: [] for m in modalities}
    for name, streams in CLIPS.items():

        def load(name=name, streams=streams):
            if calls is not None:
                calls.append(name)
            return streams

        for modality, frames in cache.states(name, modalities, load, processor).items():
            states[modality].append(frames)
    return {f"{m}_states": v for m, v in states.items()}


@torch.no_grad()
@pytest.mark.parametrize("modalities", [("audio",), ("video",), BOTH])
def test_the_model_sees_the_same_and_clips_are_loaded_once(frozen, tmp_path, modalities):
    model, processor = frozen
    text = ["set red", "bin blue at"]
    streams = {m: [c[("audio", "video").index(m)] for c in CLIPS.values()] for m in modalities}
    expected = model(**processor(text=text, **streams)).logits
    calls = []
    for _ in range(2):
        cache = FeatureCache(tmp_path, model, "centre crop")
        batch = processor(text=text, **fill(cache, processor, modalities, calls))
        assert_same_sums(model(**batch).logits, expected, TINY_MODEL, "the logits")
    assert calls == ["one", "two"]


def test_another_tower_or_transform_has_other_files(frozen, tmp_path):
    model, processor = frozen
    fill(FeatureCache(tmp_path, model, "a"), processor)
    files = set(tmp_path.rglob("*.safetensors"))
    before = tower_hash(model.audio_tower)
    fill(FeatureCache(tmp_path, model, "b"), processor)
    assert len(set(tmp_path.rglob("*.safetensors"))) == 2 * len(files)
    with torch.no_grad():
        model.audio_tower.layer_norm.bias[0] += 1
    try:
        assert tower_hash(model.audio_tower) != before
        calls = []
        fill(FeatureCache(tmp_path, model, "a"), processor, calls=calls)
        assert calls == ["one", "two"]
    finally:
        with torch.no_grad():
            model.audio_tower.layer_norm.bias[0] -= 1


def test_damaged_files_are_made_again(frozen, tmp_path):
    model, processor = frozen
    cache = FeatureCache(tmp_path, model, "a")
    expected = fill(cache, processor)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    again = fill(cache, processor)
    assert all(torch.equal(a, b) for k in expected for a, b in zip(expected[k], again[k], strict=True))
    assert all(file.stat().st_size > 50 for file in tmp_path.rglob("*.safetensors"))


def test_several_workers_share_a_folder(frozen, tmp_path):
    model, processor = frozen
    expected = fill(FeatureCache(tmp_path / "alone", model, "a"), processor)

    def work(_):
        return fill(FeatureCache(tmp_path / "shared", model, "a"), processor)

    with ThreadPoolExecutor(4) as pool:
        for states in pool.map(work, range(8)):
            assert all(torch.equal(a, b) for k in expected for a, b in zip(expected[k], states[k], strict=True))
    assert len(list((tmp_path / "shared").rglob("*.safetensors"))) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_trained_tower_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="tower is trained"):
        FeatureCache(tmp_path, model, "a")
